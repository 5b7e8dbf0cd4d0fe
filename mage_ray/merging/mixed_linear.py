"""The per-row mix of stacked experts: one batch, any number of preferences, no weight copies (METHOD.md section 4).

Legend: B batch rows, T tokens, R stacked ranks of all experts of a module, K experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import linear


class RowMix:
    """What the batch that runs now mixes: a model's MixedLinears share one of these.

    It belongs to one model and holds coefficients only inside ``rows``; there is no adapter state between forwards.
    """

    def __init__(self) -> None:
        self._coefficients_BK: torch.Tensor | None = None
        self._by_layout: dict[int, torch.Tensor] = {}

    @contextmanager
    def rows(self, coefficients_BK: torch.Tensor) -> Iterator[None]:
        """Within it, row b of every batch runs with experts mixed by ``coefficients_BK[b]``."""
        if self._coefficients_BK is not None:
            raise RuntimeError("a model runs one batch at a time")
        self._coefficients_BK = coefficients_BK
        try:
            yield
        finally:
            self._coefficients_BK = None
            self._by_layout.clear()

    @property
    def active(self) -> bool:
        return self._coefficients_BK is not None

    def diagonal(self, layout: Layout) -> torch.Tensor:
        """The batch's diagonals in rank space, [B, R]: coefficient times scale of the expert that owns each rank."""
        diagonal_BR = self._by_layout.get(id(layout))
        if diagonal_BR is None:
            assert self._coefficients_BK is not None
            diagonal_BR = self._coefficients_BK[:, layout.expert_R] * layout.scale_R
            self._by_layout[id(layout)] = diagonal_BR
        return diagonal_BR


class Layout(nn.Module):
    """Which expert owns each stacked rank of a module, and its scale. Modules with equal layouts share one."""

    expert_R: torch.Tensor
    scale_R: torch.Tensor

    def __init__(self, experts: list[int], scales: list[float], like: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("expert_R", torch.tensor(experts, device=like.device), persistent=False)
        self.register_buffer("scale_R", torch.tensor(scales, device=like.device, dtype=like.dtype), persistent=False)


class MixedLinear(nn.Module):
    """A linear plus ``up @ diag(lam * scale) @ down``, with another lam for every row of the batch.

    down [R, in] and up [out, R] stack all experts of this module, so the mix equals the full merge
    ``W + sum_i lam_i s_i B_i A_i`` exactly, whatever the ranks (METHOD.md section 4).
    """

    down: torch.Tensor
    up: torch.Tensor

    def __init__(self, base: nn.Module, down: torch.Tensor, up: torch.Tensor, layout: Layout, mix: RowMix) -> None:
        super().__init__()
        self.base = base
        self.layout = layout
        self._mix = mix
        self.register_buffer("down", down, persistent=False)
        self.register_buffer("up", up, persistent=False)

    def forward(self, x_BTi: torch.Tensor) -> torch.Tensor:
        y_BTo = self.base(x_BTi)
        if not self._mix.active:
            return y_BTo
        diagonal_BR = self._mix.diagonal(self.layout)
        if x_BTi.ndim != 3 or x_BTi.shape[0] != diagonal_BR.shape[0]:
            raise ValueError(f"rows to mix: got input {tuple(x_BTi.shape)}, allowed: [{diagonal_BR.shape[0]}, T, in]")
        return y_BTo + linear(linear(x_BTi, self.down) * diagonal_BR[:, None, :], self.up)
