"""Gang: runners in several processes behind the calls of one. A row's ``home`` says which it lives in.

The first is this process's own and runs the bases; the others run guides, perhaps of other models. In a step all start
from the same tokens at the same time, and only the scores of the candidates come back.

Legend: R rows of the outputs, N rows asked for, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from mage_ray.decoding.outputs import Outputs, Scorer
from mage_ray.decoding.plan import Row
from mage_ray.decoding.remote import RemoteRunner, RemoteScorer
from mage_ray.decoding.runner import LiveRow, RowRunner
from mage_ray.errors import FieldError


class Gang:
    """Stands in an engine where one RowRunner would. What it shares with that is documented there."""

    def __init__(self, own: RowRunner, others: Sequence[RemoteRunner]) -> None:
        self._own, self._others = own, list(others)
        self.model = own.model
        self.memory = own.memory
        self.rows = min(own.rows, *(other.rows for other in others))
        self.length = min(own.length, *(other.length for other in others))

    @property
    def waited(self) -> float:
        """Seconds spent waiting for the others' answers, since they began."""
        return sum(other.waited for other in self._others)

    def _at(self, row: Row) -> RowRunner | RemoteRunner:
        return self._own if row.home == 0 else self._others[row.home - 1]

    def check(self, row: Row) -> None:
        """As ``RowRunner.check``. Raises FieldError, too, for a home that isn't here."""
        if not 0 <= row.home <= len(self._others):
            raise FieldError("plan.rows", f"a row at {row.home}", f"0 to {len(self._others)}, this gang's runners")
        self._at(row).check(row)

    def fits(self, rows: Sequence[Row]) -> bool:
        """Whether these could be started now."""
        return self._within(rows, lambda runner: runner.free)

    def holds(self, rows: Sequence[Row]) -> bool:
        """Whether these could ever be started, with nothing beside them."""
        return self._within(rows, lambda runner: runner.rows)

    def _within(self, rows: Sequence[Row], places: Callable[[RowRunner | RemoteRunner], int]) -> bool:
        homes = [row.home for row in rows]
        runners: list[RowRunner | RemoteRunner] = [self._own, *self._others]
        return all(homes.count(home) <= places(runner) for home, runner in enumerate(runners))

    def start(self, row: Row, goal: Sequence[int] = ()) -> LiveRow:
        """As ``RowRunner.start``."""
        self.check(row)
        return self._at(row).start(row, goal)

    def catch_up(self, row: LiveRow) -> None:
        """As ``RowRunner.catch_up``."""
        self._at(row.row).catch_up(row)

    def adopt(self, row: LiveRow, other: Row) -> None:
        """As ``RowRunner.adopt``."""
        self._at(row.row).adopt(row, other)

    def branch(self, row: LiveRow, other: Row) -> LiveRow:
        """As ``RowRunner.branch``; from one runner to another nothing can be taken along, and it starts anew."""
        if row.row.home != other.home:
            return self.start(other, row.goal)
        return self._at(other).branch(row, other)

    def rewind(self, row: LiveRow, length: int) -> None:
        """As ``RowRunner.rewind``."""
        self._at(row.row).rewind(row, length)

    def end(self, row: LiveRow, wipe: bool = False) -> None:
        """As ``RowRunner.end``."""
        self._at(row.row).end(row, wipe)

    def arrange(self, first: Sequence[LiveRow]) -> None:
        """As ``RowRunner.arrange``; the others do it by themselves."""
        self._own.arrange([row for row in first if row.row.home == 0])

    def feed(self, rows: Sequence[LiveRow], tokens: Sequence[Sequence[int]], keep: int = 1) -> Outputs:
        """As ``RowRunner.feed``. The others are told first, so that all compute at the same time."""
        homes = [row.row.home for row in rows]
        longest = max(map(len, tokens))
        by_home = {home: [i for i, at in enumerate(homes) if at == home] for home in dict.fromkeys(homes)}
        if by_home.keys() == {0}:
            return self._own.feed(rows, tokens, keep)
        scorers: dict[int, Scorer] = {}
        for home, who in by_home.items():
            if home > 0:
                other, fed = self._others[home - 1], [tokens[i] for i in who]
                # All columns, since theirs may be fewer than the whole forward's.
                width = max(map(len, fed))
                number = other.feed([rows[i] for i in who], fed, width if keep else 0)
                places = _places(who, width, longest, keep)
                valued = frozenset(place for place in places if rows[place // keep].row.head is not None)
                scorer = RemoteScorer(other, number, places, valued)
                scorers |= dict.fromkeys(scorer.places, scorer)
        outputs, sources = self._own.none(), {}
        if mine := by_home.get(0, []):
            fed = [tokens[i] for i in mine]
            width = max(map(len, fed))
            outputs = self._own.feed([rows[i] for i in mine], fed, width if keep else 0)
            sources = _places(mine, width, longest, keep)
        if keep == 0:
            return self._own.none()
        return outputs.spread([sources.get(number) for number in range(len(rows) * keep)], scorers)

    def look(self, rows: Sequence[tuple[LiveRow, Sequence[int]]], ids_NC: torch.Tensor) -> torch.Tensor:
        """As ``RowRunner.look``."""
        homes = [row.row.home for row, _ in rows]
        values_NC = torch.empty(ids_NC.shape, device=self.model.device)
        for home in dict.fromkeys(homes):
            own = [n for n, at in enumerate(homes) if at == home]
            values_NC[own] = self._at(rows[own[0]][0].row).look([rows[n] for n in own], ids_NC[own]).to(values_NC)
        return values_NC

    def take(self, row: LiveRow, place: int, token: int) -> None:
        """As ``RowRunner.take``."""
        self._at(row.row).take(row, place, token)

    def close(self) -> None:
        """Let the other processes leave their loops."""
        for other in self._others:
            other.close()


def _places(who: Sequence[int], width: int, longest: int, keep: int) -> dict[int, int]:
    """Where rows ``who`` of a forward that keeps ``keep`` of ``longest`` columns are in one that keeps all its own."""
    return {
        i * keep + column - (longest - keep): n * width + column
        for n, i in enumerate(who)
        for column in range(longest - keep, min(longest, width))
    }
