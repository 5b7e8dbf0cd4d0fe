"""The benchmark's arms of explicit value models on a tiny model: right tokens, wrong ones refused, their ratios."""

from __future__ import annotations

import copy
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "jobs" / "bench"))

import decoding
import results
import timing
import value_arms
from arms import Arm, ours
from naive import Agreement, NaiveReference
from rivals import MergedModels
from setting import PREFERENCES, BenchError, Prompt, Prompts, load, random_experts, unguided
from timing import Steps, Timing
from transformers import PreTrainedModel
from value_arms import (
    guided_by_q,
    guided_by_v,
    make_value_arms,
    random_values,
    v_over_q,
    value_engine,
    value_steps,
)

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.plan import Plan, Row
from mage_ray.merging.adapter import Adapter

SMALL = ["--model", "tiny", "--threads", "1", "--prompt-tokens", "6", "--new-tokens", "8"]
NEW = 10
PLANS = {"Q": guided_by_q(50), "V": guided_by_v(20)}


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return load("tiny")


@pytest.fixture(scope="module")
def everyone(reference: PreTrainedModel) -> list[Adapter]:
    # Stronger than the benchmark's own: on so small a model those change few tokens.
    return [*random_experts(reference, 3, relative=0.5), *random_values(reference, 3, relative=0.5)]


@pytest.fixture(scope="module")
def models(reference: PreTrainedModel, everyone: list[Adapter]) -> MergedModels:
    return MergedModels(reference, everyone)


@pytest.fixture(scope="module")
def engine(reference: PreTrainedModel, everyone: list[Adapter]) -> Engine:
    return value_engine(reference, everyone, 8, 32)


class Plainest:
    """Every score by a whole forward of its own, in float64, and a merge's value by each value model's own head."""

    def __init__(self, models: MergedModels, everyone: Sequence[Adapter]) -> None:
        self._models, self._everyone = models, everyone
        self._doubles: dict[Row, PreTrainedModel] = {}

    def _of(self, row: Row) -> PreTrainedModel:
        if row not in self._doubles:
            self._doubles[row] = copy.deepcopy(self._models.of(row)).double()
        return self._doubles[row]

    def _hidden(self, row: Row, sequences: list[list[int]]) -> torch.Tensor:
        return self._of(row).base_model(torch.tensor(sequences), use_cache=False).last_hidden_state[:, -1]

    @torch.inference_mode()
    def values(self, row: Row, tokens: list[int], kept: list[int]) -> torch.Tensor:
        """Of each kept token as the next one, [C]."""
        hidden = self._hidden(row, [[*tokens, a] for a in kept] if row.head == "scalar" else [tokens])
        embedding = self._of(row).get_input_embeddings().weight[kept]
        total = torch.zeros(len(kept), dtype=torch.float64)
        for coefficient, expert in zip(row.coefficients, self._everyone, strict=True):
            if coefficient:
                assert expert.head is not None
                head = {name: part.double() for name, part in expert.head.tensors().items()}
                own = hidden @ head["weight"] + head["bias"]
                if row.head == "vocabulary":
                    own = own + embedding @ (head["up"] @ (head["down"] @ hidden[0]))
                total += coefficient * own
        return total

    @torch.inference_mode()
    def scores(self, plan: Plan, tokens: list[int]) -> dict[int, float]:
        """Of each candidate, up to a constant."""
        base = self._of(plan.rows[0])(torch.tensor([tokens]), use_cache=False).logits[0, -1].log_softmax(-1)
        kept = range(len(base)) if plan.candidates is None else base.topk(plan.candidates).indices.tolist()
        total = plan.weights[0] * base[list(kept)]
        for row, weight in zip(plan.rows[1:], plan.weights[1:], strict=True):
            total = total + weight * self.values(row, tokens, list(kept))
        return dict(zip(kept, total.tolist(), strict=True))

    def decode(self, plan: Plan, prompt: Prompt) -> list[int]:
        """The greedy continuation."""
        tokens = list(prompt)
        for _ in range(NEW):
            scores = self.scores(plan, tokens)
            tokens.append(max(scores, key=scores.__getitem__))
        return tokens[len(prompt) :]


@pytest.fixture(scope="module")
def plainest(models: MergedModels, everyone: list[Adapter]) -> Plainest:
    return Plainest(models, everyone)


