"""What a set of points says about a method, and what a set of texts says about its language (docs/method.md).

``points_MN``: M points of N objectives, bigger is better. ``preferences_MN``: the preference that each point answers
to. Every measure of points also takes leading batch axes (``[..., M, N]``) and returns ``[...]``: the bootstrap needs
a thousand fronts at once. Everything is computed in float64.

A front of **one** point has a hypervolume, an inner product and a length of 1, but no order, no gaps and no evenness:
its controllability, sparsity and spacing are ``nan``, because 0 would read as the best sparsity there is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

# Preferences are decimal fractions: 0.1 + 0.2 and 0.3 are the same wish.
_SAME_WEIGHT = 1e-9


def pareto_mask(points_MN: ArrayLike) -> NDArray[np.bool_]:
    """``[..., M]``: True where no other point is at least as good everywhere and better somewhere.

    Of equal points the first is kept, so that the mask counts places on the front. Source: the definition of Pareto
    dominance.
    """
    points = _points(points_MN)
    m = points.shape[-2]
    other, one = points[..., :, None, :], points[..., None, :, :]  # [..., M (other), M (one), N]
    covers = (other >= one).all(-1)
    beats = covers & (other > one).any(-1)
    earlier_twin = covers & ~beats & np.triu(np.ones((m, m), dtype=bool), k=1)
    return np.logical_not((beats | earlier_twin).any(-2))


def front_length(points_MN: ArrayLike) -> Floats:
    """Number of non-dominated points, equal ones counted once: ``sum pareto_mask``."""
    return pareto_mask(points_MN).sum(-1).astype(np.float64)


def hypervolume(points_MN: ArrayLike, reference_point_N: ArrayLike) -> Floats:
    """Volume of ``{z : reference_point <= z <= f for some point f}``, for maximisation.

    A point that does not beat the reference point in every objective contributes nothing; no such point gives 0.
    Source: Zitzler and Thiele 1999; computed by pymoo, which minimises, on the negated points.
    """
    from pymoo.indicators.hv import HV

    points = _points(points_MN)
    indicator = HV(ref_point=-np.asarray(reference_point_N, dtype=np.float64))
    volumes = np.zeros(points.shape[:-2])
    for index in np.ndindex(volumes.shape):
        volumes[index] = indicator(-points[index]) if points.shape[-2] else 0.0
    return volumes[()]


def inner_product(preferences_MN: ArrayLike, points_MN: ArrayLike) -> Floats:
    """``mean_j <mu^j, f^j>``: what the users who asked got, weighed as they asked (docs/method.md)."""
    product = np.asarray(preferences_MN, dtype=np.float64) * _points(points_MN)
    return product.sum(-1).mean(-1)


def controllability(preferences_MN: ArrayLike, points_MN: ArrayLike) -> Floats:
    """Share of (objective i, pair of preferences j, k) with ``mu_i^j > mu_i^k`` for which ``f_i^j > f_i^k``, in [0, 1].

    Pairs whose weights ``mu_i`` are equal ask for no order and don't count. Points that tie in ``f_i`` count as
    wrong: the user moved the weight and nothing happened. Chance is 1/2. ``nan`` when no pair counts (one point,
    say). Source: docs/method.md; the paper's own formula was not seen.
    """
    preferences, points = np.asarray(preferences_MN, dtype=np.float64), _points(points_MN)
    asked = (
        preferences[:, None, :] - preferences[None, :, :] > _SAME_WEIGHT
    )  # [M, M, N], each pair in one direction only
    pairs = asked.sum()
    if pairs == 0:
        return np.full(points.shape[:-2], np.nan)[()]
    obeyed = points[..., :, None, :] > points[..., None, :, :]
    return (asked & obeyed).sum((-3, -2, -1)) / pairs


def sparsity(points_MN: ArrayLike) -> Floats:
    """``1/(m-1) sum_i sum_k (f_i^(k) - f_i^(k+1))^2`` over the m points of the front, each objective sorted by itself.

    Small is dense; a front that has collapsed to nearly one point is small too, so read it beside the hypervolume.
    ``nan`` for a front of one point. Source: Xu et al. 2020 (prediction-guided MORL), equation for sparsity.
    """
    points = _points(points_MN)
    mask = pareto_mask(points)
    # NaN sorts to the end of each column, so the gaps between front points stay adjacent and the rest drop out of the
    # sum.
    ordered = np.sort(np.where(mask[..., None], points, np.nan), axis=-2)
    squares = np.nansum(np.diff(ordered, axis=-2) ** 2, axis=(-2, -1))
    return _divide(squares, mask.sum(-1) - 1)


def spacing(points_MN: ArrayLike) -> Floats:
    """``sqrt(1/(m-1) sum_j (mean(d) - d_j)^2)``, ``d_j = min_k sum_i |f_i^j - f_i^k|`` over the m points of the front.

    0 is an evenly spaced front, and always the spacing of two points; ``nan`` for a front of one. Source: Schott 1995.
    """
    points = _points(points_MN)
    mask = pareto_mask(points)
    m = points.shape[-2]
    distances = np.abs(points[..., :, None, :] - points[..., None, :, :]).sum(-1)
    is_pair = mask[..., :, None] & mask[..., None, :] & ~np.eye(m, dtype=bool)
    nearest = np.where(is_pair, distances, np.inf).min(-1, initial=np.inf)
    nearest = np.where(mask & np.isfinite(nearest), nearest, 0.0)
    count = mask.sum(-1)
    mean = nearest.sum(-1) / np.maximum(count, 1)
    squares = (np.where(mask, nearest - mean[..., None], 0.0) ** 2).sum(-1)
    return np.sqrt(_divide(squares, count - 1))


def repetition(text: str, n: int = 4) -> float:
    """rep-n: ``1 - |distinct word n-grams| / |word n-grams|``, in [0, 1); 0 for a text of fewer than ``n`` words.

    Words are what white space separates, in lower case. Source: Welleck et al. 2020 (seq-rep-n).
    """
    grams = _ngrams(text, n)
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(groups: Sequence[Sequence[str]], n: int = 2) -> tuple[float, Floats]:
    """distinct-n of all texts together: ``|distinct word n-grams| / |word n-grams|``, in [0, 1].

    And [groups], the same of the texts of all groups but one. 0 where there is no n-gram. Low is a model that says the
    same to everybody, which no measure of a single answer shows. It falls as texts grow longer. Source: Li et al. 2016.
    """
    grams = [Counter(gram for text in texts for gram in _ngrams(text, n)) for texts in groups]
    carriers = Counter(gram for own in grams for gram in own)
    total = sum(own.total() for own in grams)
    totals = np.array([total - own.total() for own in grams], dtype=np.float64)
    lost = np.array([sum(carriers[gram] == 1 for gram in own) for own in grams])
    without = np.divide(len(carriers) - lost, totals, out=np.zeros(len(grams)), where=totals > 0)
    return len(carriers) / total if total else 0.0, without


def _ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    words = text.lower().split()
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def _points(points_MN: ArrayLike) -> Floats:
    points = np.asarray(points_MN, dtype=np.float64)
    if points.ndim < 2 or points.shape[-1] == 0:
        raise ValueError(f"points must have shape [..., points, objectives], got {points.shape}")
    return points


def _divide(total: Floats, count: NDArray[np.int_]) -> Floats:
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)[()]
