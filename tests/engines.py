"""A tiny model with four adapters behind an engine, and the float64 formula of any plan as its oracle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from adapters import make_adapter
from tiny import make_tiny_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.plan import Plan, Row
from mage_ray.decoding.runner import RowRunner
from mage_ray.merging.adapter import Adapter, load_adapter
from mage_ray.merging.bank import AdapterBank

BASE, GUIDE, ZERO = (0.7, 0.3, 0.0, 0.0), (0.0, 0.0, 0.6, 0.4), (0.0,) * 4


def ids(text: str) -> tuple[int, ...]:
    return tuple(make_tiny_tokenizer()(text)["input_ids"])


def guided(strength: float = 1.3, candidates: int | None = 12, base: Sequence[float] = BASE, **how: Any) -> Plan:
    """Three rows: a base, a guide and the reference."""
    return Plan.guided(base, [(GUIDE, 1.0), (ZERO, -1.0)], strength, candidates, **how)


class Tiny:
    """A folder with a tiny model, and its four adapters."""

    def __init__(self, model: Path, place: Path, scale: float = 0.2) -> None:
        self.folder = model
        self.paths = [make_adapter(model, place / f"e{i}", seed=i, scale=scale, r=2 + i) for i in range(4)]
        self.adapters: list[Adapter] = [load_adapter(path) for path in self.paths]
        self._merged: dict[Row, PreTrainedModel] = {}

    def engine(self, rows: int = 24, length: int = 200, stop: Sequence[int] = (258,), **options: Any) -> Engine:
        """A fresh engine; options of the runner and of the engine."""
        runner = {k: options.pop(k) for k in ("memory", "kept", "fixed") if k in options}
        model = AutoModelForCausalLM.from_pretrained(self.folder)
        return Engine(RowRunner(model, AdapterBank(self.adapters), rows, length, **runner), stop, **options)

    def merged(self, row: Row) -> PreTrainedModel:
        """The model of one row, merged apart in float64."""
        if row not in self._merged:
            model = AutoModelForCausalLM.from_pretrained(self.folder).double().eval()
            for lam, adapter in zip(row.coefficients, self.adapters, strict=True):
                for name, factors in adapter.factors.items():
                    model.get_submodule(name).weight.data += lam * factors.delta()
            self._merged[row] = model
        return self._merged[row]

    @torch.inference_mode()
    def rows(self, plan: Plan, sequence: Sequence[int]) -> torch.Tensor:
        """Log-probabilities of the plan's rows after each position, [R, T, V], by whole forwards."""
        batch = torch.tensor([list(sequence)])
        return torch.stack([self.merged(row)(batch).logits[0].log_softmax(-1) for row in plan.rows])

    def logprobs(self, plan: Plan, sequence: Sequence[int], alone: bool = False, rounding: float = 0.0) -> torch.Tensor:
        """The plan's log-probabilities after each position, [T, V]; of the base ``alone`` if asked, same candidates.

        ``rounding`` is the standard deviation of noise on the rows: what they could have been in fewer bits.
        """
        rows_RTV = self.rows(plan, sequence)
        rows_RTV = rows_RTV + rounding * torch.randn_like(rows_RTV)
        weights = (1.0, *[0.0] * (len(plan.rows) - 1)) if alone else plan.weights
        scores_TV = sum(w * row_TV for w, row_TV in zip(weights, rows_RTV, strict=True))
        assert isinstance(scores_TV, torch.Tensor)
        if plan.candidates is not None:
            allowed = rows_RTV[0].topk(plan.candidates, dim=-1).indices
            scores_TV = torch.full_like(scores_TV, -torch.inf).scatter(-1, allowed, scores_TV.gather(-1, allowed))
        return scores_TV.log_softmax(-1)

    def drawn(self, plan: Plan, prompt: Sequence[int], answer: Sequence[int], alone: bool = False) -> torch.Tensor:
        """The log-probability of each token of an answer under the plan, [T]."""
        logprobs_TV = self.logprobs(plan, [*prompt, *answer][:-1], alone)[len(prompt) - 1 :]
        return logprobs_TV.gather(-1, torch.tensor([list(answer)]).T)[:, 0]
