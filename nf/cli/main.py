"""From argv to an exit code: 0 ok, 1 failed work, 2 usage, 128 + n stopped by signal n.

Results go to stdout, everything else to stderr. An error is one sentence; ``--debug`` adds the traceback. Modules
that take long to import are imported by the commands when they run, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType

from nf import __version__
from nf.cli import bench, compile, generate, info, plan
from nf.cli.parser import CommandParser, add_common_options
from nf.errors import InputError, NfError

OK, FAILED, USAGE = 0, 1, 2

_COMMANDS: dict[str, ModuleType] = {
    "generate": generate,
    "plan": plan,
    "compile": compile,
    "bench": bench,
    "info": info,
}

_EPILOG = """\
examples:
  nf generate -p "def read_lines(path):"        stream text from the bundled model
  nf generate ./llama -p "Hello" --max-tokens 64
  nf generate ./llama --prompts-file prompts.jsonl --output results.jsonl
  nf bench throughput                           tokens per second of the bundled model
  nf plan show nano-batch                       what runs when, and on which stream
  nf plan estimate llama-3-8b --gpu h200        what bounds a model on a machine
  nf compile --arch sm_90a --out kernels-h200   the GPU kernels as a bundle, made on any machine
  nf info                                       versions, devices, what would be used and why

`nf COMMAND --help` tells all about one command.
Exit codes: 0 ok, 1 failed work, 2 usage, 128 + n stopped by signal n.
"""


def build_parser() -> CommandParser:
    """The whole parser; cheap, imports nothing but argparse and the command modules' heads."""
    parser = CommandParser(prog="nf", description="LLM inference at high throughput.", epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"nf {__version__}", help="print the version and exit")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for module in _COMMANDS.values():
        module.add_parser(subparsers)
    for subparser in subparsers.choices.values():
        add_common_options(subparser)
    add_common_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; options that cannot be parsed exit with 2 at once."""
    args = build_parser().parse(sys.argv[1:] if argv is None else argv)
    if args.command is None:
        build_parser().print_help(sys.stderr)
        return USAGE
    _prepare_streams()
    try:
        code: int = _COMMANDS[args.command].run(args)
        return code
    except KeyboardInterrupt:
        print("nf: stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        _discard_stdout()
        return 128 + signal.SIGPIPE  # what every tool cut off by `| head` ends with
    except Exception as error:
        if getattr(args, "debug", False):
            import traceback

            traceback.print_exc()
        print(f"{_name(args)}: {_sentence(error)}", file=sys.stderr)
        return USAGE if isinstance(error, InputError) else FAILED


def _name(args: argparse.Namespace) -> str:
    """The command as it was called: "nf plan search"."""
    words = ("nf", args.command, getattr(args, f"{args.command}_command", None))
    return " ".join(word for word in words if word)


def _sentence(error: Exception) -> str:
    if isinstance(error, NfError):
        return str(error)
    if isinstance(error, MemoryError):
        return "out of memory; a smaller --max-model-len or --max-num-seqs needs less"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"unexpected {type(error).__name__}: {error} (--debug shows where)"


def _prepare_streams() -> None:
    """Text a terminal cannot show becomes `?` instead of an error; warnings become one line; closed is /dev/null."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    warnings.formatwarning = lambda message, *_args, **_kwargs: f"nf: warning: {message}\n"
    logging.getLogger("nf").addHandler(_WARNINGS)  # once, however often main is called


class _Warnings(logging.Handler):
    """Shows what the engine warns of; what is worse ends the command, which tells it itself."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno == logging.WARNING:
            print(f"nf: warning: {record.getMessage()}", file=sys.stderr)


_WARNINGS = _Warnings()


def _discard_stdout() -> None:
    """Point stdout at /dev/null, so that Python's own flush at exit does not meet the closed pipe again."""
    with suppress(OSError, ValueError):  # stdout is no file (a test's buffer)
        stdout = sys.stdout.fileno()
        os.dup2(os.open(os.devnull, os.O_WRONLY), stdout)
