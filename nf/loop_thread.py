"""LoopThread: an event loop on a thread of its own, so that synchronous callers can use asynchronous code."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from nf.errors import EngineError

T = TypeVar("T")


class LoopThread:
    """Runs coroutines for other threads, also for one that has a running event loop of its own (a notebook)."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._main, name=name, daemon=True)
        self._lock = threading.Lock()  # between handing in a coroutine and stopping
        self._stopping = False
        self._process = os.getpid()  # a forked child has no such thread
        self._thread.start()

    def check_open(self) -> None:
        """Raise EngineError if nothing can run here any more."""
        if self._process != os.getpid():
            raise EngineError("the engine belongs to the process that made it; make another after a fork")
        if self._stopping:
            raise EngineError("the engine is closed")

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run to the end and return the result; interrupting the caller (Ctrl-C) cancels the coroutine.

        Raises:
            EngineError: the thread has been stopped, or this is a forked process.
        """
        with self._lock:
            try:
                self.check_open()
            except EngineError:
                coroutine.close()
                raise
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def stop(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run ``last()``, let the other coroutines end, stop the thread; idempotent.

        Called on the thread itself (a garbage collection may run anywhere), it only starts all that.
        """
        if self._process != os.getpid():
            return
        with self._lock:
            if not self._stopping:
                self._stopping = True
                self._loop.call_soon_threadsafe(lambda: self._loop.create_task(self._stop(last)))
        if threading.current_thread() is not self._thread:
            self._thread.join()

    async def _stop(self, last: Callable[[], Coroutine[Any, Any, None]]) -> None:
        try:
            await last()
        finally:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            if others:
                await asyncio.wait(others)
            await self._loop.shutdown_asyncgens()
            self._loop.stop()

    def _main(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
        finally:
            self._loop.close()
