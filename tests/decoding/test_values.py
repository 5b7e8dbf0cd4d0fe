"""Explicit value models in the engine, against float64 models merged apart and values read off one by one.

Legend: R rows, T tokens, V vocabulary, C candidates, E hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import BASE, GUIDE, ZERO, Tiny, ids
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.plan import Cadence, Plan, Row
from mage_ray.decoding.request import Request, Sampling
from mage_ray.decoding.runner import RowRunner
from mage_ray.errors import FieldError
from mage_ray.merging.adapter import Adapter, load_adapter, save_adapter
from mage_ray.merging.bank import AdapterBank
from mage_ray.merging.export import soup
from mage_ray.merging.value_head import ValueHead

MIXED = (0.0, 1.75, -0.75, 0.2)
STRENGTH = 1.4


class Valued(Tiny):
    """A tiny model whose experts have heads: vocabulary heads of different ranks, but for expert 0, a policy."""

    def __init__(self, model: Path, place: Path) -> None:
        super().__init__(model, place)
        dice = torch.Generator().manual_seed(9)
        for k in (1, 2, 3):
            head = ValueHead(
                torch.randn(32, generator=dice) * 0.3,
                0.1 * k,
                torch.randn(1 + k, 32, generator=dice) * 0.4,
                torch.randn(32, 1 + k, generator=dice) * 0.4,
            )
            self.adapters[k] = replace(self.adapters[k], head=head)

    @torch.inference_mode()
    def hidden(self, row: Row, sequence: Sequence[int]) -> torch.Tensor:
        """Last hidden states of a whole sequence, [T, E], in float64."""
        return self.merged(Row(row.coefficients)).model(torch.tensor([list(sequence)])).last_hidden_state[0]

    @torch.inference_mode()
    def value(self, row: Row, sequence: Sequence[int]) -> float:
        """``V`` of the state after a whole sequence, by the head merged explicitly."""
        weight_E = sum(lam * h.weight_E.double() for lam, h in self.heads(row))
        bias = sum(lam * h.bias for lam, h in self.heads(row))
        return float(self.hidden(row, sequence)[-1] @ weight_E + bias)

    @torch.inference_mode()
    def values(self, row: Row, sequence: Sequence[int]) -> torch.Tensor:
        """``Q`` of every token after a sequence, [V]."""
        matrix_EE = sum(lam * h.up_Er.double() @ h.down_rE.double() for lam, h in self.heads(row))
        embedding_VE = self.merged(Row(ZERO)).get_input_embeddings().weight
        return embedding_VE @ (matrix_EE @ self.hidden(row, sequence)[-1]) + self.value(row, sequence)

    def heads(self, row: Row) -> list[tuple[float, ValueHead]]:
        pairs = zip(row.coefficients, self.adapters, strict=True)
        return [(lam, a.head) for lam, a in pairs if a.head is not None]

    @torch.inference_mode()
    def formula(self, plan: Plan, sequence: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids [C], log-probabilities [C]) of the plan after a sequence, one row and one candidate at a time."""
        base_V = self.merged(plan.rows[0])(torch.tensor([list(sequence)])).logits[0, -1].log_softmax(-1)
        ids_C = (
            torch.arange(len(base_V)) if plan.candidates is None else base_V.topk(plan.candidates).indices.sort().values
        )
        total_C = torch.zeros(len(ids_C), dtype=torch.float64)
        for row, weight in zip(plan.rows, plan.weights, strict=True):
            if row.head is None:
                score_C = self.merged(row)(torch.tensor([list(sequence)])).logits[0, -1].log_softmax(-1)[ids_C]
            elif row.head == "vocabulary":
                score_C = self.values(row, sequence)[ids_C]
            else:
                score_C = torch.tensor([self.value(row, [*sequence, token]) for token in ids_C.tolist()])
            total_C = total_C + weight * score_C
        return ids_C, total_C.log_softmax(-1)


@pytest.fixture(scope="module")
def valued(tmp_path_factory: pytest.TempPathFactory) -> Valued:
    place = tmp_path_factory.mktemp("valued")
    return Valued(make_tiny_model(place / "model"), place)


def scalar(*coefficients: float) -> Row:
    return Row(coefficients, "scalar")


def vocabulary(*coefficients: float) -> Row:
    return Row(coefficients, "vocabulary")


