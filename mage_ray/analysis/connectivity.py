"""Linear mode connectivity of value models: is what lies between two of them as good as they are?

Merging rests on it. The merge of value models with weights ``lam`` should tell the reward ``sum_i lam_i r_i``; its loss
is measured along the segment between every two of a set, and at random points of the simplex of all. Beside it: the
*chord*, the same mix of the ends' own losses, and the *ensemble* of the same value models, which by Jensen's inequality
never lies above the chord. The *barrier* is how far the merge rises above the chord at most (Frankle et al.,
arXiv:1912.05671). A set whose members start from different initialisations is the control.

Legend: n objectives, A answers, R resamples, P points, lam [n].
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mage_ray.analysis.bootstrap import first_interval, prompt_draws
from mage_ray.analysis.scores import Answers, held_out, score_rows
from mage_ray.decoding.plan import Row
from mage_ray.errors import UserError
from mage_ray.evaluation.summary import Interval
from mage_ray.folder import StudyFolder
from mage_ray.generator import is_trained
from mage_ray.progress import shown
from mage_ray.study import Study

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Point:
    """A merge, by its weights: its loss, the ensemble's, and the mix of the ends' own losses."""

    lam: tuple[float, ...]
    merged: Interval
    ensemble: Interval
    chord: Interval


@dataclass(frozen=True)
class Segment:
    """The points between two value models, ends included, and how far the merge rises above the chord at most."""

    first: str
    second: str
    points: tuple[Point, ...]
    barrier: Interval
    gap: Interval
    """The merge's loss minus the ensemble's, on average over the segment."""


@dataclass(frozen=True)
class Connected:
    """A set of value models: its segments, and random points of its simplex."""

    set: str
    target: str
    head: str
    initialisation: str
    answers: int
    segments: tuple[Segment, ...]
    simplex: tuple[Point, ...]


def connectivity(study: Study, folder: StudyFolder, console: Console | None = None) -> list[Connected]:
    """Each trained set's. Ray must be connected. Raises UserError when there is none."""
    trained = [name for name in study.values if is_trained(folder, study, name)]
    if not trained:
        raise UserError("analyse connectivity: no value models, allowed: a study with trained ones (mage-ray values)")
    return [_of_set(study, folder, name, console) for name in trained]


def _of_set(study: Study, folder: StudyFolder, name: str, console: Console | None) -> Connected:
    spec, names = study.values[name], study.objective_names
    n = len(names)
    answers = held_out(study, folder, spec.held_out)
    segments = list(itertools.combinations(range(n), 2))
    steps = np.linspace(0, 1, study.analysis.segment)
    lams = [np.eye(n)[a] * (1 - t) + np.eye(n)[b] * t for a, b in segments for t in steps]
    dice = np.random.default_rng([study.seed, 8])
    lams += [*dice.dirichlet(np.ones(n), study.analysis.simplex)]
    rows = [Row(tuple(map(float, lam)), "scalar") for lam in [*np.eye(n), *lams]]
    with shown(console, f"connectivity of {name}") as progress:
        values = score_rows(study, folder, [name], rows, answers, progress)
    losses = _Losses(study, answers, values[:n])
    points = [losses.point(lam, own) for lam, own in zip(lams, values[n:], strict=True)]
    done, parts = [], np.split(np.arange(len(segments) * len(steps)), len(segments))
    for (a, b), part in zip(segments, parts, strict=True):
        rise_RP = np.stack([points[p].merged_R - points[p].chord_R for p in part], axis=1)
        gap_RP = np.stack([points[p].merged_R - points[p].ensemble_R for p in part], axis=1)
        confidence = study.analysis.confidence
        barrier, gap = first_interval(rise_RP.max(1), confidence), first_interval(gap_RP.mean(1), confidence)
        done.append(Segment(names[a], names[b], tuple(losses.shown(points[p]) for p in part), barrier, gap))
    simplex = tuple(losses.shown(point) for point in points[len(segments) * len(steps) :])
    return Connected(name, spec.target, spec.head, spec.initialisation, len(answers.ids), tuple(done), simplex)


@dataclass(frozen=True, eq=False)
class _Resampled:
    lam: tuple[float, ...]
    merged_R: np.ndarray
    ensemble_R: np.ndarray
    chord_R: np.ndarray


class _Losses:
    """Half the mean squared error over all states of the answers, in every resample of the prompts."""

    def __init__(self, study: Study, answers: Answers, ends: Sequence[list[np.ndarray]]) -> None:
        self._confidence = study.analysis.confidence
        self._ends = ends
        self._rewards_AN = answers.rewards_AN
        self._draws_RA = prompt_draws(answers.prompt_ids, study.evaluation.resamples, study.seed)
        self._states_A = np.array([len(values) for values in ends[0]])
        unit = np.eye(len(ends))
        self._ends_RN = np.stack([self._loss_R(own, unit[i]) for i, own in enumerate(ends)], axis=1)

    def point(self, lam: np.ndarray, merged: list[np.ndarray]) -> _Resampled:
        mixed = [np.tensordot(lam, np.stack(own), 1) for own in zip(*self._ends, strict=True)]
        chord_R = self._ends_RN @ lam
        return _Resampled(tuple(map(float, lam)), self._loss_R(merged, lam), self._loss_R(mixed, lam), chord_R)

    def shown(self, point: _Resampled) -> Point:
        parts = (point.merged_R, point.ensemble_R, point.chord_R)
        return Point(point.lam, *(first_interval(part_R, self._confidence) for part_R in parts))

    def _loss_R(self, values: Sequence[np.ndarray], lam: np.ndarray) -> np.ndarray:
        reward_A = self._rewards_AN @ lam
        squares_A = np.array([((own - reward) ** 2).sum() for own, reward in zip(values, reward_A, strict=True)])
        loss_R: np.ndarray = 0.5 * (self._draws_RA @ squares_A) / (self._draws_RA @ self._states_A)
        return loss_R
