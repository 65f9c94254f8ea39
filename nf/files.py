"""Files that others may be reading, and the folders they are in."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from nf.errors import InputError


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a file so that readers see the old one or the new one, never a part; text is UTF-8.

    Raises:
        OSError: it cannot be written, and names it; nothing is left then.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data.encode() if isinstance(data, str) else data)
        part.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def make_folder(field: str, folder: str | os.PathLike[str]) -> Path:
    """The folder, made if it is not there.

    Raises:
        InputError: it cannot be made, or nothing can be written in it.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(field, f"{path} cannot be a folder: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise InputError(field, f"{path} cannot be written in: permission denied")
    return path
