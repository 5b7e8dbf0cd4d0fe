"""All experts of a study: one for each row of each backbone set's mix, each a PEFT adapter."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mage_ray.cluster import connected
from mage_ray.errors import FieldError
from mage_ray.files import atomic_path
from mage_ray.folder import StudyFolder
from mage_ray.merging.adapter import ORIGIN_FILE
from mage_ray.models import fingerprint, load_tokenizer, tokenizer_fingerprint
from mage_ray.progress import shown as counted_on
from mage_ray.study import Study
from mage_ray.training.checkpoint import export_checkpoint, load_state
from mage_ray.training.pairs import Pair, Sample, expert_pairs, modpo_weights, training_order
from mage_ray.training.ray_train import fit_all, room
from mage_ray.training.reference import pool_logps, reference_logps
from mage_ray.training.rollouts import load_pool, sample_pool
from mage_ray.training.run import Run

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console


@dataclass(frozen=True)
class Expert:
    """A row of a mix, and the places (several, where sets share a row) where its adapter goes.

    ``loss``: ``training.method`` on the mixed reward; MODPO's; or that of an autoregressive reward model, DPO's without
    a reference. Trainings of one place that differ have a ``variant`` each, such as the beta of its set, where that was
    chosen among several. ``record`` is written down beside the adapter.
    """

    weights: Mapping[str, float]
    places: tuple[Path, ...]
    variant: str = ""
    loss: Literal["mixed", "modpo", "arm"] = "mixed"
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.places[0].name}-{self.variant}" if self.variant else self.places[0].name


def study_experts(study: Study, folder: StudyFolder) -> list[Expert]:
    """The experts to train, in the order of the sets and of their rows; equal rows are one expert."""
    names = study.objective_names
    places: dict[tuple[float, ...], list[Path]] = {}
    variants: dict[tuple[float, ...], str] = {}
    for backbone, spec in study.training.backbones.items():
        for objective, row in zip(names, spec.mix(len(names)), strict=True):
            key = tuple(float(b) for b in row)
            places.setdefault(key, []).append(folder.expert(backbone, objective))
            variants.setdefault(key, f"beta-{spec.beta:g}" if spec.betas is not None else "")
    return [Expert(dict(zip(names, row, strict=True)), tuple(at), variants[row]) for row, at in places.items()]


def train_experts(study: Study, folder: StudyFolder, console: Console | None = None) -> None:
    """Train what is missing of the study's experts; as ``train_missing``."""
    check_training(study)
    train_missing(study, folder, study_experts(study, folder), console)


def train_missing(study: Study, folder: StudyFolder, experts: Sequence[Expert], console: Console | None = None) -> None:
    """Train those of ``experts`` that aren't there, ``parallel_experts`` at a time, from the pool in ``folder``.

    Experts that are there are left alone; one that was under way goes on from its last checkpoint. Connects to Ray
    where the caller hasn't. ``console`` is shown the progress. Raises UserError: the first expert's failure, after all
    others have ended.
    """
    todo = [expert for expert in experts if not all(map(is_expert, expert.places))]
    if not todo:
        return
    trained = [expert for expert in todo if any(map(is_expert, expert.places))]
    for expert in trained:
        _copy(next(place for place in expert.places if is_expert(place)), expert.places)
    todo = [expert for expert in todo if expert not in trained]
    pool = load_pool(folder, study)
    with connected():
        places = room(study)
        for round in range(study.training.rounds):
            todo = _train_round(study, folder, todo, pool, round, places, console)


def train_early(
    study: Study, folder: StudyFolder, place: StudyFolder, steps: int, console: Console | None = None
) -> None:
    """As ``train_experts``, but only for the first ``steps`` steps of round 0, from where a whole training goes on.

    Pool and checkpoints are those of ``folder``; the experts go into ``place``.
    """
    todo = [expert for expert in study_experts(study, place) if not all(map(is_expert, expert.places))]
    if todo:
        _train_round(study, folder, todo, load_pool(folder, study), 0, room(study), console, steps)


def check_training(study: Study) -> None:
    """Raises FieldError where fields of ``training`` don't go together."""
    spec = study.training
    if spec.batch_size % spec.workers:
        raise FieldError("training.batch_size", spec.batch_size, f"a multiple of training.workers ({spec.workers})")
    if spec.method == "dpo" and spec.kl_strength == 0:
        raise FieldError("training.kl_strength", 0, "above 0 with dpo, whose loss it scales")
    if spec.method == "grpo" and spec.batch_size % spec.generations_per_prompt:
        group = spec.generations_per_prompt
        raise FieldError("training.batch_size", spec.batch_size, f"a multiple of generations_per_prompt ({group})")
    if spec.method == "grpo" and spec.rounds > 1:
        raise FieldError("training.rounds", spec.rounds, "1 with grpo, which samples from the expert at every step")


def is_expert(place: Path) -> bool:
    """Whether a whole expert is there (its folder comes into being at once)."""
    return (place / ORIGIN_FILE).is_file()


