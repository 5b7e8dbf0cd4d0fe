"""The rollout pool: sampled once from the reference model, scored by every objective, and drawn on by all training."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mage_ray import objectives
from mage_ray.cluster import Progress, counted, run_shards
from mage_ray.errors import FieldError, UserError
from mage_ray.files import atomic_path, write_atomic
from mage_ray.folder import StudyFolder
from mage_ray.objectives import Normaliser, Objective
from mage_ray.objectives.reward import reward_digests
from mage_ray.prompts import Prompt, load_prompts, split_prompts
from mage_ray.study import Study

if TYPE_CHECKING:
    import pandas as pd


def study_prompts(study: Study) -> tuple[list[Prompt], list[Prompt]]:
    """The study's prompts to train on and to evaluate on; no prompt is in both."""
    train, evaluation, _ = _split(study, 0)
    return train, evaluation


def search_prompts(study: Study, count: int | None = None, field: str = "search.prompts") -> list[Prompt]:
    """The study's prompts to choose constants by, none of them among ``study_prompts``.

    As many as the search has unless ``count`` is given. Raises FieldError, of ``field`` where there are too few.
    """
    try:
        return _split(study, study.search.prompts if count is None else count)[2]
    except FieldError as error:
        own = field if error.field == "search.prompts" else error.field
        raise FieldError(own, error.value, error.allowed) from None


def _split(study: Study, search: int) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    spec = study.prompts
    everything = load_prompts(spec.source, split=spec.split, column=spec.column, seed=study.seed)
    return split_prompts(everything, spec.train, spec.evaluation, study.seed, search)


def load_objectives(study: Study, folder: StudyFolder) -> dict[str, Objective]:
    """The study's objectives, in its order; its own reward models are in ``folder``. Raises FieldError."""
    return {
        name: objectives.load(name, spec.type, spec.options, spec.direction, folder)
        for name, spec in study.objectives.items()
    }


