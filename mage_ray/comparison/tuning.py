"""Tuning: for each method the best of its settings on the validation prompts, the same number of them for each."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mage_ray.comparison.settings import Constants, constants_that_matter, settings, with_constants
from mage_ray.comparison.variants import Variant, compared_methods, single_sets
from mage_ray.decoding.methods import Setup
from mage_ray.evaluation.cells import Cell
from mage_ray.evaluation.evaluate import evaluate_cells, method_cells
from mage_ray.evaluation.summary import Interval, summary_of
from mage_ray.generator import bank_setup
from mage_ray.progress import shown
from mage_ray.prompts import Prompt
from mage_ray.study import Study
from mage_ray.training.rollouts import search_prompts

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

MATCHED = "extrapolated-soup"
BONE_SOUP = "bone-soup"
_FARTHEST = 8
"""How far a soup is extrapolated at most to reach a rival's KL: alpha."""


@dataclass(frozen=True)
class Tried:
    """A setting on the validation prompts: ``score`` is by ``compare.measure``, ``kl`` from the reference."""

    constants: Constants
    score: Interval
    kl: float


@dataclass(frozen=True)
class Arm:
    """What takes part under one label: a method of a variant, its constants, and how they were found."""

    label: str
    method: str
    variant: Variant
    constants: Constants
    tried: tuple[Tried, ...] = ()
    """Empty where there was nothing to choose."""
    kl_goal: float | None = None
    """What a matched soup's KL should be; its own is that of the last one tried."""

    @property
    def setup(self) -> Setup:
        return setup_with(self.variant, self.constants)


def setup_with(variant: Variant, constants: Constants) -> Setup:
    """What plans draw on with these constants, over all that the variant has trained. Raises UserError."""
    return bank_setup(with_constants(variant.study, constants), variant.sets)


def arms_cells(
    variant: Variant,
    arms: Sequence[Arm],
    place: str,
    prompts: Sequence[Prompt] | None = None,
    grid: Sequence[Any] | None = None,
) -> list[Cell]:
    """The cells of a variant's arms; on the test's prompts and grid unless these are given."""
    return method_cells(
        variant.study,
        variant.folder,
        {arm.label: arm.method for arm in arms},
        setups={arm.label: arm.setup for arm in arms},
        prompts=prompts,
        grid=grid,
        place=variant.folder.comparison / place,
    )


def validation_prompts(study: Study) -> list[Prompt]:
    """Those to choose constants by, neither trained nor tested on. Raises FieldError."""
    return search_prompts(study, study.compare.prompts, "compare.prompts")


def tuned_arms(variant: Variant, console: Console | None) -> list[Arm]:
    """The variant's methods, each with the best of its settings. Ray must be connected. Raises UserError.

    Of the study's own training also Bone Soup with each other set of mixed rewards, and the matched soups.
    """
    study = variant.study
    grid = study.validation_grid()

    def setup_of(constants: Constants) -> Setup:
        return setup_with(variant, constants)

    wanted: dict[str, list[dict[str, Any]]] = {}
    for method in variant.methods:
        names = constants_that_matter(study, method, setup_of, grid)
        wanted[method] = settings(study, method, names)
    tried = _tried(variant, wanted, console)
    made = []
    for method, own in tried.items():
        best = max(own, key=lambda one: _score(one.score)).constants if own else {}
        made.append(Arm(variant.label(method), method, variant, best, tuple(own)))
    if variant.name:
        return made
    for name in study.training.backbones if BONE_SOUP in variant.methods else ():
        if name != study.guidance.base and name not in single_sets(study):
            made.append(Arm(f"{BONE_SOUP}-{name}", BONE_SOUP, variant, {"base": name}))
    return made + [_matched(variant, arm, console) for arm in made if arm.method in matched_methods(study)]


def matched_methods(study: Study) -> list[str]:
    """Those beside which an extrapolated soup stands."""
    return study.compare.among("matched", compared_methods(study))


def _matched(variant: Variant, rival: Arm, console: Console | None) -> Arm:
    """The soup that is extrapolated as far as has the KL of a tuned method, on the validation prompts, over its base.

    alpha is looked for at whole numbers from 0 on, ``_FARTHEST`` at most, and then between two of them.
    """
    known = rival.tried or _tried(variant, {rival.method: [rival.constants]}, console, even_one=True)[rival.method]
    goal = next(one.kl for one in known if one.constants == rival.constants)
    base = {"base": rival.constants["base"]} if "base" in rival.constants else {}
    label = f"{MATCHED}@kl-of-{rival.label}"
    found: list[Tried] = []

    def at(alphas: Iterable[float]) -> None:
        wanted = {MATCHED: [{**base, "extrapolation": float(alpha)} for alpha in alphas]}
        [tried] = _tried(variant, wanted, console, f"{label}.{len(found)}", even_one=True).values()
        found.extend(tried)

    while not found or (found[-1].kl < goal and len(found) <= _FARTHEST):
        at(range(len(found), len(found) + 3))
    alpha = crossing([one.constants["extrapolation"] for one in found], [one.kl for one in found], goal)
    at([alpha])
    return Arm(label, MATCHED, variant, found[-1].constants, tuple(found), kl_goal=goal)


def crossing(x: Sequence[float], y: Sequence[float], goal: float) -> float:
    """Where the line through the points (x rising) first comes to ``goal``; where it never does, x of the nearest y."""
    for i in range(len(x) - 1):
        low, high = sorted((y[i], y[i + 1]))
        if low <= goal <= high and y[i] != y[i + 1]:
            return float(x[i] + (x[i + 1] - x[i]) * (goal - y[i]) / (y[i + 1] - y[i]))
    return float(x[int(np.argmin(np.abs(np.subtract(y, goal))))])


def _tried(
    variant: Variant,
    wanted: Mapping[str, Sequence[Constants]],
    console: Console | None,
    label: str = "",
    even_one: bool = False,
) -> dict[str, list[Tried]]:
    """By method what its settings come to; unless ``even_one``, nothing where there is only one, and so no choice."""
    study, prompts, grid = variant.study, validation_prompts(variant.study), variant.study.validation_grid()
    arms = [
        Arm(f"{label or variant.label(method)}.{i}", method, variant, constants)
        for method, own in wanted.items()
        if len(own) > 1 or even_one
        for i, constants in enumerate(own)
    ]
    if not arms:
        return {method: [] for method in wanted}
    cells = arms_cells(variant, arms, "validation", prompts, grid)
    samples = evaluated(variant, cells, console, f"validation {label or variant.name}".strip())
    summary = summary_of(study, samples)
    found: dict[str, list[Tried]] = {method: [] for method in wanted}
    for arm in arms:
        measures = summary.method(arm.label).measures
        found[arm.method].append(Tried(arm.constants, measures[study.compare.measure], measures["kl"].value))
    return found


def evaluated(variant: Variant, cells: Sequence[Cell], console: Console | None, what: str) -> pd.DataFrame:
    """The samples of a variant's cells, those that are missing made first. Ray must be connected."""
    with shown(console, what) as progress:
        return evaluate_cells(variant.study, variant.folder, cells, progress)


def _score(score: Interval) -> float:
    return -math.inf if math.isnan(score.value) else score.value
