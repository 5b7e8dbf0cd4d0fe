"""Plans of trained baselines: which rows they have, GenARM's formula and temperature, and many searches at once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import Tiny, ids
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.methods import BASELINES, METHODS, Backbones, Setup, compact, plan_for, planned_at
from mage_ray.decoding.plan import Row
from mage_ray.decoding.request import Request, Sampling
from mage_ray.decoding.search import beam_search, best_of, drawn_once, search, search_all
from mage_ray.errors import FieldError

GRID = np.array([(0.0, 1.0), (0.6, 0.4)])


def setup(strength: float = 1.0, **changes: object) -> Setup:
    """A bank of four single-objective experts, two policies of each kind and two reward models, in another order."""
    sets = {
        "arm": Backbones((0, 1), np.eye(2), baseline="arm"),
        "modpo": Backbones((5, 4), GRID, baseline="modpo"),
        "soup": Backbones((2, 3), np.eye(2)),
        "morlhf": Backbones((6, 7), GRID, baseline="morlhf"),
    }
    made = Setup(8, sets, "soup", "soup", strength, candidates=10, extrapolation=(0.5, 0.5))
    return replace(made, **changes)  # type: ignore[arg-type]


def unit(*places: int) -> tuple[float, ...]:
    return tuple(float(k in places) for k in range(8))


@pytest.mark.parametrize(("method", "places"), [("morlhf", (6, 7)), ("modpo", (5, 4))])
def test_a_policy_of_its_own_is_one_row_where_it_was_trained_and_refused_elsewhere(
    method: str, places: tuple[int, int]
) -> None:
    for mu, place in zip(GRID, places, strict=True):
        plan = plan_for(method, tuple(mu), setup())
        assert plan.rows == (Row(unit(place)),) and plan.weights == (1.0,) and not plan.values
    assert plan_for(method, (0.6004, 0.3996), setup()).rows == (Row(unit(places[1])),)
    with pytest.raises(
        FieldError, match=r"preference: got \(0.5, 0.5\), allowed: those that .*: \(0, 1\), \(0.6, 0.4\)"
    ):
        plan_for(method, (0.5, 0.5), setup())
    assert planned_at(method, setup()) == [(0.0, 1.0), (0.6, 0.4)]


def test_genarm_adds_reward_models_and_subtracts_no_reference() -> None:
    plan = plan_for("genarm", (0.6, 0.4), setup(1.5))
    weights = dict(zip(plan.rows, plan.weights, strict=True))
    assert weights == {Row(unit()): 1.0, Row(unit(0)): pytest.approx(0.9), Row(unit(1)): pytest.approx(0.6)}
    assert plan.rows[0] == Row(unit()) and plan.candidates == 10
    assert plan_for("genarm", (1.0, 0.0), setup(1.5)).rows == (Row(unit()), Row(unit(0)))
    assert plan_for("genarm", (0.6, 0.4), setup(0.0)).rows == (Row(unit()),)
    assert planned_at("genarm", setup()) is None


def test_reward_models_of_another_model_live_at_its_home() -> None:
    theirs = Setup(2, {"arm": Backbones((0, 1), np.eye(2), baseline="arm")}, "soup", "soup")
    plan = plan_for("genarm", (0.6, 0.4), setup(1.0, guides=theirs))
    assert plan.rows == (Row(unit()), Row((1.0, 0.0), home=1), Row((0.0, 1.0), home=1))


@pytest.mark.parametrize("method", BASELINES)
def test_what_was_not_trained_is_named(method: str) -> None:
    bare = setup(sets={"soup": Backbones((2, 3), np.eye(2))})
    with pytest.raises(FieldError, match=r"^method: .* is trained \(mage-ray baselines\)$"):
        plan_for(method, (0.6, 0.4), bare)


def test_policies_of_baselines_are_merged_by_no_method() -> None:
    """Those at the corners look like single-objective experts."""
    corners = {"m": Backbones((0, 1), np.eye(2), baseline="morlhf"), "soup": Backbones((2, 3), np.eye(2))}
    assert plan_for("rewarded-soup", (0.6, 0.4), setup(sets=corners)).rows == (Row((0, 0, 0.6, 0.4, 0, 0, 0, 0)),)
    assert not set(METHODS) & set(BASELINES)


@given(st.sampled_from(sorted(BASELINES)))
def test_a_compact_bank_holds_a_whole_set_of_policies(method: str) -> None:
    plans = [plan_for(method, tuple(mu), setup()) for mu in GRID]
    [name], small = compact(plans, setup())
    assert name == {"genarm": "arm"}.get(method, method)
    assert all(len(row.coefficients) == 2 for plan in small for row in plan.rows)


@pytest.fixture(scope="module")
def tiny(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tiny_model_folder, tmp_path_factory.mktemp("baselines"))


@pytest.fixture(scope="module")
def engine(tiny: Tiny) -> Engine:
    return tiny.engine(rows=150, kept=1000)


def arms(strength: float) -> Setup:
    """Two of the four adapters as reward models."""
    sets = {"arm": Backbones((3, 1), np.eye(2), baseline="arm")}
    return Setup(4, sets, "arm", "arm", strength, candidates=260)


def genarm_logprobs(tiny: Tiny, mu: tuple[float, float], alpha: float, temperature: float) -> torch.Tensor:
    """GenARM's next-token distribution as its authors compute it: the weighted mean of log-probabilities, divided by
    ``temperature / (1 + alpha)``; in float64, from models merged apart."""
    prompt = torch.tensor([list(ids("hello"))])
    rows = {place: tiny.merged(Row(tuple(float(k == place) for k in range(4)))) for place in (3, 1)}
    reference = tiny.merged(Row((0.0,) * 4))
    with torch.inference_mode():
        base = reference(prompt).logits[0, -1].log_softmax(-1)
        rewards = [rows[place](prompt).logits[0, -1].log_softmax(-1) for place in (3, 1)]
    mean = (base + alpha * mu[0] * rewards[0] + alpha * mu[1] * rewards[1]) / (1 + alpha)
    return (mean / (temperature / (1 + alpha))).log_softmax(-1)


def p_value(tokens: list[int], logprobs: torch.Tensor) -> float:
    """Of draws from this distribution, over bins of tokens of about a twelfth of the probability each."""
    order = logprobs.argsort().numpy()
    probs = logprobs.exp().numpy()[order]
    bins = np.empty(len(order), dtype=int)
    bins[order] = ((probs.cumsum() - probs / 2) * 12).astype(int)
    observed, expected = np.bincount(bins[tokens], minlength=12), np.bincount(bins[order], probs, 12) * len(tokens)
    return float(chisquare(observed[expected > 0], expected[expected > 0]).pvalue)


@pytest.mark.slow
def test_genarm_draws_from_its_formula_at_any_temperature(tiny: Tiny, engine: Engine) -> None:
    mu, alpha = (0.7, 0.3), 1.6
    plan = plan_for("genarm", mu, arms(alpha))
    at_one = genarm_logprobs(tiny, mu, alpha, 1.0)
    for temperature in (1.0, 0.6):
        sampling = [Sampling(1, temperature, seed=seed) for seed in range(400)]
        drawn = engine.generate([Request(ids("hello"), plan, how) for how in sampling])
        tokens = [one.ids[0] for one in drawn]
        assert p_value(tokens, genarm_logprobs(tiny, mu, alpha, temperature)) > 1e-3
        # That temperature is not one of the weighted mean, nor is it ignored.
        for other in (temperature * (1 + alpha), temperature / (1 + alpha)):
            assert p_value(tokens, genarm_logprobs(tiny, mu, alpha, other)) < 1e-6
        # What is told of a token is its log-probability at temperature 1.
        assert [one.logprobs[0] for one in drawn] == pytest.approx(at_one[tokens].tolist(), abs=2e-4)


def ranked(seed: int, strength: float = 0.0) -> Request:
    plan = plan_for("genarm", (0.7, 0.3), arms(1.0).given(strength, valued=True))
    return Request(ids("hello"), plan, Sampling(9, seed=seed))


@pytest.mark.slow
@pytest.mark.parametrize("at_once", [None, 2])
def test_many_searches_come_to_what_each_comes_to_alone(engine: Engine, at_once: int | None) -> None:
    def strategies() -> list:
        return [
            beam_search(ranked(1), 2, 2, 3), drawn_once(ranked(2)), best_of(ranked(3, 0.5), 4),
            beam_search(ranked(4), 1, 3, 4), best_of(ranked(5), 1),
        ]  # fmt: skip

    found = {one.place: one for one in search_all(engine, strategies(), at_once)}
    assert sorted(found) == list(range(5)) and engine.runner.live == 0
    for place, alone in enumerate(search(engine, strategy) for strategy in strategies()):
        assert found[place].answer.ids == alone.ids
        assert found[place].answer.value == pytest.approx(alone.value, abs=2e-4)
    counts = [len(one.drawn) for _, one in sorted(found.items())]
    assert counts[1:3] == [1, 4] and counts[4] == 1
    assert (
        counts[0] > 4 and counts[0] % 2 == 0
    )  # width x expansions in each of several rounds, fewer once one has ended
    assert found[2].answer in found[2].drawn


def test_an_error_of_one_search_ends_them_all(engine: Engine) -> None:
    too_long = replace(ranked(1), sampling=Sampling(10_000))
    with pytest.raises(FieldError, match="prompt: got 5 tokens and 10000 new ones"):
        list(search_all(engine, [drawn_once(ranked(2)), drawn_once(too_long)]))
    assert engine.runner.live == 0
