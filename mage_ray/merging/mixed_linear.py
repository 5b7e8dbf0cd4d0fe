"""The per-row mix of stacked experts: one batch, any number of preferences, no weight copies (docs/method.md).

Linears of one input are one product, and their experts' ``down`` matrices are more rows of the same weight: beyond the
bare model, a group of linears costs one scaling and one small product for each member.

Legend: B batch rows, T tokens, M = B * T, i/o in and out features, R stacked ranks of a linear or a group, K experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from mage_ray.merging.adapter import Factors
from mage_ray.merging.packed import Norm, PackedLinears, can_pack


class RowMix:
    """What the batch that runs now mixes: a model's MixedLinears share one of these.

    It belongs to one model and holds coefficients only inside ``rows``. What linears pass on to each other lives
    from the begin to the end of one forward of that model, so that no forward sees anything of another.
    """

    def __init__(self, model: nn.Module) -> None:
        self.active = False
        self.running = False
        self.pending: dict[SharedInput, Parts] = {}
        self._coefficients_BK: torch.Tensor | None = None
        self._diagonals: dict[tuple[Layout, torch.Size], torch.Tensor] = {}
        # A prefill runs the body alone, without the head.
        for module in {model, getattr(model, "base_model", model)}:
            module.register_forward_pre_hook(self._begin)
            module.register_forward_hook(self._end, always_call=True)

    @contextmanager
    def rows(self, coefficients_BK: torch.Tensor) -> Iterator[None]:
        """Within it, row b of every batch runs with experts mixed by ``coefficients_BK[b]``; outside, as the base."""
        if self.active:
            raise RuntimeError("a model runs one batch at a time")
        self.active, self._coefficients_BK = True, coefficients_BK
        try:
            yield
        finally:
            self.active, self._coefficients_BK = False, None

    def diagonal(self, layout: Layout, shape_BTi: torch.Size) -> torch.Tensor:
        """The diagonals in rank space for an input of this shape, [M, R]: coefficient times scale of each rank.

        Raises ValueError when the input isn't [B, T, in].
        """
        diagonal_MR = self._diagonals.get((layout, shape_BTi))
        if diagonal_MR is None:
            assert self._coefficients_BK is not None
            rows = self._coefficients_BK.shape[0]
            if len(shape_BTi) != 3 or shape_BTi[0] != rows:
                raise ValueError(f"rows to mix: got input {tuple(shape_BTi)}, allowed: [{rows}, T, in]")
            diagonal_BR = (self._coefficients_BK.index_select(1, layout.expert_R) * layout.scale_R).to(layout.dtype)
            diagonal_MR = diagonal_BR[:, None].expand(-1, shape_BTi[1], -1).flatten(0, 1)
            # Only for this forward: a CUDA graph must compute it anew from the coefficients in each replay.
            if self.running:
                self._diagonals[layout, shape_BTi] = diagonal_MR
        return diagonal_MR

    def _begin(self, *_: Any) -> None:
        self._forget()
        self.running = True

    def _end(self, *_: Any) -> None:
        self.running = False
        self._forget()

    def _forget(self) -> None:
        self.pending.clear()
        self._diagonals.clear()


class Layout:
    """Which expert owns each stacked rank of a group, and its scale. Groups with equal layouts share one."""

    def __init__(self, experts: Sequence[int], scales: Sequence[float], like: torch.Tensor) -> None:
        self.expert_R = torch.tensor(experts, device=like.device, dtype=torch.long)
        self.scale_R = torch.tensor(scales, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
        self.dtype = like.dtype


@dataclass
class Parts:
    """One result of a group: what each member has yet to take, and the input that it is the result of."""

    of: torch.Tensor
    parts: list[torch.Tensor | None]
    left: int


class SharedInput:
    """Linears that get the same input, as one product ``[W_1; ..; W_n; A_1; ..; A_n] x``.

    A_j [R_j, i] stacks the ``down`` of all experts of member j. To the part of member j is added
    ``B_j diag(coefficient * scale) A_j x``, so that each equals the full merge ``W + sum_k lam_k s_k B_k A_k`` exactly,
    whatever the ranks (docs/method.md). Derived; the stacking is plain linear algebra.
    """

    def __init__(
        self,
        linears: Sequence[nn.Module],
        factors: Sequence[Mapping[int, Factors]],
        layouts: dict[tuple[tuple[int, ...], tuple[float, ...]], Layout],
        mix: RowMix,
    ) -> None:
        """``factors`` of each linear by expert; ``layouts`` are those of other groups by content, and grow."""
        weights = [weight_oi(module) for module in linears]
        biases: list[Any] = [module.bias for module in linears]
        like = weights[0]
        owned = [(k, f) for by_expert in factors for k, f in by_expert.items()]
        self._mix = mix
        self._outs = [len(w) for w in weights]
        self.size = len(linears)
        self._layout: Layout | None = None
        if owned:
            experts = tuple(k for k, f in owned for _ in range(len(f.down)))
            scales = tuple(f.scale for _, f in owned for _ in range(len(f.down)))
            if (experts, scales) not in layouts:
                layouts[experts, scales] = Layout(experts, scales, like)
            self._layout = layouts[experts, scales]
        self._multiply = (
            PackedLinears(weights, biases, factors) if can_pack(like) else _Stacked(weights, biases, factors)
        )

    def part(self, member: int, x: torch.Tensor) -> torch.Tensor:
        """The result of one member. The first that is called with a tensor computes those of the others, too.

        They are given to the others only within the same forward of the model and for the same tensor object.
        """
        if self.size == 1:
            return self.results(x)[0]
        pending = self._mix.pending
        held = pending.get(self)
        if held is not None and held.of is x:
            part = held.parts[member]
            if part is not None:
                if held.left == 1:
                    del pending[self]
                else:
                    held.parts[member] = None
                    held.left -= 1
                return part
        results = self.results(x)
        if self._mix.running:
            parts: list[torch.Tensor | None] = [*results]
            parts[member] = None
            pending[self] = Parts(x, parts, len(parts) - 1)
        return results[member]

    def results(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """The results of all members, [..., out] each; views of one tensor, which is theirs alone."""
        y = self._multiply(x, self._diagonal(x))
        return (y,) if self.size == 1 else self.split(y)

    def split(self, y: torch.Tensor) -> Sequence[torch.Tensor]:
        """The results of all members, [..., out] each, of which ``y`` holds all, beside each other."""
        return y.split_with_sizes(self._outs, -1)

    def fused(self, x: torch.Tensor, norm: Norm | None = None, residual: torch.Tensor | None = None) -> torch.Tensor:
        """All members' results beside each other, of x after its norm, plus the residual. For packed groups."""
        assert isinstance(self._multiply, PackedLinears)
        return self._multiply(x, self._diagonal(x), norm, residual)

    @property
    def packed(self) -> bool:
        """Whether its weights are packed."""
        return isinstance(self._multiply, PackedLinears)

    def _diagonal(self, x: torch.Tensor) -> torch.Tensor | None:
        layout = self._layout
        return self._mix.diagonal(layout, x.shape) if layout is not None and self._mix.active else None


