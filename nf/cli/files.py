"""Files that results go to, checked before any work is done for them."""

from __future__ import annotations

import os
from pathlib import Path

from nf.errors import InputError


def check_writable(flag: str, file: str | os.PathLike[str] | None) -> None:
    """Raise InputError if ``file`` could not be written; None is no file."""
    if file is None:
        return
    path = Path(file)
    folder = path.absolute().parent
    if path.is_dir():
        raise InputError(flag, f"{path} cannot be written: it is a folder")
    if not folder.is_dir():
        raise InputError(flag, f"{path} cannot be written: there is no folder {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise InputError(flag, f"{path} cannot be written: permission denied")


def make_folder(flag: str, folder: str | os.PathLike[str]) -> Path:
    """The folder, made if it is not there.

    Raises:
        InputError: it cannot be made, or nothing can be written in it.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(flag, f"{path} cannot be a folder: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise InputError(flag, f"{path} cannot be written in: permission denied")
    return path


def check_picture(file: str | None) -> None:
    """Raise InputError if --plot cannot draw to ``file``."""
    from nf.errors import shown

    if file is not None and not file.endswith(".svg"):
        raise InputError("--plot", f"must name a file that ends in .svg, not {shown(file)}")
    check_writable("--plot", file)
