"""Who runs: requests wait in order, take slots when all their rows fit, and are computed up to their last token.

A request's ``history`` is its prompt and what it has generated. Each of its rows holds some beginning of that; what is
missing, but for the last token, which a step feeds, is the row's *lag*. New requests, rows that a changed preference
brought in and rows that guidance left out for a while are all the same thing here: rows that lag.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from mage_ray.decoding.plan import Plan
from mage_ray.decoding.prefixes import common_length
from mage_ray.decoding.request import Request, Token
from mage_ray.decoding.runner import PREFILL_TOKENS, LiveRow, RowRunner
from mage_ray.decoding.text import TextStream


@dataclass(eq=False)
class Running:
    """A request on its way. ``rows[i]`` is the live row of ``plan.rows[i]``; ``emit`` is handed its tokens."""

    request: Request
    emit: Callable[[Token], None]
    plan: Plan
    history: list[int]
    dice: torch.Generator
    text: TextStream | None = None
    rows: list[LiveRow] = field(default_factory=list)
    generated: int = 0
    proposals: list[Proposal] = field(default_factory=list)
    ended: bool = False

    @property
    def room(self) -> int:
        """Tokens that it may still generate."""
        return self.request.sampling.max_new_tokens - self.generated

    def uniform(self) -> float:
        """The request's next random number in [0, 1)."""
        return float(torch.rand((), generator=self.dice, dtype=torch.float64))

    def rest(self) -> str:
        """The text that was held back, when no more will come."""
        return self.text.end() if self.text is not None else ""

    @property
    def eager_rows(self) -> list[LiveRow]:
        """The rows that run at every step."""
        return self.rows if self.plan.eager else self.rows[:1]

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
    """A token that the base proposed, and the base's logits [V] that it was drawn from."""

    token: int
    logits_V: torch.Tensor


class Scheduler:
    """First come, first served for slots; prefill in bounded chunks, shared between those who wait for it.

    While requests decode, a chunk has at most ``chunk`` tokens, so that their steps come often; it goes by turns to the
    oldest request and to the one with least left to compute, so a long prompt neither stalls short ones nor starves.
    """

    def __init__(self, runner: RowRunner, chunk: int) -> None:
        self._runner, self._chunk = runner, chunk
        self.waiting: deque[Running] = deque()
        self.running: list[Running] = []
        self._oldest_next = True

    def admit(self) -> None:
        """Give the longest-waiting requests the free slots, all of a request's rows at once."""
        while self.waiting and len(self.waiting[0].plan.rows) <= self._runner.free:
            joining = self.waiting.popleft()
            self.running.append(joining)
            # What it is started for is fixed here: the history grows.
            goal = tuple(joining.history)
            for row in joining.plan.rows:
                joining.rows.append(self._runner.start(row, goal))

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
        """Compute one chunk of what rows lack."""
        lagging = [(running, self._lagging(running)) for running in self.running if not running.ready]
        lagging = [(running, rows) for running, rows in lagging if rows]
        if not lagging:
            return
        busy = any(running.ready for running in self.running)
        budget = self._chunk if busy else PREFILL_TOKENS
        if not self._oldest_next:
            lagging.sort(key=lambda pair: sum(map(pair[0].lag, pair[1])))
        self._oldest_next = not self._oldest_next
        rows: list[LiveRow] = []
        tokens: list[list[int]] = []
        width = 0
        for running, own in lagging:
            if not rows:
                width = max(1, min(max(map(running.lag, own)), budget // len(own)))
            for row in own:
                if rows and (len(rows) + 1) * width > budget:
                    break
                done = len(row.tokens)
                rows.append(row)
                tokens.append(running.history[done : done + min(width, running.lag(row))])
        self._runner.feed(rows, tokens, keep=0)

    def _lagging(self, running: Running) -> list[LiveRow]:
        """The rows of a request that a forward has to bring on now: not those that another row is computing for."""
        behind = [row for row in running.rows if running.lag(row) > 0]
        return [row for row in behind if not self._served_by_another(running, row)]

    def _served_by_another(self, running: Running, row: LiveRow) -> bool:
        """Take what a row of equal coefficients has in common with this one; whether more of it is on its way."""
        leader = max(self._runner.siblings(row), key=lambda other: _sharable(other, row), default=None)
        if leader is None or _sharable(leader, row) <= len(row.tokens):
            return False
        self._runner.share(leader, row)
        if running.lag(row) <= 0:
            return True
        ahead = _sharable(leader, row) > len(row.tokens)
        # Of two rows that could serve each other, the one that has come further, then the one in the lower slot, leads.
        return ahead and (len(leader.tokens), -leader.place) > (len(row.tokens), -row.place)


def _sharable(source: LiveRow, target: LiveRow) -> int:
    """How many tokens of the target's goal, short of the last, the source has or will have."""
    return min(common_length(source.ahead, target.goal), len(target.goal) - 1)
