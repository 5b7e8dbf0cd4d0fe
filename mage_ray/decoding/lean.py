"""Layers that do in a few operations what transformers' do in many: at small batch a step is bound by their number.

A lean layer computes what the layer in its place does, from the same linears. Left out are only detours: normalisation
in one kernel, no copies of keys for grouped queries; on the CPU norms and residuals are part of the packed products
(packed.c), and the rest of attention is one call (attend.c).

Legend: B rows, T tokens, H query heads, G key-value heads, D head size, L positions, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention, silu
from transformers import PreTrainedModel

from mage_ray.decoding.attend import FEW, attend, can_attend
from mage_ray.decoding.attention import Attention
from mage_ray.merging.mixed_linear import MixedLinear, SharedInput
from mage_ray.merging.packed import Norm

_Map = Callable[[torch.Tensor], torch.Tensor]

_KNOWN = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
"""Pre-norm layers of RMS norms, rotary positions and a gated MLP."""


def lighten(model: PreTrainedModel, attention: Attention) -> Callable[[], None]:
    """Put lean layers in place of those of a known kind; returns what puts the original ones back.

    For models whose linears are in place already (AdapterBank.install) and whose attention is "sdpa".
    """
    layers = getattr(getattr(model, "base_model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or getattr(model.config, "_attn_implementation", None) != "sdpa":
        return lambda: None
    originals = list(layers)
    step = _Step()
    for i, layer in enumerate(originals):
        if type(layer).__name__ in _KNOWN:
            layers[i] = LeanLayer(layer, step, attention.full)

    def undo() -> None:
        for i, layer in enumerate(originals):
            layers[i] = layer

    return undo


class _Step:
    """What all layers of one forward share, made by the first: the rotation's factors, the mask of grouped queries."""

    def __init__(self) -> None:
        self._of: tuple[object, object] = (None, None)
        self.cos_BT1D = self.sin_BT1D = self.mask_B1TL = torch.empty(0)

    def prepare(self, cos_BTD: torch.Tensor, sin_BTD: torch.Tensor, mask_B1TL: torch.Tensor, groups: int) -> None:
        if self._of[0] is cos_BTD and self._of[1] is mask_B1TL:
            return
        self._of = cos_BTD, mask_B1TL
        self.cos_BT1D = cos_BTD[:, :, None]
        first_BTd, second_BTd = sin_BTD.chunk(2, -1)
        # Rotating half of a head is rolling it, with the sign of the first half turned.
        self.sin_BT1D = torch.cat((-first_BTd, second_BTd), -1)[:, :, None]
        # Added up as it is; attention would make these numbers of a mask of booleans in each layer anew.
        zero = torch.zeros((), dtype=cos_BTD.dtype, device=cos_BTD.device)
        mask_B1TL = torch.where(mask_B1TL, zero, -torch.inf)
        self.mask_B1TL = mask_B1TL if mask_B1TL.shape[2] == 1 else mask_B1TL.repeat(1, 1, groups, 1)

    def rotated(self, x_BTHD: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(x_BTHD * self.cos_BT1D, x_BTHD.roll(x_BTHD.shape[-1] // 2, -1), self.sin_BT1D)


class LeanLayer(nn.Module):
    """Stands in for one decoder layer. Without a cache and a mask of its own, the original runs."""

    def __init__(self, original: nn.Module, step: _Step, full: bool) -> None:
        super().__init__()
        self.original = original
        attention: Any = original.self_attn
        mlp: Any = original.mlp
        norms: Any = (original.input_layernorm, original.post_attention_layernorm)
        attending = [attention.q_proj, attention.k_proj, attention.v_proj]
        head = int(attention.head_dim)
        head_norms = (_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None
        group, whole = _packed(attending), None
        if group is not None and full and head_norms is None and can_attend(norms[0].weight, head):
            whole = partial(group.fused, norm=_rms(norms[0]))
        # Outside of nn.Module's look-ups, which cost as much as a small operation.
        parts = {
            "step": step,
            "index": attention.layer_idx,
            "head": head,
            "heads": (attention.q_proj.out_features // head, attention.k_proj.out_features // head),
            "scale": float(attention.scaling),
            "whole": whole,
            "qkv": _normed(norms[0], attending),
            "out": _added(attention.o_proj),
            "gate_up": _normed(norms[1], [mlp.gate_proj, mlp.up_proj]),
            "down": _added(mlp.down_proj),
            "act": silu if isinstance(mlp.act_fn, nn.SiLU) or mlp.act_fn is silu else mlp.act_fn,
            "head_norms": head_norms,
        }
        object.__setattr__(self, "parts", tuple(parts.values()))

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        past_key_values: Any = None,
        **others: Any,
    ) -> torch.Tensor:
        if attention_mask is None or past_key_values is None or position_embeddings is None:
            return self.original(
                hidden_states,
                attention_mask=attention_mask,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                **others,
            )
        step, index, head, heads, scale, whole, qkv, out, gate_up, down, act, head_norms = self.parts  # type: ignore[misc]
        if whole is not None and hidden_states.shape[1] <= FEW:
            qkv_BTx = whole(hidden_states)
            seen_BTx = attend(qkv_BTx, *position_embeddings, past_key_values, index, heads, scale)
        else:
            step.prepare(*position_embeddings, attention_mask, heads[0] // heads[1])
            seen_BTx = _look_back(step, past_key_values, index, head, heads, scale, head_norms, *qkv(hidden_states))
        x_BTE = out(seen_BTx, hidden_states)
        gate_BTM, up_BTM = gate_up(x_BTE)
        return down(act(gate_BTM).mul_(up_BTM), x_BTE)


def _look_back(
    step: _Step,
    cache: Any,
    index: int,
    head: int,
    heads: tuple[int, int],
    scale: float,
    head_norms: tuple[_Map, _Map] | None,
    q_BTx: torch.Tensor,
    k_BTx: torch.Tensor,
    v_BTx: torch.Tensor,
) -> torch.Tensor:
    """What the queries see, [B, T, H * D], by PyTorch's own attention."""
    rows, tokens, _ = q_BTx.shape
    q_BTHD = q_BTx.unflatten(-1, (heads[0], head))
    k_BTGD = k_BTx.unflatten(-1, (heads[1], head))
    if head_norms is not None:
        q_BTHD, k_BTGD = head_norms[0](q_BTHD), head_norms[1](k_BTGD)
    q_BTHD, k_BTGD = step.rotated(q_BTHD), step.rotated(k_BTGD)
    k_BGLD, v_BGLD = cache.update(k_BTGD.transpose(1, 2), v_BTx.unflatten(-1, (heads[1], head)).transpose(1, 2), index)
    # The queries that share a key-value head are further tokens of it.
    q_BGtD = q_BTHD.transpose(1, 2).reshape(rows, heads[1], -1, head)
    seen_BGtD = scaled_dot_product_attention(q_BGtD, k_BGLD, v_BGLD, attn_mask=step.mask_B1TL, scale=scale)
    return seen_BGtD.reshape(rows, heads[0], tokens, head).transpose(1, 2).reshape(rows, tokens, -1)


def _packed(linears: Sequence[nn.Module]) -> SharedInput | None:
    """The packed group that these linears are, in order."""
    group = _group(linears)
    return group if group is not None and group.packed else None


def _group(linears: Sequence[nn.Module]) -> SharedInput | None:
    first = linears[0]
    return first.leads(linears) if isinstance(first, MixedLinear) else None


def _normed(module: nn.Module, linears: Sequence[nn.Module]) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    """What linears make of one input after its norm; by one product where they are one group, in order."""
    if (packed := _packed(linears)) is not None:
        norm, split = _rms(module), packed.split
        return lambda x: split(packed.fused(x, norm))
    norm_of, group = _norm(module), _group(linears)
    if group is not None:
        return lambda x: group.results(norm_of(x))

    def each(x: torch.Tensor) -> list[torch.Tensor]:
        normed = norm_of(x)
        return [linear(normed) for linear in linears]

    return each


def _added(linear: nn.Module) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(x, residual) -> residual + linear(x)."""
    if (packed := _packed([linear])) is not None:
        return lambda x, residual: packed.fused(x, None, residual)
    return lambda x, residual: residual + linear(x)


def _rms(module: Any) -> Norm:
    return Norm(module.weight.detach(), float(module.variance_epsilon))


def _norm(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """An RMS norm in one kernel."""
    weight, eps = module.weight, module.variance_epsilon
    assert isinstance(weight, torch.Tensor)
    size = len(weight)
    if weight.device.type == "cuda":
        return lambda x: rms_norm(x, (size,), weight, float(eps))  # type: ignore[arg-type]
    if weight.dtype != torch.float32:
        return module
    # With its negative behind it, a vector has mean 0, and the variance is the mean square: a layer norm does it.
    weight_2E = torch.cat((weight, weight)).detach()
    return lambda x: layer_norm(torch.cat((x, -x), -1), (2 * size,), weight_2E, None, float(eps))[..., :size]  # type: ignore[arg-type]
