"""The resident engines of a search: each loads the model and the experts once, for all trials and the last check."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from mage_ray.cluster import Progress, counted, equal_cpus, follow, nodes_with
from mage_ray.errors import FieldError
from mage_ray.evaluation.cells import Cell, CellRunner, make_cells, read_cells
from mage_ray.evaluation.evaluate import shards_of
from mage_ray.folder import StudyFolder
from mage_ray.generator import sets_places
from mage_ray.prompts import Prompt
from mage_ray.search.recipe import Recipe
from mage_ray.search.space import Space
from mage_ray.search.trial import Share
from mage_ray.study import Study
from mage_ray.training.rollouts import search_prompts

_BLOCK = 4
"""Prompts in a cell, at most: few enough that engines get equal shares of a setting."""


class ResidentEngine:
    """A Ray actor that tries settings."""

    def __init__(
        self, study: Study, folder: StudyFolder, sets: Sequence[str], threads: int, device: str | None
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        folder.fetch(folder.rewards, folder.normalisation, *sets_places(folder, study, sets))
        self._space, self._folder = Space(study), folder
        self._prompts = search_prompts(study)
        self._runner = CellRunner(study, folder, sets, device)

    def run(self, config: Mapping[str, Any], prompts: int, place: int, of: int) -> Share:
        """A setting on the first ``prompts`` prompts: of its cells those at ``place``, ``place + of`` and so on.

        Raises UserError.
        """
        import pandas as pd

        recipe = self._space.recipe(config)
        every: list[Cell] = []
        begin = 0
        for end in rung_sizes(len(self._prompts), self._space.study.search.rungs):
            while begin < min(end, prompts):
                block = self._prompts[begin : min(begin + _BLOCK, end)]
                every += setting_cells(self._space, self._folder, recipe, block)
                begin += len(block)
        # Which engine gets the odd one out changes with the setting.
        mine = every[(place + sum(every[0].file.encode())) % of :: of]
        self._folder.fetch(*(cell.path(self._folder) for cell in mine))
        missing = [cell for cell in mine if not cell.path(self._folder).exists()]
        began = time.monotonic()
        for _ in self._runner.run(missing):
            pass
        self._folder.publish(*(cell.path(self._folder) for cell in missing))
        tokens = sum(int(frame["tokens"].sum()) for frame in read_cells(self._folder, missing))
        names = ["point", "tokens", "forwards", "kl", *(f"reward/{name}" for name in self._space.study.objectives)]
        samples = [frame[names] for frame in read_cells(self._folder, mine)]
        numbers = pd.concat(samples, ignore_index=True) if samples else pd.DataFrame(columns=names)
        kept = recipe.model_dump(mode="json", exclude_none=True)
        return Share(numbers, time.monotonic() - began, tokens, kept)

    def write(self, shards: Sequence[Sequence[Cell]]) -> Iterator[int]:
        """Write these cells, shard by shard; yields 1 for every generation that ends."""
        for cells in shards:
            paths = [cell.path(self._folder) for cell in cells]
            self._folder.fetch(*paths)
            yield from self._runner.run(cells)
            self._folder.publish(*paths)


@contextmanager
def resident_engines(space: Space, folder: StudyFolder) -> Iterator[list[Any]]:
    """Up to ``search.workers`` actors, as many as the cluster has room for at once, that share its CPUs.

    They are there until the block ends; one that dies comes back and does its work again. Ray must be connected.
    Raises UserError where there is no room for one.
    """
    study = space.study
    folder.publish(folder.rewards, folder.normalisation, *sets_places(folder, study, space.engine_sets))
    labels = study.cluster.selector
    cpus, gpus = equal_cpus(study.search.workers, labels), study.training.gpus_per_worker
    nodes = nodes_with(labels)
    room = sum(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) // gpus if gpus else math.inf) for node in nodes)
    if not room:
        raise FieldError("training.gpus_per_worker", gpus, f"what a node of the cluster has, beside {cpus} CPUs")
    options: dict[str, Any] = {"num_cpus": cpus, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": -1}
    options["label_selector"] = labels
    engine: Any = ray.remote(ResidentEngine).options(**options)
    device = "cuda" if gpus > 0 else None
    count = min(study.search.workers, int(room))
    engines = [engine.remote(study, folder, space.engine_sets, cpus, device) for _ in range(count)]
    try:
        yield engines
    finally:
        for one in engines:
            ray.kill(one)


def write_cells(
    folder: StudyFolder, engines: Sequence[Any], cells: Sequence[Cell], draws: int, progress: Progress | None = None
) -> None:
    """Have the cells written that aren't there yet, each of ``draws`` samples for a prompt. Raises UserError."""
    missing = [cell for cell in cells if not cell.path(folder).exists()]
    total, left = (sum(len(cell.prompts) for cell in own) * draws for own in (cells, missing))
    shards, n = shards_of(missing, len(engines)), len(engines)
    streams = [
        engine.write.options(num_returns="streaming").remote(shards[i::n])
        for i, engine in enumerate(engines)
        if shards[i::n]
    ]
    follow(streams, counted(progress, total - left, total))
    folder.fetch(*(cell.path(folder) for cell in missing))


def rung_sizes(prompts: int, rungs: int) -> list[int]:
    """How many prompts each rung has in all: half of them at the last but one, a quarter before that, and so on."""
    return [-(-prompts // 2 ** (rungs - 1 - rung)) for rung in range(rungs)]


def setting_cells(space: Space, folder: StudyFolder, recipe: Recipe, prompts: Sequence[Prompt]) -> list[Cell]:
    """A recipe's cells over the search's grid; their files are named by content, so that no setting is run twice."""
    study = recipe.applied(space.study)
    place = folder.search / "cells"
    plans, grid = {recipe.method: space.plans(recipe)}, study.search_grid()
    return make_cells(study, folder, place, plans, space.setup(recipe), grid, prompts, whole=True)
