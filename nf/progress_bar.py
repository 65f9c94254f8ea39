"""progress_bar: finished requests and tokens per second while a synchronous call runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nf.outputs import RequestOutput


@contextmanager
def progress_bar(num_requests: int, *, show: bool) -> Iterator[Callable[[RequestOutput], None]]:
    """A function to call with each finished output; the bar is drawn on stderr, and only on a terminal."""
    if not show:
        yield lambda _: None
        return
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc,unused-ignore]
        monitor_interval = 0  # the thread that redraws stalled bars would outlive the call

    start, tokens_in, tokens_out = time.monotonic(), 0, 0
    with Bar(total=num_requests, unit=" requests", dynamic_ncols=True, disable=None) as bar:

        def finished(output: RequestOutput) -> None:
            nonlocal tokens_in, tokens_out
            tokens_in += len(output.prompt_token_ids)
            tokens_out += sum(len(completion.token_ids) for completion in output.outputs)
            seconds = max(time.monotonic() - start, 1e-9)
            bar.set_postfix_str(
                f"{tokens_in / seconds:,.0f} tokens/s in, {tokens_out / seconds:,.0f} out", refresh=False
            )
            bar.update()

        yield finished
