"""Win rates by a language model that is asked which of two answers to a prompt is better, in both orders."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mage_ray.cluster import counted, run_shards
from mage_ray.comparison.spec import JudgeSpec
from mage_ray.errors import UserError
from mage_ray.evaluation.summary import Interval, interval
from mage_ray.files import atomic_path
from mage_ray.folder import StudyFolder
from mage_ray.progress import shown
from mage_ray.study import Study

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console
    from transformers import PreTrainedModel

    from mage_ray.chat import Chat

AGAINST = "reference"
_PER_SHARD = 64


def win_rates(study: Study, folder: StudyFolder, samples: pd.DataFrame, console: Console | None) -> dict[str, Interval]:
    """By method: how often its answer is better than the reference model's to the same prompt with the same seed.

    The mean over all preferences, prompts and seeds of the judge's own probability of saying so, over both orders of
    the two, so that a judge who always says A gives 1/2; of equal answers it is 1/2. Intervals by a bootstrap over the
    prompts. Judgements are kept in files. Ray must be connected. Raises UserError: a judge that can't be loaded.
    """
    import pandas as pd

    judge = study.compare.judge
    assert judge is not None
    key = ["prompt_id", "seed"]
    plain = samples[samples["method"] == AGAINST].drop_duplicates(key).set_index(key)["completion"]
    asked = samples[samples["method"] != AGAINST].copy()
    asked["other"] = [plain[prompt, seed] for prompt, seed in zip(asked["prompt_id"], asked["seed"], strict=True)]
    triples = asked[["prompt", "completion", "other"]].drop_duplicates()
    triples = triples[triples["completion"] != triples["other"]].reset_index(drop=True)
    shards = []
    for begin in range(0, len(triples), _PER_SHARD):
        part = triples.iloc[begin : begin + _PER_SHARD]
        digest = hashlib.sha256(json.dumps([judge.model_dump(), part.to_numpy().tolist()]).encode()).hexdigest()
        shards.append((f"{digest[:12]}.parquet", part))
    place = judgements(folder)
    folder.fetch(place)
    missing = [shard for shard in shards if not (place / shard[0]).exists()]
    left = sum(len(part) for _, part in missing)
    with shown(console, "judge") as progress:
        run_shards(
            _judge_shards,
            missing,
            (judge, folder, study.training.gpus_per_worker > 0),
            folder=folder,
            writes=place,
            workers=study.evaluation.workers,
            gpus_per_worker=study.training.gpus_per_worker,
            labels=study.cluster.selector,
            on_progress=counted(progress, len(triples) - left, len(triples)),
        )
    wins = [pd.read_parquet(place / file)["wins"].to_numpy() for file, _ in shards]
    triples["wins"] = np.concatenate(wins) if wins else np.zeros(0)
    if triples["wins"].isna().any():
        raise UserError(f"compare.judge.model: {judge.model} says what is no number, allowed: a model that works")
    # Equal answers are none of the triples.
    asked = asked.merge(triples, on=["prompt", "completion", "other"], how="left").fillna({"wins": 0.5})
    prompts = asked["prompt_id"].unique()
    spec = study.evaluation
    random = np.random.default_rng([study.seed, 13])
    weights_RP = random.multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), spec.resamples)
    found = {}
    for method, own in asked.groupby("method", sort=False):
        by_prompt = own.groupby("prompt_id")["wins"].mean()[prompts].to_numpy()
        resampled = weights_RP @ by_prompt / len(prompts)
        found[str(method)] = interval(float(by_prompt.mean()), resampled, spec.confidence)
    return found


def judgements(folder: StudyFolder) -> Path:
    """Where they are kept."""
    return folder.comparison / "judgements"


def _judge_shards(
    judge: JudgeSpec, folder: StudyFolder, gpu: bool, shards: Sequence[tuple[str, pd.DataFrame]]
) -> Iterator[int]:
    """In a worker: yields how many pairs of answers it has judged."""
    from mage_ray.chat import Chat
    from mage_ray.models import load_model, load_tokenizer

    model = load_model(judge.model, device="cuda" if gpu else None)
    chat = Chat(load_tokenizer(judge.model), model)
    for file, part in shards:
        path = judgements(folder) / file
        if path.exists():
            continue
        rows = list(part.itertuples(index=False))
        prefers = preferences_of(
            judge,
            model,
            chat,
            [(row.prompt, row.completion, row.other) for row in rows]
            + [(row.prompt, row.other, row.completion) for row in rows],
        )
        wins = (prefers[: len(rows)] + 1 - prefers[len(rows) :]) / 2
        with atomic_path(path) as partial:
            part.assign(wins=wins).to_parquet(partial)
        yield len(rows)


def preferences_of(
    judge: JudgeSpec, model: PreTrainedModel, chat: Chat, triples: Sequence[tuple[str, str, str]]
) -> np.ndarray:
    """[triples] The probability that the judge calls the first of two answers better: ``P(A) / (P(A) + P(B))``.

    Of (prompt, first, second); read off the next token after its question.
    """
    import torch

    a, b = (chat.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "AB")
    asked = [chat.encode(_question(judge, *triple))[-judge.max_length :] for triple in triples]
    order = sorted(range(len(asked)), key=lambda i: len(asked[i]))
    found = np.zeros(len(asked))
    for begin in range(0, len(order), judge.batch_size):
        own = order[begin : begin + judge.batch_size]
        longest = max(len(asked[i]) for i in own)
        ids_BT = torch.tensor([[*asked[i], *[a] * (longest - len(asked[i]))] for i in own])
        mask_BT = torch.tensor([[1] * len(asked[i]) + [0] * (longest - len(asked[i])) for i in own])
        with torch.inference_mode():
            logits_BTV = model(input_ids=ids_BT.to(model.device), attention_mask=mask_BT.to(model.device)).logits
        last_B = torch.tensor([len(asked[i]) - 1 for i in own], device=model.device)
        logits_BV = logits_BTV[torch.arange(len(own), device=model.device), last_B].float()
        found[own] = torch.sigmoid(logits_BV[:, a] - logits_BV[:, b]).cpu().numpy()
    return found


def _question(judge: JudgeSpec, prompt: str, first: str, second: str) -> str:
    return (
        f"Somebody asked:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n"
        f"{judge.question} Say A or B, and nothing else."
    )
