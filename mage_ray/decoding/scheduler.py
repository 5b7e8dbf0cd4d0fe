"""Who runs: requests wait in order, take slots when all their rows fit, and are computed up to their last token.

A request's ``history`` is its prompt and what it has generated. Each of its rows holds some beginning of that; what is
missing, but for the last token, which a step feeds, is the row's *lag*. New requests, rows that a changed preference
brought in and rows that guidance left out for a while are all the same thing here: rows that lag.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mage_ray.decoding.outputs import Outputs
from mage_ray.decoding.plan import Plan, Row
from mage_ray.decoding.prefixes import common_length
from mage_ray.decoding.request import Request, Token
from mage_ray.decoding.rows import Rows
from mage_ray.decoding.runner import PREFILL_TOKENS, LiveRow
from mage_ray.decoding.seeds import DRAW, uniform
from mage_ray.decoding.text import TextStream


@dataclass(eq=False)
class Running:
    """A request on its way. ``rows[i]`` is the live row of ``plan.rows[i]``; ``emit`` is handed its tokens."""

    request: Request
    emit: Callable[[Token], None]
    plan: Plan
    history: list[int]
    text: TextStream | None = None
    rows: list[LiveRow] = field(default_factory=list)
    generated: int = 0
    schedule: tuple[tuple[int, Plan], ...] = ()
    """Plans that it changes to, each when so many tokens are generated."""
    proposals: list[Proposal] = field(default_factory=list)
    ended: bool = False
    began: float = field(default_factory=time.monotonic)
    queued: float = 0.0
    """Seconds that it waited for slots, the last time that it did, since it ``began``."""

    @property
    def room(self) -> int:
        """Tokens that it may still generate."""
        return self.request.sampling.max_new_tokens - self.generated

    @property
    def turn(self) -> int:
        """Tokens that it may generate before its plan changes, or it ends."""
        return min([self.room, *(at - self.generated for at, _ in self.schedule[:1])])

    def uniform(self, use: int = DRAW, ahead: int = 0) -> float:
        """The random number in [0, 1) of its next token, or of one ``ahead`` of that."""
        return uniform(self.request.sampling.seed, self.generated + ahead, use)

    def rest(self) -> str:
        """The text that was held back, when no more will come."""
        return self.text.end() if self.text is not None else ""

    @property
    def eager_rows(self) -> list[LiveRow]:
        """The rows that every step feeds the last token. Those that look ahead get their candidates later."""
        return [row for row in self.rows if not row.looks] if self.plan.eager else self.rows[:1]

    def lag(self, row: LiveRow) -> int:
        """Tokens that the row lacks before a step may feed it, or, of a row that waits for its turns, of its goal."""
        eager = self.plan.eager or row is self.rows[0]
        return (len(self.history) if eager else len(row.goal)) - 1 - len(row.tokens)

    @property
    def ready(self) -> bool:
        """Whether a step may feed it."""
        return bool(self.rows) and all(self.lag(row) <= 0 for row in self.rows)


@dataclass(frozen=True)
class Proposal:
    """A token that the base proposed, and the base's row that it was drawn from."""

    token: int
    base: Outputs


class Scheduler:
    """First come, first served for slots; prefill in bounded chunks, shared between those who wait for it.

    While requests decode, a chunk has at most ``chunk`` tokens, so that their steps come often; it goes by turns to the
    oldest request and to the one with least left to compute, so a long prompt neither stalls short ones nor starves.
    """

    def __init__(self, runner: Rows, chunk: int) -> None:
        self._runner, self._chunk = runner, chunk
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self._oldest_next = True

    def admit(self) -> None:
        """Give the longest-waiting requests the free slots, all of a request's rows at once."""
        while self.waiting and self._runner.fits(self.waiting[0].plan.rows):
            joining = self.waiting.popleft()
            joining.queued = time.monotonic() - joining.began
            self.running.append(joining)
            # What it is started for is fixed here: the history grows.
            goal = tuple(joining.history)
            for row in joining.plan.rows:
                joining.rows.append(self._runner.start(row, goal))

    def queue(self, rows: Sequence[Row]) -> int:
        """How many requests would wait for slots, one more of these rows included."""
        waiting = [running.plan.rows for running in list(self.waiting)]
        taken = itertools.accumulate([*waiting, tuple(rows)])
        return sum(not self._runner.fits(all_rows) for all_rows in taken)

    def remove(self, running: Running, wipe: bool = False) -> None:
        """A request that has ended goes, wherever it is."""
        running.ended = True
        self._release(running, wipe)
        if running in self.running:
            self.running.remove(running)
        elif running in self.waiting:
            self.waiting.remove(running)

    def requeue(self, running: Running) -> None:
        """A running request gives up its slots and waits at the front; it computes its history anew."""
        self._release(running)
        self.running.remove(running)
        self.waiting.appendleft(running)

    def _release(self, running: Running, wipe: bool = False) -> None:
        for row in running.rows:
            self._runner.end(row, wipe)
        running.rows, running.proposals = [], []

    def prefill(self) -> None:
        """Compute one chunk of what rows lack, and nothing twice."""
        lagging = [(running, self._lagging(running)) for running in self.running if not running.ready]
        lagging = [(running, rows) for running, rows in lagging if rows]
        if not lagging:
            return
        busy = any(running.ready for running in self.running)
        budget = self._chunk if busy else PREFILL_TOKENS
        if not self._oldest_next:
            lagging.sort(key=lambda pair: sum(map(pair[0].lag, pair[1])))
        self._oldest_next = not self._oldest_next
        chunk: dict[LiveRow, list[int]] = {}
        width = 0
        for running, own in lagging:
            if not chunk:
                width = max(1, min(max(map(running.lag, own)), budget // len(own)))
            for row in own:
                if chunk and (len(chunk) + 1) * width > budget:
                    break
                # Only this chunk is worth waiting for: a row further on may not have its turn for long.
                if any(_serves(other, fed, row) for other, fed in chunk.items()):
                    continue
                done = len(row.tokens)
                chunk[row] = running.history[done : done + min(width, running.lag(row))]
        self._runner.feed(list(chunk), list(chunk.values()), keep=0)

    def _lagging(self, running: Running) -> list[LiveRow]:
        """The rows of a request that still lag after they took what rows of equal coefficients have."""
        for row in running.rows:
            if running.lag(row) > 0:
                self._runner.catch_up(row)
        return [row for row in running.rows if running.lag(row) > 0]


def _serves(other: LiveRow, fed: Sequence[int], row: LiveRow) -> bool:
    """Whether a row that is fed this will hold more of what ``row`` was started for than ``row`` itself does."""
    if not other.exact or other.row != row.row:
        return False
    return common_length([*other.tokens, *fed], row.goal[:-1]) > len(row.tokens)
