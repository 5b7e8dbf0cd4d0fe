"""Explicit value models of a study: one for each objective, trained on the pool, measured on prompts held out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mage_ray.cluster import connected
from mage_ray.errors import FieldError, UserError
from mage_ray.files import write_atomic
from mage_ray.merging.adapter import ORIGIN_FILE
from mage_ray.study import Study, StudyFolder, ValuesSpec
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
_FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)
_RESAMPLES = 2000
_AT_ONCE = 16


def values_spec(study: Study) -> ValuesSpec:
    """The study's ``values``. Raises FieldError when it has none."""
    if study.values is None:
        raise FieldError("values", None, "a part of the study that says how value models are trained")
    return study.values


def train_values(study: Study, folder: StudyFolder, console: Console | None = None) -> None:
    """Train what is missing of the study's value models, from the pool in ``folder``, and measure each.

    One that is there is left alone; one that was under way goes on from its last checkpoint. Raises UserError when the
    pool isn't there or has rewards that are no numbers, or when a value model was trained as another study says.
    """
    spec = values_spec(study)
    if spec.batch_size % study.training.workers:
        raise FieldError(
            "values.batch_size", spec.batch_size, f"a multiple of training.workers ({study.training.workers})"
        )
    for name in study.objective_names:
        check_trained_as(folder.value(name), spec)
    todo = [name for name in study.objective_names if not is_expert(folder.value(name))]
    pool = load_pool(folder, study)
    train, test = split(pool, spec.held_out, study.seed)
    if todo:
        runs = {f"value-{name}": _run(study, folder, train, name) for name in todo}
        origin = model_origin(study.model)

        def finished(run: Run, checkpoint: Path) -> None:
            _export(study, folder.value(next(iter(run.weights))), checkpoint, origin)

        with connected():
            fit_all(list(runs.values()), room(study.training), finished, console)
    for name in study.objective_names:
        if not (folder.value(name) / QUALITY).exists():
            quality = measure(study, folder.value(name), test, f"reward/{name}")
            write_atomic(folder.value(name) / QUALITY, json.dumps(quality, indent=1) + "\n")


def check_trained_as(place: Path, spec: ValuesSpec) -> None:
    """Raises UserError when the value model in ``place`` was trained otherwise than ``spec`` says."""
    if is_expert(place) and json.loads((place / ORIGIN_FILE).read_text()).get("values") != spec.model_dump(mode="json"):
        raise UserError(f"{place}: trained as another `values` said, allowed: the same, or delete it to train it anew")


def split(pool: DataFrame, held_out: float, seed: int) -> tuple[DataFrame, DataFrame]:
    """The pool's answers to train on and those held out, whole prompts each; at least one prompt of either."""
    prompts = np.sort(pool["prompt_id"].unique())
    count = min(max(1, round(held_out * len(prompts))), len(prompts) - 1)
    chosen = set(np.random.default_rng([seed, 4]).permutation(prompts)[:count])
    held = pool["prompt_id"].isin(chosen)
    return pool[~held], pool[held]


def _run(study: Study, folder: StudyFolder, train: DataFrame, name: str) -> Run:
    spec = values_spec(study)
    rewards = train[f"reward/{name}"].to_numpy(dtype=np.float64)
    if not np.isfinite(rewards).all():
        count = int((~np.isfinite(rewards)).sum())
        raise UserError(f"value model {name}: {count} rewards of the pool are not finite, allowed: numbers")
    answers = [
        Example(Sample(str(prompt), tuple(map(int, ids))), float(reward))
        for prompt, ids, reward in zip(train["prompt"], train["ids"], rewards, strict=True)
        if len(ids)
    ]
    if len(answers) < spec.batch_size:
        raise UserError(
            f"value model {name}: the pool has {len(answers)} answers to train on, allowed: at least values.batch_size "
            f"({spec.batch_size})"
        )
    order = training_order(len(answers), spec.steps * spec.batch_size, study.seed)
    return Run(
        name=f"value-{name}",
        study=study,
        checkpoints=folder.checkpoints,
        weights={name: 1.0},
        examples=[answers[i] for i in order],
    )


def _export(study: Study, place: Path, checkpoint: Path, origin: dict[str, str]) -> None:
    """Put the value model of a finished run in its place, with its record."""
    state = load_state(checkpoint)
    values = values_spec(study).model_dump(mode="json")
    record = {**origin, "values": values, "steps": state.step, "metrics": state.metrics}
    export_checkpoint(checkpoint, place, record)


def measure(study: Study, place: Path, test: DataFrame, column: str) -> dict[str, Any]:
    """How well ``V`` tells the final reward of answers to unseen prompts, by the share of the answer that it has seen.

    For each share: the mean squared error, beside the rewards' own variance, and Spearman's rank correlation with its
    90 % interval, by a bootstrap over prompts.
    """
    from mage_ray.chat import Chat
    from mage_ray.decoding.plan import Row
    from mage_ray.decoding.runner import RowRunner
    from mage_ray.merging.adapter import load_adapter
    from mage_ray.merging.bank import AdapterBank
    from mage_ray.models import load_model, load_tokenizer

    model = load_model(study.model, study.dtype)
    chat = Chat(load_tokenizer(study.model), model, study.system)
    encoded = {text: list(chat.encode(text)) for text in test["prompt"].unique()}
    sequences = [[*encoded[text], *map(int, ids)] for text, ids in zip(test["prompt"], test["ids"], strict=True)]
    starts = [len(encoded[text]) for text in test["prompt"]]
    runner = RowRunner(model, AdapterBank([load_adapter(place)]), _AT_ONCE, max(map(len, sequences)) + 1)
    values: list[np.ndarray] = []
    for begin in range(0, len(sequences), _AT_ONCE):
        part = slice(begin, begin + _AT_ONCE)
        values += [v.numpy() for v in runner.values(Row((1.0,)), sequences[part], starts[part])]
    rewards = test[column].to_numpy(dtype=np.float64)
    prompts = test["prompt_id"].to_numpy()
    rows = []
    for fraction in _FRACTIONS:
        seen = np.array([v[round(fraction * (len(v) - 1))] for v in values], dtype=np.float64)
        low, high = _interval(seen, rewards, prompts, study.seed)
        error = float(np.mean((seen - rewards) ** 2))
        correlation = rank_correlation(seen, rewards)
        rows.append({"seen": fraction, "error": error, "correlation": correlation, "low": low, "high": high})
    return {"answers": len(rewards), "prompts": len(set(prompts)), "variance": float(rewards.var()), "by_prefix": rows}


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
