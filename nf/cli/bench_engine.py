"""``nf bench throughput`` and ``nf bench latency``: the whole engine on lengths that are constant or from a trace."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nf.cli.files import check_writable
from nf.cli.options import add_engine_options, engine_options, named_by_flag
from nf.cli.workload_options import add_workload_options, read_workload
from nf.errors import InputError
from nf.hub import BUNDLED_MODEL

if TYPE_CHECKING:
    from nf.bench.engine import Subject
    from nf.bench.workload import Workload

_THROUGHPUT = """\
Give the engine all requests at once and see how many tokens per second come of it: over the whole
run, and over the middle half of the tokens, where it neither fills up nor runs dry. Prompts are
random token ids, outputs are greedy and run to their full length.
"""

_THROUGHPUT_EXAMPLES = """\
examples:
  nf bench throughput --num-prompts 16 --input-len 64 --output-len 32
  nf bench throughput ./llama --trace sharegpt.csv --max-total-len 4000 --num-prompts 3000
  nf bench throughput --random-weights --shape llama-3-8b --input-len 1024 --output-len 512 \\
      --num-prompts 1024 --max-num-seqs 1024 --json record.json --trace-out step.json
"""

_LATENCY = """\
Let requests arrive at random moments, as from many users (a Poisson process), at one rate after the
other, and see how long they take: end-to-end latency per output token (normalised latency), time to
first token (TTFT) and time per output token after it (TPOT).
"""

_LATENCY_EXAMPLES = """\
examples:
  nf bench latency --request-rate 1 2 4 8 --num-prompts 32 --input-len 64 --output-len 32
  nf bench latency ./llama --trace chat.csv --request-rate 5 10 20 --num-prompts 1000 --json l.json
