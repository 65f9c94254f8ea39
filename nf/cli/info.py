"""`nf info`: versions, devices, the executor that would run a model and why, and where things are kept."""

from __future__ import annotations

import argparse
import sys
from typing import Any

_EPILOG = """\
examples:
  nf info
  nf info meta-llama/Meta-Llama-3-8B            which executor would run it, and why
  nf info --json | jq .executor
"""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "info",
        help="versions, devices, and what would be used to run a model",
        description="Say what nf finds on this machine, and which executor would run a model, and why.",
        epilog=_EPILOG,
    )
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a directory, a Hugging Face name or a well-known shape; without: any that there are GPU kernels for",
    )
    parser.add_argument("--json", action="store_true", help="as one JSON object")


def run(args: argparse.Namespace) -> int:
    found = collect(args.model)
    if args.json:
        import json

        print(json.dumps(found, indent=2))
    else:
        print("\n".join(_lines(found)))
    return 0


def collect(model: str | None = None) -> dict[str, Any]:
    """Everything `nf info` tells, as plain data; sizes in bytes.

    Raises:
        ModelError: there is no such model, or it cannot be run at all.
    """
    from nf.kernels.compile import cache_dir
    from nf.machine import machine

    return machine() | {
        "executor": _executor(model),
        "kernels": _kernels(),
        "cache_dir": str(cache_dir()),
        "bundled_model": _bundled_model(),
    }


def _executor(model: str | None) -> dict[str, str]:
    """What `--device auto` comes to here."""
    from nf.cli.estimate import model_config
    from nf.device_choice import choose_device
    from nf.models.registry import declare

    choice = choose_device("auto", None if model is None else declare(model_config(model)))
    return {"name": choice.name, "reason": choice.reason}


def _kernels() -> str:
    """Where compiled kernels come from."""
    from nf.device_choice import find_kernels

    kernels = find_kernels()
    return kernels.problem or str(kernels.folder)


def _bundled_model() -> dict[str, Any] | None:
    from nf.hub import BUNDLED_DIR, BUNDLED_MODEL

    if not (BUNDLED_DIR / "config.json").is_file():
        return None
    size = sum(file.stat().st_size for file in BUNDLED_DIR.iterdir())
    return {"name": BUNDLED_MODEL, "path": str(BUNDLED_DIR), "size": size}


def _lines(found: dict[str, Any]) -> list[str]:
    versions = dict(found["versions"])
    cpu = found["cpu"]
    rows = [
        ("nf", versions.pop("nf")),
        ("python", f"{versions.pop('python')}, {sys.executable}"),
        ("system", found["platform"]),
        ("packages", ", ".join(f"{name} {v}" for name, v in versions.items() if v)),
        ("not installed", ", ".join(name for name, v in versions.items() if not v)),
        ("CPU", f"{cpu['name']}, {cpu['cores']} cores, {_size(cpu['memory'])}, BLAS {cpu['blas']}"),
    ]
    rows += [(f"GPU {i}", _gpu_line(gpu)) for i, gpu in enumerate(found["gpus"])]
    model = found["bundled_model"]
    rows += [
        ("executor", f"{found['executor']['name']}: {found['executor']['reason']}"),
        ("kernels", found["kernels"]),
        ("cache", found["cache_dir"]),
        ("bundled model", f"{model['name']}, {_size(model['size'])}, {model['path']}" if model else "missing"),
    ]
    return [_row(name, text) for name, text in rows if text]


def _gpu_line(gpu: dict[str, Any]) -> str:
    return (
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['sms']} SMs, "
        f"{_size(gpu['memory'])}, driver for CUDA {gpu['driver_cuda']}"
    )


def _row(name: str, text: str) -> str:
    import textwrap

    wrapper = textwrap.TextWrapper(
        width=100,
        initial_indent=f"{name:<14}",
        subsequent_indent=" " * 14,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.fill(text)


def _size(num_bytes: int) -> str:
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:.1f} {unit}"
    return f"{num_bytes / 1024:.1f} KiB"
