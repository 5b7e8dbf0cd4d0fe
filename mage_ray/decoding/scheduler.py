"""Who gets which slot: requests wait in order, run while rows are free, and leave their rows to the next."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from mage_ray.decoding.request import Request
from mage_ray.decoding.runner import RowRunner


@dataclass
class Running:
    """A request on its way: ``rows[i]`` is the runner's number of the plan's row i, ``next`` the token to feed."""

    index: int
    request: Request
    rows: list[int]
    next: int
    generated: int = 0
    dice: torch.Generator = field(default_factory=torch.Generator)

    def __post_init__(self) -> None:
        self.dice.manual_seed(self.request.sampling.seed)


class Scheduler:
    """First come, first served; all rows of a request run together."""

    def __init__(self, runner: RowRunner, requests: Iterable[Request]) -> None:
        self._runner = runner
        self._waiting = deque(enumerate(requests))
        self.running: list[Running] = []

    def admit(self) -> bool:
        """Give the longest-waiting requests the free rows. Whether anything has changed."""
        joining: list[tuple[int, Request]] = []
        free = self._runner.rows - self._runner.live
        while self._waiting and len(self._waiting[0][1].plan.rows) <= free:
            joining.append(self._waiting.popleft())
            free -= len(joining[-1][1].plan.rows)
        pairs = [(row, request.prompt) for _, request in joining for row in request.plan.rows]
        numbers = iter(self._runner.admit([row for row, _ in pairs], [prompt for _, prompt in pairs]))
        for index, request in joining:
            rows = [next(numbers) for _ in request.plan.rows]
            self.running.append(Running(index, request, rows, next=request.prompt[-1]))
        return bool(joining)

    def finish(self, gone: Sequence[Running]) -> None:
        """Free the rows of requests that have ended."""
        moved = self._runner.drop([row for running in gone for row in running.rows])
        left = {id(running) for running in gone}
        self.running = [running for running in self.running if id(running) not in left]
        for running in self.running:
            running.rows = [moved.get(row, row) for row in running.rows]

    def tokens(self) -> list[int]:
        """The token that each live row is fed next: all rows of a request get the same one."""
        fed = [0] * self._runner.live
        for running in self.running:
            for row in running.rows:
                fed[row] = running.next
        return fed
