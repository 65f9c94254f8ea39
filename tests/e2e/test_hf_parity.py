"""Every architecture against Hugging Face transformers: logits of every position and greedy tokens.

tests/fixtures were written by scripts/make_fixtures.py. The model runs as it does in the engine: the scheduler cuts the
prompt into chunks over pages beside another request, a pipeline plan orders the operations, and tokens are decoded one
by one from the paged KV cache; transformers saw one sequence and kept no cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from nf import LLM
from nf.executors.cpu import CpuExecutor
from nf.graphs.plan import PipelinePlan, nano_batch_plan, sequential_plan
from nf.models.hf_config import read_config
from nf.models.operations import Operation
from nf.models.registry import DECLARATIONS, declare
from nf.request import Request
from nf.sampling_params import SamplingParams
from nf.scheduler.scheduler import Scheduler, SchedulerConfig
from nf.weights import load_weights

FIXTURES = Path(__file__).parents[1] / "fixtures"
NAMES = sorted(path.parent.name for path in FIXTURES.glob("*/config.json"))
TOLERANCE = 1e-4  # of logits, absolute, float32
DENSE_BATCH_SIZE = 16
PAGE_SIZE = 4
NUM_PAGES = 64
PREFIX = 20  # tokens of the neighbour's prompt, which is the start of the fixture's

Float32 = NDArray[np.float32]
MakePlan = Callable[[Sequence[Operation], int], PipelinePlan]


def request(name: str, prompt: NDArray[np.int32], max_tokens: int) -> Request:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return Request(name, prompt, params, seed=0)


def run(name: str, make_plan: MakePlan, requests: list[Request]) -> tuple[dict[str, list[int]], dict[str, Float32]]:
    """Run requests on a fixture's model to their ends: tokens, and the logits at every position of each."""
    model = declare(read_config(FIXTURES / name))
    weights = load_weights(model, FIXTURES / name, np.dtype(np.float32))
    sizes = {
        "page_size": PAGE_SIZE,
        "num_pages": NUM_PAGES,
        "num_host_pages": 0,
        "max_num_seqs": 4,
        "max_model_len": 256,
    }
    scheduler = Scheduler(SchedulerConfig(dense_batch_size=DENSE_BATCH_SIZE, **sizes))
    executor = CpuExecutor(model, weights, make_plan(model.operations, DENSE_BATCH_SIZE), **sizes)
    tokens: dict[str, list[int]] = {r.request_id: [] for r in requests}
    logits = {r.request_id: np.full((r.max_len - 1, model.config.vocab_size), np.nan, np.float32) for r in requests}
    for r in requests:
        scheduler.add(r)
    while scheduler.has_work:
        batch = scheduler.apply(scheduler.schedule())
        owners = [scheduler.owner(int(slot))[0] for slot in batch.token_slots]
        rows = executor.logits(batch, np.arange(batch.num_tokens, dtype=np.int32))
        for owner, position, row in zip(owners, batch.positions, rows, strict=True):
            logits[owner][position] = row
        sampled = [scheduler.owner(int(slot)) for slot in batch.sampling.slots]
        for (owner, index), token in zip(sampled, executor.submit(batch).result().token_ids, strict=True):
            tokens[owner].append(int(token))
            if len(tokens[owner]) == next(r.params.max_tokens for r in requests if r.request_id == owner):
                scheduler.finish(owner, index)
    executor.close()
    return tokens, logits


@pytest.mark.parametrize("make_plan", [sequential_plan, nano_batch_plan])
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_greedy_tokens(name: str, make_plan: MakePlan) -> None:
    expected = np.load(FIXTURES / name / "expected.npz")
    prompt, greedy = expected["prompt"], expected["greedy"].tolist()
    requests = [request("all", prompt, len(greedy)), request("prefix", prompt[:PREFIX], 1)]
    tokens, logits = run(name, make_plan, requests)
    assert tokens["all"] == greedy
    assert tokens["prefix"] == [int(expected["logits"][PREFIX - 1].argmax())]
    assert np.abs(logits["all"] - expected["logits"]).max() <= TOLERANCE
    assert np.abs(logits["prefix"] - expected["logits"][:PREFIX]).max() <= TOLERANCE


def test_every_architecture_has_a_fixture() -> None:
    assert {read_config(FIXTURES / name).architecture for name in NAMES} == set(DECLARATIONS)


@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_through_the_public_api(name: str) -> None:
    """From a model directory by LLM, as users load it, in several chunks beside copies of the same request."""
    expected = np.load(FIXTURES / name / "expected.npz")
    greedy = SamplingParams(temperature=0.0, max_tokens=len(expected["greedy"]), ignore_eos=True)
    with LLM(str(FIXTURES / name), skip_tokenizer_init=True, max_num_batched_tokens=DENSE_BATCH_SIZE) as llm:
        outputs = llm.generate([expected["prompt"].tolist()] * 3, greedy, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [expected["greedy"].tolist()] * 3
