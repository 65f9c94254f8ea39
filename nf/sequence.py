"""Sequence and RequestState: what a request has produced so far, when it ends, and the output made of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as SequenceOf
from dataclasses import fields
from operator import attrgetter
from typing import TYPE_CHECKING

from nf.errors import EngineError
from nf.executors.base import TopLogprobs
from nf.outputs import CompletionOutput, FinishReason, Logprob, RequestMetrics, RequestOutput, TokenLogprobs
from nf.request import Request
from nf.text.detokenizer import IncrementalDetokenizer, StopStrings

if TYPE_CHECKING:
    from nf.text.tokenizer import Tokenizer

_metrics_values = attrgetter(*(field.name for field in fields(RequestMetrics)))  # for copies; replace() is slow

PROMPT_CONTEXT = 8
"""Tokens of the prompt that a decoder is given as context: some characters are made of four."""


class Text:
    """The text of one sequence: tokens in, text that may be shown out, stop strings cut."""

    def __init__(self, tokenizer: Tokenizer, request: Request) -> None:
        params = request.params
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        # The text continues the prompt's: without it, some tokenizers drop the space before the first word.
        self._detokenizer.add(request.prompt_token_ids[-PROMPT_CONTEXT:].tolist())
        stop = tuple(params.stop or ())
        self._stop = StopStrings(stop, include=params.include_stop_str_in_output) if stop else None
        self.shown = ""

    @property
    def stop_string(self) -> str | None:
        """The stop string that was met; nothing is shown after it."""
        return self._stop.matched if self._stop else None

    def add(self, token_ids: SequenceOf[int], *, watch: bool) -> None:
        """Append tokens; stop strings are looked for only in what is added under ``watch``."""
        self._show(self._detokenizer.add(token_ids), watch)

    def finish(self, *, watch: bool) -> None:
        """Show what was held back: an incomplete character, the beginning of a stop string that never came."""
        self._show(self._detokenizer.finish(), watch)
        if self._stop and self._stop.matched is None:
            self.shown += self._stop.finish()

    def _show(self, text: str, watch: bool) -> None:
        if self.stop_string is None:
            self.shown += self._stop.add(text) if self._stop and watch else text


class Sequence:
    """One continuation of a request, as far as its tokens have come back from the executor.

    Text is made late: when an output is asked for, or with every token if a stop string may end the sequence. So
    running sequences that nobody looks at cost the host no detokenization between two steps.
    """

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None) -> None:
        self.index = index
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self._request = request
        self._max_tokens = request.params.max_tokens
        self._stop_token_ids = request.stop_token_ids
        self._has_stop_strings = bool(request.params.stop)
        self._logprobs: list[TokenLogprobs] | None = None if request.params.logprobs is None else []
        self._cumulative_logprob = 0.0
        self._tokenizer = tokenizer if request.params.detokenize else None
        self._text: Text | None = None
        self._num_texted = 0  # tokens already given to the text
        self._text_finished = False

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    def add(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        """Take the next token; ``finish_reason`` is set if it is the last."""
        self.token_ids.append(token_id)
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(logprobs)
            self._cumulative_logprob += logprobs[token_id].logprob
        if token_id in self._stop_token_ids:
            self.finish("stop", token_id if token_id in (self._request.params.stop_token_ids or ()) else None)
        elif self._has_stop_strings and (stop_string := self._update_text()) is not None:
            self.finish("stop", stop_string)
        elif len(self.token_ids) == self._max_tokens:
            self.finish("length")

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """End the sequence; the rest of its text may still hold a stop string, which then is the reason."""
        self.finish_reason, self.stop_reason = reason, stop_reason
        if self._has_stop_strings and reason in ("stop", "length"):
            stop_string = self._update_text()
            if stop_string is not None:
                self.finish_reason, self.stop_reason = "stop", stop_string

    def fail(self) -> None:
        """End the sequence as failed and leave its text as it is: making it may be what failed."""
        self.finish_reason, self.stop_reason = "error", None
        self._text_finished = True

    def output(self) -> CompletionOutput:
        """Everything so far, as a copy that later tokens do not change."""
        self._update_text()
        return CompletionOutput(
            index=self.index,
            text=self._text.shown if self._text else "",
            token_ids=self.token_ids.copy(),
            cumulative_logprob=None if self._logprobs is None else self._cumulative_logprob,
            logprobs=None if self._logprobs is None else self._logprobs.copy(),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )

    def _update_text(self) -> str | None:
        """Give the text the tokens it has not seen; return the stop string met, if any."""
        if self._tokenizer is None or self._text_finished:
            return self._text.stop_string if self._text else None
        if self._text is None:
            self._text = Text(self._tokenizer, self._request)
        params = self._request.params
        visible = len(self.token_ids)
        if self._ended_by_stop_token() and not params.include_stop_str_in_output:
            visible -= 1
        # Stop strings may not end a text before min_tokens, just as EOS may not: what came before is not searched.
        unwatched = max(min(params.min_tokens, visible), self._num_texted)
        if self._num_texted < unwatched:
            self._text.add(self.token_ids[self._num_texted : unwatched], watch=False)
        if unwatched < visible:
            self._text.add(self.token_ids[unwatched:visible], watch=True)
        self._num_texted = visible
        if self.finished:
            self._text.finish(watch=visible > params.min_tokens)
            self._text_finished = True
        return self._text.stop_string

    def _ended_by_stop_token(self) -> bool:
        ended = self.finish_reason == "stop" and not isinstance(self.stop_reason, str)
        return ended and self.token_ids[-1] in self._request.stop_token_ids


class RequestState:
    """A request in flight: its sequences, its times, and the task that waits for news of it."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None, *, stream: bool) -> None:
        self.request = request
        self.sequences = [Sequence(request, index, tokenizer) for index in range(request.params.n)]
        self.metrics = RequestMetrics(arrival_time=request.arrival_time)
        self.error: str | None = None
        self.scheduled = set(range(request.params.n))  # indices of the sequences that the scheduler still has
        self._tokenizer = tokenizer if request.params.detokenize else None
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None
        if request.params.prompt_logprobs is not None:
            self._prompt_logprobs = [None] * request.prompt_len
        self._prompt_token_ids: list[int] = request.prompt_token_ids.tolist()
        self.delivered = False  # whether the last output has been given out
        self.stream = stream
        self._news = asyncio.Event()
        self._engine_failure: BaseException | None = None

    @property
    def finished(self) -> bool:
        return all(sequence.finished for sequence in self.sequences)

    def logprobs_of(self, token_id: int, logprobs: TopLogprobs, row: int) -> TokenLogprobs | None:
        """What the request wants to know of the token that row ``row`` of a step sampled."""
        most = self.request.params.logprobs
        return None if most is None else self._read_logprobs(logprobs, row, token_id, most)

    def add_prompt_logprobs(self, position: int, logprobs: TopLogprobs, row: int) -> None:
        """Take the log-probability of the prompt token at ``position``; recomputing a prompt may report it twice."""
        most = self.request.params.prompt_logprobs
        assert self._prompt_logprobs is not None
        assert most is not None
        token_id = int(self.request.prompt_token_ids[position])
        self._prompt_logprobs[position] = self._read_logprobs(logprobs, row, token_id, most)

    def fail(self, error: str) -> None:
        """End every sequence as failed, for the reason that ``error`` says in one sentence."""
        self.error = self.error or error
        for sequence in self.sequences:
            sequence.fail()

    def fail_with_engine(self, cause: BaseException) -> None:
        """The engine failed: whoever waits gets an EngineError with this cause."""
        self._engine_failure = cause
        self._news.set()

    def notify(self) -> None:
        """Wake whoever waits, if there is something for them to see."""
        if self.stream or not self.scheduled:
            self._news.set()

    async def news(self) -> None:
        """Wait until there is something new to see.

        Raises:
            EngineError: the engine failed while the request was in flight.
        """
        await self._news.wait()
        self._news.clear()
        if self._engine_failure is not None:
            raise EngineError(f"the engine failed: {self._engine_failure}") from self._engine_failure

    def output(self) -> RequestOutput:
        """Everything so far."""
        finished = self.delivered = self.finished
        return RequestOutput(
            request_id=self.request.request_id,
            prompt=self.request.prompt,
            prompt_token_ids=self._prompt_token_ids,
            outputs=[sequence.output() for sequence in self.sequences],
            finished=finished,
            metrics=RequestMetrics(*_metrics_values(self.metrics)),
            prompt_logprobs=self._prompt_logprobs,
            error=self.error,
        )

    def _read_logprobs(self, top: TopLogprobs, row: int, token_id: int, most: int) -> TokenLogprobs:
        def logprob(token_id: int, value: float, rank: int) -> Logprob:
            return Logprob(value, rank, self._tokenizer.token_text(token_id) if self._tokenizer else None)

        found = {token_id: logprob(token_id, float(top.logprobs[row]), int(top.ranks[row]))}
        top_ids, top_logprobs = top.top_ids[row, :most].tolist(), top.top_logprobs[row, :most].tolist()
        for rank, (top_id, value) in enumerate(zip(top_ids, top_logprobs, strict=True), start=1):
            if top_id >= 0 and top_id not in found:
                found[top_id] = logprob(top_id, value, rank)
        return found