def test_value_arms_decode_what_the_plainest_loop_decodes(
    engine: Engine, models: MergedModels, plainest: Plainest
) -> None:
    prompts = Prompts.random(160).take(8, 6)
    arms = make_value_arms(engine, NEW, (1, 8), decoding.VALUE_ARMS)
    assert [arm.key for arm in arms] == [
        "unguided_k6_b1",
        "explicit_q_b1",
        "value_v20_b1",
        "explicit_q_b8",
        "value_v20_b8",
    ]
    expected: dict[str, list[list[int]]] = {}
    for arm in arms:
        [plan] = set(arm.plans)
        if arm.name not in expected:
            expected[arm.name] = [plainest.decode(plan, prompt) for prompt in prompts]
        asked = prompts[: len(arm.plans)]
        made = arm.run(asked)
        assert made == expected[arm.name][: len(asked)], arm.key
        agreement = NaiveReference(models).check(arm.key, arm.plans, asked, made, NEW)
        assert agreement.others == 0 and agreement.tokens == len(asked) * NEW
    # Else all this would hold for values that choose nothing, or for a V that is a Q.
    assert expected["unguided_k6"] != expected["explicit_q"] != expected["value_v20"] != expected["unguided_k6"]


def test_the_plans_are_the_base_of_the_unguided_arm_and_one_row_of_values() -> None:
    [base] = unguided(PREFERENCES[0]).rows
    for plan, head, candidates in ((guided_by_q(50), "vocabulary", 50), (guided_by_v(20), "scalar", 20)):
        assert plan.rows == (Row((*base.coefficients, 0.0, 0.0, 0.0)), Row((0.0, 0.0, 0.0, *PREFERENCES[0]), head))
        assert plan.weights == (1.0, 1.0) and plan.candidates == candidates


@pytest.mark.parametrize("kind", PLANS)
def test_the_naive_reference_scores_any_candidate_as_the_plainest_loop_does(
    kind: str, models: MergedModels, plainest: Plainest
) -> None:
    plan, prompts = PLANS[kind], Prompts.random(160).take(3, 6)
    made = [[(37 * i + 11 * t) % 160 for t in range(NEW)] for i in range(len(prompts))]
    inside = 0
    for i, prompt in enumerate(prompts):
        for t in range(NEW):
            scores = plainest.scores(plan, [*prompt, *made[i][:t]])
            if (i + t) % 2:  # any candidate, else a token that is rarely one
                made[i][t] = list(scores)[(5 * i + t) % len(scores)]
    short_QT = NaiveReference(models).shortfall(plan, prompts, made)
    for i, prompt in enumerate(prompts):
        for t in range(NEW):
            scores = plainest.scores(plan, [*prompt, *made[i][:t]])
            if made[i][t] in scores:
                expected = max(scores.values()) - scores[made[i][t]]
                assert float(short_QT[i, t]) == pytest.approx(expected, abs=1e-4)
                inside += expected > 0.1
            else:
                assert short_QT[i, t] == torch.inf
    assert inside >= 10 and bool(short_QT.isinf().any())


@pytest.mark.parametrize("kind", PLANS)
def test_wrong_tokens_strengths_heads_and_value_models_are_refused(
    kind: str, engine: Engine, models: MergedModels, reference: PreTrainedModel, everyone: list[Adapter]
) -> None:
    plan, prompts = PLANS[kind], Prompts.random(160).take(4, 6)
    plans, naive = [plan] * 4, NaiveReference(models)
    made = ours(kind, engine, plans, NEW).run(prompts)
    assert naive.check(kind, plans, prompts, made, NEW).tokens == 4 * NEW
    for request, token in ((0, 0), (2, 5), (3, NEW - 1)):
        wrong = [list(tokens) for tokens in made]
        wrong[request][token] = (wrong[request][token] + 1) % 160
        with pytest.raises(BenchError, match=f"arm: token {token} of request {request} is"):
            naive.check("arm", plans, prompts, wrong, NEW)
    for strength in (0.5, 2.0, -1.0):
        other = replace(plan, weights=(1.0, strength))
        with pytest.raises(BenchError):
            naive.check("arm", plans, prompts, ours("arm", engine, [other] * 4, NEW).run(prompts), NEW)

    last = everyone[-1]
    assert last.head is not None and last.head.up_Er is not None
    wrong_head = replace(last.head, weight_E=-last.head.weight_E, up_Er=-last.head.up_Er)
    other_backbone = replace(last, factors=everyone[0].factors)
    for wrong_one in (replace(last, head=wrong_head), other_backbone):
        elsewhere = value_engine(reference, [*everyone[:-1], wrong_one], 4, 32)
        with pytest.raises(BenchError):
            naive.check("arm", plans, prompts, ours("arm", elsewhere, plans, NEW).run(prompts), NEW)
        with pytest.raises(BenchError, match=r"value_[qv]20 steps: token"):
            value_steps(elsewhere, Prompts.random(160), naive, 1, 6, NEW)


