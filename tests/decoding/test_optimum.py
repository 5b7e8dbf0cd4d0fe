"""Guidance by exact values on a task that dynamic programming solves: what is sampled is the KL-regularised optimum.

Answers of three tokens out of four; every prefix has logits and a value of its own. The optimum of
``E[r] - eta KL(pi || pi_base)`` over whole answers is ``pi*(y) ~ pi_base(y) exp(r(y) / eta)`` (docs/method.md).
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch import nn
from transformers import LlamaConfig

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.plan import Plan, Row
from mage_ray.decoding.request import Request, Sampling
from mage_ray.decoding.runner import RowRunner
from mage_ray.merging.adapter import Adapter, Factors
from mage_ray.merging.bank import AdapterBank
from mage_ray.merging.value_head import ValueHead

TOKENS, HORIZON, ETA = 4, 3, 0.5
START = (0,)
COUNT = 6000
ANSWERS = list(itertools.product(range(TOKENS), repeat=HORIZON))


def state(tokens: tuple[int, ...]) -> int:
    """The number of a prefix, the start included: its tokens as digits, one more than they are."""
    return sum((token + 1) * (TOKENS + 1) ** place for place, token in enumerate(tokens))


SIZE = (TOKENS + 1) ** (HORIZON + 1) + 1


class Body(nn.Module):
    """The last hidden state tells the whole prefix, by way of keys in the cache and of the mask: one of SIZE."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, SIZE)
        self.embedding.weight.data = torch.eye(TOKENS, SIZE)

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: Any,
        **_: Any,
    ) -> Any:
        digits_BT = ((input_ids + 1) * (TOKENS + 1) ** position_ids).float()
        keys_B1L1, _values = past_key_values.update(digits_BT[:, None, :, None], digits_BT[:, None, :, None], 0)
        seen_BTL = attention_mask[:, 0] * keys_B1L1[:, 0, None, :, 0]
        state_BT = seen_BTL.sum(-1).long().clamp(0, SIZE - 1)
        return SimpleNamespace(last_hidden_state=nn.functional.one_hot(state_BT, SIZE).float())


class Tree(nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.config = LlamaConfig(
            vocab_size=TOKENS, num_hidden_layers=1, max_position_embeddings=32, hidden_size=SIZE, num_attention_heads=1
        )
        self.model = Body()
        self.head = nn.Linear(SIZE, TOKENS, bias=False)
        self.head.weight.data = logits.T.contiguous()
        self.device, self.dtype = torch.device("cpu"), torch.float32

    @property
    def base_model(self) -> nn.Module:
        return self.model

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, logits_to_keep: int = 1, **inputs: Any) -> Any:
        hidden = self.model(**inputs).last_hidden_state
        return SimpleNamespace(logits=self.head(hidden[:, -logits_to_keep:]))


class Task:
    """Random logits of every prefix, a random reward of every answer, and what follows from them in float64."""

    def __init__(self) -> None:
        dice = np.random.default_rng(3)
        self.logits = {
            p: dice.normal(size=TOKENS) for n in range(HORIZON) for p in itertools.product(range(TOKENS), repeat=n)
        }
        self.reward = {answer: float(dice.normal()) for answer in ANSWERS}

    def probability(self, prefix: tuple[int, ...], token: int) -> float:
        weights = np.exp(self.logits[prefix])
        return float(weights[token] / weights.sum())

    def value(self, prefix: tuple[int, ...]) -> float:
        """``V*(s) = eta log E_base exp(r / eta)``, by dynamic programming."""
        if len(prefix) == HORIZON:
            return self.reward[prefix]
        total = sum(self.probability(prefix, a) * np.exp(self.value((*prefix, a)) / ETA) for a in range(TOKENS))
        return float(ETA * np.log(total))

    def base(self, answer: tuple[int, ...]) -> float:
        return float(np.prod([self.probability(answer[:t], a) for t, a in enumerate(answer)]))

    def optimum(self) -> dict[tuple[int, ...], float]:
        weights = {y: self.base(y) * np.exp(self.reward[y] / ETA) for y in ANSWERS}
        return {y: float(w / sum(weights.values())) for y, w in weights.items()}


TASK = Task()


@pytest.fixture(scope="module")
def engine() -> Engine:
    logits, value, table = torch.zeros(SIZE, TOKENS), torch.zeros(SIZE), torch.zeros(TOKENS, SIZE)
    for prefix, row in TASK.logits.items():
        logits[state((*START, *prefix))] = torch.from_numpy(row)
        for a in range(TOKENS):
            table[a, state((*START, *prefix))] = TASK.value((*prefix, a))
    for n in range(HORIZON + 1):
        for prefix in itertools.product(range(TOKENS), repeat=n):
            value[state((*START, *prefix))] = TASK.value(prefix)
    # Q(s, a) = V(s) + e_a . up down h, so the table holds what Q is more than V.
    table -= value
    nothing = {"head": Factors(torch.zeros(1, SIZE), torch.zeros(TOKENS, 1), 1.0)}
    head = ValueHead(value, 0.0, table, torch.eye(SIZE, TOKENS))
    bank = AdapterBank([Adapter("values", nothing, head=head)])
    return Engine(RowRunner(Tree(logits), bank, rows=64, length=16), stop=[])  # type: ignore[arg-type]


def sampled(engine: Engine, plan: Plan) -> dict[tuple[int, ...], int]:
    answers = engine.generate([Request(START, plan, Sampling(HORIZON, 1.0, seed=s)) for s in range(COUNT)])
    counts = dict.fromkeys(ANSWERS, 0)
    for answer in answers:
        counts[answer.require().ids] += 1
    return counts


def p_value(counts: dict[tuple[int, ...], int], expected: dict[tuple[int, ...], float]) -> float:
    often = sorted((y for y in ANSWERS if expected[y] * COUNT >= 8), key=lambda y: -expected[y])[:-1]
    seen, wanted = [counts[y] for y in often], [expected[y] * COUNT for y in often]
    return float(chisquare([*seen, COUNT - sum(seen)], [*wanted, COUNT - sum(wanted)]).pvalue)


@pytest.mark.parametrize("head", ["scalar", "vocabulary"])
def test_exact_values_give_the_optimum(engine: Engine, head: Any) -> None:
    plan = Plan.guided((0.0,), [(Row((1.0,), head), 1.0)], 1 / ETA, candidates=TOKENS)
    counts = sampled(engine, plan)
    assert p_value(counts, TASK.optimum()) > 1e-3
    assert p_value(counts, {y: TASK.base(y) for y in ANSWERS}) < 1e-6
    gained = sum(counts[y] * TASK.reward[y] for y in ANSWERS) / COUNT
    best = sum(p * TASK.reward[y] for y, p in TASK.optimum().items())
    assert gained == pytest.approx(best, abs=4 * 1.5 / COUNT**0.5)


def test_half_the_value_is_another_optimum(engine: Engine) -> None:
    """A wrong strength would show: the test above can fail."""
    plan = Plan.guided((0.0,), [(Row((0.5,), "scalar"), 1.0)], 1 / ETA, candidates=TOKENS)
    assert p_value(sampled(engine, plan), TASK.optimum()) < 1e-6
