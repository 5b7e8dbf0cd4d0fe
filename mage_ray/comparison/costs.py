"""What each method costs: what was trained and is stored for it, and what an answer takes in time and memory."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from mage_ray.cluster import counted, run_shards
from mage_ray.comparison.variants import Variant
from mage_ray.decoding.methods import compact
from mage_ray.evaluation.cells import Cell, cell_request
from mage_ray.files import write_atomic
from mage_ray.folder import StudyFolder
from mage_ray.generator import bank_setup, sets_places
from mage_ray.merging.adapter import ORIGIN_FILE, read_json
from mage_ray.progress import shown
from mage_ray.study import Study

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Trained:
    """What a method's plans draw on beside the base model.

    ``tokens`` of answers that all of it learnt from (None where that isn't known), how many ``models``, the ``bytes``
    of their files, and how many ``steps`` each was trained.
    """

    tokens: int | None
    models: int
    bytes: int
    steps: frozenset[int]


def trained_for(variant: Variant, cells: Sequence[Cell]) -> Trained:
    """What was trained for a method, by its cells at all preferences; what several sets share counts for each."""
    names, _ = compact([cell.plan for cell in cells], bank_setup(variant.study, cells[0].sets))
    places = sets_places(variant.folder, variant.study, names)
    records = [read_json(place / ORIGIN_FILE, place.name) for place in places]
    known = [record["answer_tokens"] for record in records if record.get("answer_tokens") is not None]
    return Trained(
        tokens=sum(known) if len(known) == len(places) else None,
        models=len(places),
        bytes=sum(path.stat().st_size for place in places for path in place.glob("*.safetensors")),
        steps=frozenset(record["steps"] for record in records if "steps" in record),
    )


def middle(cells: Sequence[Cell]) -> Cell:
    """The cell whose preference is the most even one."""
    return min(cells, key=lambda cell: 0.0 if cell.preference is None else float(np.max(cell.preference)))


def time_cells(
    study: Study, folder: StudyFolder, cells: Mapping[str, Cell], console: Console | None
) -> dict[str, dict[str, float]]:
    """By label ``best`` and ``median``, tokens of answers per second over the rounds, and ``bytes``.

    Each cell answers the same ``compare.timed_prompts`` prompts as one batch in each of ``compare.rounds`` rounds, in
    one process that has all of a node's CPUs, or a GPU where training has one. Cells that draw on the same sets take
    turns; each bank is of what its cells draw on alone, and is loaded when the last one is gone. No cell finds another
    one's prompts computed. The bytes are of the keys and values of all rows of one answer of full length. Kept in a
    file, so it is done once on a machine. Ray must be connected.
    """
    machine = [platform.node(), os.cpu_count()]
    spec = study.compare
    key = (
        [[label, PurePosixPath(cell.file).name] for label, cell in cells.items()],
        spec.rounds,
        spec.timed_prompts,
        machine,
    )
    file = f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}.json"
    place = timings(folder)
    if not (place / file).exists():
        sets = dict.fromkeys(name for cell in cells.values() for name in cell.sets)
        with shown(console, "timing") as progress:
            total = (spec.rounds + 1) * len(cells)
            run_shards(
                _timed,
                [dict(cells)],
                (study, folder, file),
                folder=folder,
                reads=sets_places(folder, study, sets),
                writes=place,
                workers=1,
                gpus_per_worker=study.training.gpus_per_worker,
                labels=study.cluster.selector,
                on_progress=counted(progress, 0, total),
            )
    found: dict[str, dict[str, float]] = json.loads((place / file).read_text())
    return found


def timings(folder: StudyFolder) -> Path:
    """Where they are kept."""
    return folder.comparison / "timing"


def _timed(study: Study, folder: StudyFolder, file: str, shards: Sequence[Mapping[str, Cell]]) -> Iterator[int]:
    """In a worker: yields 1 for every cell of a round; the first round is not counted."""
    from mage_ray.decoding.search import search_all
    from mage_ray.generator import Generator, load_experts

    [cells] = shards
    device = "cuda" if study.training.gpus_per_worker > 0 else None
    banks: dict[tuple[str, ...], dict[str, Cell]] = {}
    for label, cell in cells.items():
        names, [plan] = compact([cell.plan], bank_setup(study, cell.sets))
        banks.setdefault(tuple(names), {})[label] = replace(cell, sets=tuple(names), plan=plan)
    rates: dict[str, list[float]] = {label: [] for label in cells}
    sizes: dict[str, int] = {}
    generator: Generator | None = None
    for sets, own in banks.items():
        generator = None  # The old one's memory first.
        experts = load_experts(folder, study, sets)
        generator = Generator(study, experts, rows=study.evaluation.batch_rows, device=device)
        for round in range(study.compare.rounds + 1):
            for label, cell in own.items():
                prompts, seed = cell.prompts[: study.compare.timed_prompts], study.evaluation.seeds[0]
                requests = [cell_request(study, generator.chat, cell, prompt, seed) for prompt in prompts]
                generator.runner.forget()
                began = time.perf_counter()
                ways = [cell.way.start(request, generator.chat.decode) for request in requests]
                found = list(search_all(generator.engine, ways))
                seconds = time.perf_counter() - began
                if round > 0:
                    rates[label].append(sum(len(one.answer.ids) for one in found) / seconds)
                length = max(len(request.prompt) for request in requests) + study.evaluation.max_new_tokens
                positions = (length + cell.plan.ahead) * len(cell.plan.rows) * cell.way.draws
                sizes[label] = positions * generator.runner.memory.per_position
                yield 1
    content = {label: {"best": max(own), "median": median(own), "bytes": sizes[label]} for label, own in rates.items()}
    write_atomic(timings(folder) / file, json.dumps(content, indent=1) + "\n")
