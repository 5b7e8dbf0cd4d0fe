"""What people write today: transformers' ``generate`` on merged weights, and guidance in a LogitsProcessor.

Legend: Q requests, T tokens that are new since the last call, V vocabulary, C candidates, E hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from setting import CANDIDATES, STRENGTH, Prompt
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from mage_ray.decoding.plan import Plan, Row
from mage_ray.merging.adapter import Adapter


@dataclass(frozen=True)
class MergedHead:
    """``V(s) = weight . h + bias`` and, where there is a matrix, ``Q(s, a) = V(s) + e_a . matrix h``; float64."""

    weight_E: torch.Tensor
    bias: float
    matrix_EE: torch.Tensor | None


class MergedModels:
    """The model of each row, its experts added to the weights one by one in float64; made on first use and kept.

    What no expert touches (embeddings, norms, head) is one tensor for all of them. Row 0 is ``reference`` itself. A row
    may have coefficients for the first experts alone.
    """

    def __init__(self, reference: PreTrainedModel, experts: Sequence[Adapter]) -> None:
        self.reference = reference
        self._experts = experts
        self._made: dict[tuple[float, ...], PreTrainedModel] = {}

    @torch.no_grad()
    def of(self, row: Row) -> PreTrainedModel:
        """The model of a row, in eval mode; of a value model what is below its head."""
        coefficients = self._over_all(row)
        if not any(coefficients):
            return self.reference
        if coefficients not in self._made:
            touched = {f"{module}.weight" for expert in self._experts for module in expert.factors}
            shared = {id(p): p for name, p in self.reference.named_parameters() if name not in touched}
            model = copy.deepcopy(self.reference, memo=dict(shared))
            for module in {module for expert in self._experts for module in expert.factors}:
                weight = model.get_submodule(module).weight
                assert isinstance(weight, torch.Tensor)
                total = weight.double()
                for expert, coefficient in zip(self._experts, coefficients, strict=True):
                    if coefficient and module in expert.factors:
                        total += coefficient * expert.factors[module].delta()
                weight.copy_(total)
            self._made[coefficients] = model
        return self._made[coefficients]

    def head_of(self, row: Row) -> MergedHead:
        """The head of a value model's row: as its weights, each part the sum of the experts' own, in float64."""
        parts = [(c, e.head) for e, c in zip(self._experts, self._over_all(row), strict=True) if c]
        matrix_EE = None
        if row.head == "vocabulary":
            matrix_EE = sum(c * (head.up_Er.double() @ head.down_rE.double()) for c, head in parts)
        weight_E = sum(c * head.weight_E.double() for c, head in parts)
        return MergedHead(weight_E, sum(c * head.bias for c, head in parts), matrix_EE)

    def _over_all(self, row: Row) -> tuple[float, ...]:
        return (*row.coefficients, *[0.0] * (len(self._experts) - len(row.coefficients)))


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    new_tokens: int,
    guidance: LogitsProcessor | None = None,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """The greedy continuations of prompts of one length: transformers' ``generate`` with its default dynamic cache.

    The model has no end token (``setting.without_stops``), so every request gets all ``new_tokens``. ``streamer`` gets
    each token once it is made; it takes one prompt alone.
    """
    ids_QT = torch.tensor(prompts, device=model.device)
    config = GenerationConfig(do_sample=False, min_new_tokens=new_tokens, max_new_tokens=new_tokens, pad_token_id=0)
    processors = LogitsProcessorList([] if guidance is None else [guidance])
    made_QT = model.generate(
        input_ids=ids_QT,
        attention_mask=torch.ones_like(ids_QT),
        generation_config=config,
        logits_processor=processors,
        streamer=streamer,
    )
    return made_QT[:, ids_QT.shape[1] :].tolist()


class ImplicitGuidance(LogitsProcessor):
    """``log pi_base + w (log pi_guide - log pi_ref)`` on the base's most likely tokens, for one call of ``generate``.

    Guide and reference keep their own caches, are fed only what is new, and compute the logits of the last position
    alone. Logits stand in for log-probabilities: a model's constant changes no greedy choice.
    """

    def __init__(self, guide: PreTrainedModel, reference: PreTrainedModel) -> None:
        self._models = (guide, reference)
        self._caches = (DynamicCache(config=guide.config), DynamicCache(config=reference.config))
        self._seen = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        new_QT = input_ids[:, self._seen :]
        self._seen = input_ids.shape[1]
        guide_QV, reference_QV = (
            model(input_ids=new_QT, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            for model, cache in zip(self._models, self._caches, strict=True)
        )
        base_QC, ids_QC = scores.topk(min(CANDIDATES, scores.shape[-1]), dim=-1)
        guided_QC = base_QC + STRENGTH * (guide_QV.gather(1, ids_QC).float() - reference_QV.gather(1, ids_QC).float())
        return torch.full_like(scores, -torch.inf).scatter_(1, ids_QC, guided_QC)


def generate_guided(
    models: MergedModels,
    plan: Plan,
    prompts: Sequence[Prompt],
    new_tokens: int,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """The rival: ``generate`` on the plan's base, guided by its guide and the reference."""
    base, guide, reference = (models.of(row) for row in plan.rows)
    return generate(base, prompts, new_tokens, ImplicitGuidance(guide, reference), streamer)
