"""Tuning: for each method the best of its settings on the validation prompts, the same number of them for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mage_ray.comparison.settings import Constants, along, constants_that_matter, settings, with_constants
from mage_ray.comparison.variants import Variant
from mage_ray.decoding.methods import Setup
from mage_ray.errors import FieldError
from mage_ray.evaluation.cells import Cell
from mage_ray.evaluation.evaluate import evaluate_cells, method_cells
from mage_ray.evaluation.summary import Interval, Summary, summarise
from mage_ray.generator import bank_setup
from mage_ray.progress import shown
from mage_ray.prompts import Prompt
from mage_ray.study import Study
from mage_ray.training.rollouts import search_prompts

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

MATCHED = "extrapolated-soup"


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
    """None where there was nothing to choose."""

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
    try:
        wanted = study.search.model_copy(update={"prompts": study.compare.prompts, "rungs": 1})
        return search_prompts(study.model_copy(update={"search": wanted}))
    except FieldError as error:
        field = error.field.replace("search.prompts", "compare.prompts")
        raise FieldError(field, error.value, error.allowed) from None


def tuned_arms(variant: Variant, console: Console | None) -> list[Arm]:
    """The variant's methods, each with the best of its settings. Ray must be connected. Raises UserError."""
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
    if not variant.name:
        made += _matched(variant, made, console)
    return made


def _matched(variant: Variant, arms: Sequence[Arm], console: Console | None) -> list[Arm]:
    """Soups that are extrapolated as far as has the KL of a tuned method, on the validation prompts, over its base."""
    made = []
    for rival in [arm for arm in arms if arm.method in variant.study.compare.matched]:
        found = rival.tried or _tried(variant, {rival.method: [rival.constants]}, console, even_one=True)[rival.method]
        goal = next(one.kl for one in found if one.constants == rival.constants)
        base = {"base": rival.constants["base"]} if "base" in rival.constants else {}
        wanted = [{**base, "extrapolation": alpha} for alpha in along(variant.study, "extrapolation")]
        label = f"{MATCHED}@kl-of-{rival.label}"
        [own] = _tried(variant, {MATCHED: wanted}, console, label).values()
        alpha = crossing([one.constants["extrapolation"] for one in own], [one.kl for one in own], goal)
        made.append(Arm(label, MATCHED, variant, {**base, "extrapolation": alpha}, tuple(own)))
    return made


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


def summary_of(study: Study, samples: pd.DataFrame) -> Summary:
    """The measures of all labels in ``samples``, as the study's evaluation has them."""
    spec = study.evaluation
    names, point = study.objective_names, study.reference_point()
    return summarise(samples, names, point, spec.resamples, study.seed, spec.confidence)


def _score(score: Interval) -> float:
    return -math.inf if math.isnan(score.value) else score.value