class _Stacked:
    """What PackedLinears computes, by PyTorch's own products: one for all weights, one for each member's ranks."""

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        factors: Sequence[Mapping[int, Factors]],
    ) -> None:
        like = weights[0]
        downs = [f.down.to(like) for by_expert in factors for f in by_expert.values()]
        rank = sum(map(len, downs))
        self._outs = [len(w) for w in weights]
        self._stacked = torch.cat([*weights, *downs]).detach() if len(weights) + len(downs) > 1 else like.detach()
        self._bias: torch.Tensor | None = None
        if any(b is not None for b in biases):
            shares = [like.new_zeros(len(w)) if b is None else b for w, b in zip(weights, biases, strict=True)]
            self._bias = torch.cat([*shares, like.new_zeros(rank)]).detach()
        # Members without experts have no product in rank space.
        self._mixed = [j for j, by_expert in enumerate(factors) if by_expert]
        self._ranks = [sum(len(f.down) for f in factors[j].values()) for j in self._mixed]
        self._ups = [torch.cat([f.up for f in factors[j].values()], dim=1).to(like).t() for j in self._mixed]

    def __call__(self, x: torch.Tensor, d_MR: torch.Tensor | None) -> torch.Tensor:
        """[..., out] from x [..., in]; without ``d`` the linears alone."""
        y = linear(x, self._stacked, self._bias)
        outputs = sum(self._outs)
        if d_MR is None:
            return y[..., :outputs]
        y_Mo = y.view(-1, y.shape[-1])
        parts_Mo = y_Mo[:, :outputs].split_with_sizes(self._outs, 1)
        zs_Mr = (y_Mo[:, outputs:] * d_MR).split_with_sizes(self._ranks, 1)
        for j, z_Mr, up_ro in zip(self._mixed, zs_Mr, self._ups, strict=True):
            parts_Mo[j].addmm_(z_Mr, up_ro)
        return y[..., :outputs]


class MixedLinear(nn.Module):
    """Stands in a model for one linear of a SharedInput."""

    def __init__(self, base: nn.Module, group: SharedInput, member: int) -> None:
        super().__init__()
        self.out_features, self.in_features = weight_oi(base).shape
        self._group = group
        self._member = member

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self._group.part(self._member, input)

    def leads(self, members: Sequence[nn.Module]) -> SharedInput | None:
        """The group, if these are all its members, in order, itself the first."""
        whole = len(members) == self._group.size and all(
            isinstance(other, MixedLinear) and other._group is self._group and other._member == j
            for j, other in enumerate(members)
        )
        return self._group if whole else None


def weight_oi(module: nn.Module) -> torch.Tensor:
    """The weight of a linear or of a Conv1D, which holds it transposed."""
    assert isinstance(module.weight, torch.Tensor)
    return module.weight.t() if isinstance(module, Conv1D) else module.weight