"""


def add_parsers(commands: Any) -> None:
    """Add ``throughput`` and ``latency``."""
    throughput = commands.add_parser(
        "throughput", help="tokens per second", description=_THROUGHPUT, epilog=_THROUGHPUT_EXAMPLES
    )
    _add_common(throughput)
    throughput.add_argument("--num-warmups", type=int, default=8, metavar="N", help="requests before it (default 8)")
    throughput.add_argument(
        "--trace-out",
        type=Path,
        metavar="FILE",
        help="write a timeline of one steady step, and say where its time goes",
    )
    latency = commands.add_parser(
        "latency", help="latency at given request rates", description=_LATENCY, epilog=_LATENCY_EXAMPLES
    )
    _add_common(latency)
    latency.add_argument(
        "--request-rate", type=float, nargs="+", required=True, metavar="R", help="requests per second, each in turn"
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", nargs="?", metavar="MODEL",
        help=f"a directory, a Hugging Face name, or the bundled {BUNDLED_MODEL} (default)",
    )  # fmt: skip
    parser.add_argument("--random-weights", action="store_true", help="draw weights instead of reading them")
    parser.add_argument("--shape", metavar="NAME", help="well-known shape to draw weights for, e.g. llama-3-8b")
    group = add_workload_options(parser)
    group.add_argument("--detokenize", action="store_true", help="make texts of the outputs as well")
    group = parser.add_argument_group("results")
    group.add_argument("--json", type=Path, metavar="FILE", help="write a record of everything")
    group.add_argument("-q", "--quiet", action="store_true", help="no progress bar")
    add_engine_options(parser)


def throughput(args: argparse.Namespace) -> int:
    """Measure throughput."""
    subject, workload = _prepare(args)
    from nf.bench.engine import describe
    from nf.bench.environment import environment, finite, write_record
    from nf.bench.report import throughput_lines
    from nf.bench.throughput import results, run
    from nf.bench.timeline import write_timeline
    from nf.llm import LLM

    with LLM(subject.loaded) as llm:
        done = run(llm, subject, workload, warmups=args.num_warmups, detokenize=args.detokenize, show=not args.quiet)
        spans = [] if args.trace_out is None else subject.trace(done.batch)
    if args.trace_out is not None:
        write_timeline(spans, args.trace_out, f"one step of {_name(args)}")
    record = {"benchmark": "throughput", "environment": environment(), **describe(subject, workload, _name(args))}
    record["results"] = finite(results(done, subject, workload, _ceilings(subject), spans))
    print("\n".join(throughput_lines(record)))
    if args.json is not None:
        write_record(args.json, record)
    return 0


def latency(args: argparse.Namespace) -> int:
    """Measure latency at one rate after the other, printing each as it is done."""
    import asyncio

    for rate in args.request_rate:
        if not 0 < rate < float("inf"):
            raise InputError("--request-rate", f"must be above 0, not {rate:g}")
    subject, workload = _prepare(args)
    from nf.bench.engine import describe
    from nf.bench.environment import environment

    record = {"benchmark": "latency", "environment": environment(), **describe(subject, workload, _name(args))}
    record["results"] = {"rates": [], "startup": subject.startup}
    asyncio.run(_measure_rates(args, subject, workload, record))
    return 0


async def _measure_rates(
    args: argparse.Namespace, subject: Subject, workload: Workload, record: dict[str, Any]
) -> None:
    """Measure, print and record each rate."""
    from tqdm import tqdm

    from nf.bench.environment import finite, write_record
    from nf.bench.latency import run_rate, warm_up
    from nf.bench.report import latency_line, latency_title
    from nf.llm import AsyncLLM

    hide = args.quiet or not sys.stderr.isatty()
    rates = record["results"]["rates"]
    async with AsyncLLM(subject.loaded) as llm:
        await warm_up(llm, subject, workload)
        print("\n".join(latency_title(record)), flush=True)
        for rate in args.request_rate:
            with tqdm(total=len(workload), desc=f"{rate:g}/s", unit=" requests", disable=hide, leave=False) as bar:
                result = await run_rate(llm, subject, workload, rate, detokenize=args.detokenize, finished=bar.update)
            rates.append(finite(result))
            print(latency_line(rates[-1]), flush=True)
            if args.json is not None:  # at once: a later rate may be stopped
                write_record(args.json, record)


def _prepare(args: argparse.Namespace) -> tuple[Subject, Workload]:
    """The model, loaded, and its work; what is wrong with the options, whatever the model, is said before."""
    start = time.perf_counter()
    from nf.bench.engine import subject

    imported = time.perf_counter() - start
    if getattr(args, "num_warmups", 1) < 1:
        raise InputError("--num-warmups", f"must be at least 1, not {args.num_warmups}")
    for flag, path in (("--json", args.json), ("--trace-out", getattr(args, "trace_out", None))):
        check_writable(flag, path)
    if args.shape is not None and not args.random_weights:
        raise InputError("--shape", "names a model without weights; add --random-weights")
    if args.shape is not None and args.model is not None:
        raise InputError("--shape", f"is the model to measure, and so is {args.model}; name one of them")
    workload, options = read_workload(args), engine_options(args)
    if args.random_weights:
        options["random_weights"] = True
    if not args.detokenize:
        options["skip_tokenizer_init"] = True
    with named_by_flag():
        loaded = subject(_name(args), imported, **options)
    try:
        loaded.check(workload)
        if getattr(args, "trace_out", None) is not None and not loaded.traceable:
            raise InputError("--trace-out", f"the executor for {loaded.config.device} cannot time nano-operations")
    except InputError:
        loaded.log.close()
        raise
    return loaded, workload


def _ceilings(subject: Subject) -> Any:
    """Measured after the run, once the model has left the GPU; None on the CPU or if it cannot be done."""
    if not subject.gpus:
        return None
    from nf.bench.ceilings import measure_ceilings

    try:
        return measure_ceilings(subject.model_config, subject.config.max_num_batched_tokens, subject.gpus)
    except Exception as error:  # whatever it is, the run before it is worth its record
        print(f"nf bench throughput: the ceilings could not be measured: {error}", file=sys.stderr)
        return None


def _name(args: argparse.Namespace) -> str:
    """Of the model: what it is loaded by."""
    given: str | None = args.model if args.shape is None else args.shape
    return BUNDLED_MODEL if given is None else given
