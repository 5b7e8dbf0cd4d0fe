"""How right a reward model is, and how sure it may be of it. Pure.

Everything is said in *margins*: of a pair the chosen reward less the rejected one (Bradley-Terry), of a labelled text
the logit, its sign turned where the label is false. Either way the model is right where the margin is above 0, and
gives what is right the probability ``sigmoid(margin)``.

Legend: N rows, G groups (prompts), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

LARGEST = 100.0
"""A scale lies between this and its inverse."""
BINS = 10


def negative_log_likelihood(margin_N: np.ndarray) -> float:
    """The mean of ``-log sigmoid(margin)``, in nats."""
    return float(np.logaddexp(0.0, -margin_N).mean())


def fitted_scale(margin_N: np.ndarray) -> float:
    """The factor of the margins that makes these likeliest: temperature scaling (arXiv:1706.04599), as its inverse.

    Each row counts as right with probability (N + 1) / (N + 2) alone, as in Platt's scaling: few rows on which the
    model happens to be always right would else ask for certainty. The likelihood is concave in the factor, so the place
    where its slope is 0 is found by halving, on a logarithmic scale.
    """
    margin_N = np.asarray(margin_N, dtype=np.float64)
    target = (len(margin_N) + 1) / (len(margin_N) + 2)
    low, high = -math.log(LARGEST), math.log(LARGEST)
    for _ in range(60):
        middle = (low + high) / 2
        slope = (margin_N * (target - _sigmoid(math.exp(middle) * margin_N))).mean()
        low, high = (middle, high) if slope > 0 else (low, middle)
    return math.exp((low + high) / 2)


def calibration_error(margin_N: np.ndarray) -> float:
    """The expected calibration error: confidence less accuracy, in absolute value, averaged over bins by their rows.

    Confidence is ``sigmoid(|margin|)``, from 0.5 to 1 in ``BINS`` bins of one width.
    """
    confidence_N = _sigmoid(np.abs(margin_N))
    right_N = rightness(margin_N)
    bin_N = np.minimum(((confidence_N - 0.5) * 2 * BINS).astype(int), BINS - 1)
    gaps = [abs((confidence_N - right_N)[bin_N == b].sum()) for b in range(BINS)]
    return float(sum(gaps) / len(confidence_N))


def rightness(margin_N: np.ndarray) -> np.ndarray:
    """1 where the model is right, 0 where it is wrong, 0.5 where it can't tell; [N]."""
    return 0.5 * np.sign(margin_N) + 0.5


def mean_interval(
    value_N: np.ndarray, groups: Sequence[str], confidence: float, resamples: int, seed: int
) -> dict[str, float]:
    """The mean as ``value``, and its interval from ``low`` to ``high`` by a bootstrap over whole groups."""
    names = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    place_N = np.array([names[group] for group in groups])
    sum_G = np.bincount(place_N, weights=value_N)
    count_G = np.bincount(place_N)
    dice = np.random.default_rng([seed, 8])
    means = []
    for _ in range(resamples):
        drawn = dice.integers(0, len(names), len(names))
        means.append(sum_G[drawn].sum() / count_G[drawn].sum())
    low, high = np.quantile(means, ((1 - confidence) / 2, (1 + confidence) / 2))
    return {"value": float(np.mean(value_N)), "low": float(low), "high": float(high)}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0.0, -x))
