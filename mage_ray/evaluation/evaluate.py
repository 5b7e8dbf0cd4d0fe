"""Evaluation: a grid of preferences x methods x prompts x seeds, generated, scored and kept cell by cell."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mage_ray import objectives
from mage_ray.cluster import Progress, counted, run_shards
from mage_ray.decoding.plan import Plan, plan_for
from mage_ray.decoding.request import Generation, Request, Sampling, Token
from mage_ray.errors import UserError
from mage_ray.files import atomic_path
from mage_ray.generator import Generator, bank_setup, load_experts, trained_sets
from mage_ray.merging.adapter import WEIGHTS_FILE
from mage_ray.objectives import Normaliser
from mage_ray.preference import Preference
from mage_ray.prompts import Prompt
from mage_ray.study import Study, StudyFolder
from mage_ray.training.rollouts import draw_seed, load_normaliser, load_objectives, score_all, study_prompts

if TYPE_CHECKING:
    import pandas as pd


_CELLS = 12
"""Cells in a shard, at most: they are generated in one batch, and a worker that is killed loses that much."""


@dataclass(frozen=True)
class Cell:
    """One method at one preference: all prompts and seeds of the study's evaluation, kept in one file.

    ``path`` ends in a digest of all that its numbers depend on, so a cell is never taken for one of other settings.
    """

    method: str
    point: int
    preference: Preference | None
    plan: Plan
    path: Path


def study_cells(study: Study, folder: StudyFolder) -> list[Cell]:
    """The cells of a study's evaluation, method after method. A method that ignores the preference has one cell."""
    setup = bank_setup(study, trained_sets(folder, study))
    _, prompts = study_prompts(study)
    shared = {
        "model": study.model,
        "system": study.system,
        "dtype": study.dtype,
        "experts": [_digest_of_file(path) for path in sorted(folder.experts.glob(f"*/{WEIGHTS_FILE}"))],
        "values": [_digest_of_file(path) for path in sorted(folder.path.glob("values/*/*.safetensors"))],
        "objectives": {name: spec.model_dump() for name, spec in study.objectives.items()},
        "normalisation": folder.normalisation.read_text(),
        "prompts": [prompt.id for prompt in prompts],
        "sampling": [study.seed, study.evaluation.seeds, *_sampling(study, 0)],
    }
    cells = []
    for method in study.evaluation.methods:
        plans = [plan_for(method, mu, setup) for mu in study.evaluation_grid()]
        preferences: list[Preference | None] = list(study.evaluation_grid())
        if len(set(plans)) == 1:
            plans, preferences = plans[:1], [None]
        for point, (plan, preference) in enumerate(zip(plans, preferences, strict=True)):
            content = json.dumps([shared, asdict(plan), preference], sort_keys=True)
            digest = hashlib.sha256(content.encode()).hexdigest()[:12]
            path = folder.evaluation / f"{method}-{point:02d}-{digest}.parquet"
            cells.append(Cell(method, point, preference, plan, path))
    return cells


def evaluate_study(study: Study, folder: StudyFolder, progress: Progress | None = None) -> pd.DataFrame:
    """Generate and score the cells that aren't there yet, and return all samples, one row each.

    Columns as ``summarise`` wants them, and ``raw/<objective>``. Ray must be connected. Raises UserError, one line.
    """
    import pandas as pd

    load_normaliser(folder, study)
    for name, scorer in load_objectives(study).items():
        objectives.probe(name, scorer)
    cells = study_cells(study, folder)
    missing = [cell for cell in cells if not cell.path.exists()]
    # The costly ones first, dealt out in turn: shards of like cost, each enough to fill a batch.
    missing.sort(key=lambda cell: -len(cell.plan.rows))
    count = study.evaluation.workers * -(-len(missing) // (study.evaluation.workers * _CELLS))
    shards = [missing[i::count] for i in range(count) if missing[i::count]]
    each = study.prompts.evaluation * len(study.evaluation.seeds)
    run_shards(
        _evaluate_shards,
        shards,
        (study, folder.path),
        workers=study.evaluation.workers,
        gpus_per_worker=study.training.gpus_per_worker,
        on_progress=counted(progress, (len(cells) - len(missing)) * each, len(cells) * each),
    )
    frames = []
    for cell in cells:
        try:
            frames.append(pd.read_parquet(cell.path))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:80]
            raise UserError(f"{cell.path}: corrupt ({reason}); delete it, and the next run makes it again") from None
    return pd.concat(frames, ignore_index=True)


