"""Static KV slots: one row of the batch each, at its own position, dense from 0.

Legend: S slots, L positions, T tokens of this forward, H key-value heads, D their size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin

_GROWTH = 64
"""Positions are allocated in steps of this many, as rows get there."""


class _Window:
    """Which slots and positions the running forward writes, and how far it may look."""

    def __init__(self) -> None:
        self.first = self.last = self.visible = self.capacity = 0
        self.write_BT = torch.empty(0, 0, dtype=torch.long)


class _SlotLayer(CacheLayerMixin):
    def __init__(self, window: _Window, slots: int, length: int) -> None:
        super().__init__()
        self._window, self._slots, self._length = window, slots, length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = key_states.new_zeros(self._slots, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_zeros(self._slots, value_states.shape[1], 0, value_states.shape[3])
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        w = self._window
        more = w.capacity - self.keys.shape[2]
        if more > 0:
            self.keys = pad(self.keys, (0, 0, 0, more))
            self.values = pad(self.values, (0, 0, 0, more))
        keys, values = self.keys[w.first : w.last], self.values[w.first : w.last]
        rows_B1 = torch.arange(w.last - w.first, device=keys.device)[:, None]
        keys[rows_B1, :, w.write_BT] = key_states.transpose(1, 2)
        values[rows_B1, :, w.write_BT] = value_states.transpose(1, 2)
        return keys[:, :, : w.visible], values[:, :, : w.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._window.visible, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._length


class KVSlots(Cache):
    """Keys and values of ``slots`` rows of up to ``length`` tokens; memory is taken as far as rows have come.

    A forward runs over a range of slots, each at its own position; there is no padding between a row's tokens, so a
    row's numbers don't depend on its neighbours' lengths.
    """

    def __init__(self, layers: int, slots: int, length: int) -> None:
        self._window = _Window()
        self._own = [_SlotLayer(self._window, slots, length) for _ in range(layers)]
        super().__init__(layers=list(self._own))

    def open(self, first: int, starts_B: torch.Tensor, lengths_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Aim the next forward at slots ``first …``, whose rows go on at ``starts_B`` with ``lengths_B`` tokens each.

        Returns positions [B, T] (0 for padding) and the mask [B, 1, T, L'] of what each token sees, True to attend.
        """
        tokens = int(lengths_B.max())
        offsets_T = torch.arange(tokens, device=starts_B.device)
        real_BT = offsets_T < lengths_B[:, None]
        position_BT = torch.where(real_BT, starts_B[:, None] + offsets_T, 0)
        w = self._window
        w.first, w.last = first, first + len(starts_B)
        w.visible = int((starts_B + lengths_B).max())
        # Padding is written to one position that nobody looks at, past all that is visible; a longer row that comes
        # to need it writes over it first.
        w.write_BT = torch.where(real_BT, position_BT, w.visible)
        w.capacity = max(w.capacity, -(-(w.visible + 1) // _GROWTH) * _GROWTH)
        seen_BTL = torch.arange(w.visible, device=starts_B.device) <= position_BT[:, :, None]
        return position_BT, seen_BTL[:, None]

    def copy(self, source: int, target: int, length: int) -> None:
        """Slot ``target`` becomes a copy of the first ``length`` positions of slot ``source``."""
        for layer in self._own:
            if layer.keys is not None and layer.values is not None:
                layer.keys[target, :, :length] = layer.keys[source, :, :length]
                layer.values[target, :, :length] = layer.values[source, :, :length]
