"""Faults that a process does not recover from, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.gpu

_BAD_PAGE = """
import asyncio, dataclasses
import numpy as np
from nf import AsyncLLM, SamplingParams
from nf.errors import EngineError

PARAMS = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)

async def main():
    async with AsyncLLM("nf-tiny", device="cuda", skip_tokenizer_init=True, max_num_batched_tokens=64) as llm:
        inputs = llm.loaded.executor._memory.inputs
        upload, steps = inputs.upload, 0

        def upload_a_page_that_is_not_there(batch, stream):
            nonlocal steps
            steps += 1
            if steps == 10:
                batch = dataclasses.replace(batch, kv_indices=np.full_like(batch.kv_indices, 1 << 26))
            upload(batch, stream)

        inputs.upload = upload_a_page_that_is_not_there

        async def outcome(index):
            try:
                async for _ in llm.generate([5, 6, index], PARAMS, request_id=str(index)):
                    pass
            except EngineError as error:
                return str(error)
            return "finished"

        for text in await asyncio.gather(*map(outcome, range(8))):
            print("in flight:", text)
        print("later:", await outcome(8))
    print("closed")

asyncio.run(main())
"""

_NO_CLOSE = """
import threading, time
from nf import LLM, SamplingParams

llm = LLM("nf-tiny", device="cuda", skip_tokenizer_init=True)
params = SamplingParams(temperature=0, max_tokens=900, ignore_eos=True)
threading.Thread(target=llm.generate, args=([[5, 6, 7]] * 64, params), daemon=True).start()
time.sleep(0.2)
print("ends")
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)


def test_an_illegal_address_ends_every_request_and_the_engine_but_lets_the_process_exit() -> None:
    done = run(_BAD_PAGE)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    assert all(line.startswith("in flight: ") and "CUDA" in line for line in lines[:8])
    assert lines[8].startswith("later: the engine has failed and takes no more requests")
    assert lines[9] == "closed"


def test_a_process_may_end_in_the_middle_of_a_step() -> None:
    done = run(_NO_CLOSE)
    assert (done.returncode, done.stdout) == (0, "ends\n"), done.stderr
