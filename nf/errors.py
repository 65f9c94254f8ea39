"""Every error a user can meet. Messages are one sentence that names the field or the file."""

from __future__ import annotations

MAX_SHOWN = 60
"""Most characters of a user's value that an error repeats."""


class NfError(Exception):
    """Base of all errors raised on purpose by nf."""


class InputError(NfError, ValueError):
    """A value given by the user is not acceptable; nothing was started.

    ``field`` names the parameter, prompt position or file at fault.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class ModelError(InputError):
    """A model directory, one of its files or a tensor in it cannot be used; ``field`` is its path or name."""


class PlanError(InputError):
    """A pipeline plan is not valid for the operations it should run; ``field`` is the part of the plan."""


class EngineError(NfError, RuntimeError):
    """The engine cannot go on: the executor failed or the engine is closed. ``__cause__`` holds the reason."""


def shown(value: object) -> str:
    """A value as an error may show it: its repr, but short, and there is one for every value."""
    try:
        text = repr(value)
    except Exception:  # integers of thousands of digits have none, nor do objects with a bug
        return f"<{type(value).__name__} that cannot be shown>"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"
