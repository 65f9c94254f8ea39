"""LLM and AsyncLLM on an executor of known tokens: what callers see, from threads, notebooks and event loops."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_doubles import EOS, MAX_MODEL_LEN, VOCAB_SIZE, FakeExecutor, byte_tokenizer, hashed_token, make_loaded

from nf.errors import EngineError, InputError
from nf.inputs import request_seed
from nf.llm import LLM, AsyncLLM
from nf.outputs import RequestOutput
from nf.sampling_params import SamplingParams

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
GREEDY = SamplingParams(temperature=0, seed=7, max_tokens=5)


def make_llm(executor: FakeExecutor | None = None, *, tokenizer: bool = True, **options: Any) -> LLM:
    text = byte_tokenizer(TEMPLATE) if tokenizer else None
    return LLM(make_loaded(executor or FakeExecutor(), tokenizer=text, **options))


def make_async(executor: FakeExecutor | None = None, *, tokenizer: bool = True, **options: Any) -> AsyncLLM:
    text = byte_tokenizer(TEMPLATE) if tokenizer else None
    return AsyncLLM(make_loaded(executor or FakeExecutor(), tokenizer=text, **options))


def tokens_after(prompt_len: int, seed: int = 7, count: int = 5) -> list[int]:
    return [hashed_token(seed, 0, prompt_len + i) for i in range(count)]


@pytest.mark.parametrize(
    ("prompts", "prompt_ids"),
    [
        ("Hi!", [[72, 105, 33]]),
        (["Hi!", "é"], [[72, 105, 33], [0xC3, 0xA9]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1, 2, 3], (4,)], [[1, 2, 3], [4]]),
        (np.array([1, 2, 3]), [[1, 2, 3]]),
        ([np.array([1, 2], np.uint8)], [[1, 2]]),
        ({"prompt_token_ids": [9]}, [[9]]),
        ([{"prompt_token_ids": [9]}, {"prompt": "Hi!"}, "A", [8]], [[9], [72, 105, 33], [65], [8]]),
    ],
)
def test_kinds_of_prompts(prompts: Any, prompt_ids: list[list[int]]) -> None:
    with make_llm() as llm:
        outputs = llm.generate(prompts, GREEDY)
    assert [output.prompt_token_ids for output in outputs] == prompt_ids
    for output in outputs:
        tokens = tokens_after(len(output.prompt_token_ids))
        assert output.outputs[0].token_ids == tokens
        assert output.outputs[0].text == bytes(tokens).decode()


def test_outputs_are_in_the_order_of_the_prompts() -> None:
    prompts = [f"prompt {i}" for i in range(20)]
    params = [SamplingParams(seed=i, max_tokens=1 + (7 * i) % 13) for i in range(20)]
    with make_llm(max_num_seqs=3) as llm:
        outputs = llm.generate(prompts, params)
    assert [output.prompt for output in outputs] == prompts
    for i, output in enumerate(outputs):
        length = len(prompts[i])
        assert output.outputs[0].token_ids == tokens_after(length, i, 1 + (7 * i) % 13)


def test_defaults_and_max_tokens_none() -> None:
    with make_llm() as llm:
        (short,) = llm.generate("abc")
        (long,) = llm.generate("abc", SamplingParams(max_tokens=None))
    assert len(short.outputs[0].token_ids) == 16
    assert len(long.outputs[0].token_ids) == MAX_MODEL_LEN - 3
    assert long.outputs[0].finish_reason == "length"


def test_chat_renders_the_template_and_adds_nothing() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    with make_llm() as llm:
        (one,) = llm.chat(messages, GREEDY)
        many = llm.chat([messages, messages], GREEDY, add_generation_prompt=False)
        (forged,) = llm.chat([{"role": "user", "content": "<|end|>"}], GREEDY)
    assert one.prompt == "[user]Hi>"
    assert type(one.prompt) is str
    assert one.prompt_token_ids == list(b"[user]Hi>")
    assert [output.prompt for output in many] == ["[user]Hi"] * 2
    assert EOS not in forged.prompt_token_ids


def test_seeds_make_runs_reproducible() -> None:
    def run(seed: int) -> list[list[int]]:
        with make_llm(seed=seed) as llm:
            outputs = [*llm.generate(["a", "b"]), *llm.generate("a")]
        return [output.outputs[0].token_ids for output in outputs]

    first = run(0)
    assert first == run(0)
    assert first != run(1)
    assert first[0] != first[2]  # the same prompt again is another request
    assert first[2] == [hashed_token(request_seed(0, 2), 0, 1 + i) for i in range(16)]


def test_streaming_is_cumulative_and_multi_byte_safe() -> None:
    data = "né 🙂 ok".encode()
    executor = FakeExecutor(lambda _seed, _index, position: data[position - 1] if position <= len(data) else EOS)

    async def main() -> list[RequestOutput]:
        async with make_async(executor) as llm:
            return [output async for output in llm.generate("x", SamplingParams(temperature=0, max_tokens=50))]

    outputs = asyncio.run(main())
    texts = [output.outputs[0].text for output in outputs]
    counts = [len(output.outputs[0].token_ids) for output in outputs]
    assert texts[-1] == data.decode()
    assert all(texts[-1].startswith(text) for text in texts)
    assert counts == sorted(counts)
    assert counts[-1] == len(data) + 1
    assert len(outputs) > 3
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]


def test_leaving_the_iteration_aborts_the_request() -> None:
    executor = FakeExecutor(manual=True)

    async def main() -> None:
        async with make_async(executor) as llm:
            stream = llm.generate("x", SamplingParams(max_tokens=50), request_id="left")
            executor.run(2)
            async for output in stream:
                assert not output.finished
                break
            await stream.aclose()
            assert llm.num_requests == 0
            executor.run(100)
            task = asyncio.create_task(anext(llm.generate("y", GREEDY)))
            assert (await task).outputs[0].token_ids

    asyncio.run(main())


def test_abort_by_id_while_queued_running_and_being_tokenized() -> None:
    executor = FakeExecutor(manual=True)
    tokenizing, go_on = threading.Event(), threading.Event()

    async def main() -> None:
        async with make_async(executor) as llm:

            async def last(prompt: str, request_id: str) -> RequestOutput:
                outputs = [output async for output in llm.generate(prompt, SamplingParams(max_tokens=40), request_id)]
                return outputs[-1]

            running = asyncio.create_task(last("x", "running"))
            executor.run(3)
            while llm.stats.output_tokens < 3:
                await asyncio.sleep(0.001)
            await llm.abort("running")
            output = await running
            assert output.outputs[0].finish_reason == "abort"
            assert len(output.outputs[0].token_ids) == 3

            encode = llm.inputs._tokenizer.encode  # type: ignore[union-attr]

            def slow_encode(*args: Any, **how: Any) -> list[int]:
                tokenizing.set()
                go_on.wait(10)
                return encode(*args, **how)

            llm.inputs._tokenizer.encode = slow_encode  # type: ignore[method-assign,union-attr]
            prepared = asyncio.create_task(last("x", "early"))
            while not tokenizing.is_set():
                await asyncio.sleep(0.001)
            await llm.abort("early")
            go_on.set()
            output = await prepared
            assert output.outputs[0].finish_reason == "abort"
            assert output.outputs[0].token_ids == []
            await llm.abort("never heard of")
            executor.run(1000)

    asyncio.run(main())


def test_tokenizing_does_not_block_the_event_loop() -> None:
    async def main() -> int:
        async with make_async() as llm:
            encode = llm.inputs._tokenizer.encode  # type: ignore[union-attr]

            def slow_encode(*args: Any, **how: Any) -> list[int]:
                time.sleep(0.1)
                return encode(*args, **how)

            llm.inputs._tokenizer.encode = slow_encode  # type: ignore[method-assign,union-attr]
            task = asyncio.ensure_future(anext(llm.generate("x", GREEDY)))
            turns = 0
            while not task.done():
                await asyncio.sleep(0.001)
                turns += 1
            return turns

    assert asyncio.run(main()) > 5


def test_ids_that_are_made_are_nobodys() -> None:
    async def main() -> None:
        async with make_async() as llm:
            named = [llm.generate("x", GREEDY, request_id=str(number)) for number in range(4)]
            made = [llm.generate("x", GREEDY) for _ in range(4)]
            outputs = await asyncio.gather(*map(anext, [*named, *made]))
            assert len({output.request_id for output in outputs}) == 8

    asyncio.run(main())


def test_duplicate_request_id() -> None:
    executor = FakeExecutor(manual=True)

    async def main() -> None:
        async with make_async(executor) as llm:
            stream = llm.generate("x", GREEDY, request_id="a")
            first = asyncio.ensure_future(anext(stream))
            while not llm.num_requests:
                await asyncio.sleep(0.001)
            with pytest.raises(InputError, match="request_id: 'a' is already in flight"):
                await anext(llm.generate("y", GREEDY, request_id="a"))
            executor.run(100)
            await first
            await stream.aclose()

    asyncio.run(main())


def test_request_that_never_fits_raises_from_async_and_is_an_output_of_the_list() -> None:
    huge = [1] * 40

    async def main() -> None:
        async with make_async(num_pages=8) as llm:
            with pytest.raises(InputError, match="KV pages"):
                await anext(llm.generate(huge, GREEDY))

    asyncio.run(main())
    with make_llm(num_pages=8) as llm:
        good, bad, also_good = llm.generate([[1, 2], huge, [3]], GREEDY)
    assert [completion.finish_reason for completion in bad.outputs] == ["error"]
    assert bad.error is not None
    assert "KV pages" in bad.error
    assert bad.finished
    assert good.outputs[0].token_ids == tokens_after(2)
    assert also_good.outputs[0].token_ids == tokens_after(1)


def test_inside_a_running_event_loop() -> None:
    async def notebook_cell() -> list[RequestOutput]:
        with make_llm() as llm:
            return llm.generate(["a", "bc"], GREEDY)

    outputs = asyncio.run(notebook_cell())
    assert [output.outputs[0].token_ids for output in outputs] == [tokens_after(1), tokens_after(2)]


def test_from_several_threads() -> None:
    with make_llm() as llm, ThreadPoolExecutor(8) as pool:
        prompts = [[[1] * (1 + (i + j) % 9) for j in range(5)] for i in range(8)]
        results = list(pool.map(lambda batch: llm.generate(batch, GREEDY), prompts))
    for batch, outputs in zip(prompts, results, strict=True):
        assert [o.outputs[0].token_ids for o in outputs] == [tokens_after(len(ids)) for ids in batch]


def test_executor_failure_reaches_the_caller() -> None:
    with make_llm(FakeExecutor(fail_at=2)) as llm:
        with pytest.raises(EngineError, match="illegal address") as failure:
            llm.generate(["a", "b"], GREEDY)
        assert isinstance(failure.value.__cause__, RuntimeError)
        with pytest.raises(EngineError, match="takes no more requests"):
            llm.generate("c", GREEDY)


def test_close_is_idempotent_and_final() -> None:
    executor = FakeExecutor()
    llm = make_llm(executor)
    llm.generate("a", GREEDY)
    llm.close()
    llm.close()
    assert executor.num_closes == 1
    with pytest.raises(EngineError, match="closed"):
        llm.generate("a", GREEDY)


def test_a_forked_child_is_refused_instead_of_waiting_forever() -> None:
    script = """
