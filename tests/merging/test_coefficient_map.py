"""Smooth maps from preferences to coefficients: the formula is one, and none leaves its control points' hull."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import BPoly

from mage_ray.errors import FieldError
from mage_ray.merging.coefficient_map import CoefficientMap, control_places, formula_map
from mage_ray.merging.coefficients import circulant_mix, extrapolated, merging_coefficients

DEGREES = range(1, 5)
numbers = st.floats(-3, 3)


@st.composite
def preferences(draw: st.DrawFn, n: int) -> np.ndarray:
    parts = np.array(draw(st.lists(st.floats(0.01, 1), min_size=n, max_size=n)))
    return parts / parts.sum()


@given(st.data(), st.sampled_from([2, 3, 4]), st.sampled_from(DEGREES), st.floats(0.55, 1))
def test_the_formula_is_a_map_of_any_degree(data: st.DataObject, n: int, degree: int, beta: float) -> None:
    mix, mu = circulant_mix(n, beta), data.draw(preferences(n))
    np.testing.assert_allclose(formula_map(mix, degree)(mu), merging_coefficients(mix, mu), atol=1e-9)


@given(st.data(), st.sampled_from([2, 3]))
def test_the_extrapolated_soup_is_a_map_of_degree_2(data: st.DataObject, n: int) -> None:
    """``(1 + alpha . mu) lam(mu)``: its control points are the polar form's values."""
    mix, mu = circulant_mix(n, 0.7), data.draw(preferences(n))
    alpha = np.array(data.draw(st.lists(numbers, min_size=n, max_size=n)))
    lam = np.linalg.inv(mix.T)
    control = []
    for place in control_places(n, 2):
        i, j = (np.flatnonzero(np.array(place))[k] for k in (0, -1))  # the two corners that it lies between
        control.append(tuple((lam[:, i] + lam[:, j]) / 2 + (alpha[i] * lam[:, j] + alpha[j] * lam[:, i]) / 2))
    expected = extrapolated(merging_coefficients(mix, mu), mu, alpha)
    np.testing.assert_allclose(CoefficientMap(2, tuple(control))(mu), expected, atol=1e-9)


@given(st.data(), st.sampled_from(DEGREES), st.floats(0, 1))
def test_two_objectives_are_scipys_bernstein_polynomial(data: st.DataObject, degree: int, first: float) -> None:
    control = np.array(data.draw(st.lists(st.tuples(numbers, numbers), min_size=degree + 1, max_size=degree + 1)))
    made = CoefficientMap(degree, tuple(map(tuple, control.tolist())))
    np.testing.assert_allclose(made((first, 1 - first)), BPoly(control[:, None], [0, 1])(first), atol=1e-9)


@given(st.data(), st.sampled_from([2, 3]), st.sampled_from(DEGREES))
def test_it_meets_its_corners_and_stays_within_its_norm(data: st.DataObject, n: int, degree: int) -> None:
    places = control_places(n, degree)
    one = st.tuples(*[numbers] * n)
    control = tuple(data.draw(st.lists(one, min_size=len(places), max_size=len(places))))
    made = CoefficientMap(degree, control)
    for place, point in zip(places, control, strict=True):
        if max(place) == 1:
            np.testing.assert_allclose(made(place), point, atol=1e-12)
    assert np.abs(made(data.draw(preferences(n)))).sum() <= made.norm + 1e-9
    offsets = np.asarray(data.draw(st.lists(one, min_size=len(places), max_size=len(places))))
    mu = data.draw(preferences(n))
    shift = CoefficientMap(degree, tuple(map(tuple, offsets.tolist())))(mu)
    np.testing.assert_allclose(made.moved(offsets.tolist())(mu), made(mu) + shift, atol=1e-9)


@pytest.mark.parametrize(
    ("degree", "control", "field"),
    [
        (0, ((1.0, 0.0),), "degree"),
        (5, ((1.0, 0.0),), "degree"),
        (1, ((1.0, 0.0),), "control"),
        (1, (), "control"),
        (2, ((1.0, 0.0), (1.0,), (0.0, 1.0)), "control"),
        (1, ((1.0, 0.0), (0.0, float("nan"))), "control"),
    ],
)
def test_what_is_no_map_is_refused(degree: int, control: tuple[tuple[float, ...], ...], field: str) -> None:
    with pytest.raises(FieldError, match=f"^{field}: got"):
        CoefficientMap(degree, control)


@pytest.mark.parametrize(("n", "degree"), list(product((2, 3, 4), DEGREES)))
def test_control_places_are_all_multiples_once(n: int, degree: int) -> None:
    places = control_places(n, degree)
    every = {p for p in product(range(degree + 1), repeat=n) if sum(p) == degree}
    assert {tuple(round(x * degree) for x in place) for place in places} == every
    assert len(places) == len(every)