def _train_round(
    study: Study,
    folder: StudyFolder,
    experts: Sequence[Expert],
    pool: DataFrame,
    round: int,
    at_once: int,
    console: Console | None,
    until: int | None = None,
) -> list[Expert]:
    """One round of all ``experts``; returns them for the next one. The last round puts them in their places.

    So does one that ends early, after the step ``until``.
    """
    runs = _runs(study, folder, experts, pool, round, console, until)
    by_name = {run.name: expert for expert in experts for run in [runs[expert.name]]}
    last = round == study.training.rounds - 1 or until is not None

    with ThreadPoolExecutor(1) as aside:
        # In one thread, beside the training: transformers can't be imported from two at once.
        origin = aside.submit(model_origin, study.model)

        def finished(run: Run, checkpoint: Path) -> None:
            expert = by_name[run.name]
            places = expert.places if last else [_between(folder, expert, round)]
            _export(study, expert, run, checkpoint, places, origin.result())
            folder.publish(*places)

        fit_all(list(runs.values()), at_once, finished, console)
    return list(experts)


def _runs(
    study: Study,
    folder: StudyFolder,
    experts: Sequence[Expert],
    pool: DataFrame,
    round: int,
    console: Console | None,
    until: int | None,
) -> dict[str, Run]:
    """The run of each expert, by the expert's name."""
    spec = study.training
    pairs: dict[str, list[Pair]] = {}
    reference: dict[Any, float] = {}
    if spec.method == "dpo":
        for expert in experts:
            own = pool
            if round > 0:
                own = sample_pool(study, folder, adapter=_between(folder, expert, round - 1), round=round)
            weights, margins = modpo_weights(expert.weights) if expert.loss == "modpo" else (expert.weights, None)
            found = expert_pairs(
                own,
                weights,
                per_prompt=spec.pairs_per_prompt,
                batch_size=spec.batch_size,
                expert=expert.name,
                margins=margins,
            )
            order = training_order(len(found), spec.steps * spec.batch_size, study.seed + round)
            pairs[expert.name] = [found[i] for i in order]
        used = {sample for e in experts if e.loss != "arm" for sample in _samples(pairs[e.name])}
        reference = pool_logps(study, pool) if round == 0 else {}
        if unknown := sorted(used - reference.keys()):
            with counted_on(console, "reference") as told:
                reference |= reference_logps(study, folder, unknown, told)
    prompts: list[str] = []
    if spec.method == "grpo":
        found_prompts = list(pool.drop_duplicates("prompt_id").sort_values("prompt_id")["prompt"])
        needed = spec.steps * spec.batch_size // spec.generations_per_prompt
        prompts = [found_prompts[i] for i in training_order(len(found_prompts), needed, study.seed)]
    runs = {}
    for expert in experts:
        own_pairs = pairs.get(expert.name, [])
        runs[expert.name] = Run(
            name=expert.name if round == 0 else f"{expert.name}-round-{round}",
            study=_own_study(study, expert),
            home=folder,
            weights=expert.weights,
            pairs=own_pairs,
            reference={s: 0.0 if expert.loss == "arm" else reference[s] for s in _samples(own_pairs)},
            prompts=prompts,
            normalisation=folder.normalisation.read_text() if prompts else "",
            start=folder.name_of(_between(folder, expert, round - 1)) if round > 0 else None,
            until=until,
        )
    return runs


def _samples(pairs: Sequence[Pair]) -> set[Sample]:
    return {sample for pair in pairs for sample in (pair.chosen, pair.rejected)}


def _own_study(study: Study, expert: Expert) -> Study:
    """The study with the expert's own beta of DPO: MODPO's logit is divided by the weight of the pairs' objective."""
    if expert.loss != "modpo":
        return study
    beta = study.training.kl_strength / max(expert.weights.values())
    return study.model_copy(update={"training": study.training.model_copy(update={"kl_strength": beta})})


def _between(folder: StudyFolder, expert: Expert, round: int) -> Path:
    """The expert as a round left it that wasn't the last."""
    return folder.checkpoints / "rounds" / str(round) / expert.name


def _export(
    study: Study, expert: Expert, run: Run, checkpoint: Path, places: Sequence[Path], origin: Mapping[str, str]
) -> None:
    """Put the adapter of a finished run in ``places``, with its record."""
    state = load_state(checkpoint)
    record = {
        **origin,
        "weights": dict(expert.weights),
        "steps": state.step * study.training.rounds,
        "answer_tokens": None if run.answer_tokens is None else run.answer_tokens * study.training.rounds,
        "metrics": state.metrics,
        **expert.record,
    }
    export_checkpoint(checkpoint, places[0], record)
    _copy(places[0], places)


def model_origin(model: str) -> dict[str, str]:
    """What the experts are trained from, by content."""
    return {"base_model": fingerprint(model), "tokenizer": tokenizer_fingerprint(load_tokenizer(model))}


def _copy(source: Path, places: Sequence[Path]) -> None:
    for place in places:
        if place != source and not is_expert(place):
            with atomic_path(place) as partial:
                shutil.copytree(source, partial)
