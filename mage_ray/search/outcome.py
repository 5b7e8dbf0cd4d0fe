"""What a search ends in: the best setting, or the front of them, checked on prompts that the search never saw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mage_ray.evaluation.cells import read_cells
from mage_ray.evaluation.evaluate import method_cells, recipe_cells
from mage_ray.evaluation.measures import pareto_mask
from mage_ray.evaluation.summary import Interval, Summary, paired_difference, summary_of
from mage_ray.files import atomic_path
from mage_ray.folder import StudyFolder
from mage_ray.progress import shown
from mage_ray.search.engine import write_cells
from mage_ray.search.recipe import Provenance, Recipe, Score
from mage_ray.search.space import Space
from mage_ray.search.spec import METRICS
from mage_ray.search.trial import read_records

if TYPE_CHECKING:
    from rich.console import Console

CHECKED = ("hypervolume", "inner_product", "controllability")


def conclude(
    space: Space,
    folder: StudyFolder,
    engines: Sequence[Any],
    facts: Mapping[str, str],
    console: Console | None = None,
) -> Recipe:
    """Check the winner on unseen prompts, write ``recipe.yaml``, the front's recipes and the page, and return it.

    ``facts`` are what the page says of how it came about. Ray must be connected.
    """
    from mage_ray.search.page import write_search_page

    records = finished(read_records(folder))
    best = winners(records, space.study.search.metrics)
    summary = check(space, folder, engines, Recipe.model_validate(best[0]["recipe"]), console)
    made = [_with_provenance(space, record, len(records), summary if i == 0 else None) for i, record in enumerate(best)]
    place = folder.search / "recipes"
    with atomic_path(place) as partial:
        partial.mkdir()
        for i, recipe in enumerate(made):
            recipe.save(partial / f"{i:02d}.yaml")
    write_search_page(space, folder, read_records(folder), summary, made[0], facts)
    made[0].save(folder.recipe)
    return made[0]


def finished(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that were tried on all prompts."""
    return [record for record in records if record.get("last")]


def winners(records: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[Mapping[str, Any]]:
    """Those that no other beats in all metrics, the best in the first metric first."""
    signs = [1.0 if METRICS[name] == "max" else -1.0 for name in metrics]
    values = np.array(
        [[s * record["scores"][name] for s, name in zip(signs, metrics, strict=True)] for record in records]
    )
    front = [records[i] for i in np.flatnonzero(pareto_mask(np.nan_to_num(values, nan=-math.inf))).tolist()]
    return sorted(front, key=lambda record: -signs[0] * record["scores"][metrics[0]])


def check(
    space: Space, folder: StudyFolder, engines: Sequence[Any], recipe: Recipe, console: Console | None = None
) -> Summary:
    """A recipe, as ``recipe``, and the study's own constants, as their method, on the evaluation's prompts and grid."""
    study = space.study
    cells = recipe_cells(study, folder, recipe)
    cells += method_cells(study, folder, {study.search.method: study.search.method})
    with shown(console, "unseen prompts") as progress:
        write_cells(folder, engines, cells, len(study.evaluation.seeds), progress)
    samples = pd.concat(read_cells(folder, cells), ignore_index=True)
    return summary_of(study, samples)


def _with_provenance(space: Space, record: Mapping[str, Any], trials: int, summary: Summary | None) -> Recipe:
    study, spec = space.study, space.study.search
    recipe = Recipe.model_validate(record["recipe"])
    own = spec.method
    gains = {} if summary is None else {name: paired_difference(summary, "recipe", own, name) for name in CHECKED}
    provenance = Provenance(
        study=study.name,
        digest=study.digest,
        prompts=f"{study.prompts.source}: {spec.prompts} searched on, {study.prompts.evaluation} unseen",
        algorithm=spec.algorithm,
        metrics=list(spec.metrics),
        trials=trials,
        trial=record["trial"],
        seed=space.seed,
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        versions={name: version(name) for name in ("mage-ray", "torch", "transformers", "ray")},
        confidence=study.evaluation.confidence,
        searched={name: _number(record["scores"][name]) for name in METRICS},
        unseen=_measured(summary, "recipe"),
        defaults=_measured(summary, own),
        gain={name: _score(interval) for name, interval in gains.items()},
    )
    return recipe.model_copy(update={"provenance": provenance})


def _measured(summary: Summary | None, label: str) -> dict[str, Score]:
    return {} if summary is None else {name: _score(summary.method(label).measures[name]) for name in CHECKED}


def _score(interval: Interval) -> Score:
    return Score(value=_number(interval.value), low=_number(interval.low), high=_number(interval.high))


def _number(value: float) -> float | None:
    return round(float(value), 4) if math.isfinite(value) else None
