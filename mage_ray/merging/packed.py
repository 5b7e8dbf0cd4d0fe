"""Linears of one input and their experts as one product on the CPU, in float32: packed.c, compiled on first use.

Decoding multiplies all weights by a few rows, which math libraries do in twice the time that reading the weights takes,
or more; and the experts' small products cost a call each. Here all is one call, at about the speed of memory. A row's
results are the same to the last bit whatever rows are beside it.

Where there is no C compiler, PyTorch's own products do the same (mixed_linear.py), more slowly.

Legend: M rows of the input, i input features, o output features, R stacked ranks, W outputs of a panel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch

from mage_ray.merging.adapter import Factors
from mage_ray.native import library

_WIDTH = 16
_PANEL = np.dtype([("column", "i4"), ("count", "i4"), ("first", "i4"), ("ranks", "i4"), ("up", "i8")])


class _Group(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("inputs", "outputs", "ranks", "panels", "rank_panels")),
        *((name, ctypes.c_void_p) for name in ("panel", "weights", "biases", "ups")),
    )


def can_pack(weight_oi: torch.Tensor) -> bool:
    """Whether PackedLinears takes this weight: float32 on the CPU, where the library can be built."""
    return weight_oi.device.type == "cpu" and weight_oi.dtype == torch.float32 and _library() is not None


@dataclass(frozen=True)
class Norm:
    """An RMS norm: ``weight * x / sqrt(mean(x^2) + epsilon)``; the weight in float32 on the CPU."""

    weight_i: torch.Tensor
    epsilon: float


class PackedLinears:
    """``y_j = W_j x + b_j + B_j diag(d_j) A_j x`` of all members j of a group, beside each other.

    ``factors`` of each member by expert; their ranks are stacked in that order, member by member, in ``d``. The
    weights are copied. Source: docs/method.md; the layout is derived.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        factors: Sequence[Mapping[int, Factors]],
    ) -> None:
        made = _library()
        assert made is not None, "can_pack first"
        self._library = made
        self.inputs = weights[0].shape[1]
        self.outputs = sum(map(len, weights))
        self.ranks = sum(len(f.down) for by_expert in factors for f in by_expert.values())
        panels: list[tuple[int, ...]] = []
        rank_panels: list[tuple[int, ...]] = []
        parts, downs, ups = [], [], []
        column = rank = up = 0
        for weight_oi, by_expert in zip(weights, factors, strict=True):
            first, ranks = len(rank_panels) * _WIDTH, sum(len(f.down) for f in by_expert.values())
            for start in range(0, len(weight_oi), _WIDTH):
                panels.append((column + start, min(_WIDTH, len(weight_oi) - start), first, ranks, up))
                up += ranks * _WIDTH
            parts.append(_panels(weight_oi))
            if by_expert:
                ups.append(_panels(torch.cat([f.up.to(weight_oi) for f in by_expert.values()], dim=1)).flatten())
                downs.append(_panels(torch.cat([f.down.to(weight_oi) for f in by_expert.values()])))
                for start in range(0, ranks, _WIDTH):
                    rank_panels.append((rank + start, min(_WIDTH, ranks - start), 0, 0, 0))
            column += len(weight_oi)
            rank += ranks
        self._panels = np.array([*panels, *rank_panels], dtype=_PANEL)
        self._weights = torch.cat([*parts, *downs])
        self._ups = torch.cat(ups) if ups else torch.empty(0)
        self._biases: torch.Tensor | None = None
        if any(b is not None for b in biases):
            shares = [
                torch.zeros(len(w)) if b is None else b.detach().float() for w, b in zip(weights, biases, strict=True)
            ]
            self._biases = torch.cat([_panels(share[:, None])[:, 0] for share in shares])
        group = _Group(
            self.inputs,
            self.outputs,
            self.ranks,
            len(panels),
            len(rank_panels),
            self._panels.ctypes.data,
            self._weights.data_ptr(),
            None if self._biases is None else self._biases.data_ptr(),
            self._ups.data_ptr(),
        )
        self._group = ctypes.byref(group)

    def __call__(
        self,
        x: torch.Tensor,
        d_MR: torch.Tensor | None,
        norm: Norm | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """[..., o] from x [..., i]; without ``d`` the linears alone. Raises TypeError for other dtypes or devices.

        ``norm`` normalises x first; ``residual`` [..., o] is added to the result.
        """
        if x.dtype != torch.float32 or x.device.type != "cpu":
            raise TypeError(f"packed weights: got {x.dtype} on {x.device}, allowed: torch.float32 on cpu")
        x = x.contiguous()
        rows = x.numel() // self.inputs
        y = x.new_empty((*x.shape[:-1], self.outputs))
        if rows == 0:
            return y
        scratch = x.new_empty(self._library.packed_scratch(self._group, rows))
        # Named, so that they live until the call is over.
        d_MR = None if d_MR is None else d_MR.contiguous()
        residual = None if residual is None else residual.contiguous()
        self._library.packed_multiply(
            self._group,
            x.data_ptr(),
            None if d_MR is None else d_MR.data_ptr(),
            None if norm is None else norm.weight_i.data_ptr(),
            None if residual is None else residual.data_ptr(),
            y.data_ptr(),
            scratch.data_ptr(),
            0.0 if norm is None else norm.epsilon,
            rows,
            torch.get_num_threads(),
        )
        return y


def _panels(weight_oi: torch.Tensor) -> torch.Tensor:
    """[panels, i, W], the last panel filled up with zeros."""
    outputs, inputs = weight_oi.shape
    count = -(-outputs // _WIDTH)
    padded = weight_oi.new_zeros(count * _WIDTH, inputs)
    padded[:outputs] = weight_oi.detach()
    return padded.view(count, _WIDTH, inputs).transpose(1, 2).contiguous()


@cache
def _library() -> ctypes.CDLL | None:
    made = library(Path(__file__).with_suffix(".c"))
    if made is not None:
        made.packed_scratch.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        made.packed_scratch.restype = ctypes.c_int64
        made.packed_multiply.argtypes = [*[ctypes.c_void_p] * 7, ctypes.c_float, ctypes.c_int64, ctypes.c_int]
        made.packed_multiply.restype = None
    return made
