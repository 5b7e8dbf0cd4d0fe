"""What rows say of answers that are there already: each row's scores are computed once, over Ray workers, and kept.

Legend: T an answer's tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save

from mage_ray.cluster import Progress, counted, run_shards
from mage_ray.decoding.plan import Row
from mage_ray.errors import UserError
from mage_ray.files import write_atomic
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator, load_experts, set_digests, sets_places
from mage_ray.study import Study
from mage_ray.training.rollouts import load_pool
from mage_ray.training.values import split

_AT_ONCE = 16


@dataclass(frozen=True)
class Answers:
    """Answers to prompts that value models weren't trained on: A of them, and N objectives' normalised rewards."""

    prompts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    prompt_ids: tuple[str, ...]
    rewards_AN: np.ndarray


def held_out(study: Study, folder: StudyFolder, share: float) -> Answers:
    """Up to ``analysis.answers`` answers of the pool, evenly from the prompts that a split by ``share`` holds out."""
    _, test = split(load_pool(folder, study), share, study.seed)
    test = test[test["ids"].map(len) > 0].reset_index(drop=True)
    count = min(study.analysis.answers, len(test))
    chosen = test.iloc[np.unique(np.linspace(0, len(test) - 1, count).round().astype(int))]
    return Answers(
        prompts=tuple(map(str, chosen["prompt"])),
        ids=tuple(tuple(map(int, ids)) for ids in chosen["ids"]),
        prompt_ids=tuple(map(str, chosen["prompt_id"])),
        rewards_AN=chosen[[f"reward/{name}" for name in study.objectives]].to_numpy(dtype=np.float64),
    )


def score_rows(
    study: Study,
    folder: StudyFolder,
    sets: Sequence[str],
    rows: Sequence[Row],
    answers: Answers,
    progress: Progress | None = None,
) -> list[list[np.ndarray]]:
    """What each row, over a bank of ``sets``, says of each answer.

    A policy: the log-probability of each token, [T]. A value model: ``V`` of the empty answer and after each token,
    [T + 1]. Ray must be connected.
    """
    experts = [set_digests(folder, study, name) for name in sets]
    shared = [study.model, study.system, study.dtype, experts, answers.prompts, answers.ids]
    files = []
    for row in rows:
        digest = hashlib.sha256(json.dumps([*shared, asdict(row)]).encode()).hexdigest()[:16]
        files.append(f"{digest}.safetensors")
    place = scores(folder)
    missing = [item for item in dict(zip(rows, files, strict=True)).items() if not (place / item[1]).exists()]
    distinct = len(set(rows))
    run_shards(
        _score_shards,
        missing,
        (study, folder, tuple(sets), answers),
        folder=folder,
        reads=sets_places(folder, study, sets),
        writes=place,
        workers=study.evaluation.workers,
        gpus_per_worker=study.training.gpus_per_worker,
        labels=study.cluster.selector,
        on_progress=counted(progress, distinct - len(missing), distinct),
    )
    return [_read(place / file) for file in files]


def scores(folder: StudyFolder) -> Path:
    """Where they are kept."""
    return folder.analysis / "scores"


def _score_shards(
    study: Study, folder: StudyFolder, sets: Sequence[str], answers: Answers, shards: Sequence[tuple[Row, str]]
) -> Iterator[int]:
    """In a worker: score and write rows; yield 1 for each."""
    device = "cuda" if study.training.gpus_per_worker > 0 else None
    experts = load_experts(folder, study, sets)
    generator = Generator(study, experts, rows=_AT_ONCE, device=device)
    prompts = [list(generator.chat.encode(prompt)) for prompt in answers.prompts]
    sequences = [[*prompt, *ids] for prompt, ids in zip(prompts, answers.ids, strict=True)]
    runner = generator.runner
    for row, file in shards:
        score = runner.score if row.head is None else runner.values
        found: list[np.ndarray] = []
        for begin in range(0, len(sequences), _AT_ONCE):
            part = slice(begin, begin + _AT_ONCE)
            found += [s.numpy() for s in score(row, sequences[part], list(map(len, prompts[part])))]
        lengths = np.array([len(s) for s in found])
        write_atomic(
            scores(folder) / file, save({"scores": np.concatenate(found).astype(np.float32), "lengths": lengths})
        )
        yield 1


def _read(path: Path) -> list[np.ndarray]:
    try:
        stored = load_file(path)
    except Exception as error:
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"{path}: corrupt ({reason}); delete it, and the next run makes it again") from None
    return np.split(stored["scores"].astype(np.float64), np.cumsum(stored["lengths"])[:-1])
