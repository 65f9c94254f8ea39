"""Time what comes before the first token on the GPU: reading a checkpoint, drawing random weights, a whole start.

    python scripts/random_checkpoint.py llama-3-8b /tmp/llama-3-8b
    python scripts/bench_loading.py /tmp/llama-3-8b --shape mixtral-8x7b

The checkpoint is read several times; the first time counts as it comes, the others are from the page cache. A start is
from ``load(...)`` to the first token of a prompt of 64, with imports done.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from nf.cli.parser import CommandParser
from nf.device_choice import need_gpu
from nf.errors import NfError
from nf.executors.gpu_weights import DeviceWeights, load_device_weights, random_device_weights
from nf.kernels.device import Device
from nf.llm import LLM
from nf.loading import load
from nf.models.hf_config import read_config
from nf.models.registry import declare
from nf.models.shapes import SHAPES, shape
from nf.sampling_params import SamplingParams

FIRST_TOKEN = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
PROMPT = [1] * 64


def measure(folder: Path, shapes: list[str], repeat: int) -> list[dict[str, Any]]:
    """One row per thing timed: "what", "gigabytes", "seconds"; a start also has its "parts".

    Raises:
        NfError: the checkpoint or the GPU cannot be used.
    """
    model = declare(read_config(folder))
    need_gpu(model)
    Device()
    rows = [_row(f"read {folder}", lambda: load_device_weights(model, folder)) for _ in range(repeat)]
    for name in shapes:
        declared = declare(shape(name))
        rows += [_row(f"draw {name}", lambda model=declared: random_device_weights(model, 0)) for _ in range(repeat)]
    return rows + [_start(str(folder)) for _ in range(repeat)]


def _row(what: str, make: Any) -> dict[str, Any]:
    start = time.perf_counter()
    weights: DeviceWeights = make()
    seconds = time.perf_counter() - start
    gigabytes = weights.num_bytes / 1e9
    weights.free()
    return {"what": what, "gigabytes": round(gigabytes, 2), "seconds": round(seconds, 3)}


def _start(model: str) -> dict[str, Any]:
    start = time.perf_counter()
    loaded = load(model, skip_tokenizer_init=True, device="cuda")
    with LLM(loaded) as llm:
        llm.generate([PROMPT], FIRST_TOKEN, use_tqdm=False)
        seconds = time.perf_counter() - start
    parts = {name: round(part, 3) for name, part in loaded.startup.items()}
    return {"what": f"first token of {model}", "gigabytes": None, "seconds": round(seconds, 3), "parts": parts}


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, help="model directory")
    parser.add_argument(
        "--shape", nargs="*", choices=SHAPES, default=["llama-3-8b"], help="drawn (default %(default)s)"
    )
    parser.add_argument("--repeat", type=int, default=3, help="times each (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    args = parser.parse_args()
    try:
        rows = measure(args.checkpoint, args.shape, args.repeat)
    except NfError as error:
        print(f"bench_loading: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        size = row["gigabytes"]
        rate = f"{size:8.2f} GB {size / row['seconds']:8.1f} GB/s" if size else ""
        parts = (f"{name} {seconds}" for name, seconds in row.get("parts", {}).items())
        print(f"{row['what']:40} {row['seconds']:8.3f} s {rate}", *parts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
