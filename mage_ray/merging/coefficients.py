"""From a preference to merging coefficients (docs/method.md). Pure float64 functions.

Legend: n objectives, B [n, n] the backbone rewards' mix (row i is backbone i's reward over the objectives),
mu [n] a preference, lam [n] the coefficients of the backbones' deltas.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mage_ray.errors import FieldError

Vector = Sequence[float] | np.ndarray

MAX_CONDITION = 1e6
"""A mix whose condition number is above this is called singular: lam would be mostly rounding and expert noise."""


def circulant_mix(n: int, beta: float) -> np.ndarray:
    """Bone Soup's mix: ``beta`` on the diagonal and ``(1 - beta) / (n - 1)`` off it, [n, n] (docs/method.md).

    Raises FieldError when beta is outside (0, 1] or so near 1/n that the mix is singular.
    """
    if not 0 < beta <= 1:
        raise FieldError("beta", beta, "above 0, at most 1")
    off = (1 - beta) / (n - 1)
    return check_mix(np.full((n, n), off) + (beta - off) * np.eye(n), field="beta", shown=beta)


def check_mix(mix: Sequence[Sequence[float]] | np.ndarray, field: str = "matrix", shown: object = None) -> np.ndarray:
    """The mix as float64 [n, n], after checking that it is square, finite, row-stochastic and invertible.

    Raises FieldError naming ``field`` and ``shown`` (or the matrix).
    """
    shown = mix if shown is None else shown
    try:
        B = np.asarray(mix, dtype=np.float64)
    except ValueError:
        raise FieldError(field, shown, "a square matrix of numbers") from None
    if B.ndim != 2 or B.shape[0] != B.shape[1] or not np.isfinite(B).all():
        raise FieldError(field, shown, "a square matrix of finite numbers")
    if (B < 0).any() or np.abs(B.sum(axis=1) - 1).max() > 1e-6:
        raise FieldError(field, shown, "rows of numbers, 0 or more, that sum to 1")
    if np.linalg.cond(B) > MAX_CONDITION:
        raise FieldError(field, shown, f"an invertible mix (beta away from 1/{len(B)}; no row a mix of the others)")
    return B


def merging_coefficients(mix: np.ndarray, preference: Vector) -> np.ndarray:
    """lam [n] with ``B^T lam = mu``: the merged backbones then stand for the reward ``mu . r``.

    Bone Soup, arXiv:2502.10762. Negative coefficients are normal. Rewarded Soups is ``B = I``, ``lam = mu``.
    """
    return np.linalg.solve(mix.T, np.asarray(preference, dtype=np.float64))


def extrapolated(coefficients: np.ndarray, preference: Vector, alpha: Vector) -> np.ndarray:
    """``(1 + alpha . mu) lam``: theta(mu) pushed away from the reference (docs/method.md).

    alpha [n] is one extrapolation per corner, mixed linearly over the preference.
    """
    return (1 + float(np.dot(alpha, preference))) * coefficients


def noise_amplification(coefficients: np.ndarray) -> float:
    """``||lam||_1``, the factor by which the experts' noise is amplified (docs/method.md)."""
    return float(np.abs(coefficients).sum())