UNITS = [tuple(float(i == k) for i in range(4)) for k in range(4)]
PLANS = {
    "V merged": Plan.guided(BASE, [(scalar(*MIXED), 1.0)], STRENGTH, 9),
    "V ensembled": Plan.guided(BASE, [(scalar(*UNITS[k]), lam) for k, lam in ((1, 1.75), (2, -0.75))], STRENGTH, 7),
    "Q merged": Plan.guided(BASE, [(vocabulary(*MIXED), 1.0)], STRENGTH, 9),
    "Q ensembled": Plan.guided(
        BASE, [(vocabulary(*UNITS[k]), lam) for k, lam in ((1, 1.75), (3, -0.75))], STRENGTH, 12
    ),
    "Q over all": Plan.guided(BASE, [(vocabulary(*MIXED), 1.0)], STRENGTH),
    "V and Q": Plan.guided(BASE, [(scalar(*MIXED), 0.5), (vocabulary(*MIXED), 0.5)], STRENGTH, 6),
    "explicit and implicit": Plan.guided(BASE, [(scalar(*MIXED), 0.5), (GUIDE, 1.0), (ZERO, -1.0)], STRENGTH, 5),
}
PROMPTS = [ids(text) for text in ("a", "tell me more about it", "what is the best way to a good night's sleep?")]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("fixed", [False, True])
def test_all_kinds_in_one_batch_are_the_formula(valued: Valued, temperature: float, fixed: bool) -> None:
    engine = valued.engine(rows=40, stop=(), fixed=fixed)
    plans = list(PLANS.values())
    asked = [Request(PROMPTS[i % 3], plan, Sampling(5, temperature, seed=i)) for i, plan in enumerate([*plans, *plans])]
    for request, answer in zip(asked, engine.generate(asked), strict=True):
        answer.require()
        for t, (token, logprob) in enumerate(zip(answer.ids, answer.logprobs, strict=True)):
            ids_C, logprobs_C = valued.formula(request.plan, [*request.prompt, *answer.ids[:t]])
            assert logprob == pytest.approx(float(logprobs_C[ids_C == token]), abs=3e-4)
            if temperature == 0:
                assert logprobs_C[ids_C == token] >= logprobs_C.max() - 1e-5
    assert engine.runner.live == 0


@pytest.mark.parametrize("name", ["V merged", "Q merged", "V and Q", "explicit and implicit"])
@pytest.mark.parametrize("cadence", [Cadence(every=3), Cadence(entropy=2.0), Cadence(speculate=3)])
def test_lazy_values_are_the_formula_where_they_guide(valued: Valued, name: str, cadence: Cadence) -> None:
    if cadence.speculate and name != "Q merged":
        with pytest.raises(FieldError, match="speculate: got 3, allowed: 0 where scalar values look ahead"):
            PLANS[name].at(cadence)
        return
    plan = PLANS[name].at(cadence)
    request = Request(PROMPTS[1], plan, Sampling(10, 1.0, seed=3))
    tokens = list(valued.engine(stop=()).stream(request))
    assert any(t.guided for t in tokens)
    history = list(request.prompt)
    for token in tokens:
        how = plan if token.guided else replace(plan, rows=plan.rows[:1], weights=(1.0,), values=(), cadence=Cadence())
        ids_C, logprobs_C = valued.formula(how, history)
        assert token.logprob == pytest.approx(float(logprobs_C[ids_C == token.id]), abs=3e-4)
        history.append(token.id)


def test_candidates_in_one_forward_are_candidates_one_by_one_in_float64(valued: Valued) -> None:
    model = AutoModelForCausalLM.from_pretrained(valued.folder, dtype=torch.float64)
    runner = RowRunner(model, AdapterBank(valued.adapters), 8, 120)
    dice = np.random.default_rng(0)
    rows = [(scalar(*MIXED), 30), (scalar(*UNITS[1]), 7), (scalar(0.0, -1.0, 0.5, 2.0), 1)]
    sequences = [dice.integers(0, 256, n).tolist() for _, n in rows]
    live = [runner.start(row) for row, _ in rows]
    for at, sequence in zip(live, sequences, strict=True):
        if sequence[:-3]:
            runner.feed([at], [sequence[:-3]], keep=0)
    ids_NC = torch.from_numpy(dice.permuted(np.tile(np.arange(256), (3, 1)), axis=1)[:, :20].copy())
    for _ in range(3):
        values_NC = runner.look(list(zip(live, sequences, strict=True)), ids_NC)
        for (row, _), sequence, ids_C, values_C in zip(rows, sequences, ids_NC, values_NC, strict=True):
            expected = [valued.value(row, [*sequence, token]) for token in ids_C.tolist()]
            np.testing.assert_allclose(values_C.numpy(), expected, rtol=0, atol=1e-10)
        for n, (at, sequence) in enumerate(zip(live, sequences, strict=True)):
            place = int(dice.integers(20))
            runner.take(at, place, int(ids_NC[n, place]))
            sequence.append(int(ids_NC[n, place]))


def test_guide_scores_are_values_centred_over_the_candidates(valued: Valued) -> None:
    for name in ("V merged", "Q merged"):
        plan = replace(PLANS[name], valued=True)
        [answer] = valued.engine(stop=()).generate([Request(PROMPTS[1], plan, Sampling(4, 1.0, seed=1))])
        total, history = 0.0, list(PROMPTS[1])
        for token in answer.require().ids:
            ids_C, _ = valued.formula(plan, history)
            row = plan.rows[1]
            if row.head == "scalar":
                values_C = torch.tensor([valued.value(row, [*history, t]) for t in ids_C.tolist()])
            else:
                values_C = valued.values(row, history)[ids_C]
            total += float(values_C[ids_C == token] - values_C.mean())
            history.append(token)
        assert answer.value == pytest.approx(total, abs=1e-3)


