"""Explicit value models: sets of one for each objective, trained on the pool and measured on prompts held out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mage_ray.cluster import connected
from mage_ray.errors import FieldError, UserError
from mage_ray.files import write_atomic
from mage_ray.folder import StudyFolder
from mage_ray.merging.adapter import ORIGIN_FILE, load_value_model, read_json
from mage_ray.specs import RewardSpec, ValuesSpec
from mage_ray.study import Study
from mage_ray.training.checkpoint import export_checkpoint, load_state
from mage_ray.training.experts import is_expert, model_origin
from mage_ray.training.pairs import Sample, training_order
from mage_ray.training.ray_train import fit_all, room
from mage_ray.training.rollouts import load_pool
from mage_ray.training.run import Example, Run

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console

QUALITY = "quality.json"
_SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
_LENGTHS = (0, 4, 8, 16, 32, 64, 128)
_RESAMPLES = 2000
_AT_ONCE = 16


def train_values(study: Study, folder: StudyFolder, console: Console | None = None) -> None:
    """Train what is missing of the study's value models, from the pool in ``folder``, and measure each.

    One that is there is left alone; one that was under way goes on from its last checkpoint. Raises UserError when the
    pool isn't there or has rewards that are no numbers, or when a value model was trained as another study says.
    """
    check_values(study)
    for set, spec in study.values.items():
        for name in study.objective_names:
            check_trained_as(folder.value(set, name), spec)
    todo = [
        (set, name) for set in study.values for name in study.objective_names if not is_expert(folder.value(set, name))
    ]
    pool = load_pool(folder, study)
    if todo:
        places = {f"{set}-{name}": folder.value(set, name) for set, name in todo}
        runs = [set_run(study, folder, pool, set, name) for set, name in todo]
        origin = model_origin(study.model)

        def finished(run: Run, checkpoint: Path) -> None:
            _export(run, places[run.name], checkpoint, origin)
            folder.publish(places[run.name])

        with connected():
            fit_all(runs, room(study), finished, console)
    for set, spec in study.values.items():
        for name in study.objective_names:
            place = folder.value(set, name)
            if not (place / QUALITY).exists():
                _, test = split(pool, spec.held_out, study.seed)
                quality = measure(study, place, test, f"reward/{name}")
                write_atomic(place / QUALITY, json.dumps(quality, indent=1) + "\n")


def check_values(study: Study) -> None:
    """Raises FieldError when the study has no ``values``, or fields of them don't go together."""
    if not study.values:
        raise FieldError("values", "nothing", "a part of the study that says how value models are trained")
    for set, spec in study.values.items():
        if spec.batch_size % study.training.workers:
            allowed = f"a multiple of training.workers ({study.training.workers})"
            raise FieldError(f"values.{set}.batch_size", spec.batch_size, allowed)


def check_trained_as(place: Path, spec: ValuesSpec | RewardSpec, part: str = "values") -> None:
    """Raises UserError when the model in ``place`` was trained otherwise than its ``spec`` in that ``part`` says."""
    if is_expert(place) and read_json(place / ORIGIN_FILE, place.name).get(part) != spec.model_dump(mode="json"):
        raise UserError(f"{place}: trained as another `{part}` said, allowed: the same, or delete it to train it anew")


def split(pool: DataFrame, held_out: float, seed: int) -> tuple[DataFrame, DataFrame]:
    """The pool's answers to train on and those held out, whole prompts each; at least one prompt of either."""
    prompts = np.sort(pool["prompt_id"].unique())
    count = min(max(1, round(held_out * len(prompts))), len(prompts) - 1)
    chosen = set(np.random.default_rng([seed, 4]).permutation(prompts)[:count])
    held = pool["prompt_id"].isin(chosen)
    return pool[~held], pool[held]


def set_run(study: Study, folder: StudyFolder, pool: DataFrame, set: str, name: str) -> Run:
    """The training of one value model of a set, whose checkpoints lie apart from those of any other training of it.

    Raises UserError for a pool that can't teach it.
    """
    spec = study.values[set]
    train, _ = split(pool, spec.held_out, study.seed)
    rewards = train[f"reward/{name}"].to_numpy(dtype=np.float64)
    if not np.isfinite(rewards).all():
        count = int((~np.isfinite(rewards)).sum())
        raise UserError(f"value model {set}-{name}: {count} rewards of the pool are not finite, allowed: numbers")
    answers = [
        Example(Sample(str(prompt), tuple(map(int, ids))), float(reward))
        for prompt, ids, reward in zip(train["prompt"], train["ids"], rewards, strict=True)
        if len(ids)
    ]
    if len(answers) < spec.batch_size:
        allowed = f"at least values.{set}.batch_size ({spec.batch_size})"
        raise UserError(f"value model {set}-{name}: the pool teaches {len(answers)} answers, allowed: {allowed}")
    order = training_order(len(answers), spec.steps * spec.batch_size, study.seed)
    return Run(
        name=f"{set}-{name}",
        study=study,
        home=folder,
        apart=f"values/{hashlib.sha256(spec.model_dump_json().encode()).hexdigest()[:12]}",
        weights={name: 1.0},
        examples=[answers[i] for i in order],
        values=spec,
    )


