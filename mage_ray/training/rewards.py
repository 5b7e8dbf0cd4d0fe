"""Reward models: trained on pairs or labelled texts, calibrated and measured on prompts held out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np

from mage_ray.cluster import connected
from mage_ray.errors import FieldError
from mage_ray.files import atomic_path
from mage_ray.folder import StudyFolder
from mage_ray.merging.adapter import ORIGIN_FILE
from mage_ray.models import load_tokenizer
from mage_ray.objectives import score
from mage_ray.objectives.classifier import Classifier
from mage_ray.quiet import quiet_transformers
from mage_ray.specs import RewardSpec
from mage_ray.study import Study
from mage_ray.training.calibration import (
    calibration_error,
    fitted_scale,
    mean_interval,
    negative_log_likelihood,
    rightness,
)
from mage_ray.training.checkpoint import load_adapter_weights, load_state
from mage_ray.training.experts import is_expert, model_origin
from mage_ray.training.ray_train import fit_all, room
from mage_ray.training.reward_data import Comparison, Labelled, Parts, Row, length_order, read_rows, split
from mage_ray.training.reward_trainer import tuned_classifier
from mage_ray.training.run import Run
from mage_ray.training.values import QUALITY, check_trained_as
from mage_ray.training.worker import uses_bfloat16

if TYPE_CHECKING:
    from rich.console import Console

_RESAMPLES = 2000


def train_rewards(study: Study, folder: StudyFolder, console: Console | None = None) -> None:
    """Train what is missing of the study's reward models, calibrate and measure each, and put it into ``folder``.

    One that is there is left alone; one that was under way goes on from its last checkpoint. Connects to Ray where the
    caller hasn't. Raises UserError: data that can't be used, or a reward model that was trained as another study says.
    """
    check_rewards(study)
    for name, spec in study.rewards.items():
        check_trained_as(folder.rewards / name, spec, "rewards")
    todo = [name for name in study.rewards if not is_expert(folder.rewards / name)]
    if not todo:
        return
    parts = {name: _parts(name, study.rewards[name], study.seed) for name in todo}
    runs = [_run(study, folder, name, parts[name]) for name in todo]
    origins = {model: model_origin(model) for model in dict.fromkeys(run.study.model for run in runs)}
    one_at_a_time = Lock()  # each holds a whole model

    def finished(run: Run, checkpoint: Path) -> None:
        with one_at_a_time:
            if console is not None:
                held = parts[run.name]
                count = len(held.calibrate) + len(held.measure)
                console.print(f"{run.name}: measuring on {count} rows held out", highlight=False)
            _export(run, folder.rewards / run.name, checkpoint, parts[run.name], origins[run.study.model])
            folder.publish(folder.rewards / run.name)

    with connected():
        fit_all(runs, room(study), finished, console)


def check_rewards(study: Study) -> None:
    """Raises FieldError when the study has no ``rewards``, or fields of them don't go together."""
    if not study.rewards:
        raise FieldError("rewards", "nothing", "a part of the study that says how reward models are trained")
    for name, spec in study.rewards.items():
        if spec.batch_size % study.training.workers:
            allowed = f"a multiple of training.workers ({study.training.workers})"
            raise FieldError(f"rewards.{name}.batch_size", spec.batch_size, allowed)


def _parts(name: str, spec: RewardSpec, seed: int) -> Parts:
    rows = read_rows(name, spec)
    field = f"rewards.{name}"
    try:
        parts = split(rows, spec.held_out, seed)
    except ValueError as error:
        raise FieldError(f"{field}.data", str(error), "at least three prompts (or different texts)") from None
    if len(parts.train) < spec.batch_size:
        got = f"{len(parts.train)} rows to train on, of {len(rows)}"
        raise FieldError(f"{field}.data", got, f"at least {field}.batch_size ({spec.batch_size})")
    return parts


def _run(study: Study, folder: StudyFolder, name: str, parts: Parts) -> Run:
    spec = study.rewards[name]
    rows = parts.train
    lengths = [max(map(len, row.texts)) for row in rows]
    order = length_order(lengths, spec.batch_size, spec.steps, study.seed)
    # Beside those of the same spec and data alone: no other's checkpoint may be gone on from.
    content = hashlib.sha256(spec.model_dump_json().encode())
    for row in rows:
        content.update(repr(row).encode())
    return Run(
        name=name,
        study=study.model_copy(update={"model": spec.model or study.model}),
        home=folder,
        apart=f"rewards/{content.hexdigest()[:12]}",
        weights={},
        rows=[rows[i] for i in order],
        reward=spec,
    )


