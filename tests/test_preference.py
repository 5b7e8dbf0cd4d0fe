from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mage_ray.errors import FieldError
from mage_ray.preference import check_preference, named_preference, parse_preference, preference_grid

NAMES = ["helpful", "harmless", "short"]


@given(st.lists(st.floats(0.001, 1), min_size=3, max_size=3), st.floats(-9e-4, 9e-4))
def test_a_sum_within_the_tolerance_is_normalised(weights: list[float], off: float) -> None:
    total = sum(weights) / (1 + off)
    mu = check_preference([w / total for w in weights], NAMES)
    assert sum(mu) == pytest.approx(1, abs=1e-12)
    assert mu[0] / mu[1] == pytest.approx(weights[0] / weights[1])


def test_by_name_others_weigh_nothing() -> None:
    assert named_preference({"short": 0.3, "helpful": 0.7}, NAMES) == (0.7, 0, 0.3)
    assert parse_preference("helpful=0.7, short=0.3", NAMES) == (0.7, 0, 0.3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("helpful=0.7,short=0.31", "preference: got a sum of 1.01, allowed: weights that sum to 1"),
        ("helpful=1.5,short=-0.5", "preference.short: got -0.5, allowed: 0 or more"),
        ("helpful=nan,short=1", "preference.helpful: got nan, allowed: a finite number"),
        ("helpful=inf", "preference.helpful: got inf"),
        ("kind=1", "preference.kind: got 1.0, allowed: objectives of this study: helpful, harmless, short"),
        ("helpful", "each once, as name=weight"),
        ("helpful=0.5,helpful=0.5", "each once, as name=weight"),
        ("helpful=much", "preference.helpful: got much"),
        ("", "each once, as name=weight"),
    ],
)
def test_unusable_preferences_are_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(FieldError) as caught:
        parse_preference(text, NAMES)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("values", [[1.0], [True, 0, 0], ["1", 0, 0], [math.nan, 0.5, 0.5]])
def test_unusable_lists_are_refused(values: list[float]) -> None:
    with pytest.raises(FieldError, match="preference"):
        check_preference(values, NAMES)


def test_grids() -> None:
    assert preference_grid(2, 5) == [(0, 1), (0.25, 0.75), (0.5, 0.5), (0.75, 0.25), (1, 0)]
    assert len(preference_grid(2)) == 11
    assert len(preference_grid(3)) == 13
    assert len(preference_grid(3, 5)) == 15  # (4 + 2 choose 2)
    for n, points in ((2, None), (3, None), (3, 4), (4, 3)):
        grid = preference_grid(n, points)
        assert len(set(grid)) == len(grid)
        assert all(sum(mu) == pytest.approx(1) and min(mu) >= 0 for mu in grid)


@pytest.mark.parametrize(("n", "points"), [(1, 5), (2, 1), (2, 0)])
def test_unusable_grids_are_refused(n: int, points: int) -> None:
    with pytest.raises(FieldError):
        preference_grid(n, points)
