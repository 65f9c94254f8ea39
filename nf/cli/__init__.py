"""The command line, ``nf``; one file per command."""

from nf.cli.main import main

__all__ = ["main"]
