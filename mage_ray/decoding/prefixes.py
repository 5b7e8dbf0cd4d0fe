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
        self._entries: OrderedDict[tuple[Row, tuple[int, ...]], list[torch.Tensor]] = OrderedDict()
        self.used = 0

    def find(self, row: Row, goal: Sequence[int]) -> Found | None:
        """The kept sequence of equal coefficients that shares most with ``goal``; None where none shares anything."""
        best, length = None, 0
        for key in self._entries:
            if key[0] == row and (common := common_length(key[1], goal)) > length:
                best, length = key, common
        if best is None:
            return None
        self._entries.move_to_end(best)
        return Found(self._entries[best], length)

    def add(self, row: Row, tokens: Sequence[int], read: Callable[[], list[torch.Tensor]]) -> None:
        """Keep a sequence, unless a kept one begins with it; the least recently used ones go to make room."""
        if len(tokens) > self._capacity:
            return
        for key in list(self._entries):
            if key[0] != row:
                continue
            common = common_length(key[1], tokens)
            if common == len(tokens):
                self._entries.move_to_end(key)
                return
            if common == len(key[1]):
                self._drop(key)
        while self.used + len(tokens) > self._capacity:
            self._drop(next(iter(self._entries)))
        self._entries[row, tuple(tokens)] = read()
        self.used += len(tokens)

    def _drop(self, key: tuple[Row, tuple[int, ...]]) -> None:
        del self._entries[key]
        self.used -= len(key[1])
