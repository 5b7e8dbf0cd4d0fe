"""One trial in a process of its own, which runs this file: all that a search's resident engines keep is done anew.

``python trial_process.py naive|engine STUDY_FOLDER RECIPE THREADS`` prints the trial's figures as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def fresh_trial(kind: str, folder: Path, recipe: Path, threads: int) -> dict[str, Any]:
    """A recipe tried on the search's prompts and grid, by ``naive_trial`` or by our engine; ``seconds`` of wall time.

    Also how many ``tokens`` its answers have, their ``hypervolume``, and what took how long. Raises BenchError when the
    process fails.
    """
    from setting import BenchError

    command = [sys.executable, str(Path(__file__).resolve()), kind, str(folder), str(recipe), str(threads)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True)
    seconds = time.perf_counter() - began
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise BenchError(f"the {kind} trial ended with {done.returncode}; its last line: {last[:300]}")
    return {"seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


class Clock:
    """Seconds since it was last asked, by what they went into; the interpreter's own start is in none."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._last = time.perf_counter()

    def note(self, what: str) -> None:
        now = time.perf_counter()
        self.spent[what] = self.spent.get(what, 0.0) + now - self._last
        self._last = now


def engine(folder: Path, recipe: Path, clock: Clock) -> dict[str, Any]:
    """By our engine: the same cells that a resident engine runs, in one batch."""
    from mage_ray.decoding.methods import plan_for
    from mage_ray.evaluation.cells import CellRunner, make_cells, read_cells
    from mage_ray.folder import StudyFolder
    from mage_ray.generator import bank_setup, needed_sets
    from mage_ray.search.recipe import load_recipe
    from mage_ray.training.rollouts import search_prompts

    place, chosen = StudyFolder(folder), load_recipe(recipe)
    study = chosen.applied(place.study)
    grid, sets = study.search_grid(), needed_sets(place, study)
    setup = bank_setup(study, sets)
    plans = {chosen.method: [plan_for(chosen.method, mu, setup) for mu in grid]}
    prompts = search_prompts(study)
    cells = make_cells(study, place, place.search / "cells", plans, setup, grid, prompts, whole=True)
    runner = CellRunner(study, place, sets)
    clock.note("load")
    for _ in runner.run(cells):
        pass
    clock.note("generate and score")
    frames = read_cells(place, cells)
    points = [frame[[f"reward/{name}" for name in study.objectives]].mean().tolist() for frame in frames]
    return _figures(study, points, sum(int(frame["tokens"].sum()) for frame in frames), clock)


def naive(folder: Path, recipe: Path, clock: Clock) -> dict[str, Any]:
    """By ``naive_trial``: at each preference all prompts in one batch, on weights that are merged for it."""
    from dataclasses import replace

    from naive_trial import PeftModels, generate_planned

    from mage_ray.chat import Chat
    from mage_ray.decoding.methods import plan_for
    from mage_ray.decoding.request import Sampling
    from mage_ray.folder import StudyFolder
    from mage_ray.generator import bank_setup, needed_sets, set_places
    from mage_ray.models import load_model, load_tokenizer
    from mage_ray.search.recipe import load_recipe
    from mage_ray.training.rollouts import load_normaliser, load_objectives, score_all, search_prompts

    place, chosen = StudyFolder(folder), load_recipe(recipe)
    study = chosen.applied(place.study)
    spec, grid, sets = study.evaluation, study.search_grid(), needed_sets(place, study)
    setup = bank_setup(study, sets)
    reference, tokenizer = load_model(study.model, study.dtype), load_tokenizer(study.model)
    chat = Chat(tokenizer, reference, study.system)
    models = PeftModels(reference, [path for name in sets for path in set_places(place, study, name)])
    scorers, normaliser = load_objectives(study, place), load_normaliser(place, study)
    prompts = [prompt.text for prompt in search_prompts(study) for _ in spec.seeds]
    encoded = [chat.encode(prompt) for prompt in prompts]
    sampling = Sampling(spec.max_new_tokens, spec.temperature, spec.top_p)
    clock.note("load")
    points, tokens = [], 0
    for i, mu in enumerate(grid):
        plan = plan_for(chosen.method, mu, setup)
        rows = [models.of(row) for row in plan.rows]
        clock.note("merge")
        drawn = replace(sampling, seed=i)
        answers = generate_planned(rows, plan, encoded, drawn, chat.stop, int(tokenizer.pad_token_id))
        tokens += sum(map(len, answers))
        clock.note("generate")
        raw_NM = score_all(scorers, prompts, [chat.decode(answer) for answer in answers])
        points.append(normaliser.apply(raw_NM).mean(axis=0).tolist())
        clock.note("score")
    return _figures(study, points, tokens, clock)


def _figures(study: Any, points: list[list[float]], tokens: int, clock: Clock) -> dict[str, Any]:
    from mage_ray.evaluation.measures import hypervolume

    volume = float(hypervolume(points, study.reference_point()))
    clock.note("score")
    return {"tokens": tokens, "hypervolume": volume, "parts": clock.spent}


if __name__ == "__main__":
    started = Clock()
    import torch

    torch.set_num_threads(int(sys.argv[4]))
    run = {"naive": naive, "engine": engine}[sys.argv[1]]
    print(json.dumps(run(Path(sys.argv[2]), Path(sys.argv[3]), started)))
