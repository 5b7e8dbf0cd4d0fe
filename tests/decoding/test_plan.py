from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mage_ray.decoding.plan import EXPLICIT, METHODS, Backbones, Plan, Row, Setup, plan_for
from mage_ray.errors import FieldError
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


def test_equal_rows_become_one() -> None:
    """Base and guide alike: two rows with weights 1 + w and -w (METHOD.md section 3)."""
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
