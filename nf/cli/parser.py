"""CommandParser: argparse with one-sentence errors, and help laid out for people."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
from collections.abc import Sequence
from typing import Any, NoReturn

_MAX_WIDTH = 100
_HELP_COLUMN = 30


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps examples as written, and names a value once per option rather than once per spelling of it."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, _MAX_WIDTH) - 2
        super().__init__(prog, max_help_position=_HELP_COLUMN, width=width)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return ", ".join(action.option_strings) + f" {value}"

    def _format_action(self, action: argparse.Action) -> str:
        """The list of commands, without a line for the word COMMAND."""
        if isinstance(action, argparse._SubParsersAction):
            return "".join(map(self._format_action, action._get_subactions()))
        return super()._format_action(action)


class CommandParser(argparse.ArgumentParser):
    """Errors are one sentence on stderr and exit code 2; options are never guessed from a prefix."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **kwargs)
        self._positionals.title = "arguments"

    def error(self, message: str) -> NoReturn:
        end = "" if message.endswith("?") else f"; see {self.prog} --help"
        self.exit(2, f"{self.prog}: {_tidy(message)}{end}\n")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """As parse_args, but an unknown option is answered with the nearest ones of its own command."""
        parsed, unknown = self.parse_known_args(argv)
        if unknown:
            command = self._command(parsed)
            command.error(f"{unknown[0]}: unknown {_kind(unknown[0])}{command.suggest(unknown[0])}")
        return parsed

    def suggest(self, option: str) -> str:
        """ "; did you mean …?" for a misspelt option, or nothing."""
        known = [o for action in self._actions for o in action.option_strings if o.startswith("--")]
        near = difflib.get_close_matches(option.split("=")[0], known, n=2, cutoff=0.75)
        return f"; did you mean {' or '.join(near)}?" if near else ""

    def _command(self, parsed: argparse.Namespace) -> CommandParser:
        """The innermost command that was named."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found = action.choices.get(getattr(parsed, action.dest, None) or "")
                if isinstance(found, CommandParser):
                    return found._command(parsed)
        return self


def add_common_options(parser: argparse.ArgumentParser) -> None:
    """Options every command takes, before or after the command's name."""
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )


def _kind(word: str) -> str:
    return "option" if word.startswith("-") else "argument"


def _tidy(message: str) -> str:
    """argparse's `argument --x: invalid …` in this project's form: the field, then the sentence."""
    message = re.sub(r"^argument ([^:]+): ", lambda m: m[1].split("/")[-1].strip() + ": ", message)
    message = re.sub(r"invalid int value: (.*)$", r"must be an integer, not \1", message)
    return re.sub(r"invalid float value: (.*)$", r"must be a number, not \1", message)