def _evaluate_shards(study: Study, folder: Path, shards: Sequence[Sequence[Cell]]) -> Iterator[int]:
    """In a worker: generate, score and write cells; yield 1 for every generation that ends."""
    place = StudyFolder(folder)
    _, prompts = study_prompts(study)
    normaliser = load_normaliser(place, study)
    scorers = load_objectives(study)
    device = "cuda" if study.training.gpus_per_worker > 0 else None
    generator = Generator(study, load_experts(place, study), rows=study.evaluation.batch_rows, device=device)
    draws = [(prompt, seed) for prompt in prompts for seed in study.evaluation.seeds]
    encoded = {prompt.id: generator.chat.encode(prompt.text) for prompt in prompts}
    for cells in shards:
        todo = [cell for cell in cells if not cell.path.exists()]
        # Prompt by prompt: rows that several cells share, the reference above all, are computed once.
        asked = [(cell, prompt, seed) for prompt, seed in draws for cell in todo]
        requests = [
            Request(encoded[prompt.id], cell.plan, Sampling(*_sampling(study, draw_seed(study.seed, prompt.id, seed))))
            for cell, prompt, seed in asked
        ]
        tokens: list[list[Token]] = [[] for _ in requests]
        for index, token in generator.engine.events(requests):
            tokens[index].append(token)
            if token.finished:
                yield 1
        answers = [Generation.of(drawn).require() for drawn in tokens]
        scores = generator.reference_logprobs([(r.prompt, a.ids) for r, a in zip(requests, answers, strict=True)])
        for i, cell in enumerate(todo):
            own = slice(i, None, len(todo))
            raw_NM = score_all(scorers, [prompt.text for prompt, _ in draws], [a.text for a in answers[own]])
            _write_cell(cell, draws, answers[own], scores[own], raw_NM, normaliser)


def _write_cell(
    cell: Cell,
    draws: Sequence[tuple[Prompt, int]],
    answers: Sequence[Generation],
    reference_logprobs: Sequence[Sequence[float]],
    raw_NM: np.ndarray,
    normaliser: Normaliser,
) -> None:
    import pandas as pd

    frame = pd.DataFrame(
        {
            "method": cell.method,
            "point": cell.point,
            "preference": [cell.preference] * len(draws),
            "prompt_id": [prompt.id for prompt, _ in draws],
            "seed": [seed for _, seed in draws],
            "prompt": [prompt.text for prompt, _ in draws],
            "completion": [answer.text for answer in answers],
            "tokens": [len(answer.ids) for answer in answers],
            "kl": [_mean_log_ratio(a.logprobs, r) for a, r in zip(answers, reference_logprobs, strict=True)],
            **{f"raw/{name}": column for name, column in zip(normaliser.names, raw_NM.T, strict=True)},
            **{f"reward/{n}": column for n, column in zip(normaliser.names, normaliser.apply(raw_NM).T, strict=True)},
        }
    )
    with atomic_path(cell.path) as partial:
        frame.to_parquet(partial)


def _mean_log_ratio(guided: Sequence[float], reference: Sequence[float]) -> float:
    """KL from the reference per token, estimated on the sampled tokens: ``mean(log pi - log pi_ref)``, in nats."""
    return float(np.mean(np.subtract(guided, reference))) if len(guided) else 0.0


def _sampling(study: Study, seed: int) -> tuple[int, float, float, int]:
    spec = study.evaluation
    return spec.max_new_tokens, spec.temperature, spec.top_p, seed


def _digest_of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
