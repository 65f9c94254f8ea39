"""Everything that is measured on a GPU, one after the other, each with its record: what a new state of the engine is
judged by, or a new card.

    python scripts/bench_all.py --out records                      # about half an hour on an H200
    python scripts/bench_all.py --out records --only kernels constant decode --seconds 400

Runs are of Llama-3-8B's shape with random weights, but for what says otherwise. What no longer fits into ``--seconds``
is left out and told; what was measured is kept, whatever becomes of the rest.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nf.cli.parser import CommandParser
from nf.errors import InputError
from nf.files import make_folder

ROOT = Path(__file__).parents[1]
NF = f"{shlex.quote(sys.executable)} -m nf.cli"
PYTHON = shlex.quote(sys.executable)
MODEL = "--random-weights --shape llama-3-8b"
SPARE = 1.5  # a run may take so many times what it is expected to
GRACE_SECONDS = 5.0  # to end after SIGTERM


@dataclass(frozen=True, slots=True)
class Run:
    """One benchmark.

    Args:
        command: ``{out}`` is where its record goes, ``{trace}`` a CSV of lengths.
        seconds: that it took on an H200, the start included.
    """

    name: str
    command: str
    seconds: float


CONSTANT = (
    f"{NF} bench throughput {MODEL} --input-len 1024 --output-len 512 --num-prompts 1024 --max-model-len 2048 "
    "--max-num-seqs 1024 -q --json {out}.json"
)
TRACE = (
    f"{NF} bench throughput {MODEL} --trace {{trace}} --max-total-len 4000 --num-prompts 3000 --max-model-len 4096 "
    "--max-num-seqs 2048 -q --json {out}.json"
)
RUNS = (
    Run("tests", f"{PYTHON} -m pytest tests/gpu --junit-xml {{out}}.xml", 130),
    Run("kernels", f"{NF} bench kernels --json {{out}}.json", 220),
    Run("constant", f"{CONSTANT} --trace-out {{out}}-step.json", 75),
    Run("constant-sequential", f"{CONSTANT} --plan sequential", 70),
    Run("trace", TRACE, 75),
    Run("trace-sequential", f"{TRACE} --plan sequential", 75),
    Run("decode", f"{PYTHON} scripts/bench_decode.py llama-3-8b --random-weights --json {{out}}.json", 30),
    Run(
        "latency",
        f"{NF} bench latency {MODEL} --input-len 512 --output-len 128 --num-prompts 200 --request-rate 10 20 30 "
        "--max-model-len 2048 --max-num-seqs 1024 -q --json {out}.json",
        45,
    ),
    Run("profile", f"{NF} plan profile llama-3-8b --quick --profiles-dir {{out}} --plot {{out}}.svg", 110),
    Run("partitions", f"{PYTHON} scripts/bench_partitions.py --json {{out}}.json", 80),
    Run("parity", f"{PYTHON} scripts/check_parity.py --json {{out}}.json llama qwen2 qwen3 mistral mixtral", 180),
    Run("soak", f"{PYTHON} scripts/soak.py nf-tiny --device cuda --seconds 600 --rate 100 --json {{out}}.json", 620),
)


def execute(run: Run, out: Path, trace: str, seconds: float) -> str:
    """Run it for ``seconds`` at most, with its output in a file beside its record; how it ended."""
    command = shlex.split(run.command.format(out=shlex.quote(str(out / run.name)), trace=shlex.quote(trace)))
    with (out / f"{run.name}.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()  # some keep what they have on this signal
            try:
                process.wait(GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            return "took too long"
    return "ok" if code == 0 else f"exit code {code}"


def main() -> int:
    parser = CommandParser(description=__doc__)
    names = [run.name for run in RUNS]
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where records and logs go")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--trace", metavar="FILE", help="CSV of lengths for the run of that name, else it is left out")
    parser.add_argument("--seconds", type=float, default=1e9, metavar="S", help="for all of them together")
    args = parser.parse_args()
    if args.trace is not None and not Path(args.trace).is_file():
        parser.error(f"--trace: there is no file {args.trace}")
    try:
        out = make_folder("--out", args.out).resolve()
    except InputError as error:
        parser.error(str(error))
    trace = str(Path(args.trace or "").resolve())
    wanted = [run for run in RUNS if run.name in args.only and (args.trace or "{trace}" not in run.command)]
    end, wrong = time.monotonic() + args.seconds, False
    for run in wanted:
        started = time.monotonic()
        if run.seconds > end - started:
            print(f"{run.name}: left out, it takes about {run.seconds:.0f} s", flush=True)
            continue
        ended = execute(run, out, trace, min(SPARE * run.seconds, end - started))
        print(f"{run.name}: {ended}, {time.monotonic() - started:.0f} s", flush=True)
        wrong |= ended != "ok"
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
