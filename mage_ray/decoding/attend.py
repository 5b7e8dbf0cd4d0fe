"""Attention of a few new tokens over KV slots on the CPU, in one call: attend.c, compiled on first use.

Legend: B rows, T new tokens, H query heads, G key-value heads, D head size, S slots, L positions.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from mage_ray.decoding.slots import KVSlots
from mage_ray.native import library

FEW = 8
"""New tokens of a row up to which this is the faster way; from some number on, products of matrices are."""
_WIDTH, _LARGEST = 16, 256


def can_attend(like: torch.Tensor, head: int) -> bool:
    """Whether ``attend`` takes such numbers and heads of this size: float32 on the CPU, where it can be built."""
    plain = like.device.type == "cpu" and like.dtype == torch.float32
    return plain and head % _WIDTH == 0 and head <= _LARGEST and _library() is not None


def attend(
    qkv_BTX: torch.Tensor,
    cos_BTD: torch.Tensor,
    sin_BTD: torch.Tensor,
    slots: KVSlots,
    layer: int,
    heads: tuple[int, int],
    scale: float,
) -> torch.Tensor:
    """What the queries see, [B, T, H * D]; the new keys and values, rotated, are then in the slots.

    ``qkv_BTX`` holds H queries, G keys and G values of each token beside each other, before their rotation by
    ``cos_BTD`` and ``sin_BTD``. Each token sees what the slots' window says.
    """
    made = _library()
    assert made is not None, "can_attend first"
    rows, tokens, _ = qkv_BTX.shape
    head = cos_BTD.shape[-1]
    keys_SLGD, values_SLGD = slots.whole(layer, heads[1], head, qkv_BTX)
    qkv_BTX, cos_BTD, sin_BTD = qkv_BTX.contiguous(), cos_BTD.contiguous(), sin_BTD.contiguous()
    seen_BTX = qkv_BTX.new_empty(rows, tokens, heads[0] * head)
    threads = torch.get_num_threads()
    window = slots.window
    # A token sees itself besides what is before it.
    reach = (window.visible // _WIDTH + 1) * _WIDTH
    scratch = qkv_BTX.new_empty(threads * reach)
    made.attend(
        qkv_BTX.data_ptr(),
        cos_BTD.data_ptr(),
        sin_BTD.data_ptr(),
        keys_SLGD.data_ptr(),
        values_SLGD.data_ptr(),
        window.start_B.data_ptr(),
        window.seen_BT.data_ptr(),
        window.write_N.data_ptr(),
        seen_BTX.data_ptr(),
        scratch.data_ptr(),
        rows,
        tokens,
        *heads,
        head,
        reach,
        scale,
        threads,
    )
    return seen_BTX


@cache
def _library() -> ctypes.CDLL | None:
    made = library(Path(__file__).with_suffix(".c"))
    if made is not None:
        many, few, real = ctypes.c_int64, ctypes.c_int, ctypes.c_float
        made.attend.argtypes = [*[ctypes.c_void_p] * 10, many, many, few, few, few, many, real, few]
        made.attend.restype = None
    return made
