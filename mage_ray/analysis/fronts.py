"""Fronts of any plans: each label's plans over the study's grid, generated, scored and kept, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from mage_ray.decoding.methods import Setup
from mage_ray.decoding.plan import Plan
from mage_ray.evaluation.cells import make_cells
from mage_ray.evaluation.evaluate import evaluate_cells
from mage_ray.evaluation.summary import Summary, summary_of
from mage_ray.folder import StudyFolder
from mage_ray.generator import bank_setup, is_trained
from mage_ray.merging.coefficients import Vector
from mage_ray.progress import shown
from mage_ray.study import Study
from mage_ray.training.rollouts import study_prompts

if TYPE_CHECKING:
    from rich.console import Console

Planner = Callable[[Vector], Plan]
"""From a preference to a plan over the bank of ``whole_setup``."""


def whole_setup(study: Study, folder: StudyFolder) -> Setup:
    """What plans may draw on here: every set of the study that is trained, not only those that its guidance names."""
    valued = [name for name in study.values if is_trained(folder, study, name)]
    return bank_setup(study, [*study.training.backbones, *valued])


def fronts(
    study: Study, folder: StudyFolder, planners: Mapping[str, Planner], setup: Setup, console: Console | None, what: str
) -> Summary:
    """The measures of each planner by its label, with the study's intervals for analyses. Ray must be connected."""
    study = _narrowed(study)
    grid = study.evaluation_grid()
    _, prompts = study_prompts(study)
    cells = []
    for label, planner in planners.items():
        # One by one, so that each runs on a bank of the sets that it needs.
        plans = {label: [planner(mu) for mu in grid]}
        cells += make_cells(study, folder, folder.analysis / "cells", plans, setup, grid, prompts)
    with shown(console, what) as progress:
        samples = evaluate_cells(study, folder, cells, progress)
    return summary_of(study, samples, study.analysis.confidence)


def _narrowed(study: Study) -> Study:
    """The study with the grid and the number of prompts that its analyses have."""
    spec, evaluation, prompts = study.analysis, study.evaluation, study.prompts
    if spec.grid is not None:
        evaluation = evaluation.model_copy(update={"grid": spec.grid})
    if spec.prompts is not None:
        prompts = prompts.model_copy(update={"evaluation": min(spec.prompts, prompts.evaluation)})
    return study.model_copy(update={"evaluation": evaluation, "prompts": prompts})
