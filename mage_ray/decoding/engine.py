"""The loop: admit, prefill a chunk, feed every row its token, combine the rows of each request, draw, and go on."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mage_ray.decoding.change import change_plan
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Generation, Request, Token, check_length
from mage_ray.decoding.rows import Rows
from mage_ray.decoding.scheduler import Running, Scheduler
from mage_ray.decoding.step import Step
from mage_ray.decoding.stream import Driver, Stream
from mage_ray.decoding.text import Decode, TextStream
from mage_ray.errors import FieldError, UserError


class Busy(UserError):
    """The queue is full; the same request may be accepted later."""


class EngineFailed(UserError):
    """The engine could not go on, through no fault of the request; another one can, from the tokens that are there."""


@dataclass(frozen=True)
class Load:
    """Requests that run and that wait; the rows of those that run, and the tokens that they hold, by the rows' home."""

    running: int
    waiting: int
    rows: int
    tokens: Mapping[int, int]


class Engine:
    """Decodes any mix of plans in one continuous batch over one runner: requests join and leave at every step.

    ``stop`` holds the token ids that end a request; ``decode`` turns tokens into text, which stop strings need.
    ``chunk`` bounds the prompt tokens that are computed between two steps of running requests (default: 128 on a CPU,
    1024 on a GPU), ``waiting`` the number of requests that may wait for slots.

    A request's tokens depend on itself alone, up to the rounding of a batched forward, and what goes wrong with it ends
    it alone. All methods may be called from any thread.
    """

    def __init__(
        self,
        runner: Rows,
        stop: Sequence[int],
        decode: Decode | None = None,
        *,
        chunk: int | None = None,
        waiting: int | None = None,
    ) -> None:
        self.runner = runner
        self._decode = decode
        self._limit = waiting
        self._scheduler = Scheduler(runner, chunk or (1024 if runner.model.device.type == "cuda" else 128))
        self._step = Step(runner, frozenset(stop))
        # Whoever holds the lock may touch what runs; others leave word, which the next step reads first.
        self._lock = threading.Lock()
        self._inbox: deque[Callable[[], None]] = deque()
        self.steps = 0
        """Rounds of the loop so far."""
        self._driver = Driver(self.step)

    def submit(self, request: Request, *, always: bool = False) -> Stream:
        """Start a request from within an event loop; ``async for token in stream`` gives its tokens as they come.

        Raises FieldError for a request that can't run here, Busy when the queue is full; one that was accepted before,
        and goes on, may wait ``always``.
        """
        if not always and self._limit is not None and (queue := self._scheduler.queue(request.plan.rows)) > self._limit:
            raise Busy(f"queue: got {queue} waiting requests, allowed: at most {self._limit}")
        stream = Stream(self.cancel, self.change)
        stream.running = self._add(request, stream.emit)
        self._driver.wake()
        return stream

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """All requests, in order. One that can't run, or not on, ends with its error; the others are not touched."""
        tokens: list[list[Token]] = [[] for _ in requests]
        for index, token in self.events(requests):
            tokens[index].append(token)
        return [Generation.of(drawn) for drawn in tokens]

    def stream(self, request: Request) -> Iterator[Token]:
        """The tokens of one request, as they are drawn; closing the iterator cancels it. Raises its error."""
        for _, token in self.events([request]):
            if token.error is not None:
                raise token.error
            yield token

    def events(self, requests: Sequence[Request]) -> Iterator[tuple[int, Token]]:
        """Every token of every request as (index of the request, token), as they are drawn.

        Closing the iterator cancels what still runs.
        """
        tokens: deque[tuple[int, Token]] = deque()
        running: list[Running] = []
        left = len(requests)
        for index, request in enumerate(requests):
            try:
                running.append(self._add(request, lambda token, index=index: tokens.append((index, token))))  # type: ignore[misc]
            except UserError as error:
                tokens.append((index, Token.end("error", error=error)))
        try:
            while left:
                while tokens:
                    index, token = tokens.popleft()
                    left -= token.finished is not None
                    yield index, token
                if left:
                    self.step()
        finally:
            for unfinished in running:
                if not unfinished.ended:
                    self.cancel(unfinished)

    def cancel(self, running: Running) -> None:
        """End a request. Its slots are free at once, or, while a step runs, when that ends."""
        self._leave_word(lambda: None if running.ended else self._emit(running, Token.end("cancelled")))

    def change(self, running: Running, plan: Plan, recompute: bool = True) -> None:
        """Go on with another plan from the next step on.

        With ``recompute``, as if the text so far had been the prompt of a new request (exact). Without, the new rows
        go on from the keys and values that the old ones made (at once, and approximate); where they need more slots
        than are free, they are recomputed all the same. The rest of the request's schedule is dropped. Raises
        FieldError when the plan can't run here.
        """
        self._check_plan(plan, "plan")
        check_length(len(running.request.prompt), running.request.sampling.max_new_tokens, plan, self.runner.length)

        def word() -> None:
            running.schedule = ()
            change_plan(running, plan, recompute, self._scheduler, self.runner)

        self._leave_word(word)

    def step(self) -> bool:
        """One round of the loop; whether there is more to do. What fails here ends every request that runs."""
        with self._lock:
            self._read_inbox()
            self.steps += 1
            scheduler = self._scheduler
            try:
                scheduler.admit()
                scheduler.prefill()
                for running, token in self._step.run([r for r in scheduler.running if r.ready]):
                    self._emit(running, token)
                self._follow_schedules()
            except Exception as error:
                reason = EngineFailed(f"the engine failed: {type(error).__name__}")
                ended = list(scheduler.running)
                # All have ended before the first is told, so that whoever hears of it can tell which they were.
                for running in ended:
                    scheduler.remove(running, wipe=True)
                for running in ended:
                    running.emit(Token.end("error", error=reason))
                raise
            return bool(scheduler.running or scheduler.waiting or self._inbox)

    def close(self, seconds: float) -> bool:
        """End all requests; the runner may then be another engine's. False where a step doesn't end in that time."""
        if not self._lock.acquire(timeout=seconds):
            return False
        try:
            for running in [*self._scheduler.running, *self._scheduler.waiting]:
                self._emit(running, Token.end("cancelled"))
        finally:
            self._lock.release()
        return True

    def _follow_schedules(self) -> None:
        for running in list(self._scheduler.running):
            while running.schedule and running.schedule[0][0] <= running.generated:
                (_, plan), *rest = running.schedule
                running.schedule = tuple(rest)
                change_plan(running, plan, True, self._scheduler, self.runner)

    @property
    def load(self) -> Load:
        """What it does now, as far as one can tell beside a step that runs."""
        running = list(self._scheduler.running)
        rows = [row for one in running for row in list(one.rows)]
        tokens: Counter[int] = Counter()
        for row in rows:
            tokens[row.row.home] += len(row.tokens)
        return Load(len(running), len(self._scheduler.waiting), len(rows), tokens)

    def check(self, request: Request) -> None:
        """Raises FieldError for a request that can never run here."""
        runner, sampling = self.runner, request.sampling
        if not request.prompt:
            raise FieldError("prompt", "no tokens", "1 or more")
        vocabulary = runner.model.config.get_text_config().vocab_size
        for field, tokens in (("prompt", request.prompt), ("answer", request.answer)):
            if not all(isinstance(token, int) for token in tokens):
                raise FieldError(field, "tokens that are no integers", "token ids")
            if min(tokens, default=0) < 0 or max(tokens, default=0) >= vocabulary:
                raise FieldError(field, "unknown tokens", f"token ids 0 to {vocabulary - 1}")
        if sampling.stop and self._decode is None:
            raise FieldError("stop", list(sampling.stop), "none: this engine has no tokenizer")
        request.check_length(runner.length)
        for field, plan in (("plan", request.plan), *((f"schedule.{at}", plan) for at, plan in request.schedule)):
            self._check_plan(plan, field)

    def _check_plan(self, plan: Plan, field: str) -> None:
        for row in plan.rows:
            self.runner.check(row)
        if not self.runner.holds(plan.rows):
            budget = f"at most {self.runner.rows} ({self.runner.memory.total / 2**20:.0f} MiB of keys and values)"
            raise FieldError(field, f"{len(plan.rows)} rows", budget)

    def _add(self, request: Request, emit: Callable[[Token], None]) -> Running:
        self.check(request)
        running = Running(
            request=request,
            emit=emit,
            plan=request.plan_at(len(request.answer)),
            history=[*request.prompt, *request.answer],
            generated=len(request.answer),
            schedule=tuple((at, plan) for at, plan in request.schedule if at > len(request.answer)),
            text=TextStream(self._decode, request.sampling.stop) if self._decode is not None else None,
        )
        if running.text is not None:
            for token in request.answer:
                running.text.add(token)
        self._scheduler.waiting.append(running)
        return running

    def _emit(self, running: Running, token: Token) -> None:
        if token.finished is not None:
            # What an error left in a slot may not be finite, and would reach the next one there.
            self._scheduler.remove(running, wipe=token.finished == "error")
        running.emit(token)

    def _leave_word(self, word: Callable[[], None]) -> None:
        self._inbox.append(word)
        if self._lock.acquire(blocking=False):
            try:
                self._read_inbox()
            finally:
                self._lock.release()

    def _read_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
