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


def check_picture(file: str | None) -> None:
    """Raise InputError if --plot cannot draw to ``file``."""
    from nf.errors import shown

    if file is not None and not file.endswith(".svg"):
        raise InputError("--plot", f"must name a file that ends in .svg, not {shown(file)}")
    check_writable("--plot", file)
