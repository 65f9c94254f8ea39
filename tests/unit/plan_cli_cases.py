"""What the tests of ``nf plan`` have in common: the command, and steps that take as long as their plan's name says."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fake_profile import MODEL, SMS

from nf.bench.measure import Measurement
from nf.bench.steady_step import Load
from nf.cli import plan as command
from nf.executors.trace import Span
from nf.graphs.plan import PipelinePlan
from nf.graphs.plan_store import StoredPlan, find_plans


def nf(*argv: str) -> int:
    parser = argparse.ArgumentParser(prog="nf")
    command.add_parser(parser.add_subparsers(dest="command"))
    return command.run(parser.parse_args(["plan", *argv]))


def found_plans(folder: Path | None = None) -> list[StoredPlan]:
    """Of 2,048 tokens: plans of other sizes that ship are an engine's too."""
    found = find_plans(MODEL, "NVIDIA H200", 2048, folder=folder, gpu_sms=SMS)
    return [stored for stored in found if stored.plan.dense_batch_size == 2048]


class StepBench:
    """Every other plan than "nano-batch" takes a second."""

    quick = False

    def __init__(self, *_: Any, quick: bool = False) -> None:
        StepBench.quick = quick

    def measure(self, plan: PipelinePlan, loads: Sequence[Load]) -> list[Measurement]:
        return [Measurement(0.8 if plan.name == "nano-batch" else 1.0, 690.0) for _ in loads]

    def trace(self, plan: PipelinePlan, _load: Load) -> list[Span]:
        streams = [stream.name for stream in plan.streams]
        return [Span(streams[0], f"qkv_proj [0, 2048) layer {i}", 100.0 * i, 90.0) for i in range(32)]
