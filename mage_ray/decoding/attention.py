"""What each layer of a model may look at: causal masks over KV slots, with sliding windows where a model has them.

Legend: B rows, T tokens of this forward, L positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from mage_ray.errors import FieldError

_FULL, _SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class Attention:
    """``kinds`` of layers in a model; ``window`` the reach of the sliding ones; ``additive`` where a mask is added."""

    kinds: tuple[str, ...]
    window: int | None
    additive: bool
    dtype: torch.dtype

    @classmethod
    def of(cls, model: PreTrainedModel, length: int) -> Attention:
        """Raises FieldError for layers that aren't plain or sliding attention, or kernels that take no such mask."""
        config = model.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            window = None
        kinds = set(getattr(config, "layer_types", None) or ([_SLIDING] if window else [_FULL]))
        if not kinds <= {_FULL, _SLIDING}:
            raise FieldError("model", f"layers of {', '.join(sorted(kinds))}", f"{_FULL} and {_SLIDING}")
        if window is None or length <= window:  # what a window would hide is never there
            kinds, window = {_FULL}, None
        kernel = getattr(model.config, "_attn_implementation", None) or "sdpa"
        if kernel not in ("sdpa", "eager"):
            raise FieldError("model", f"attention by {kernel}", "sdpa or eager, which take a mask for each row")
        return cls(tuple(sorted(kinds)), window, kernel == "eager", model.dtype)

    @property
    def full(self) -> bool:
        """Whether all layers see all that is before."""
        return self.kinds == (_FULL,)

    def masks(
        self,
        position_BT: torch.Tensor,
        visible: int,
        seen_BT: torch.Tensor | None = None,
        own_BT: torch.Tensor | None = None,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The mask [B, 1, T, L] of tokens at ``position_BT``, L = ``visible``; by kind where there are several.

        Tokens see what is before them and themselves; with ``seen_BT`` and ``own_BT`` the first so many of the slot's
        places and their own one, which then need not be their position.
        """
        by_kind = {kind: self._mask(kind, position_BT, visible, seen_BT, own_BT) for kind in self.kinds}
        return by_kind if len(by_kind) > 1 else by_kind[self.kinds[0]]

    def _mask(
        self,
        kind: str,
        position_BT: torch.Tensor,
        visible: int,
        seen_BT: torch.Tensor | None,
        own_BT: torch.Tensor | None,
    ) -> torch.Tensor:
        place_L = torch.arange(visible, device=position_BT.device)
        seen_BTL = place_L <= position_BT[:, :, None] if seen_BT is None else place_L < seen_BT[:, :, None]
        if kind == _SLIDING and self.window is not None:
            seen_BTL &= place_L > position_BT[:, :, None] - self.window
        if own_BT is not None:
            seen_BTL |= place_L == own_BT[:, :, None]
        if self.additive:
            hidden = torch.finfo(self.dtype).min
            return torch.zeros_like(seen_BTL, dtype=self.dtype).masked_fill(~seen_BTL, hidden)[:, None]
        return seen_BTL[:, None]
