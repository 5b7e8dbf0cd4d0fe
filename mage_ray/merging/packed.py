"""A weight laid out once for MKL: float32 on the CPU multiplies faster by it, most of all by few rows.

Legend: M rows of the input, o out and i in features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch.nn.functional import linear

_PACKED_FOR = 64
"""Rows that a weight is packed for. Of 1, 8, 16 and 64 it was the fastest at 1 to 128 rows (SmolLM2's linears)."""


def can_pack(weight: torch.Tensor) -> bool:
    """Whether ``projection`` packs this weight: float32 on the CPU, where ``mkl_is_exact``."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32 and mkl_is_exact()


def projection(weight_oi: torch.Tensor, bias_o: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function x [..., i] -> x @ weight.T + bias [..., o], contiguous. A packed weight itself isn't kept."""
    if can_pack(weight_oi):
        return _packed(weight_oi, bias_o)
    return partial(linear, weight=weight_oi, bias=bias_o)


@cache
def mkl_is_exact() -> bool:
    """Whether a weight packed for one number of rows multiplies right by others, as tried once in this process.

    MKL asks for the same number at both ends, so this rests on how it behaves here, not on its word.
    """
    if not torch.backends.mkl.is_available():
        return False
    dice = torch.Generator().manual_seed(0)
    weight_oi = torch.randn(515, 1537, generator=dice)
    bias_o = torch.randn(515, generator=dice)
    try:
        multiply = _packed(weight_oi, bias_o)
        for m in (1, 2, 3, 7, 24, _PACKED_FOR, _PACKED_FOR + 1, 300):
            x_Mi = torch.randn(m, 1537, generator=dice)
            exact_Mo = x_Mi.double() @ weight_oi.double().T + bias_o.double()
            if not torch.allclose(multiply(x_Mi).double(), exact_Mo, rtol=0, atol=2e-3):
                return False
    except (AttributeError, NotImplementedError, RuntimeError):  # these operators are PyTorch's own affair
        return False
    return True


def _packed(weight_oi: torch.Tensor, bias_o: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    multiply = torch.ops.mkl._mkl_linear
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight_oi.detach().contiguous(), _PACKED_FOR)
    # The operator reads the plain weight only when its last argument isn't the number of rows, else just the shape.
    shape_oi = weight_oi.new_zeros(1).expand(weight_oi.shape)
    features = weight_oi.shape[1]

    def project(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = multiply(x, packed, shape_oi, bias_o, x.numel() // features)
        return result

    return project
