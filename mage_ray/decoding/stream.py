"""The engine from within an event loop: a stream for each request, and a task that steps while there is work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Generation, Token
from mage_ray.decoding.scheduler import Running


class Stream:
    """The tokens of one request, as they come: ``async for token in stream``. The last one says why it ended.

    A request that fails raises its error from the iteration. Leave early by ``cancel()`` or by way of
    ``async with engine.submit(request) as stream``; a task that is cancelled while it waits for a token cancels too.
    """

    running: Running

    def __init__(self, cancel: Callable[[Running], None], change: Callable[[Running, Plan, bool], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Token] = asyncio.Queue()
        self._cancel, self._change = cancel, change
        self._ended = False

    def emit(self, token: Token) -> None:
        """Hand over a token, from any thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, token)

    def cancel(self) -> None:
        """End the request; what it frees is free by the next step at the latest."""
        self._cancel(self.running)

    def change(self, plan: Plan, recompute: bool = True) -> None:
        """Go on with another plan, as ``Engine.change`` does. Raises FieldError when the plan can't run here."""
        self._change(self.running, plan, recompute)

    async def result(self) -> Generation:
        """All that is left to come, as one. Raises the request's error."""
        return Generation.of([token async for token in self])

    def __aiter__(self) -> Stream:
        return self

    async def __anext__(self) -> Token:
        if self._ended:
            raise StopAsyncIteration
        try:
            token = await self._queue.get()
        except asyncio.CancelledError:
            self.cancel()
            raise
        self._ended = token.finished is not None
        if token.error is not None:
            raise token.error
        return token

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class Driver:
    """Calls ``step`` in a thread of its own for as long as that says there is more to do."""

    def __init__(self, step: Callable[[], bool]) -> None:
        self._step = step
        self._task: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = False

    def wake(self) -> None:
        """There is work. Called from within an event loop."""
        self._woken = True
        loop = asyncio.get_running_loop()
        if self._task is None or self._task.done() or (self._loop is not None and self._loop.is_closed()):
            self._loop, self._task = loop, loop.create_task(self._run())

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "mage-ray-engine") as thread:
            more = True
            while more or self._woken:
                self._woken = False
                try:
                    more = await loop.run_in_executor(thread, self._step)
                except Exception:  # every request that ran has been told
                    more = True