def test_random_value_models_are_no_copies_and_have_a_say(reference: PreTrainedModel) -> None:
    values, experts = random_values(reference, 3), random_experts(reference, 3)
    assert [value.name for value in values] == ["value-0", "value-1", "value-2"]
    name = "model.layers.1.mlp.down_proj"
    drawn = [adapter.factors[name].down for adapter in [*experts, *values]]
    assert not any(torch.equal(one, other) for i, one in enumerate(drawn) for other in drawn[:i])
    weight = reference.get_parameter(f"{name}.weight")
    for value in values:
        assert value.head is not None and value.head.kind == "vocabulary"
        assert value.head.down_rE is not None and value.head.down_rE.shape == (32, 48)
        assert float(value.factors[name].delta().norm() / weight.detach().norm()) == pytest.approx(0.08, rel=0.25)
    weights = [value.head.weight_E for value in values if value.head is not None]
    assert not torch.equal(weights[0], weights[1])
    # Merged, over the candidates of some states: some tenths to a few units.
    plainest = Plainest(MergedModels(reference, [*experts, *values]), [*experts, *values])
    for prompt in Prompts.random(160).take(5, 20):
        for plan in (guided_by_q(20), guided_by_v(20)):
            kept = list(plainest.scores(plan, list(prompt)))
            assert 0.3 < float(plainest.values(plan.rows[1], list(prompt), kept).std()) < 3


def test_a_row_over_the_first_experts_is_the_same_row_over_all(models: MergedModels) -> None:
    short, long = Row((0.5, 0.3, 0.2)), Row((0.5, 0.3, 0.2, 0.0, 0.0, 0.0))
    assert models.of(short) is models.of(long) is not models.of(Row((0.5, 0.3)))
    assert models.of(Row((0.0,))) is models.reference
    assert models.of(guided_by_q(5).rows[1]) is models.of(guided_by_v(5).rows[1])
    with pytest.raises(ValueError):
        models.of(Row((1.0,) * 7))


