"""Spans as a Perfetto file, and the CPU executor's spans of a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nf.bench.engine import subject
from nf.bench.throughput import run
from nf.bench.timeline import trace_events, write_timeline
from nf.bench.workload import constant
from nf.executors.cpu import CpuExecutor
from nf.executors.trace import Span
from nf.llm import LLM
from nf.sampling_params import SamplingParams


def test_every_stream_is_a_row_of_its_own(tmp_path: Path) -> None:
    spans = [
        Span("compute", "qkv_proj [0, 4) layer 0", 0.0, 2.5),
        Span("memory", "decode_attention [4, 8) layer 0", 1.0, 7.25),
        Span("compute", "o_proj [0, 4) layer 0", 2.5, 1.0),
    ]
    file = tmp_path / "step.json"
    write_timeline(spans, file, "one step")
    events = json.loads(file.read_text())["traceEvents"]
    assert json.loads(json.dumps(trace_events(spans, "one step")))["traceEvents"] == events
    rows = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert rows == {0: "compute", 1: "memory"}
    assert [event["args"] for event in events if event["name"] == "process_name"] == [{"name": "one step"}]
    complete = [event for event in events if event["ph"] == "X"]
    assert [(rows[e["tid"]], e["name"], e["ts"], e["dur"]) for e in complete] == [
        (span.stream, span.name, span.start_us, span.duration_us) for span in spans
    ]
    assert [event["cat"] for event in complete] == ["qkv_proj", "decode_attention", "o_proj"]
    assert {event["pid"] for event in events} == {0}


@pytest.mark.parametrize("plan", ["sequential", "nano-batch"])
def test_a_step_of_the_cpu_executor(plan: str) -> None:
    measured = subject("nf-tiny", 0.0, plan=plan, max_num_batched_tokens=48, skip_tokenizer_init=True, device="cpu")
    workload = constant(20, 6, 8)
    greedy = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, detokenize=False)
    with LLM(measured.loaded) as llm:
        before = llm.generate([[5, 6, 7]], greedy, use_tqdm=False)
        done = run(llm, measured, workload)
        batch = done.batch
        assert batch is not None
        spans = measured.trace(batch)
        again = llm.generate([[5, 6, 7]], greedy, use_tqdm=False)
    assert isinstance(measured.log.executor, CpuExecutor)
    assert again[0].outputs[0].token_ids == before[0].outputs[0].token_ids  # what runs later is not harmed

    assert all(span.duration_us >= 0 for span in spans)
    assert [s.start_us for s in spans[1:]] == pytest.approx([s.start_us + s.duration_us for s in spans[:-1]])
    names = [span.name for span in spans]
    assert (names[0], names[-1]) == ("embed", "sampling")
    layers = measured.model_config.num_layers
    for operation in ("attn_norm", "qkv_proj", "rope_append", "o_proj", "ffn_norm", "gate_up_proj", "down_proj"):
        rows = [name.split("[")[1].split(")")[0].split(", ") for name in names if name.startswith(operation + " ")]
        assert sum(int(stop) - int(start) for start, stop in rows) == layers * batch.num_tokens
    decode = [name for name in names if name.startswith("decode_attention ")]
    assert bool(decode) == bool(batch.num_decode)


def test_the_log_counts_every_token_once() -> None:
    measured = subject("nf-tiny", 0.0, max_num_batched_tokens=32, skip_tokenizer_init=True, device="cpu")
    workload = constant(30, 5, 7)
    with LLM(measured.loaded) as llm:
        done = run(llm, measured, workload)
        steps, rows = llm.stats.steps, llm.stats.step_tokens
    assert sum(step.input_tokens for step in done.steps) == workload.input_tokens
    surplus = sum(step.output_tokens for step in done.steps) - workload.output_tokens
    assert 0 <= surplus <= len(workload)
    assert len(done.steps) < steps  # the warm-up's are not among them
    assert sum(step.rows for step in done.steps) < rows
    assert [step.ended for step in done.steps] == sorted(step.ended for step in done.steps)
    assert done.start <= done.steps[0].ended <= done.steps[-1].ended <= done.end
