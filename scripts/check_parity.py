"""Logits of the GPU executor against transformers in float32 on the same GPU: random four-layer models, full width.

    python scripts/check_parity.py [--plan nano-batch] [--sequences 4] [--directory /dev/shm] [--json FILE] [llama …]

Teacher-forced over four sequences of 512 tokens (one is too few to tell an agreement of 98.8 % from 99.2 %), in chunks
and then token by token. Prints, for each architecture, the largest relative error of a position's logits and how often
the most likely token is the same, and beside them the same figures of transformers in bfloat16. Fails if an error is
above 2e-2 or an agreement below 99 %. Needs PyTorch and transformers.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1] / "tests"
sys.path[:0] = [str(TESTS), str(TESTS / "gpu")]

from parity import AGREEMENT, CASES, DENSE_BATCH_SIZE, ERROR, TOKENS, measure, write_checkpoint  # noqa: E402

from nf.cli.parser import CommandParser  # noqa: E402
from nf.graphs.plan import load_plan  # noqa: E402


def main() -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--plan", default="nano-batch", help="name or file of the pipeline plan")
    parser.add_argument("--sequences", type=int, default=4, help="of 512 tokens (default 4)")
    parser.add_argument("--directory", help="where checkpoints of up to 12 GB are put for a while")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    args = parser.parse_args()
    for name in args.names:
        if name not in CASES:
            parser.error(f"{name!r} is not one of {', '.join(CASES)}")
    if args.sequences < 1:
        parser.error(f"--sequences: must be at least 1, not {args.sequences}")
    records, failed = {}, []
    for name in args.names or CASES:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=args.directory) as directory:
            model = write_checkpoint(Path(directory), CASES[name].config(small=False), device="cuda")
            plan = load_plan(args.plan, model.operations, DENSE_BATCH_SIZE)
            ours, theirs = measure(model, Path(directory), plan, args.sequences)
        seconds = time.perf_counter() - started
        print(f"{name}: {ours} | transformers in bfloat16: {theirs} | {seconds:.0f} s", flush=True)
        records[name] = {"nf": dataclasses.asdict(ours), "transformers_bf16": dataclasses.asdict(theirs)}
        if ours.error > ERROR or ours.agreement < AGREEMENT:
            failed.append(name)
        if args.json:
            record = {"tokens": TOKENS * args.sequences, "plan": args.plan, "models": records}
            args.json.write_text(json.dumps(record, indent=2) + "\n")
    if failed:
        print(f"too far from float32: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