def test_a_step_s_time_leaves_the_prompt_out(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([100.0, 107.0, 108.0, 109.0, 115.0])
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    [prompt] = Prompts.random(160).take(1, 6)
    seconds, [made] = timing.joint_steps(engine, PLANS["V"], [prompt], 5)
    assert seconds == 15 / 4 and len(made) == 5


def test_value_steps_are_taken_in_turn_and_checked(
    engine: Engine, models: MergedModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Plan] = []

    measured = timing.joint_steps

    def seconds_of(*arguments: Any) -> tuple[float, list[list[int]]]:
        asked.append(arguments[1])
        return float(len(asked)), measured(*arguments)[1]

    monkeypatch.setattr(timing, "joint_steps", seconds_of)
    steps = value_steps(engine, Prompts.random(160), NaiveReference(models), 3, 6, NEW)
    v, q = guided_by_v(20), guided_by_q(20)
    assert v.candidates == q.candidates and asked == [v, q, q, v, v, q, q, v]
    assert steps["value_v20"].seconds == [4.0, 5.0, 8.0] and steps["value_q20"].seconds == [3.0, 6.0, 7.0]
    for kind in steps.values():
        assert kind.agreement.tokens == 4 * NEW and kind.agreement.shortfall <= 1e-3


def test_the_ratios_are_time_over_time_of_steps_and_throughput_over_throughput(
    capsys: pytest.CaptureFixture[str],
) -> None:
    steps = {"value_v20": Steps([6.0, 5.0, 40.0], Agreement()), "value_q20": Steps([2.0, 2.5, 1.0], Agreement())}
    assert v_over_q(steps, statistics.median) == 3.0 and v_over_q(steps, min) == 5.0

    def timed(name: str, seconds: list[float]) -> Timing:
        arm = Arm(name, (unguided(PREFERENCES[0]),), lambda prompts: [])
        return Timing(arm, 64, seconds)

    timings = [timed("unguided", [3.0]), timed("unguided_k6", [3.6]), timed("explicit_q", [4.0])]
    ratios = results.throughput_ratios(timings, statistics.median)
    assert ratios == {"explicit_q_vs_unguided": 0.75, "explicit_q_vs_unguided_k6": pytest.approx(0.9)}
    met = results.bars(ratios | {"value_v20_vs_q": 3.0})
    assert {name: bar["pass"] for name, bar in met.items()} == {"explicit_q_vs_unguided": True, "value_v20_vs_q": True}
    missed = results.bars({"explicit_q_vs_unguided": 0.749, "value_v20_vs_q": 3.01})
    assert [bar["pass"] for bar in missed.values()] == [False, False]
    results.show_bars({"ratios": ratios, "ratios_of_minima": {}, "bars": met})
    assert "explicit_q_vs_unguided_k6" in capsys.readouterr().out


@pytest.mark.slow
def test_what_the_two_ratios_need_runs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    only = ["--only", "unguided", *decoding.VALUE_ARMS, "value_steps"]
    assert decoding.main(["--out", str(out), "--rounds", "2", *only, *SMALL]) == 0
    written = json.loads(out.read_text())
    arms = {f"{arm['name']}_b{arm['batch']}": arm for arm in written["arms"]}
    both = {f"{name}_b{batch}" for name in ("unguided", "explicit_q", "value_v20") for batch in (1, 8)}
    assert set(arms) == set(written["checks"]["arms"]) == both | {"unguided_k6_b1"}
    for key, check in written["checks"]["arms"].items():
        assert check["tokens"] == 3 * arms[key]["batch"] * 8 and check["shortfall"] <= 1e-3

    ratios, speed = written["ratios"], {key: arm["tokens_per_s_median"] for key, arm in arms.items()}
    assert set(written["bars"]) == {"explicit_q_vs_unguided", "value_v20_vs_q"}
    assert set(ratios) == set(written["ratios_of_minima"]) == {*written["bars"], "explicit_q_vs_unguided_k6"}
    assert ratios["explicit_q_vs_unguided"] == pytest.approx(speed["explicit_q_b1"] / speed["unguided_b1"])
    assert ratios["explicit_q_vs_unguided_k6"] == pytest.approx(speed["explicit_q_b1"] / speed["unguided_k6_b1"])
    v, q = (written["value_steps"][kind] for kind in ("value_v20", "value_q20"))
    assert v["samples"] == q["samples"] == len(v["seconds"]) == 2
    assert ratios["value_v20_vs_q"] == pytest.approx(v["seconds_median"] / q["seconds_median"])
    assert written["ratios_of_minima"]["value_v20_vs_q"] == pytest.approx(v["seconds_min"] / q["seconds_min"])
    assert {kind: check["tokens"] for kind, check in written["value_steps"]["checks"].items()} == {
        "value_v20": 3 * 8,
        "value_q20": 3 * 8,
    }
    assert "explicit_q_vs_unguided_k6" in capsys.readouterr().out


def test_without_value_arms_there_are_no_value_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError("not asked for")

    monkeypatch.setattr(value_arms, "random_values", never)
    monkeypatch.setattr(value_arms, "value_engine", never)
    assert decoding.main(["--out", str(tmp_path / "r.json"), "--rounds", "1", "--only", "unguided", *SMALL]) == 0
    with pytest.raises(AssertionError, match="not asked for"):
        decoding.main(["--out", str(tmp_path / "r.json"), "--rounds", "1", "--only", "explicit_q", *SMALL])


def test_a_run_with_a_wrong_value_head_aborts_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def without_lookahead(model: PreTrainedModel, experts: list[Adapter], batch: int, length: int) -> Engine:
        heads = [None if e.head is None else replace(e.head, weight_E=e.head.weight_E * 0) for e in experts]
        return value_engine(model, [replace(e, head=h) for e, h in zip(experts, heads, strict=True)], batch, length)

    monkeypatch.setattr(value_arms, "value_engine", without_lookahead)
    out = tmp_path / "r.json"
    assert decoding.main(["--out", str(out), "--rounds", "1", "--only", "value_v20", *SMALL]) == 1
    assert "error: value_v20_b" in capsys.readouterr().err and not out.exists()
