"""Static KV slots: one row of the batch each, at its own position.

Legend: S slots, L positions, B rows of this forward, T tokens, H key-value heads, D their size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import pad
from transformers.cache_utils import Cache, CacheLayerMixin

_GROWTH = 64
"""Positions are allocated in steps of this many, as rows get there, unless shapes are fixed."""


class Window:
    """Which slots the running forward reads, where it writes, and how far it may look.

    Row b's slot begins at ``start_B`` of all positions of all slots. Its tokens are written to ``write_N`` of all
    positions, N = B * T; each looks at the first ``seen_BT`` positions of its slot, and at itself.
    """

    def __init__(self) -> None:
        self.slots: slice | torch.Tensor = slice(0, 0)
        self.visible = self.capacity = 0
        self.start_B = self.seen_BT = self.write_N = torch.empty(0, dtype=torch.long)


class _SlotLayer(CacheLayerMixin):
    def __init__(self, window: Window, slots: int, length: int) -> None:
        super().__init__()
        self._window, self._slots, self._length = window, slots, length

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.whole(key_states.shape[1], key_states.shape[3], key_states)

    def whole(self, heads: int, head: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, [S, L, H, D] each, with the positions that the running forward needs."""
        if not self.is_initialized:
            # Positions before heads: what a forward writes is then contiguous, as the projections made it.
            self.keys = like.new_zeros(self._slots, self._window.capacity, heads, head)
            self.values = torch.zeros_like(self.keys)
            self.is_initialized = True
        assert self.keys is not None and self.values is not None
        more = self._window.capacity - self.keys.shape[1]
        if more > 0:
            # The place of padding comes within sight, and what is there need not be finite.
            self.keys[:, -1] = self.values[:, -1] = 0
            self.keys = pad(self.keys, (0, 0, 0, 0, 0, more))
            self.values = pad(self.values, (0, 0, 0, 0, 0, more))
        return self.keys, self.values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self.whole(key_states.shape[1], key_states.shape[3], key_states)
        w = self._window
        keys.flatten(0, 1).index_copy_(0, w.write_N, key_states.transpose(1, 2).flatten(0, 1))
        values.flatten(0, 1).index_copy_(0, w.write_N, value_states.transpose(1, 2).flatten(0, 1))
        return keys[w.slots, : w.visible].transpose(1, 2), values[w.slots, : w.visible].transpose(1, 2)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._window.visible, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._length


class KVSlots(Cache):
    """Keys and values of ``slots`` rows of up to ``length`` tokens.

    A forward runs over any slots, each at its own position; there is no padding between a row's tokens, so a row's
    numbers don't depend on its neighbours' lengths. Memory is taken as far as rows have come, or, with ``fixed``
    shapes, all of it by the first forward.
    """

    def __init__(self, layers: int, slots: int, length: int, fixed: bool = False) -> None:
        self.window = Window()
        self._own = [_SlotLayer(self.window, slots, length) for _ in range(layers)]
        self.window.capacity = self.capacity(length) if fixed else 0
        super().__init__(layers=list(self._own))

    @staticmethod
    def capacity(visible: int) -> int:
        """Positions that a slot of ``visible`` ones takes: one more for padding, rounded up."""
        return -(-(visible + 1) // _GROWTH) * _GROWTH

    def padding(self, visible: int) -> int:
        """The position to which a forward that looks at ``visible`` ones writes its padding: the last of each slot."""
        return max(self.window.capacity, self.capacity(visible)) - 1

    def open(
        self,
        slots: slice | torch.Tensor,
        place_B: torch.Tensor,
        position_BT: torch.Tensor,
        written_BT: torch.Tensor,
        visible: int,
    ) -> None:
        """Aim the next forward at ``slots``, numbered ``place_B``: it writes to ``written_BT``, looks at ``visible``.

        Padding is written to ``padding(visible)``, which nobody looks at.
        """
        w = self.window
        w.slots, w.visible = slots, visible
        w.capacity = max(w.capacity, self.capacity(visible))
        w.start_B, w.seen_BT = place_B * w.capacity, position_BT + 1
        w.write_N = (w.start_B[:, None] + written_BT).flatten()

    def whole(self, layer: int, heads: int, head: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values of a layer, [S, L, H, D] each, with the positions that the running forward needs."""
        return self._own[layer].whole(heads, head, like)

    def _tensors(self) -> list[torch.Tensor]:
        return [t for layer in self._own for t in (layer.keys, layer.values) if t is not None]

    def copy(self, source: int, target: int, length: int) -> None:
        """Slot ``target`` becomes a copy of the first ``length`` positions of slot ``source``."""
        for tensor in self._tensors():
            tensor[target, :length] = tensor[source, :length]

    def swap(self, one: int, other: int, lengths: tuple[int, int]) -> None:
        """Exchange the contents of two slots, whose rows have come ``lengths`` far."""
        longest = max(lengths)
        for tensor in self._tensors():
            tensor[[one, other], :longest] = tensor[[other, one], :longest]

    def finite(self, slot: int, length: int) -> bool:
        """Whether the first ``length`` positions of a slot hold finite numbers alone."""
        sums = [tensor[slot, :length].sum(dtype=torch.float32) for tensor in self._tensors()]
        return not sums or bool(torch.stack(sums).isfinite().all())

    def wipe(self, slot: int) -> None:
        """Zero a slot. What isn't finite would reach later rows even from behind a mask."""
        for tensor in self._tensors():
            tensor[slot] = 0

    def read(self, slot: int, length: int) -> list[torch.Tensor]:
        """The first ``length`` positions of a slot, copied: keys and values of each layer, [length, H, D]."""
        return [tensor[slot, :length].clone() for tensor in self._tensors()]

    def write(self, slot: int, kept: Sequence[torch.Tensor], length: int) -> None:
        """Put the first ``length`` positions of what ``read`` gave into a slot."""
        for tensor, part in zip(self._tensors(), kept, strict=True):
            tensor[slot, :length] = part[:length]

    @property
    def bytes_per_position(self) -> int:
        """Bytes that one token of one row takes. 0 before the first forward, which shows the shapes."""
        return sum(t.shape[2] * t.shape[3] * t.element_size() for t in self._tensors())
