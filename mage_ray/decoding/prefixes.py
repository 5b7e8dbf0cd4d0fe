"""Prompts that ended rows leave behind, so that the next row of equal coefficients needn't compute them again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from mage_ray.decoding.plan import Row


def common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many first tokens two sequences share."""
    low, high = 0, min(len(one), len(other))
    if not high or one[0] != other[0]:
        return 0
    while low < high:  # all of one[:low] is shared; comparing slices is much quicker than comparing tokens
        middle = (low + high + 1) // 2
        if list(one[low:middle]) == list(other[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low


@dataclass(frozen=True)
class Found:
    """Keys and values of a kept sequence, of which the first ``common`` positions are those asked for."""

    parts: list[torch.Tensor]
    common: int


class PrefixStore:
    """Keeps the most recently used sequences, ``capacity`` tokens in all."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._of_row: dict[Row, dict[tuple[int, ...], list[torch.Tensor]]] = {}
        self._by_use: OrderedDict[tuple[Row, tuple[int, ...]], None] = OrderedDict()  # the latest last
        self.used = 0
        self.added = 0
        """Sequences kept so far, the dropped ones included."""

    def find(self, row: Row, goal: Sequence[int]) -> Found | None:
        """The kept sequence of equal coefficients that shares most with ``goal``; None where none shares anything."""
        kept = self._of_row.get(row, {})
        best: tuple[int, ...] = ()
        length = 0
        for tokens in kept:
            if (common := common_length(tokens, goal)) > length:
                best, length = tokens, common
        if not length:
            return None
        self._by_use.move_to_end((row, best))
        return Found(kept[best], length)

    def add(self, row: Row, tokens: Sequence[int], read: Callable[[], list[torch.Tensor]]) -> None:
        """Keep a sequence, unless a kept one begins with it; the least recently used ones go to make room."""
        if len(tokens) > self._capacity:
            return
        for kept in list(self._of_row.get(row, ())):
            common = common_length(kept, tokens)
            if common == len(tokens):
                self._by_use.move_to_end((row, kept))
                return
            if common == len(kept):
                self._drop(row, kept)
        while self.used + len(tokens) > self._capacity:
            self._drop(*next(iter(self._by_use)))
        added = tuple(tokens)
        self._of_row.setdefault(row, {})[added] = read()
        self._by_use[row, added] = None
        self.used += len(added)
        self.added += 1

    def clear(self) -> None:
        """Forget all that is kept."""
        self._of_row.clear()
        self._by_use.clear()
        self.used = 0

    def _drop(self, row: Row, tokens: tuple[int, ...]) -> None:
        del self._by_use[row, tokens]
        del self._of_row[row][tokens]
        if not self._of_row[row]:
            del self._of_row[row]
        self.used -= len(tokens)