def score_all(scorers: Mapping[str, Objective], prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
    """Raw rewards [N, n] of N completions under n objectives. Raises FieldError when an objective misbehaves."""
    columns = [objectives.score(name, scorer, prompts, completions) for name, scorer in scorers.items()]
    return np.stack(columns, axis=1)


def draw_seed(*parts: object) -> int:
    """A seed for one generation, from what identifies it; the same on every machine and in every order of work."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def sample_pool(
    study: Study,
    folder: StudyFolder,
    adapter: Path | None = None,
    round: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Sample and score what isn't there yet, over Ray workers, and return the pool with normalised rewards.

    Round 0 is the reference model's pool, which also fits the normalisation. A further round samples from the expert in
    ``adapter`` and lies beside its checkpoints. Ray must be connected. Raises UserError.
    """
    if round == 0:
        _check_scored_by(study, folder)
    place = folder.rollouts if round == 0 else folder.checkpoints / f"{_expert(adapter)}-rollouts-{round}"
    place.mkdir(parents=True, exist_ok=True)
    folder.fetch(place)
    prompts, _ = study_prompts(study)
    size = study.rollouts.prompts_per_shard
    shards = [(f"shard-{i:05d}.parquet", prompts[i * size : (i + 1) * size]) for i in range(-(-len(prompts) // size))]
    missing = [shard for shard in shards if not (place / shard[0]).exists()]
    total = len(prompts) * study.rollouts.samples_per_prompt
    left = sum(len(p) for _, p in missing) * study.rollouts.samples_per_prompt
    for name, scorer in load_objectives(study, folder).items():
        objectives.probe(name, scorer)
    run_shards(
        _sample_shards,
        missing,
        (study, folder, folder.name_of(place), None if adapter is None else folder.name_of(adapter), round),
        folder=folder,
        reads=[folder.rewards, folder.normalisation, *([] if adapter is None else [adapter])],
        writes=place,
        workers=study.rollouts.workers,
        gpus_per_worker=study.training.gpus_per_worker,
        labels=study.cluster.selector,
        on_progress=counted(progress, total - left, total),
    )
    if lost := [file for file, _ in shards if not (place / file).exists()]:
        raise UserError(
            f"{folder.shown(place)}: {len(lost)} shards are missing, {lost[0]} for one; the same command makes them"
        )
    if round == 0 and not folder.normalisation.exists():
        if scored_by := reward_digests(folder, study.reward_models):
            write_atomic(folder.rollouts / _SCORED_BY, json.dumps(scored_by) + "\n")
            folder.publish(folder.rollouts)
        _fit_normalisation(study, folder)
        folder.publish(folder.rollouts)
    return load_pool(folder, study, place)


_SCORED_BY = "rewards.json"


def _check_scored_by(study: Study, folder: StudyFolder) -> None:
    """Raises UserError where the pool was scored by reward models that have been trained anew since."""
    path = folder.rollouts / _SCORED_BY
    if path.exists() and json.loads(path.read_text()) != reward_digests(folder, study.reward_models):
        raise UserError(
            f"{path}: the pool was scored by other reward models, allowed: those, or a new folder (its experts learnt "
            "from these scores)"
        )


def load_pool(folder: StudyFolder, study: Study, place: Path | None = None) -> pd.DataFrame:
    """The pool, one row per completion: prompt_id, prompt, sample, completion, ids, tokens, logprob, finished,
    raw/<objective> and reward/<objective>, the normalised one. ``logprob`` is the whole answer's, in nats, under the
    model that it was sampled from, at temperature 1. Raises UserError when the pool is missing or corrupt."""
    pool = _read_shards(place or folder.rollouts, study)
    normalised = load_normaliser(folder, study).apply(pool[[f"raw/{name}" for name in study.objectives]].to_numpy())
    for name, column in zip(study.objectives, normalised.T, strict=True):
        pool[f"reward/{name}"] = column
    return pool


def load_normaliser(folder: StudyFolder, study: Study) -> Normaliser:
    """The normalisation that was fitted on the reference's pool. Raises UserError when it is missing or corrupt."""
    try:
        text = folder.normalisation.read_text()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"{folder.normalisation}: missing or unreadable, allowed: a study with a rollout pool"
        ) from None
    return Normaliser.from_json(text, study.objective_names)


def _fit_normalisation(study: Study, folder: StudyFolder) -> None:
    pool = _read_shards(folder.rollouts, study)
    raw_NM = pool[[f"raw/{name}" for name in study.objectives]].to_numpy()
    directions = [scorer.direction for scorer in load_objectives(study, folder).values()]
    write_atomic(folder.normalisation, Normaliser.fit(study.objective_names, directions, raw_NM).to_json())


def _read_shards(place: Path, study: Study) -> pd.DataFrame:
    import pandas as pd

    frames = []
    for path in sorted(place.glob("shard-*.parquet")):
        try:
            frames.append(pd.read_parquet(path))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:80]
            raise UserError(f"{path}: corrupt ({reason}); delete it, and the next run makes it again") from None
    if not frames:
        raise UserError(f"{place}: no rollouts, allowed: a study whose pool was sampled (mage-ray train)")
    pool = pd.concat(frames, ignore_index=True)
    for column in [
        "prompt_id",
        "prompt",
        "completion",
        "ids",
        "logprob",
        "finished",
        *(f"raw/{name}" for name in study.objectives),
    ]:
        if column not in pool:
            raise UserError(f"{place}: has no column {column}, allowed: the rollouts of this study")
    return pool


def _sample_shards(
    study: Study,
    folder: StudyFolder,
    part: str,
    adapter: str | None,
    round: int,
    shards: Sequence[tuple[str, Sequence[Prompt]]],
) -> Iterator[int]:
    """In a worker: sample and score shards one after the other, into this part of the folder.

    Yields the number of completions as they end.
    """
    import pandas as pd

    from mage_ray.chat import Chat
    from mage_ray.decoding.engine import Engine
    from mage_ray.decoding.plan import Plan
    from mage_ray.decoding.request import Generation, Request, Sampling, Token
    from mage_ray.decoding.runner import RowRunner
    from mage_ray.merging.adapter import load_adapter
    from mage_ray.merging.bank import AdapterBank
    from mage_ray.models import load_model, load_tokenizer

    spec = study.rollouts
    device = "cuda" if study.training.gpus_per_worker > 0 else None
    model = load_model(study.model, study.dtype, device)
    chat = Chat(load_tokenizer(study.model), model, study.system)
    bank = AdapterBank([] if adapter is None else [load_adapter(folder.at(adapter))])
    plan = Plan.of([((1.0,) * len(bank), 1.0)])
    scorers = load_objectives(study, folder)
    encoded = {prompt.id: chat.encode(prompt.text) for _, prompts in shards for prompt in prompts}
    length = max(map(len, encoded.values())) + spec.max_new_tokens
    engine = Engine(RowRunner(model, bank, spec.batch_rows, length), chat.stop, chat.decode)
    for file, prompts in shards:
        path = folder.at(part) / file
        if path.exists():
            continue
        cells = [(prompt, sample) for prompt in prompts for sample in range(spec.samples_per_prompt)]
        requests = [
            Request(
                encoded[prompt.id],
                plan,
                Sampling(
                    spec.max_new_tokens, spec.temperature, spec.top_p, draw_seed(study.seed, round, prompt.id, sample)
                ),
            )
            for prompt, sample in cells
        ]
        tokens: list[list[Token]] = [[] for _ in requests]
        for index, token in engine.events(requests):
            tokens[index].append(token)
            if token.finished:
                yield 1
        answers = [Generation.of(drawn).require() for drawn in tokens]
        texts = [answer.text for answer in answers]
        raw_NM = score_all(scorers, [prompt.text for prompt, _ in cells], texts)
        frame = pd.DataFrame(
            {
                "prompt_id": [prompt.id for prompt, _ in cells],
                "prompt": [prompt.text for prompt, _ in cells],
                "sample": [sample for _, sample in cells],
                "completion": texts,
                "ids": [answer.ids for answer in answers],
                "tokens": [len(answer.ids) for answer in answers],
                "logprob": [sum(answer.logprobs) for answer in answers],
                "finished": [answer.finished == "stop" for answer in answers],
                **{f"raw/{name}": column for name, column in zip(scorers, raw_NM.T, strict=True)},
            }
        )
        with atomic_path(path) as partial:
            frame.to_parquet(partial)


def _expert(adapter: Path | None) -> str:
    if adapter is None:
        raise ValueError("a further round samples from an expert")
    return adapter.name
