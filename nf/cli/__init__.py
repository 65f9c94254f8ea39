"""The command line: ``nf generate``, ``nf plan``, ``nf info``."""

from nf.cli.main import main

__all__ = ["main"]
