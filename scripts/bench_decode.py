"""What a decoding step costs by the number of sequences, beside what the card's ceilings would allow.

    python scripts/bench_decode.py llama-3-8b --random-weights --sequences 1 16 64 256 640 --context 1024

The whole step is measured, logits and sampling included, on random keys and values, with steps enqueued ahead as the
engine does. On a GPU the ceilings are measured right afterwards; a step's bound is the sum over its operations of the
longer of two times, for its arithmetic and for its memory traffic.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nf.bench.ceilings import measure_ceilings
from nf.bench.environment import environment, write_record
from nf.bench.roofline import Ceilings
from nf.bench.steady_step import measure_step, step_batch
from nf.cli.files import check_writable
from nf.cli.options import add_engine_options, engine_options, named_by_flag
from nf.cli.parser import CommandParser
from nf.errors import InputError, NfError
from nf.executors.gpu import GpuExecutor
from nf.loading import load
from nf.models.declaration import Model
from nf.models.registry import declare
from nf.planning.operation_costs import Workload, operation_costs

SEQUENCES = (1, 4, 16, 32, 64, 128, 256, 384, 512, 640, 768, 1024)


def measure(model: str, sequences: list[int], context: int, options: dict[str, Any]) -> dict[str, Any]:
    """Time steps of each number of sequences, all at ``context`` tokens.

    Raises:
        NfError: the model cannot be loaded, or the engine does not take such a step.
    """
    loaded = load(model, **{"max_model_len": context + 1, "max_num_seqs": max(sequences), **options})
    executor, config = loaded.executor, loaded.config
    try:
        if max(sequences) > min(config.max_num_seqs, config.max_num_batched_tokens):
            raise InputError("--sequences", f"{max(sequences)} are more than the engine runs at a time")
        if isinstance(executor, GpuExecutor):
            executor.randomize_kv(seed=1)
        steps = []
        for count in sequences:
            batch = step_batch(count, [1] * count, [context] * count, executor.page_size, executor.num_pages)
            steps.append((count, measure_step(executor, batch)))
    finally:
        executor.close()
    declared = declare(loaded.model_config)
    ceilings = measure_ceilings(declared.config, config.max_num_batched_tokens) if config.device == "cuda" else None
    rows = []
    for count, step in steps:
        least = None if ceilings is None else bound(declared, count, context, ceilings)
        rows.append({
            "sequences": count, "ms": step.seconds * 1e3, "tokens_per_second": count / step.seconds,
            "joules_per_token": step.joules / count, "bound_ms": None if least is None else least * 1e3,
            "share": None if least is None else least / step.seconds,
        })  # fmt: skip
    return {
        "benchmark": "decode", "environment": environment(), "model": model, "options": asdict(config),
        "context": context, "ceilings": None if ceilings is None else asdict(ceilings), "rows": rows,
    }  # fmt: skip


def bound(model: Model, sequences: int, context: int, ceilings: Ceilings) -> float:
    """Seconds of such a step if every operation ran at the ceiling of its scarcer resource."""
    workload = Workload(0, 2 * context)  # decoding only, at ``context`` tokens on average
    costs = operation_costs(model, workload, sequences)
    return sum(max(cost.flops / ceilings.flops, cost.memory_bytes / ceilings.read_rate) for cost in costs)


def table(record: dict[str, Any]) -> list[str]:
    """The record as lines of text."""
    lines = ["sequences        ms   tokens/s  mJ/token  bound ms  share"]
    for row in record["rows"]:
        line = f"{row['sequences']:9} {row['ms']:9.3f} {row['tokens_per_second']:10,.0f} "
        line += f"{row['joules_per_token'] * 1e3:9.1f}" if math.isfinite(row["joules_per_token"]) else f"{'–':>9}"
        lines.append(line if row["share"] is None else f"{line} {row['bound_ms']:9.3f} {row['share']:6.3f}")
    return lines


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("model", help="model directory, bundled model or, with --random-weights, a shape")
    parser.add_argument("--random-weights", action="store_true", help="draw weights instead of reading them")
    parser.add_argument("--sequences", type=int, nargs="+", default=list(SEQUENCES), help="that decode, several counts")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record")
    add_engine_options(parser)
    args = parser.parse_args()
    if min(*args.sequences, args.context) < 1:
        parser.error("--sequences, --context: must be at least 1")
    options = {"random_weights": args.random_weights, "skip_tokenizer_init": True}
    try:
        check_writable("--json", args.json)
        with named_by_flag():
            record = measure(args.model, args.sequences, args.context, options | engine_options(args))
    except NfError as error:
        print(f"bench_decode: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    if args.json is not None:
        write_record(args.json, record)
    print("\n".join(table(record)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
