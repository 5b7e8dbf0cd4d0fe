"""Decoder: a gang from its owner's side. It knows every request's tokens so far, so that a gang that lost a member, or
all of them, is made whole and each request goes on where it was, with the tokens that it would have had."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from deployments.gang import Actors, Lost, new_name
from deployments.logs import LOGGER
from deployments.metrics import Metrics
from deployments.options import Options
from deployments.workers import Asked, Batch, Failed, Part, Piece, WorkerFacts
from mage_ray.decoding.engine import EngineFailed
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Request, Token
from mage_ray.errors import UserError

_TRIES = 3
"""A request that held rows in so many failures without a token more is taken for the cause."""
_STARTS = 5
"""A gang that fails that often before it has come together is given up."""


class Unavailable(Exception):
    """There is no gang at the moment."""


@dataclass(eq=False)
class Live:
    """A request on its way. ``answer`` are its tokens so far; its reader takes them from ``queue``."""

    id: str
    request: Request
    queue: asyncio.Queue[Piece]
    answer: list[int] = field(default_factory=list)
    tried_at: int = -1
    tries: int = 0

    def take(self, piece: Piece) -> None:
        """Its next token, or its end."""
        if piece.token.id >= 0:
            self.answer.append(piece.token.id)
        self.queue.put_nowait(piece)

    def again(self) -> bool:
        """Whether it may be tried once more."""
        self.tries = self.tries + 1 if self.tried_at == len(self.answer) else 1
        self.tried_at = len(self.answer)
        return self.tries <= _TRIES

    @property
    def rest(self) -> Request:
        """What is left of it."""
        return replace(self.request, answer=tuple(self.answer))


class Decoder:
    """Owns a gang's actors, which ``start`` makes. ``asked`` is called for changes that other replicas were asked for.

    Used within one event loop.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        options: Options,
        metrics: Metrics,
        asked: Callable[[str, dict[str, Any]], Awaitable[Any]],
    ) -> None:
        self.name = new_name()
        self._actors = Actors(self.name, parts, options)
        self._options, self._metrics, self._asked = options, metrics, asked
        self._live: dict[str, Live] = {}
        self._coming = 0
        self._ready = asyncio.Event()
        self._broken: UserError | None = None
        self._facts: list[WorkerFacts] = []
        self._suspects: Container[str] | None = None  # those that may have made the gang fail; None: all
        self._tasks: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Returns when the gang answers requests. Raises UserError when it never will."""
        self._background(self._supervise())
        await self._ready.wait()
        if self._broken is not None:
            raise self._broken

    @property
    def ready(self) -> bool:
        """Whether requests are answered now."""
        return self._ready.is_set() and self._broken is None

    @property
    def broken(self) -> UserError | None:
        """Why there will be no gang, however long one waits."""
        return self._broken

    @property
    def facts(self) -> WorkerFacts:
        """The leader's, or the last one's while it is replaced. Only once the gang has answered requests."""
        return self._facts[0]

    @property
    def live(self) -> int:
        """Requests on their way."""
        return len(self._live)

    async def submit(self, id: str, request: Request, queue: asyncio.Queue[Piece]) -> Live:
        """Start a request; its tokens come into the queue up to the last, which may be an error.

        Raises FieldError or Busy, as the engine does, or Unavailable.
        """
        try:
            await asyncio.wait_for(self._ready.wait(), self._options.queue_seconds)
        except TimeoutError:
            raise Unavailable("the workers are being replaced") from None
        if self._broken is not None:
            raise Unavailable(str(self._broken))
        live = self._live[id] = Live(id, request, queue)
        try:
            await self._actors.leader.submit.remote(id, request)
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, EngineFailed):
                self._live.pop(id, None)
                raise (error.cause if isinstance(error.cause, UserError) else error) from None
        except ray.exceptions.RayError:
            pass
        except BaseException:
            self.cancel(live)
            raise
        # Where the leader, or its engine, is gone: what is live is told to the next one.
        return live

    def cancel(self, live: Live) -> None:
        """End a request, if it hasn't ended. Its slots are free by the next step."""
        if self._live.pop(live.id, None) is not None and self._ready.is_set():
            self._actors.leader.cancel.remote([live.id])

    async def change(self, id: str, plan: Plan, recompute: bool) -> bool:
        """Give a request another plan from its next token on; whether it was there. Raises FieldError."""
        live = self._live.get(id)
        if live is None:
            return False
        await self._ready.wait()
        if self._live.get(id) is not live:  # it has ended meanwhile, perhaps with the gang
            return False
        try:
            if not await self._actors.leader.change.remote(id, plan, recompute):
                return False
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, EngineFailed):
                raise (error.cause if isinstance(error.cause, UserError) else error) from None
        except ray.exceptions.RayError:
            pass
        # Where the leader, or its engine, is gone: it goes on under the new plan when there is one again.
        live.request = replace(live.request, plan=plan, schedule=())
        return True

    @contextmanager
    def coming(self) -> Iterator[None]:
        """Within it requests are made that this gang will get: until then it isn't drained."""
        self._coming += 1
        try:
            yield
        finally:
            self._coming -= 1

    async def drained(self) -> None:
        """Returns when no request is on its way."""
        while self._live or self._coming:
            await asyncio.sleep(0.1)

    def close(self) -> None:
        """End the actors, with whatever runs."""
        self._ready.clear()
        for task in self._tasks:
            task.cancel()
        self._actors.end()
        self._metrics.closed(self.name)

    async def _supervise(self) -> None:
        failures = 0
        while True:
            try:
                await self._actors.together()
                self._facts = self._actors.facts
                await self._replay()
                failures = 0
                await self._listen()
            except UserError as error:
                self._give_up(error)
                return
            except Exception as error:
                # Whatever it is, those who wait for their tokens must not wait in vain.
                self._ready.clear()
                reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                LOGGER.warning("the gang is made anew", extra={"gang": self.name, "live": self.live, "reason": reason})
                self._metrics.rebuilt()
                await self._actors.sift()
                await asyncio.sleep(0.2 * 2**failures)
                failures += 1
                if failures == _STARTS:
                    self._give_up(UserError(f"the workers can't be started: {reason}"))
                    return

    def _give_up(self, error: UserError) -> None:
        LOGGER.error("the gang is given up", extra={"gang": self.name, "reason": str(error)})
        self._broken = error
        for live in list(self._live.values()):
            self._take(Piece(live.id, Token.end("error", error=error)))
        self._ready.set()

    async def _replay(self) -> None:
        """Tell a new leader what is live, and nothing of what is cancelled meanwhile; the gang is ready then."""
        told: list[str] = []
        for live in list(self._live.values()):
            if live.id not in self._live:
                continue
            if (self._suspects is None or live.id in self._suspects) and not live.again():
                self._take(Piece(live.id, Token.end("error", error=UserError("the engine failed at this request"))))
                continue
            told.append(live.id)
            try:
                await self._actors.leader.submit.remote(live.id, live.rest, always=True)
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, UserError):
                    raise
                # Its own fault, which must not end the others.
                self._take(Piece(live.id, Token.end("error", error=error.cause)))
        if gone := [id for id in told if id not in self._live]:
            self._actors.leader.cancel.remote(gone)
        self._suspects = None
        self._ready.set()

    async def _listen(self) -> None:
        events = self._actors.leader.events.options(num_returns="streaming").remote()
        while True:
            coming = asyncio.ensure_future(anext(events))
            while not (await asyncio.wait({coming}, timeout=self._options.patience))[0]:
                if await self._actors.sift():
                    coming.cancel()
                    raise Lost("a worker does not answer")
            batch: Batch = await coming.result()
            self._metrics.stands(self.name, batch, [said.positions for said in self._facts])
            for event in batch.events:
                if isinstance(event, Failed):
                    self._suspects = event.ids
                    raise Lost(event.reason)
                if isinstance(event, Asked):
                    self._background(self._answer(self._actors.leader, event))
                else:
                    self._take(event)

    async def _answer(self, leader: Any, asked: Asked) -> None:
        await leader.answer.remote(asked.number, await self._asked(asked.id, asked.change))

    def _take(self, piece: Piece) -> None:
        live = self._live.get(piece.id)
        if live is None:
            return
        if piece.token.finished is not None:
            del self._live[piece.id]
        live.take(piece)

    def _background(self, work: Awaitable[None]) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[assignment]
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
