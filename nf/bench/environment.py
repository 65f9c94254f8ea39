"""Where and when something was measured, as every benchmark's record says it. Needs no GPU library."""

from __future__ import annotations

import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Date, commit, versions, CPU, GPUs and driver."""
    from nf.bench.card import driver_version
    from nf.cli.info import collect

    found = collect()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": {name: version for name, version in found["versions"].items() if version},
        "platform": found["platform"],
        "cpu": found["cpu"],
        "gpus": found["gpus"],
        "driver": driver_version(),
    }


def commit() -> str | None:
    """Of the checkout this package stands in, with "-dirty" if files differ from it; None if it is none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
