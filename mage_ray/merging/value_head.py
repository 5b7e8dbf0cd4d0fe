"""Value heads: what a value model reads off the last hidden state, stacked so that every row mixes its own.

Legend: K experts, R rows, E hidden size, V vocabulary, C tokens asked for, r rank of a head.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import embedding

from mage_ray.errors import FieldError

Kind = Literal["scalar", "vocabulary"]


@dataclass(frozen=True)
class ValueHead:
    """``V(s) = weight . h + bias`` of the last hidden state h [E], in the units of the reward that it was trained on.

    A *vocabulary* head has ``down`` [r, E] and ``up`` [E, r] besides: ``Q(s, a) = V(s) + e_a . up down h``, where e_a
    is the model's input embedding of token a. Merging is linear in ``weight``, ``bias`` and the product ``up down``, as
    it is in LoRA's deltas. Derived.
    """

    weight_E: torch.Tensor
    bias: float
    down_rE: torch.Tensor | None = None
    up_Er: torch.Tensor | None = None

    @property
    def kind(self) -> Kind:
        """Whether it scores all next tokens from one state, or one state alone."""
        return "scalar" if self.down_rE is None else "vocabulary"

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a file of it holds."""
        parts = {"weight": self.weight_E, "bias": torch.tensor(self.bias), "down": self.down_rE, "up": self.up_Er}
        return {name: part.contiguous() for name, part in parts.items() if part is not None}

    @classmethod
    def of(cls, tensors: Mapping[str, torch.Tensor], name: str) -> ValueHead:
        """The head in a file's tensors. Raises FieldError when they are no head's, or not finite."""
        kinds = ({"weight", "bias"}, {"weight", "bias", "down", "up"})
        if set(tensors) not in kinds or tensors["weight"].ndim != 1 or tensors["bias"].numel() != 1:
            raise FieldError(f"value head {name}", sorted(tensors), "weight [E] and bias, and perhaps down and up")
        if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
            raise FieldError(f"value head {name}", "NaN or infinity", "finite weights")
        down, up, size = tensors.get("down"), tensors.get("up"), len(tensors["weight"])
        if down is not None and up is not None and (down.shape[1:] != (size,) or up.shape != (size, len(down))):
            got = f"down {tuple(down.shape)} and up {tuple(up.shape)}"
            raise FieldError(f"value head {name}", got, f"[r, {size}] and [{size}, r]")
        return cls(tensors["weight"], float(tensors["bias"]), down, up)


def merged_head(heads: Sequence[ValueHead | None], coefficients: Sequence[float]) -> ValueHead | None:
    """The head of a merge, exact whatever the ranks; None where an expert that takes part has none.

    It is a vocabulary head when all that take part are.
    """
    parts = [(float(lam), head) for lam, head in zip(coefficients, heads, strict=True) if lam != 0]
    if not parts or any(head is None for _, head in parts):
        return None
    own = [(lam, head) for lam, head in parts if head is not None]
    weight_E = torch.stack([lam * head.weight_E.double() for lam, head in own]).sum(0).to(own[0][1].weight_E)
    low = [(lam, head.down_rE, head.up_Er) for lam, head in own]
    downs = [down_rE for _, down_rE, _ in low if down_rE is not None]
    ups = [(lam * up_Er.double()).to(up_Er) for lam, _, up_Er in low if up_Er is not None]
    whole = len(downs) == len(ups) == len(own)
    bias = sum(lam * head.bias for lam, head in own)
    return ValueHead(weight_E, bias, torch.cat(downs) if whole else None, torch.cat(ups, dim=1) if whole else None)


class ValueHeads:
    """The heads of a bank's experts, None for those that are no value models. Each row gets the head it merges."""

    def __init__(self, experts: Mapping[str, ValueHead | None], embedding_VE: torch.Tensor) -> None:
        """``experts``: each one's head by its name, in the bank's order. Raises FieldError for another hidden size."""
        heads = list(experts.values())
        self._embedding_VE = embedding_VE
        size, like = embedding_VE.shape[1], embedding_VE
        for name, head in experts.items():
            if head is not None and head.weight_E.shape != (size,):
                raise FieldError(
                    f"value head {name}", f"one of hidden size {len(head.weight_E)}", f"{size}, the model's"
                )
        zeros_E = like.new_zeros(size)
        self._weight_KE = torch.stack([zeros_E if h is None else h.weight_E.to(like) for h in heads] or [zeros_E])
        self._bias_K = like.new_tensor([0.0 if h is None else h.bias for h in heads] or [0.0])
        low = [(k, h) for k, h in enumerate(heads) if h is not None and h.down_rE is not None and h.up_Er is not None]
        self._expert_R = torch.tensor([k for k, h in low for _ in range(len(h.down_rE))], dtype=torch.long)  # type: ignore[arg-type]
        self._expert_R = self._expert_R.to(like.device)
        empty = like.new_zeros(0, size)
        self._down_RE = torch.cat([empty, *(h.down_rE.to(like) for _, h in low)])  # type: ignore[union-attr]
        self._up_RE = torch.cat([empty, *(h.up_Er.to(like).t() for _, h in low)])  # type: ignore[union-attr]

    def scalar(self, hidden_RE: torch.Tensor, coefficients_RK: torch.Tensor) -> torch.Tensor:
        """``V`` of each row, [R], by the head that its coefficients make."""
        weight_RE = coefficients_RK @ self._weight_KE
        return (hidden_RE * weight_RE).sum(-1) + coefficients_RK @ self._bias_K

    def vocabulary(
        self, hidden_RE: torch.Tensor, coefficients_RK: torch.Tensor, ids_RC: torch.Tensor | None
    ) -> torch.Tensor:
        """``Q`` of some tokens of each row, [R, C], or of all, [R, V]."""
        inner_RE = ((hidden_RE @ self._down_RE.t()) * coefficients_RK[:, self._expert_R]) @ self._up_RE
        if ids_RC is None:
            scores = inner_RE @ self._embedding_VE.t()
        else:
            scores = (embedding(ids_RC, self._embedding_VE) @ inner_RE[:, :, None])[:, :, 0]
        return scores + self.scalar(hidden_RE, coefficients_RK)[:, None]