def test_a_changed_preference_takes_its_values_along(valued: Valued) -> None:
    engine = valued.engine(stop=())
    for other in PLANS.values():
        drawn = []
        request = Request(PROMPTS[1], PLANS["V merged"], Sampling(8, 0.0))
        running = engine._add(request, drawn.append)
        while not running.ended:
            engine.step()
            if len(drawn) == 4 and running.plan == request.plan:
                engine.change(running, other)
        first = tuple(t.id for t in drawn[:4])
        [fresh] = engine.generate([Request((*PROMPTS[1], *first), other, Sampling(4, 0.0))])
        assert tuple(t.id for t in drawn[4:]) == fresh.require().ids


@pytest.mark.parametrize(
    ("rows", "candidates", "message"),
    [
        ([Row(UNITS[1], "scalar")], 5, "a policy first, the base"),
        ([Row(BASE), Row(UNITS[1], "scalar")], None, "candidates: got None"),
    ],
)
def test_plans_that_make_no_sense_are_refused(rows: list[Row], candidates: int | None, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        Plan(tuple(rows), (1.0,) * len(rows), candidates)


def test_what_can_not_be_scored_here_is_refused(valued: Valued, tmp_path: Path) -> None:
    engine = valued.engine(stop=(), length=60)

    def error(plan: Plan, new: int = 8) -> str:
        [answer] = engine.generate([Request(PROMPTS[0], plan, Sampling(new))])
        return str(answer.error)

    assert "over expert e0, which has no value head" in error(Plan.guided(BASE, [(scalar(*UNITS[0]), 1.0)], 1.0, 5))
    assert "9 candidates to look at, allowed: at most 60 together" in error(PLANS["V merged"], 58)
    plain = Tiny(valued.folder, tmp_path).engine(stop=())
    [answer] = plain.generate([Request(PROMPTS[0], PLANS["V merged"], Sampling(4))])
    assert "over expert e1, which has no value head" in str(answer.error)


def test_a_head_is_saved_beside_its_adapter_and_checked_when_read(valued: Valued, tmp_path: Path) -> None:
    expert = valued.adapters[2]
    save_adapter(expert, tmp_path / "value")
    read = load_adapter(tmp_path / "value")
    assert read.head is not None and expert.head is not None and read.head.kind == "vocabulary"
    for name, tensor in expert.head.tensors().items():
        assert torch.equal(read.head.tensors()[name], tensor)
    for broken in (
        {"weight": torch.zeros(32)},
        {"weight": torch.full((32,), torch.nan), "bias": torch.zeros(())},
        {"weight": torch.zeros(32), "bias": torch.zeros(()), "down": torch.zeros(2, 31), "up": torch.zeros(32, 2)},
    ):
        with pytest.raises(FieldError, match="value head"):
            ValueHead.of(broken, "broken")
    wide = Adapter("wide", expert.factors, head=ValueHead(torch.zeros(33), 0.0))
    with pytest.raises(FieldError, match="value head wide: got one of hidden size 33, allowed: 32"):
        RowRunner(AutoModelForCausalLM.from_pretrained(valued.folder), AdapterBank([wide]), 4, 40)


def test_engines_share_no_state(valued: Valued) -> None:
    """Two engines over one bank's adapters, in turn, answer as each alone."""
    one, other = (valued.engine(stop=()) for _ in range(2))
    request = Request(PROMPTS[2], PLANS["V and Q"], Sampling(6, 1.0, seed=4))
    assert isinstance(one, Engine)
    assert one.generate([request, request])[1].ids == other.generate([request])[0].ids


def test_a_soup_of_value_models_is_their_merge_head_included(valued: Valued, tmp_path: Path) -> None:
    """The exported merge under coefficient 1 scores as the row that mixes its parts, negative coefficients included."""
    merged = soup(valued.adapters[1:], MIXED[1:], "merged")
    save_adapter(merged, tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(valued.folder, dtype=torch.float64)
    one = RowRunner(model, AdapterBank([load_adapter(tmp_path / "merged")]), 4, 60)
    sequence = list(PROMPTS[2])
    [values] = one.values(Row((1.0,)), [sequence], [3])
    expected = [valued.value(scalar(*MIXED), sequence[:n]) for n in range(3, len(sequence) + 1)]
    np.testing.assert_allclose(values.numpy(), expected, rtol=0, atol=1e-5)  # the file holds float32
    assert merged.head is not None and merged.head.kind == "vocabulary"
    assert soup(valued.adapters[:2], (0.5, 0.5), "policy").head is None
