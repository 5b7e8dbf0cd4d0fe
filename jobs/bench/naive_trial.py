"""A trial as people write it today: weights merged by PEFT, ``generate``, and any plan's guide in a LogitsProcessor.

Legend: Q requests, S tokens of a prompt, padded on the left, T tokens that are new since the last call, V vocabulary,
C candidates.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from setting import BenchError, Prompt
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from mage_ray.decoding.plan import Plan, Row
from mage_ray.decoding.request import Sampling


class PeftModels:
    """The model of any row: adapters weighed by PEFT, exactly (their ranks side by side), and merged into a copy."""

    def __init__(self, reference: PreTrainedModel, experts: Sequence[Path]) -> None:
        self.reference = reference
        self._experts = [str(path) for path in experts]

    def of(self, row: Row) -> PreTrainedModel:
        """In eval mode; a row of no expert's is the reference itself. Raises BenchError for a value model."""
        if row.head is not None:
            raise BenchError("the naive trial knows no value models, allowed: settings guided by experts")
        weights = {f"expert-{k}": c for k, c in enumerate(row.coefficients) if c != 0}
        if not weights:
            return self.reference
        (first, place), *others = [(name, self._experts[int(name.split("-")[1])]) for name in weights]
        model = PeftModel.from_pretrained(copy.deepcopy(self.reference), place, adapter_name=first)
        for name, place in others:
            model.load_adapter(place, adapter_name=name)
        model.add_weighted_adapter(list(weights), list(weights.values()), "mix", combination_type="cat")
        merged: PreTrainedModel = model.merge_and_unload(adapter_names=["mix"])
        return merged.eval()


class PlanGuidance(LogitsProcessor):
    """``sum_r w_r log pi_r`` on the most likely tokens of the plan's first row, for one call of ``generate`` on it.

    The other rows' models keep their own caches, are fed only what is new, and compute the logits of the last position
    alone. Logits stand in for log-probabilities: a model's constant changes no choice.
    """

    def __init__(self, plan: Plan, others: Sequence[PreTrainedModel], mask_QS: torch.Tensor) -> None:
        self._plan, self._mask_QS = plan, mask_QS
        self._models = [(model, DynamicCache(config=model.config)) for model in others]
        self._seen = 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        length = input_ids.shape[1]
        made = torch.ones(len(input_ids), length - self._mask_QS.shape[1], dtype=self._mask_QS.dtype)
        mask = torch.cat([self._mask_QS, made], dim=1)
        fed = {
            "input_ids": input_ids[:, self._seen :],
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, self._seen :],
        }
        self._seen = length
        kept_QC, ids_QC = scores.topk(min(self._plan.candidates or scores.shape[-1], scores.shape[-1]), dim=-1)
        total_QC = self._plan.weights[0] * kept_QC
        for (model, cache), weight in zip(self._models, self._plan.weights[1:], strict=True):
            row_QV = model(**fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1].float()
            total_QC += weight * row_QV.gather(1, ids_QC)
        return torch.full_like(scores, -torch.inf).scatter_(1, ids_QC, total_QC)


@torch.inference_mode()
def generate_planned(
    models: Sequence[PreTrainedModel],
    plan: Plan,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    stop: Sequence[int],
    pad: int,
) -> list[list[int]]:
    """A plan's answers to prompts in one batch, each without what follows its first token among ``stop``.

    ``models`` are those of its rows. Temperature 0 is greedy. Raises BenchError for guides that skip tokens.
    """
    if not plan.cadence.always:
        raise BenchError("the naive trial guides every token, allowed: settings without every, entropy or speculate")
    base, *others = models
    longest = max(map(len, prompts))
    ids_QS = torch.tensor([[pad] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask_QS = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    # On the model, so that nothing of the model's own is filled in where this says nothing.
    base.generation_config = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=bool(drawn),
        eos_token_id=list(stop) or None,
        pad_token_id=pad,
        **drawn,
    )
    torch.manual_seed(sampling.seed % 2**32)
    made_QT = base.generate(
        input_ids=ids_QS,
        attention_mask=mask_QS,
        logits_processor=LogitsProcessorList([PlanGuidance(plan, others, mask_QS)]),
    )[:, longest:]
    return [_until(tokens, stop) for tokens in made_QT.tolist()]


def _until(tokens: Sequence[int], stop: Sequence[int]) -> list[int]:
    """The tokens up to the first one in ``stop``, which is among them."""
    end = next((i + 1 for i, token in enumerate(tokens) if token in stop), len(tokens))
    return list(tokens[:end])
