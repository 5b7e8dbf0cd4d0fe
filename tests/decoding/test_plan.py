from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mage_ray.decoding.methods import EXPLICIT, METHODS, Backbones, Setup, compact, plan_for
from mage_ray.decoding.plan import Plan, Row
from mage_ray.errors import FieldError
from mage_ray.merging.coefficient_map import CoefficientMap
from mage_ray.merging.coefficients import circulant_mix


def setup(strength: float = 1.0, base: str = "bone", guide: str = "soup") -> Setup:
    """A bank of four: two Bone Soup experts (beta 0.7) and two of single objectives."""
    sets = {"bone": Backbones((0, 1), circulant_mix(2, 0.7)), "soup": Backbones((2, 3), np.eye(2))}
    return Setup(4, sets, base, guide, strength, candidates=10, extrapolation=(0.5, 0.3))


def terms(plan: Plan) -> dict[tuple[float, ...], float]:
    return {
        tuple(round(c, 9) for c in row.coefficients): round(w, 9)
        for row, w in zip(plan.rows, plan.weights, strict=True)
    }


MU = (0.6, 0.4)
LAM = ((0.6 - 0.3) / 0.4, (0.4 - 0.3) / 0.4)  # (0.75, 0.25)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("reference", {(0, 0, 0, 0): 1}),
        ("rewarded-soup", {(0, 0, 0.6, 0.4): 1}),
        ("bone-soup", {(0.75, 0.25, 0, 0): 1}),
        ("extrapolated-soup", {(1.42 * 0.75, 1.42 * 0.25, 0, 0): 1}),
        ("mod", {(0, 0, 1, 0): 0.6, (0, 0, 0, 1): 0.4}),
        ("proxy-tuning", {(0, 0, 0, 0): 1 - 1.5, (0, 0, 1, 0): 0.9, (0, 0, 0, 1): 0.6}),
        ("mage-i-m", {(0.75, 0.25, 0, 0): 1, (0, 0, 0.6, 0.4): 1.5, (0, 0, 0, 0): -1.5}),
        (
            "mage-i-e",
            {(0.75, 0.25, 0, 0): 1, (0, 0, 1, 0): 0.9, (0, 0, 0, 1): 0.6, (0, 0, 0, 0): -1.5},
        ),
    ],
)
def test_every_method_has_the_rows_of_the_table(method: str, expected: dict[tuple[float, ...], float]) -> None:
    plan = plan_for(method, MU, setup(strength=1.5))
    assert terms(plan) == {tuple(round(float(c), 9) for c in row): pytest.approx(w) for row, w in expected.items()}


@given(st.sampled_from(sorted(set(METHODS) - set(EXPLICIT))), st.floats(0, 1), st.floats(0, 4))
def test_weights_of_every_method_add_up_to_1(method: str, first: float, strength: float) -> None:
    plan = plan_for(method, (first, 1 - first), setup(strength))
    assert sum(plan.weights) == pytest.approx(1, abs=1e-9)
    assert len(set(plan.rows)) == len(plan.rows)


def test_a_base_may_be_extrapolated_mapped_and_guided_by_objective() -> None:
    """Constants that searches turn: alpha of a guided base, coefficients of one's own, a strength per objective."""
    own = replace(setup(), base_extrapolation=(1.0, 0.5), strength=(1.0, 2.0))
    stretched = 1 + 0.6 * 1.0 + 0.4 * 0.5
    w = 0.6 * 1.0 + 0.4 * 2.0
    expected = {(stretched * 0.75, stretched * 0.25, 0, 0): 1, (0, 0, 0.6, 0.4): w, (0, 0, 0, 0): -w}
    rounded = {tuple(round(float(c), 9) for c in row): round(x, 9) for row, x in expected.items()}
    assert terms(plan_for("mage-i-m", MU, own)) == rounded
    # The baselines that have no soup for a base, and the extrapolated soup with its own alpha, are as they were.
    for method in ("reference", "rewarded-soup", "extrapolated-soup", "mod"):
        assert plan_for(method, MU, own) == plan_for(method, MU, setup())
    swapped = CoefficientMap(1, ((1.0, 0.0), (0.0, 1.0)))  # at the second's corner, which comes first, and the first's
    mapped = replace(setup(), base_map=swapped, guide_map=swapped)
    assert terms(plan_for("bone-soup", MU, mapped)) == {(0.4, 0.6, 0, 0): 1}
    assert terms(plan_for("extrapolated-soup", MU, mapped)) == {(round(1.42 * 0.4, 9), round(1.42 * 0.6, 9), 0, 0): 1}
    assert (0.0, 0.0, 0.4, 0.6) in terms(plan_for("mage-i-m", MU, mapped))
    assert terms(plan_for("mage-i-e", MU, mapped))[(0, 0, 1, 0)] == pytest.approx(0.4)


