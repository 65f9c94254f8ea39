"""Where and when something was measured, as every benchmark's record says it. Needs no GPU library."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_ARCHIVED = "$Format:%h$"  # `git archive` writes the commit here, see .gitattributes


def environment() -> dict[str, Any]:
    """Date, commit, versions, CPU, GPUs and driver."""
    from nf.bench.card import driver_version
    from nf.machine import machine

    found = machine()
    found["versions"] = {name: version for name, version in found["versions"].items() if version}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, "commit": commit(), **found, "driver": driver_version()}


def commit() -> str | None:
    """Of the code that runs: of its checkout, with "-dirty" if files differ from it, of the archive it was unpacked
    from, or of the repository that pip installed it from; None if it is none of these.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        # A checkout around an installed package or a snapshot is not its own: this file must be one of git's.
        subprocess.run([*git, "ls-files", "--error-unmatch", Path(__file__).name], capture_output=True, check=True)
        done = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return _installed_from() if _ARCHIVED.startswith("$") else _ARCHIVED


def _installed_from() -> str | None:
    """The commit that pip notes when it installs from a repository (PEP 610)."""
    try:
        told = json.loads(metadata.distribution("nf").read_text("direct_url.json") or "{}")
        return str(told["vcs_info"]["commit_id"])
    except (metadata.PackageNotFoundError, ValueError, KeyError):
        return None


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON, which has no NaN: null stands for it."""
    path.write_text(json.dumps(finite(record), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """The value with None for every number that is NaN or infinite, however deep."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
