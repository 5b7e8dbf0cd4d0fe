"""Normaliser against the definition in float64 arithmetic, and against files that were tampered with."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mage_ray.errors import FieldError, UserError
from mage_ray.objectives import Direction, Normaliser

NAMES = ("warm", "short", "plain")
DIRECTIONS: tuple[Direction, ...] = ("maximise", "minimise", "maximise")
FITTED = Normaliser(NAMES, (1, -1, 1), (0.1, -40.25, 1 / 3), (0.5, 12.0, 1e-7))

raw_values = arrays(
    np.float64,
    st.tuples(st.integers(2, 20), st.just(3)),
    elements=st.floats(-1e6, 1e6, allow_nan=False),
)


@given(raw_values)
@settings(max_examples=100, deadline=None)
def test_the_reference_gets_mean_zero_and_std_one(raw_NM: np.ndarray) -> None:
    assume((np.ptp(raw_NM, axis=0) > 1e-3).all())
    normalised_NM = Normaliser.fit(NAMES, DIRECTIONS, raw_NM).apply(raw_NM)
    np.testing.assert_allclose(normalised_NM.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(normalised_NM.std(axis=0), 1, atol=1e-5)


@given(raw_values)
@settings(max_examples=100, deadline=None)
def test_bigger_is_better_for_either_direction(raw_NM: np.ndarray) -> None:
    assume((np.ptp(raw_NM, axis=0) > 1e-3).all())
    normaliser = Normaliser.fit(NAMES, DIRECTIONS, raw_NM)
    better = normaliser.apply(raw_NM + np.array([10.0, -10.0, 10.0]))
    assert (better > normaliser.apply(raw_NM)).all()


def test_known_values() -> None:
    normaliser = Normaliser.fit(["words"], ["minimise"], np.array([[10.0], [30.0]]))
    assert normaliser == Normaliser(("words",), (-1,), (-20.0,), (10.0,))
    assert normaliser.apply(np.array([[10.0], [30.0], [5.0]])).tolist() == [[1.0], [-1.0], [1.5]]


@given(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=3, max_size=3),
    st.lists(st.floats(1e-300, 1e300), min_size=3, max_size=3),
    st.lists(st.sampled_from([1, -1]), min_size=3, max_size=3),
)
def test_json_gives_back_the_same_numbers(mean: list[float], std: list[float], sign: list[int]) -> None:
    normaliser = Normaliser(NAMES, tuple(sign), tuple(mean), tuple(std))
    assert Normaliser.from_json(normaliser.to_json(), NAMES) == normaliser


@pytest.mark.parametrize("constant", [0.0, 0.1, -3e8])
def test_a_constant_objective_is_refused(constant: float) -> None:
    raw_NM = np.column_stack([np.arange(7.0), np.full(7, constant), np.arange(7.0)])
    with pytest.raises(FieldError) as caught:
        Normaliser.fit(NAMES, DIRECTIONS, raw_NM)
    assert caught.value.field == "objectives.short"


def test_rounding_noise_is_a_constant() -> None:
    raw_NM = np.array([[0.1 + 0.2], [0.3], [0.3]])
    assert raw_NM[0] != raw_NM[1]
    with pytest.raises(FieldError, match=r"objectives\.noisy"):
        Normaliser.fit(["noisy"], ["maximise"], raw_NM)


def test_one_sample_has_no_spread() -> None:
    with pytest.raises(FieldError, match=r"objectives\.warm"):
        Normaliser.fit(NAMES, DIRECTIONS, np.ones((1, 3)))


def test_a_spread_beyond_float64_is_refused() -> None:
    with pytest.raises(FieldError, match="finite spread"):
        Normaliser.fit(["huge"], ["maximise"], np.array([[1e300], [-1e300]]))


def _tampered(key: str, value: Any) -> str:
    data = json.loads(FITTED.to_json())
    if value is None:
        del data[key]
    else:
        data[key] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, None) for key in ("names", "sign", "mean", "std")),
        ("names", ["warm", "warm", "plain"]),
        ("names", []),
        ("names", ["warm", 2, "plain"]),
        ("names", "warm"),
        ("sign", [1, 0, 1]),
        ("sign", [1, True, 1]),
        ("sign", [1, -1]),
        ("mean", [0.0, float("nan"), 0.0]),
        ("mean", [0.0, "1", 0.0]),
        ("mean", 0.5),
        ("std", [1.0, 0.0, 1.0]),
        ("std", [1.0, -1.0, 1.0]),
        ("std", [1.0, float("inf"), 1.0]),
        ("std", [1.0, 1.0, 1.0, 1.0]),
        ("median", [1.0, 1.0, 1.0]),
    ],
)
def test_from_json_names_the_field_that_is_wrong(key: str, value: Any) -> None:
    with pytest.raises(FieldError) as caught:
        Normaliser.from_json(_tampered(key, value))
    assert caught.value.field == f"normalisation.{key}"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [("short", "warm", "plain"), ("warm", "short"), (*NAMES, "kind")])
def test_from_json_refuses_another_studys_objectives(names: tuple[str, ...]) -> None:
    with pytest.raises(FieldError) as caught:
        Normaliser.from_json(FITTED.to_json(), names)
    assert caught.value.field == "normalisation.names"


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{'names': 1}\n\n"])
def test_from_json_of_something_else_is_one_line(text: str) -> None:
    with pytest.raises(UserError, match=r"^normalisation: ") as caught:
        Normaliser.from_json(text)
    assert "\n" not in str(caught.value)
