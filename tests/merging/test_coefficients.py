from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mage_ray.errors import FieldError
from mage_ray.merging.coefficients import (
    check_mix,
    circulant_mix,
    extrapolated,
    merging_coefficients,
    noise_amplification,
)


@st.composite
def simplex(draw: st.DrawFn, n: int) -> list[float]:
    weights = draw(st.lists(st.floats(0.01, 1), min_size=n, max_size=n))
    return [w / sum(weights) for w in weights]


@given(st.data(), st.integers(2, 6), st.floats(0.05, 1))
def test_circulant_agrees_with_the_closed_form(data: st.DataObject, n: int, beta: float) -> None:
    if abs(beta - 1 / n) < 0.02:
        return
    mu = data.draw(simplex(n))
    lam = merging_coefficients(circulant_mix(n, beta), mu)
    off = (1 - beta) / (n - 1)
    np.testing.assert_allclose(lam, [(m - off) / (beta - off) for m in mu], rtol=1e-9, atol=1e-9)
    assert lam.sum() == pytest.approx(1)
    if beta > 1 / n:
        assert all((x < -1e-9) <= (m < off) for x, m in zip(lam, mu, strict=True))


@given(st.data(), st.integers(2, 5))
def test_any_invertible_mix_gives_back_the_preference(data: st.DataObject, n: int) -> None:
    B = np.array([data.draw(simplex(n)) for _ in range(n)]) * 0.5 + 0.5 * np.eye(n)
    mu = data.draw(simplex(n))
    lam = merging_coefficients(check_mix(B), mu)
    # The merged reward sum_i lam_i h_i, h = B r, must be mu . r whatever the rewards are.
    rewards = np.random.default_rng(0).normal(size=(n, 50))
    np.testing.assert_allclose(lam @ (B @ rewards), np.array(mu) @ rewards, atol=1e-9)


def test_known_corner() -> None:
    lam = merging_coefficients(circulant_mix(2, 0.7), [1, 0])
    np.testing.assert_allclose(lam, [1.75, -0.75])
    assert noise_amplification(lam) == pytest.approx(2.5)


def test_identity_mix_is_rewarded_soup() -> None:
    np.testing.assert_allclose(merging_coefficients(np.eye(3), [0.2, 0.3, 0.5]), [0.2, 0.3, 0.5])


def test_extrapolation_mixes_alpha_over_the_preference() -> None:
    lam = np.array([0.25, 0.75])
    np.testing.assert_allclose(extrapolated(lam, [0.25, 0.75], [0.4, 0.8]), lam * (1 + 0.1 + 0.6))


@pytest.mark.parametrize(
    ("matrix", "word"),
    [
        ([[0.5, 0.5], [0.5, 0.5]], "invertible"),
        ([[0.5, 0.5], [0.5 + 1e-9, 0.5 - 1e-9]], "invertible"),
        ([[1, 0], [0.5, 0.6]], "sum to 1"),
        ([[1.5, -0.5], [0, 1]], "0 or more"),
        ([[1, 0, 0], [0, 1, 0]], "square"),
        ([[float("nan"), 1], [0, 1]], "finite"),
        ([[1, 0], [1]], "square"),
    ],
)
def test_unusable_mixes_are_refused(matrix: list[list[float]], word: str) -> None:
    with pytest.raises(FieldError, match=word):
        check_mix(matrix)


@pytest.mark.parametrize(("n", "beta"), [(2, 0.5), (3, 1 / 3), (2, 0), (2, 1.1), (2, float("nan"))])
def test_singular_or_absurd_beta_is_refused(n: int, beta: float) -> None:
    with pytest.raises(FieldError, match="beta"):
        circulant_mix(n, beta)
