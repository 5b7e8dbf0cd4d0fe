"""The engine from within an event loop: a stream for each request, and a task that steps while there is work."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
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
    """Calls ``step`` for as long as that says there is more to do: a task in each event loop that asked for it.

    A loop may end while others wait for their tokens, so none drives for another. The steps run in threads.
    """

    def __init__(self, step: Callable[[], bool]) -> None:
        self._step = step
        self._tasks: dict[asyncio.AbstractEventLoop, asyncio.Task[None]] = {}
        self._woken: set[asyncio.AbstractEventLoop] = set()

    def wake(self) -> None:
        """There is work. Called from within an event loop."""
        loop = asyncio.get_running_loop()
        for closed in [other for other in self._tasks if other.is_closed()]:
            self._tasks.pop(closed, None)
            self._woken.discard(closed)
        self._woken.add(loop)
        if loop not in self._tasks or self._tasks[loop].done():
            self._tasks[loop] = loop.create_task(self._run(loop))

    async def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        with ThreadPoolExecutor(1, "mage-ray-engine") as thread:
            more = True
            while more or loop in self._woken:
                self._woken.discard(loop)
                try:
                    more = await loop.run_in_executor(thread, self._step)
                except Exception:  # every request that ran has been told
                    more = True
