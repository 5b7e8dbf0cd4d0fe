"""Evaluation: a grid of preferences x methods x prompts x seeds, cell by cell over Ray workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mage_ray import objectives
from mage_ray.cluster import Progress, counted, run_shards
from mage_ray.decoding.methods import BASELINES, Setup
from mage_ray.errors import FieldError
from mage_ray.evaluation.cells import Cell, CellRunner, make_cells, read_cells
from mage_ray.evaluation.strategies import way_to
from mage_ray.folder import StudyFolder
from mage_ray.generator import bank_setup, needed_sets, sets_places
from mage_ray.preference import Preference
from mage_ray.prompts import Prompt
from mage_ray.search.recipe import Recipe
from mage_ray.study import Study
from mage_ray.training.rollouts import load_normaliser, load_objectives, study_prompts

if TYPE_CHECKING:
    import pandas as pd


_CELLS = 12
"""Cells in a shard, at most: they are generated in one batch, and a worker that is killed loses that much."""


def method_cells(
    study: Study,
    folder: StudyFolder,
    methods: Mapping[str, str],
    *,
    setups: Mapping[str, Setup] = MappingProxyType({}),
    grid: Sequence[Preference] | None = None,
    prompts: Sequence[Prompt] | None = None,
    place: Path | None = None,
) -> list[Cell]:
    """The cells of some methods by their labels, method after method.

    What a method draws on is its label's in ``setups``, all over the same sets, else the study's own; the grid, the
    prompts and the folder of the files are the evaluation's unless given. Raises FieldError for a method without the
    experts that it needs, or one that isn't trained for a preference of the grid.
    """
    own_setup = bank_setup(study, needed_sets(folder, study)) if set(methods) - set(setups) else None
    grid = study.evaluation_grid() if grid is None else grid
    prompts = study_prompts(study)[1] if prompts is None else prompts
    # A baseline's experts may be many, and every row pays for all that are in its bank: each has one of its own.
    banks = [[label for label, method in methods.items() if method not in BASELINES]]
    banks += [[label for label in methods if methods[label] == baseline] for baseline in BASELINES]
    cells = []
    for labels in filter(None, banks):
        setup: Any = {label: setups.get(label, own_setup) for label in labels}
        found = {label: [way_to(methods[label], mu, setup[label], study) for mu in grid] for label in labels}
        plans = {label: [plan for plan, _ in own] for label, own in found.items()}
        ways = {label: [way for _, way in own] for label, own in found.items()}
        # Any of them: they tell the sets' places in the bank, which are the same.
        shared = setup[labels[0]]
        cells += make_cells(study, folder, place or folder.evaluation, plans, shared, grid, prompts, ways=ways)
    order = list(methods)
    return sorted(cells, key=lambda cell: order.index(cell.method))


def study_cells(study: Study, folder: StudyFolder) -> list[Cell]:
    """The cells of a study's evaluation, method after method."""
    return method_cells(study, folder, {method: method for method in study.evaluation.methods})


def recipe_cells(study: Study, folder: StudyFolder, recipe: Recipe) -> list[Cell]:
    """A recipe's cells in the same evaluation, under the label ``recipe``. Raises UserError where it doesn't fit."""
    return method_cells(recipe.applied(study), folder, {"recipe": recipe.method})


def evaluate_study(
    study: Study, folder: StudyFolder, progress: Progress | None = None, recipe: Recipe | None = None
) -> pd.DataFrame:
    """Generate and score the study's cells that aren't there yet, and return all samples; as ``evaluate_cells``."""
    cells = study_cells(study, folder)
    return evaluate_cells(
        study, folder, cells + ([] if recipe is None else recipe_cells(study, folder, recipe)), progress
    )


def evaluated_front(study: Study, folder: StudyFolder) -> dict[str, list[tuple[Preference | None, list[float]]]]:
    """Of each method, its points that are evaluated: the preference, None where it has none, and mean rewards [n]."""
    import pandas as pd

    points: dict[str, list[tuple[Preference | None, list[float]]]] = {}
    cells: list[Cell] = []
    for method in study.evaluation.methods if folder.normalisation.exists() else ():
        with suppress(FieldError):  # one that isn't trained has no points
            cells += method_cells(study, folder, {method: method})
    for cell in cells:
        if cell.path(folder).exists():
            means = pd.read_parquet(cell.path(folder))[[f"reward/{name}" for name in study.objectives]].mean()
            points.setdefault(cell.method, []).append((cell.preference, means.tolist()))
    return points


def evaluate_cells(
    study: Study, folder: StudyFolder, cells: Sequence[Cell], progress: Progress | None = None
) -> pd.DataFrame:
    """Generate and score the cells that aren't there yet, and return all samples, one row each.

    Columns as ``summarise`` wants them, and ``raw/<objective>``. Ray must be connected. Raises UserError, one line.
    """
    import pandas as pd

    load_normaliser(folder, study)
    for name, scorer in load_objectives(study, folder).items():
        objectives.probe(name, scorer)
    missing = [cell for cell in cells if not cell.path(folder).exists()]
    draws = len(study.evaluation.seeds)
    total = sum(len(cell.prompts) for cell in cells) * draws
    left = sum(len(cell.prompts) for cell in missing) * draws
    sets = dict.fromkeys(name for cell in missing for name in cell.sets)
    run_shards(
        _evaluate_shards,
        shards_of(missing, study.evaluation.workers),
        (study, folder),
        folder=folder,
        reads=[folder.rewards, folder.normalisation, *sets_places(folder, study, sets)],
        writes=folder.at(cells[0].file).parent,
        workers=study.evaluation.workers,
        gpus_per_worker=study.training.gpus_per_worker,
        labels=study.cluster.selector,
        on_progress=counted(progress, total - left, total),
    )
    return pd.concat(read_cells(folder, cells), ignore_index=True)


def shards_of(missing: Sequence[Cell], workers: int) -> list[list[Cell]]:
    """Shards of like cost, each of one bank and enough to fill a batch."""
    shards = []
    for sets in dict.fromkeys(cell.sets for cell in missing):
        # The costly ones first, dealt out in turn.
        own = [cell for cell in missing if cell.sets == sets]
        own.sort(key=lambda cell: -len(cell.plan.rows) * cell.way.draws)
        count = workers * -(-len(own) // (workers * _CELLS))
        shards += [own[i::count] for i in range(count) if own[i::count]]
    return shards


def _evaluate_shards(study: Study, folder: StudyFolder, shards: Sequence[Sequence[Cell]]) -> Iterator[int]:
    """In a worker: yields 1 for every generation that ends."""
    device = "cuda" if study.training.gpus_per_worker > 0 else None
    runner: CellRunner | None = None
    loaded: tuple[str, ...] = ()
    for cells in shards:
        if runner is None or cells[0].sets != loaded:
            runner, loaded = None, cells[0].sets  # The old one's memory first.
            runner = CellRunner(study, folder, loaded, device)
        yield from runner.run(cells)
