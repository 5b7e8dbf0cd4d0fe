"""Choosing beta early: short training of each candidate's backbones, hypervolume decides, the winner trains on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from mage_ray.decoding.methods import plan_for
from mage_ray.evaluation.cells import make_cells
from mage_ray.evaluation.evaluate import evaluate_cells
from mage_ray.evaluation.summary import Interval, summary_of
from mage_ray.files import write_atomic
from mage_ray.folder import StudyFolder
from mage_ray.generator import bank_setup
from mage_ray.progress import shown
from mage_ray.study import Study
from mage_ray.training.experts import train_early
from mage_ray.training.rollouts import search_prompts

if TYPE_CHECKING:
    from rich.console import Console


def choose_betas(study: Study, folder: StudyFolder, console: Console | None = None) -> Study:
    """The study with the beta of each of its backbone sets chosen, by hypervolume of the set's soup.

    A set with ``betas`` is trained with each of them for ``training.early`` of its steps, and tried on the search's
    prompts (Bone Soup chooses so, arXiv:2502.10762). What is chosen is written down and stays, and its training goes on
    from there. Ray must be connected. Raises UserError.
    """
    for name, spec in study.training.backbones.items():
        if spec.decided:
            continue
        steps = max(1, math.ceil(study.training.early * study.training.steps))
        tried = {beta: _try(study, folder, name, beta, steps, console) for beta in spec.betas or ()}
        best = max(tried, key=lambda beta: tried[beta].value)
        _keep(folder, name, best, steps, tried)
        study = study.with_betas({name: best})
        if console is not None:
            shown_ones = ", ".join(f"{beta:g}: {one.value:.3f}" for beta, one in tried.items())
            console.print(f"{name}: beta {best:g} by hypervolume after {steps} steps ({shown_ones})", highlight=False)
    return study


def _try(study: Study, folder: StudyFolder, name: str, beta: float, steps: int, console: Console | None) -> Interval:
    """The hypervolume of a set's soup when it has trained so far with this beta."""
    alone = {name: study.training.backbones[name].model_copy(update={"beta": beta})}
    unset = dict.fromkeys(("base_map", "guide_map", "values", "head"))
    guidance = study.guidance.model_copy(update={"base": name, "guide": name, **unset})
    training = study.training.model_copy(update={"backbones": alone})
    early = study.model_copy(update={"training": training, "guidance": guidance, "values": {}})
    place = folder.within(folder.checkpoints / "early" / f"{name}-{beta:g}", "rollouts", "rewards")
    folder.fetch(place.path)
    train_early(early, folder, place, steps, console)
    setup = bank_setup(early, [name])
    grid = early.search_grid()
    plans = {"bone-soup": [plan_for("bone-soup", mu, setup) for mu in grid]}
    cells = make_cells(early, place, place.evaluation, plans, setup, grid, search_prompts(early))
    with shown(console, f"{name} with beta {beta:g}") as progress:
        samples = evaluate_cells(early, place, cells, progress)
    [own] = summary_of(early, samples).methods
    return own.measures["hypervolume"]


def _keep(folder: StudyFolder, name: str, beta: float, steps: int, tried: Mapping[float, Interval]) -> None:
    candidates = {f"{one:g}": asdict(found) for one, found in tried.items()}
    choice = {"beta": beta, "steps": steps, "hypervolume": candidates}
    write_atomic(folder.chosen, json.dumps(folder.choices() | {name: choice}, indent=1) + "\n")
    folder.publish(folder.chosen)