def _export(run: Run, place: Path, checkpoint: Path, origin: dict[str, str]) -> None:
    """Put the value model of a finished run in its place, with its record."""
    assert run.values is not None
    state = load_state(checkpoint)
    values = run.values.model_dump(mode="json")
    tokens = run.answer_tokens
    record = {**origin, "values": values, "steps": state.step, "answer_tokens": tokens, "metrics": state.metrics}
    export_checkpoint(checkpoint, place, record)


def measure(study: Study, place: Path, test: DataFrame, column: str) -> dict[str, Any]:
    """How well ``V`` tells the final reward of answers to unseen prompts, by how much of the answer it has seen.

    Once by the share of the answer (which gives its length away), once by tokens, over the answers that go on from
    there. Each time: the mean squared error, beside the rewards' own variance, and Spearman's rank correlation with its
    90 % interval, by a bootstrap over prompts. Raises UserError when ``place`` holds no value model for this model.
    """
    from mage_ray.chat import Chat
    from mage_ray.decoding.plan import Row
    from mage_ray.decoding.runner import RowRunner
    from mage_ray.merging.bank import AdapterBank
    from mage_ray.models import load_model, load_tokenizer, model_fingerprint, tokenizer_fingerprint

    value_model = load_value_model(place)
    model, tokenizer = load_model(study.model, study.dtype), load_tokenizer(study.model)
    value_model.check_origin(model_fingerprint(model), tokenizer_fingerprint(tokenizer))
    chat = Chat(tokenizer, model, study.system)
    encoded = {text: list(chat.encode(text)) for text in test["prompt"].unique()}
    sequences = [[*encoded[text], *map(int, ids)] for text, ids in zip(test["prompt"], test["ids"], strict=True)]
    starts = [len(encoded[text]) for text in test["prompt"]]
    runner = RowRunner(model, AdapterBank([value_model]), _AT_ONCE, max(map(len, sequences)))
    values: list[np.ndarray] = []
    for begin in range(0, len(sequences), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        values += [v.numpy() for v in runner.values(Row((1.0,)), sequences[part], starts[part])]
    rewards = test[column].to_numpy(dtype=np.float64)
    prompts = test["prompt_id"].to_numpy()

    def quality(own: np.ndarray, seen: np.ndarray) -> dict[str, float]:
        low, high = _interval(seen, rewards[own], prompts[own], study.seed)
        error = float(np.mean((seen - rewards[own]) ** 2))
        correlation = rank_correlation(seen, rewards[own])
        return {"answers": len(own), "error": error, "correlation": correlation, "low": low, "high": high}

    everyone = np.arange(len(values))
    by_share = [
        {"seen": share, **quality(everyone, np.array([v[round(share * (len(v) - 1))] for v in values], np.float64))}
        for share in _SHARES
    ]
    by_length = []
    for length in _LENGTHS:
        longer = np.array([a for a in everyone if len(values[a]) - 1 > length], dtype=np.int64)
        if len(longer) > 1:
            by_length.append(
                {"seen": length, **quality(longer, np.array([values[a][length] for a in longer], np.float64))}
            )
    totals = {"answers": len(rewards), "prompts": len(set(prompts)), "variance": float(rewards.var())}
    return totals | {"by_share": by_share, "by_length": by_length}


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's; 0 where either is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(one), rankdata(other)
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _interval(one: np.ndarray, other: np.ndarray, prompts: np.ndarray, seed: int) -> tuple[float, float]:
    dice = np.random.default_rng([seed, 5])
    groups = [np.flatnonzero(prompts == prompt) for prompt in np.unique(prompts)]
    found = []
    for _ in range(_RESAMPLES):
        taken = np.concatenate([groups[i] for i in dice.integers(0, len(groups), len(groups))])
        found.append(rank_correlation(one[taken], other[taken]))
    low, high = np.quantile(found, (0.05, 0.95))
    return float(low), float(high)
