"""Run the work of `nf bench throughput` through vLLM, where it is installed, and print the ratio.

    nf bench throughput DIR --num-prompts 1024 --input-len 1024 --output-len 512 --json nf.json
    python scripts/bench_vllm.py DIR --num-prompts 1024 --input-len 1024 --output-len 512 --nf-json nf.json

Requests are the same ones, token by token: greedy, past any end of text, without prefix caching, without texts. The
time is that of one call of `generate` after a warm-up, as nf counts it. DIR must hold weights; scripts/
random_checkpoint.py writes random ones. Not part of the product: vLLM is used through its public interface alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # vLLM's environment need not have nf installed

from nf.bench.environment import environment, write_record
from nf.bench.power import ENGINE_POLL_SECONDS, PowerMeter
from nf.bench.workload import Workload
from nf.cli.parser import CommandParser
from nf.cli.workload_options import add_workload_options, read_workload
from nf.errors import InputError
from nf.models.hf_config import read_config

WARMUPS, WARMUP_OUTPUT_LEN = 8, 8
SAME = ("requests", "input_tokens", "output_tokens", "seed")


def main(argv: list[str] | None = None) -> int:
    parser = CommandParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="DIR", help="model directory")
    add_workload_options(parser)
    group = parser.add_argument_group("engine")
    group.add_argument("--dtype", default="bfloat16")
    group.add_argument("--max-model-len", type=int, metavar="N")
    group.add_argument("--max-num-seqs", type=int, default=1024, metavar="N")
    group.add_argument("--max-num-batched-tokens", type=int, default=2048, metavar="N")
    group.add_argument("--gpu-memory-utilization", type=float, default=0.92, metavar="X")
    group.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N")
    group.add_argument("--engine-arg", action="append", default=[], metavar="NAME=JSON", help="any other of vLLM's")
    group = parser.add_argument_group("results")
    group.add_argument("--json", type=Path, metavar="FILE", help="write a record")
    group.add_argument("--nf-json", type=Path, metavar="FILE", help="record of nf on the same work, to compare")
    args = parser.parse_args(argv)
    try:
        workload = read_workload(args)
        theirs = _nf_record(args.nf_json, workload.describe()) if args.nf_json else None
        vocab_size = read_config(args.model).vocab_size
        options = engine_options(args)
    except InputError as error:
        print(f"bench_vllm: {error}", file=sys.stderr)
        return 2
    try:
        import vllm
    except ImportError:
        print("bench_vllm: vLLM is not installed here (pip install vllm)", file=sys.stderr)
        return 1
    record = run(vllm, options, workload, vocab_size)
    print(_line("vLLM", record["results"]))
    if theirs is not None:
        record["nf"] = theirs["results"]["tokens_per_second"]
        ratio = record["nf"]["total"] / record["results"]["tokens_per_second"]["total"]
        record["ratio"] = ratio
        print(_line("nf", theirs["results"]))
        print(f"{'nf / vLLM':<10}{ratio:.3f}")
    if args.json:
        write_record(args.json, record)
    return 0


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of vllm.LLM."""
    names = ("dtype", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "tensor_parallel_size")
    options: dict[str, Any] = {"model": str(args.model), "seed": 0} | {name: getattr(args, name) for name in names}
    options |= {"skip_tokenizer_init": True, "enable_prefix_caching": False}
    if args.max_model_len is not None:
        options["max_model_len"] = args.max_model_len
    for item in args.engine_arg:
        name, _, text = item.partition("=")
        try:
            options[name] = json.loads(text)
        except ValueError:
            raise InputError("--engine-arg", f"takes NAME=JSON such as enforce_eager=true, not {item!r}") from None
    return options


def run(vllm: Any, options: dict[str, Any], workload: Workload, vocab_size: int) -> dict[str, Any]:
    """Load, warm up, run and describe."""
    gpus = range(options["tensor_parallel_size"])
    start = time.monotonic()
    llm = vllm.LLM(**options)
    loaded = time.monotonic()
    _generate(vllm, llm, workload.warmup(WARMUPS, WARMUP_OUTPUT_LEN), vocab_size)
    seconds, joules = _generate(vllm, llm, workload, vocab_size, gpus)
    tokens = workload.input_tokens + workload.output_tokens
    return {
        "benchmark": "throughput",
        "engine": f"vLLM {vllm.__version__}",
        "environment": environment(),
        "options": options,
        "workload": workload.describe(),
        "results": {
            "seconds": seconds,
            "requests_per_second": len(workload) / seconds,
            "tokens_per_second": {
                "input": workload.input_tokens / seconds,
                "output": workload.output_tokens / seconds,
                "total": tokens / seconds,
            },
            "joules_per_token": None if math.isnan(joules) else joules / tokens,
            "startup": {"total": loaded - start},
        },
    }


def _generate(vllm: Any, llm: Any, workload: Workload, vocab_size: int, gpus: range = range(0)) -> tuple[float, float]:
    """Seconds and joules of all requests at once."""
    prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts(vocab_size)]
    params = [
        vllm.SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        for output_len in workload.output_lens.tolist()
    ]
    with PowerMeter(*gpus, poll_seconds=ENGINE_POLL_SECONDS) as meter:
        start = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=sys.stderr.isatty())
        seconds = time.monotonic() - start
    lens = [len(output.outputs[0].token_ids) for output in outputs]
    if lens != workload.output_lens.tolist():
        raise SystemExit("bench_vllm: vLLM's outputs do not have the lengths that were asked for")
    return seconds, seconds * meter.watts


def _nf_record(path: Path, workload: dict[str, int | str]) -> dict[str, Any]:
    """nf's record, if it is of the same requests."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        theirs, rate = record["workload"], record["results"]["tokens_per_second"]["total"]
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError("--nf-json", f"{path} is not a record of nf bench throughput") from None
    for name in SAME:
        if theirs.get(name) != workload[name]:
            raise InputError("--nf-json", f"is of other requests: {name} {theirs.get(name)}, here {workload[name]}")
    if not isinstance(rate, float) or rate <= 0:
        raise InputError("--nf-json", f"{path} holds no rate to compare with")
    return record


def _line(name: str, results: dict[str, Any]) -> str:
    rates, joules = results["tokens_per_second"], results["joules_per_token"]
    energy = "" if joules is None else f", {joules:.4f} J/token"
    return (
        f"{name:<10}{rates['total']:,.1f} tokens/s (in {rates['input']:,.1f}, out {rates['output']:,.1f}), "
        f"{results['requests_per_second']:.2f} requests/s{energy}, start {results['startup']['total']:.1f} s"
    )


if __name__ == "__main__":
    sys.exit(main())
