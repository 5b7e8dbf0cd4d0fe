"""Merging against ensembling: how far apart their guides are, over the size of the experts' deltas.

With every delta scaled by s, ``f`` a log-probability or a value, and ``dbar = sum_i lam_i d_i`` (docs/method.md):

    f(theta_0 + s dbar) - sum_i lam_i f(theta_0 + s d_i) = s^2/2 [dbar' H dbar - sum_i lam_i d_i' H d_i] + O(s^3)

where f(theta_0) counts once on either side. The curvatures ``d' H d`` are second differences of f itself.

Legend: n objectives, A answers, R resamples, T all tokens of all answers, s scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from mage_ray.analysis.bootstrap import first_interval, prompt_draws
from mage_ray.analysis.fronts import Planner, fronts, whole_setup
from mage_ray.analysis.scores import Answers, held_out, score_rows
from mage_ray.decoding.methods import BASES, GUIDES, Setup, Terms
from mage_ray.decoding.plan import Plan, Row
from mage_ray.evaluation.summary import Interval, Summary
from mage_ray.folder import StudyFolder
from mage_ray.generator import load_experts
from mage_ray.merging.coefficients import Vector, merging_coefficients
from mage_ray.progress import shown
from mage_ray.specs import ValuesSpec
from mage_ray.study import Study

if TYPE_CHECKING:
    from rich.console import Console

_STEP, _LONGEST = 0.01, 0.5
"""Of the second differences: the size of the deltas there, over the weights; and the longest, as a share of the deltas.
Shorter ones drown in float32's rounding, longer ones pick up the fourth order."""


@dataclass(frozen=True)
class Apart:
    """A guide's two kinds at one scale, over the tokens of held-out answers, in nats or in units of reward."""

    scale: float
    size: float
    """The experts' deltas over the weights that they are added to, Frobenius norms, mean over experts."""
    guide: Interval
    """Root mean square of the ensemble's score."""
    difference: Interval
    """Root mean square of the merged guide's score minus the ensemble's."""
    predicted: Interval
    """The same by the second-order formula."""
    correlation: float
    """Of the difference and its prediction, over tokens."""


@dataclass(frozen=True)
class Compared:
    """One kind of guide (implicit or explicit): its scores at each scale."""

    guide: str
    set: str
    answers: int
    scales: tuple[Apart, ...]


def merging(
    study: Study, folder: StudyFolder, console: Console | None = None
) -> tuple[list[Compared], dict[str, tuple[str, float]], Summary]:
    """The scores of implicit and, where trained, explicit guides, at the even preference, and the fronts.

    Fronts are by label; beside them (guide, scale) of each label. Ray must be connected.
    """
    setup = whole_setup(study, folder)
    kinds = {"implicit": study.guidance.guide} | ({"explicit": setup.values} if setup.values is not None else {})
    compared = [_scores(study, folder, kind, name, console) for kind, name in kinds.items()]
    labels = {
        f"{kind}-{how} x {scale:g}": (f"{kind}-{how}", scale)
        for kind in kinds
        for scale in study.analysis.front_scales
        for how in ("merged", "ensembled")
    }
    planners: dict[str, Planner] = {label: partial(scaled, *own, setup=setup) for label, own in labels.items()}
    return compared, labels, fronts(study, folder, planners, setup, console, "merging: fronts")


def scaled(guide: str, scale: float, mu: Vector, setup: Setup) -> Plan:
    """The Bone Soup of a preference, steered by a guide whose deltas (and heads) are ``scale`` times theirs."""
    terms: Terms = []
    for term, weight in GUIDES[guide](mu, setup):
        row = term if isinstance(term, Row) else Row(tuple(term))
        terms.append((Row(tuple(scale * c for c in row.coefficients), row.head), weight))
    return setup.guided(BASES["bone-soup"](mu, setup), terms, mu)


def _scores(study: Study, folder: StudyFolder, kind: str, name: str, console: Console | None) -> Compared:
    n = len(study.objectives)
    spec = study.values.get(name)
    mix = np.eye(n) if spec is not None else study.training.backbones[name].mix(n)
    lam = merging_coefficients(mix, np.full(n, 1 / n))
    answers = held_out(study, folder, (study.value_spec or ValuesSpec()).held_out)
    directions = [lam, *np.eye(n)]
    size = _relative_size(study, folder, name)
    step = min(_STEP / size, _LONGEST) if size > 0 else _LONGEST
    # One entry for each factor: several scales may be equal to a step.
    factors = list(dict.fromkeys([*study.analysis.scales, step, -step]))
    rows = [_row(np.zeros(n), kind), *(_row(x * d, kind) for x in factors for d in directions)]
    with shown(console, f"merging: {kind} scores") as progress:
        found = score_rows(study, folder, [name], rows, answers, progress)
    flat_RT = np.stack([np.concatenate(scores) for scores in found])
    moved_FDT = (flat_RT[1:] - flat_RT[0]).reshape(len(factors), len(directions), -1)
    moved = dict(zip(factors, moved_FDT, strict=True))
    bend_T = bend(moved[step], moved[-step], step, lam)
    draws_RT = _per_token(study, answers, found[0])

    def root(part_T: np.ndarray) -> Interval:
        return first_interval(np.sqrt(draws_RT @ part_T**2 / draws_RT.sum(1)), study.analysis.confidence)

    scales = []
    for scale in study.analysis.scales:
        ensemble_T = lam @ moved[scale][1:]
        difference_T, predicted_T = moved[scale][0] - ensemble_T, scale**2 * bend_T
        both = difference_T.std() > 0 and predicted_T.std() > 0
        correlation = float(np.corrcoef(difference_T, predicted_T)[0, 1]) if both else 0.0
        scales.append(Apart(scale, scale * size, root(ensemble_T), root(difference_T), root(predicted_T), correlation))
    return Compared(kind, name, len(answers.ids), tuple(scales))


def bend(ahead_DT: np.ndarray, back_DT: np.ndarray, step: float, lam: np.ndarray) -> np.ndarray:
    """``1/2 [dbar' H dbar - sum_i lam_i d_i' H d_i]`` for each token, by second differences.

    From what f gains a ``step`` ahead and back, along dbar first and then along each d_i.
    """
    curvature_DT = (ahead_DT + back_DT) / step**2
    bent_T: np.ndarray = 0.5 * (curvature_DT[0] - lam @ curvature_DT[1:])
    return bent_T


def _row(coefficients: np.ndarray, kind: str) -> Row:
    return Row(tuple(map(float, coefficients)), "scalar" if kind == "explicit" else None)


def _per_token(study: Study, answers: Answers, like: Sequence[np.ndarray]) -> np.ndarray:
    """How often each token of each answer counts in each resample of the prompts, [R + 1, T]."""
    draws_RA = prompt_draws(answers.prompt_ids, study.evaluation.resamples, study.seed)
    return np.repeat(draws_RA, [len(part) for part in like], axis=1)


def _relative_size(study: Study, folder: StudyFolder, name: str) -> float:
    from mage_ray.models import load_model

    weights = dict(load_model(study.model, study.dtype).named_parameters())
    ratios = []
    for expert in load_experts(folder, study, [name])[name]:
        deltas = sum(float(factors.delta().square().sum()) for factors in expert.factors.values())
        whole = sum(float(weights[f"{module}.weight"].detach().double().square().sum()) for module in expert.factors)
        ratios.append((deltas / whole) ** 0.5)
    return float(np.mean(ratios))
