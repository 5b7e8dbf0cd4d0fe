"""Intervals over answers: prompts are drawn anew, each with all its answers.

Legend: R resamples, A answers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mage_ray.evaluation.summary import Interval, interval


def prompt_draws(prompt_ids: Sequence[str], resamples: int, seed: int) -> np.ndarray:
    """How often each answer counts in each resample, [R + 1, A]; in row 0, the sample itself, once."""
    names, place_A = np.unique(np.asarray(prompt_ids), return_inverse=True)
    chances = np.full(len(names), 1 / len(names))
    drawn_RP = np.random.default_rng([seed, 7]).multinomial(len(names), chances, resamples)
    return np.vstack([np.ones(len(place_A)), drawn_RP[:, place_A]])


def first_interval(values_R: np.ndarray, confidence: float) -> Interval:
    """The first of ``prompt_draws``' rows, the sample itself, with the percentiles of the others."""
    return interval(values_R[0], values_R[1:], confidence)