def test_equal_rows_become_one() -> None:
    """Base and guide alike: two rows with weights 1 + w and -w (docs/method.md)."""
    plan = plan_for("mage-i-m", MU, setup(strength=1.5, guide="bone"))
    assert terms(plan) == {(0.75, 0.25, 0, 0): 2.5, (0, 0, 0, 0): -1.5}


def test_strength_0_is_the_base_alone() -> None:
    assert plan_for("mage-i-m", MU, setup(strength=0)).rows == plan_for("bone-soup", MU, setup()).rows
    assert plan_for("mage-i-m", MU, setup(strength=0)).weights == (1.0,)


def test_a_base_of_weight_0_stays_to_choose_the_candidates() -> None:
    plan = plan_for("proxy-tuning", MU, setup(strength=1.0))
    assert plan.rows[0] == Row((0.0,) * 4)
    assert plan.weights[0] == pytest.approx(0)
    assert Plan.of([((0.0,), 1.0), ((1.0,), 1.0), ((0.0,), -1.0)]).rows == (Row((1.0,)),)


def test_corner_drops_the_expert_that_has_no_weight() -> None:
    assert terms(plan_for("mod", (1.0, 0.0), setup())) == {(0, 0, 1, 0): 1}


def test_minus_zero_is_zero() -> None:
    assert Plan.of([((-0.0, 1.0), 1.0), ((0.0, 1.0), 1.0)]) == Plan.of([((0.0, 1.0), 2.0)])


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_unusable_strength_is_refused(value: float) -> None:
    with pytest.raises(FieldError, match="strength"):
        setup(strength=value)


def test_unknown_method_names_those_there_are() -> None:
    with pytest.raises(FieldError, match=r"method: got nope, allowed: one of reference, .*mage-i-e"):
        plan_for("nope", MU, setup())


def test_nothing_left_is_refused() -> None:
    with pytest.raises(FieldError, match=r"plan.weights"):
        Plan.of([((0.0,), 1.0), ((0.0,), -1.0)])


def with_values(**how: float) -> Setup:
    """The same bank with two value models behind it, those of the second objective first."""
    sets = setup().sets
    moved = {name: Backbones(own.experts, own.mix) for name, own in sets.items()}
    values = Backbones((5, 4), np.eye(2), value_models=True)
    both = {**moved, "v": values}
    return Setup(6, both, "bone", "soup", candidates=10, extrapolation=(0.5, 0.3), values="v", **how)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("method", "rows"),
    [("mage-e-m", {(0, 0, 0, 0, 0.4, 0.6): 1.0}), ("mage-e-e", {(0, 0, 0, 0, 0, 1): 0.6, (0, 0, 0, 0, 1, 0): 0.4})],
)
def test_explicit_guides_are_value_rows_at_a_strength_of_their_own(
    method: str, rows: dict[tuple[float, ...], float]
) -> None:
    base = (0.75, 0.25, 0, 0, 0, 0)
    for own, expected in (
        (with_values(strength=1.5), 1.5),
        (with_values(strength=1.5, value_strength=4.0), 4.0),
        (with_values(strength=1.5, value_strength=0.0), 0.0),
        (with_values(strength=1.5, value_strength=4.0).given(strength=2.0), 2.0),
    ):
        plan = plan_for(method, MU, own)
        wanted = {base: 1.0} | {row: round(expected * w, 9) for row, w in rows.items() if expected}
        assert terms(plan) == wanted
        assert [row.head for row in plan.rows] == [None, *["vocabulary"] * (len(plan.rows) - 1)]
        assert terms(plan_for("proxy-tuning", MU, own))[(0, 0, 1, 0, 0, 0)] == pytest.approx(0.6 * own.strength)
    with pytest.raises(FieldError, match="value_strength: got -1"):
        with_values(value_strength=-1.0)
    with pytest.raises(FieldError, match="method: got one guided by explicit values"):
        plan_for(method, MU, setup())


@given(st.sampled_from(sorted(METHODS)), st.floats(0, 1))
def test_a_compact_bank_holds_what_the_plans_need_and_no_more(method: str, first: float) -> None:
    whole = with_values(strength=1.2)
    plan = plan_for(method, (first, 1 - first), whole)
    names, [small] = compact([plan], whole)
    kept = [k for name in names for k in whole.sets[name].experts]
    assert small.weights == plan.weights and small.values == plan.values
    for row, other in zip(small.rows, plan.rows, strict=True):
        assert [row.coefficients[i] for i in range(len(kept))] == [other.coefficients[k] for k in kept]
        assert row.head == other.head
        assert not any(c for k, c in enumerate(other.coefficients) if k not in kept)
    for name in names:
        assert any(row.coefficients[k] for row in plan.rows for k in whole.sets[name].experts)
