"""The model made ready to decode, and its forward: the only place where one happens.

Legend: B rows of a forward, K experts, T tokens, L positions, E hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from mage_ray.decoding.attend import FEW
from mage_ray.decoding.attention import Attention
from mage_ray.decoding.lean import lighten
from mage_ray.decoding.outputs import Head, Raw
from mage_ray.decoding.slots import KVSlots
from mage_ray.merging.bank import AdapterBank
from mage_ray.merging.value_head import ValueHeads


class Backbone:
    """A model with a bank built in, its layers lean and its head apart where that computes the same.

    The model belongs to it from here on. With ``whole`` every forward makes its logits itself. Raises FieldError when
    the bank doesn't fit the model, or when the model's attention can't be given a mask of its own.
    """

    def __init__(self, model: PreTrainedModel, bank: AdapterBank, length: int, whole: bool) -> None:
        self.model = model.eval()
        self.layers = model.config.get_text_config().num_hidden_layers
        self.experts = len(bank)
        self.head: Head | None = None
        tied_VE = _tied_weight(model)
        self._mix = bank.install(model)
        self.values = _value_heads(model, bank)
        # Without the head, where nobody needs logits.
        self._body = getattr(model, "base_model", model)
        self._attention = Attention.of(model, length)
        self._lighten(length, None if whole else _head(model, bank, tied_VE))

    @torch.inference_mode()
    def run(
        self,
        cache: KVSlots,
        slots: slice | torch.Tensor,
        place_B: torch.Tensor,
        coefficients_BK: torch.Tensor,
        input_BT: torch.Tensor,
        position_BT: torch.Tensor,
        written_BT: torch.Tensor,
        visible: int,
        keep: int,
        seen_BT: torch.Tensor | None = None,
    ) -> Raw:
        """One forward over ``slots`` of the cache, numbered ``place_B``; hidden states or logits of the last columns.

        ``keep`` columns [B * keep, ..]: their hidden states, unless nobody can use those, and their logits, unless the
        head comes later. With 0 only keys and values are made. Tokens see their slot up to their position or, where
        ``seen_BT`` is given, its first so many places and themselves. Everything that changes from step to step is in
        tensors, so that it can be captured.
        """
        own_BT = None if seen_BT is None else written_BT
        cache.open(slots, place_B, position_BT + 1 if seen_BT is None else seen_BT, written_BT, visible)
        inputs = {
            "input_ids": input_BT,
            "position_ids": position_BT,
            "attention_mask": self._attention.masks(position_BT, visible, seen_BT, own_BT),
            "past_key_values": cache,
            "use_cache": True,
        }
        with self._mix.rows(coefficients_BK):
            if keep == 0:
                self._body(**inputs)
                return Raw(None, torch.empty(0))
            if self.head is not None or seen_BT is not None:
                return Raw(self._body(**inputs).last_hidden_state[:, -keep:].flatten(0, 1), None)
            if self.values is None:
                return Raw(None, self._logits(inputs, keep))
            # The model makes its logits in its own way; what they are made from is seen on the way.
            passing: list[torch.Tensor] = []
            hook = self._body.register_forward_hook(lambda *seen: passing.append(seen[2].last_hidden_state))
            try:
                logits_RV = self._logits(inputs, keep)
            finally:
                hook.remove()
            return Raw(passing[0][:, -keep:].flatten(0, 1), logits_RV)

    def _logits(self, inputs: dict[str, Any], keep: int) -> torch.Tensor:
        logits_RV: torch.Tensor = self.model(**inputs, logits_to_keep=keep).logits.flatten(0, 1)
        return logits_RV

    def _lighten(self, length: int, head: Head | None) -> None:
        """Give the model lean layers, and the outputs its head, each if that computes the same here.

        A model that can't be run here fails now.
        """
        expected_TV = self._probe(length)
        tolerance = 1e-4 if expected_TV.dtype == torch.float32 else 0.1

        def same(got_TV: torch.Tensor) -> bool:
            return bool((got_TV - expected_TV).abs().max() <= tolerance * expected_TV.abs().max())

        undo = lighten(self.model, self._attention)
        if not same(self._probe(length)):
            undo()
        if head is not None:
            self.head = head
            hidden_TE = self._probe(length)
            size = self.model.config.get_text_config().hidden_size
            if not (hidden_TE.shape[-1] == size and same(head.project(hidden_TE))):
                self.head = None

    @torch.inference_mode()
    def _probe(self, length: int) -> torch.Tensor:
        """The logits, or what comes before the head, of a few tokens and of many."""
        parts = []
        for tokens in (min(length, 4), min(length, 2 * FEW)):
            position_1T = torch.arange(tokens, device=self.model.device)[None]
            coefficients_1K = torch.zeros(1, self.experts, device=self.model.device, dtype=self.model.dtype)
            cache = KVSlots(self.layers, 1, tokens)
            inputs = (position_1T[0, :1], coefficients_1K, position_1T % 4, position_1T, position_1T)
            raw = self.run(cache, slice(0, 1), *inputs, tokens, tokens)
            made = raw.hidden_RE if raw.logits_RV is None else raw.logits_RV
            assert made is not None
            parts.append(made)
            self.bytes_per_position = cache.bytes_per_position
            self.nothing = raw.first(0)
        return torch.cat(parts)


def _output(model: PreTrainedModel) -> nn.Module | None:
    """The model's head, the module that makes logits, if it says which one that is."""
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None


def _tied_weight(model: PreTrainedModel) -> torch.Tensor | None:
    """The weight [V, E] of a head that is the embedding's, too, and so stays whatever is done to the head."""
    head = _output(model)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        return None
    embedding: Any = model.get_input_embeddings()
    return head.weight.detach() if getattr(embedding, "weight", None) is head.weight else None


def _head(model: PreTrainedModel, bank: AdapterBank, weight_VE: torch.Tensor | None) -> Head | None:
    """The model's head as it is now, if no expert touches it."""
    head = _output(model)
    names = {name for name, module in model.named_modules() if module is head}
    if head is None or any(not names.isdisjoint(expert.factors) for expert in bank.experts):
        return None
    return Head(head, weight_VE)


def _value_heads(model: PreTrainedModel, bank: AdapterBank) -> ValueHeads | None:
    """The bank's value heads, where any expert has one."""
    heads = {expert.name: expert.head for expert in bank.experts}
    if all(head is None for head in heads.values()):
        return None
    embedding: Any = model.get_input_embeddings()
    return ValueHeads(heads, embedding.weight.detach())