def _export(run: Run, place: Path, checkpoint: Path, parts: Parts, origin: Mapping[str, str]) -> None:
    """Put the reward model of a finished run in its place: merged, calibrated, with its record and its quality.

    The scale is folded into the head, so that ``sigmoid`` of a logit, or of the difference of two, is a probability.
    """
    spec = run.reward
    assert spec is not None
    model = merged_classifier(run, checkpoint)
    tokenizer = load_tokenizer(run.study.model)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    model.config.id2label, model.config.label2id = {0: run.name}, {run.name: 0}
    tokenizer.model_max_length = spec.max_length
    with quiet_transformers(), atomic_path(place) as partial:
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)
        precision = "bfloat16" if uses_bfloat16(run.spec) else "float32"
        scorer = Classifier(str(partial), "completion", f"rewards.{run.name}", precision=precision)
        held = [*parts.calibrate, *parts.measure]
        margin_N = margins(run.name, scorer, held)
        del scorer  # it may read the file that is about to be written anew
        scale = fitted_scale(margin_N[: len(parts.calibrate)])
        model.score.weight.data.mul_(scale)
        model.save_pretrained(partial)
        quality = measured(run.study, spec, parts, margin_N, scale)
        (partial / QUALITY).write_text(json.dumps(quality, indent=1) + "\n")
        state = load_state(checkpoint)
        record = {**origin, "rewards": spec.model_dump(mode="json"), "steps": state.step, "metrics": state.metrics}
        (partial / ORIGIN_FILE).write_text(json.dumps(record, indent=2) + "\n")


def merged_classifier(run: Run, checkpoint: Path) -> Any:
    """A run's classifier at ``checkpoint``, its LoRA merged into the weights, in the type that it was trained in."""
    tuned = tuned_classifier(run, "bfloat16" if uses_bfloat16(run.spec) else "float32")
    load_adapter_weights(checkpoint, tuned)
    return tuned.merge_and_unload().eval()


def margins(name: str, scorer: Classifier, rows: Sequence[Row]) -> np.ndarray:
    """How far the model is right about each row (``mage_ray.training.calibration``), float64 [rows]."""
    texts = list(dict.fromkeys(text for row in rows for text in row.texts))
    logit = dict(zip(texts, score(name, scorer, [""] * len(texts), texts), strict=True))
    found = []
    for row in rows:
        if isinstance(row, Comparison):
            found.append(logit[row.chosen] - logit[row.rejected])
        else:
            found.append(logit[row.text] * (1 if row.label else -1))
    return np.array(found)


def measured(study: Study, spec: RewardSpec, parts: Parts, margin_N: np.ndarray, scale: float) -> dict[str, Any]:
    """What ``quality.json`` says of a model with these margins on the rows held out, those to calibrate by first.

    Accuracy is over all of them, since no scale changes it; calibration over those that the scale was not fitted on.
    The rival of pairs is the longer answer, that of labelled texts the label that training saw more often.
    """
    held = [*parts.calibrate, *parts.measure]
    own = margin_N[len(parts.calibrate) :]
    groups = [row.group for row in held]
    confidence = study.evaluation.confidence

    def interval(right_N: np.ndarray) -> dict[str, float]:
        return mean_interval(right_N, groups, confidence, _RESAMPLES, study.seed)

    usual = 2 * sum(row.label for row in parts.train if isinstance(row, Labelled)) >= len(parts.train)
    rival_N = [row.longer if isinstance(row, Comparison) else float(row.label == usual) for row in held]
    rival = "longer answer" if spec.label is None else f"always {usual}".lower()
    return {
        "trained_on": len(parts.train),
        "held_out": len(held),
        "prompts": len(set(groups)),
        "confidence": confidence,
        "accuracy": interval(rightness(margin_N)),
        "rival": {"name": rival, **interval(np.array(rival_N))},
        "scale": scale,
        "calibration": {
            "rows": len(own),
            "before": {"nll": negative_log_likelihood(own), "ece": calibration_error(own)},
            "after": {"nll": negative_log_likelihood(scale * own), "ece": calibration_error(scale * own)},
        },
    }