import os
from engine_doubles import FakeExecutor, make_loaded
from nf import LLM
llm = LLM(make_loaded(FakeExecutor()))
llm.generate([1])
if child := os.fork():
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(llm.generate([1])))
    llm.close()
else:
    try:
        llm.generate([1])
    except Exception as error:
        print(error, flush=True)
"""
    path = {"PYTHONPATH": str(Path(__file__).parents[1])}
    found = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | path, capture_output=True, text=True, timeout=30, check=True
    )
    assert found.stdout == "the engine belongs to the process that made it; make another after a fork\n0 1\n"


def test_close_ends_what_other_threads_wait_for() -> None:
    executor = FakeExecutor(manual=True)
    llm = make_llm(executor)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(llm.generate, ["a", "b"], SamplingParams(max_tokens=40))
        executor.run(4)
        while llm.stats.output_tokens < 8:
            time.sleep(0.001)
        threading.Timer(0.02, executor.run, [100]).start()
        llm.close()
        outputs = waiting.result(timeout=10)
    assert [output.outputs[0].finish_reason for output in outputs] == ["abort", "abort"]


def test_forgotten_llm_ends_its_threads() -> None:
    executor = FakeExecutor()
    before = threading.active_count()
    llm = make_llm(executor)
    llm.generate("a", GREEDY)
    del llm
    gc.collect()
    assert executor.num_closes == 1
    assert threading.active_count() < before + 1


def test_interrupt_aborts_the_requests_of_the_call() -> None:
    executor = FakeExecutor(manual=True)
    with make_llm(executor) as llm:
        executor.run(3)

        def interrupt() -> None:
            while llm.stats.output_tokens < 3:
                time.sleep(0.001)
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

        threading.Thread(target=interrupt).start()
        with pytest.raises(KeyboardInterrupt):
            llm.generate("a", SamplingParams(max_tokens=40))
        executor.run(100)
        (output,) = llm.generate("b", GREEDY)
        assert output.outputs[0].token_ids == tokens_after(1)
        assert llm.stats.output_tokens < 40


WRONG_PROMPTS = [
    ("", "prompts: is empty"),
    ([], "prompts: is empty"),
    (["a", ""], r"prompts\[1\]: is empty"),
    ([[1], []], r"prompts\[1\]: is empty"),
    ([[1, -1]], r"prompts\[0\]\[1\]: token id -1 is not in \[0, 257\)"),
    ([1, VOCAB_SIZE], r"prompts\[1\]: token id 257 is not in \[0, 257\)"),
    ([1, True], r"prompts\[1\]: must be a token id, not True"),
    ([1, "a"], r"prompts\[1\]: must be a token id, not 'a'"),
    ([[1.5]], r"prompts\[0\]\[0\]: must be a token id, not 1.5"),
    (["a", 5], r"prompts\[1\]: must be a text, a list of token ids or a mapping, not int"),
    (7, "prompts: must be a text, token ids, or a list of such, not int"),
    (b"ab", "prompts: must be a text, token ids, or a list of such, not bytes"),
    ([b"ab"], r"prompts\[0\]: must be a text, a list of token ids or a mapping, not bytes"),
    (np.array(5), "prompts: must be a text, token ids, or a list of such, not ndarray"),
    ([10**5000], r"prompts\[0\]: token id <int that cannot be shown> is not in \[0, 257\)"),
    ({"prompt_token_ids": []}, r"prompts.prompt_token_ids: is empty"),
    ({"prompt": [1]}, r"prompts.prompt: must be a text"),
    ({"tokens": [1]}, r"prompts: must hold prompt_token_ids or prompt, and holds \['tokens'\]"),
    ("a\ud800", "prompts: character 1 is half of a surrogate pair"),
    ([[1] * 60], r"prompts\[0\]: 60 prompt tokens \+ max_tokens 5 = 65, more than the model length 64"),
]


@pytest.mark.parametrize(("prompts", "message"), WRONG_PROMPTS)
def test_wrong_prompts_are_named_and_nothing_is_started(prompts: Any, message: str) -> None:
    executor = FakeExecutor()
    with make_llm(executor) as llm, pytest.raises(InputError, match=message):
        llm.generate(prompts, GREEDY)
    assert executor.batches == []


WRONG_PARAMS = [
    ({"max_tokens": 64}, r"1 prompt tokens \+ max_tokens 64 = 65, more than the model length 64"),
    ({"n": 5}, "^n: must be at most max_num_seqs = 4, not 5"),
    ({"stop_token_ids": [1, 257]}, r"^stop_token_ids: token id 257 is not in \[0, 257\)"),
    ({"allowed_token_ids": [300]}, r"^allowed_token_ids: token id 300"),
    ({"logit_bias": {257: 1.0}}, r"^logit_bias: token id 257"),
    ({"bad_words": [f"{i:04}" * 8 for i in range(64)]}, "^bad_words: are 4160 tokens; at most 4096 are accepted"),
    ({"max_tokens": None, "min_tokens": 64}, "^min_tokens: 64 exceeds the 63 tokens left"),
    ({"allowed_token_ids": [EOS], "min_tokens": 2}, "^allowed_token_ids: leaves no token"),
    ({"allowed_token_ids": [65], "bad_words": ["A"]}, "^allowed_token_ids: leaves no token"),
]


@pytest.mark.parametrize(("params", "message"), WRONG_PARAMS)
def test_params_that_do_not_suit_the_model(params: dict[str, Any], message: str) -> None:
    executor = FakeExecutor()
    with make_llm(executor) as llm:
        with pytest.raises(InputError, match=message):
            llm.generate("a", SamplingParams(**params))
        if message.startswith("^"):
            with pytest.raises(InputError, match=message.replace("^", r"^sampling_params\[1\]\.")):
                llm.generate(["a", "b"], [GREEDY, SamplingParams(**params)])
    assert executor.batches == []


def test_wrong_calls() -> None:
    with make_llm() as llm:
        with pytest.raises(InputError, match="sampling_params: holds 1 entries for 2 prompts"):
            llm.generate(["a", "b"], [GREEDY])
        with pytest.raises(InputError, match=r"sampling_params\[1\]: must be SamplingParams"):
            llm.generate(["a", "b"], [GREEDY, None])  # type: ignore[list-item]
        with pytest.raises(InputError, match="sampling_params: must be SamplingParams or a list"):
            llm.generate("a", 5)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="messages: must be a list"):
            llm.chat([], GREEDY)
        with pytest.raises(InputError, match=r"messages\[1\]"):
            llm.chat([[{"role": "user", "content": "a"}], []], GREEDY)
        with pytest.raises(InputError, match=r"messages\[0\]\.content: must be a text"):
            llm.chat([{"role": "user", "content": 5}], GREEDY)
        with pytest.raises(InputError, match="chat_template_kwargs: must not hold 'tools'"):
            llm.chat([{"role": "user", "content": "a"}], GREEDY, chat_template_kwargs={"tools": []})


def test_long_text_is_refused_without_tokenizing() -> None:
    with make_llm() as llm:
        llm._llm.inputs._tokenizer.encode = None  # type: ignore[union-attr,method-assign,assignment]
        least = -(-2000 // llm._llm.inputs._tokenizer.max_token_bytes)  # type: ignore[union-attr]
        message = f"^prompts: 2000 bytes of text are at least {least} tokens, more than the model length 64$"
        with pytest.raises(InputError, match=message):
            llm.generate("a" * 2000, GREEDY)


def test_without_a_tokenizer_only_token_ids_are_taken() -> None:
    with make_llm(tokenizer=False) as llm:
        (output,) = llm.generate([1, 2], SamplingParams(seed=7, max_tokens=5, logprobs=1))
        assert output.outputs[0].token_ids == tokens_after(2)
        assert output.outputs[0].text == ""
        assert output.outputs[0].logprobs is not None
        assert output.outputs[0].logprobs[0][0].decoded_token is None
        with pytest.raises(InputError, match="prompts: a text needs a tokenizer"):
            llm.generate("a", GREEDY)
        with pytest.raises(InputError, match="stop: needs a tokenizer"):
            llm.generate([1], SamplingParams(stop="x"))
        with pytest.raises(InputError, match="bad_words: needs a tokenizer"):
            llm.generate([1], SamplingParams(bad_words=["x"]))
        with pytest.raises(InputError, match="messages: a conversation needs a tokenizer"):
            llm.chat([{"role": "user", "content": "a"}], GREEDY)


def test_progress_bar_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with make_llm() as llm:
        llm.generate(["a", "b"], GREEDY, use_tqdm=True)
        llm.generate(["a", "b"], GREEDY, use_tqdm=False)
    assert threading.active_count() == before
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_seqs": 4}, "max_seqs: is not an option; did you mean max_num_seqs"),
        ({"device": "tpu"}, "device: must be one of auto, cpu, cuda, not 'tpu'"),
        ({"dtype": "int8"}, "dtype: must be one of auto, bfloat16, float16, float32, not 'int8'"),
        ({"tensor_parallel_size": 2}, "tensor_parallel_size: must be 1, a model runs on one device, not 2"),
        ({"max_num_seqs": 0}, "max_num_seqs: must be an integer of at least 1, not 0"),
        ({"page_size": 2.5}, "page_size: must be an integer of at least 1, not 2.5"),
        ({"seed": -1}, "seed: must be an integer of at least 0"),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization: must be in \(0, 1\]"),
        ({"preemption": "drop"}, "preemption: must be one of auto, swap, recompute"),
        ({"plan": 5}, "plan: must be the name of a plan or of a JSON file"),
        ({"page_size": 10**30}, "page_size: must be at most 2147483647, not 1000"),
        ({"seed": 10**5000}, "seed: must be at most 18446744073709551615, not <int that cannot be shown>"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    for kind in (LLM, AsyncLLM):
        with pytest.raises(InputError, match=message):
            kind(str(Path("no") / "such" / "model"), **options)
