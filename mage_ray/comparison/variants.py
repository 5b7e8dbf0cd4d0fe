"""Variants of a study: the same backbones trained for another length, or on rewards that were dealt out at random."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mage_ray.decoding.methods import EXPLICIT, KNOWN, PER_PREFERENCE
from mage_ray.errors import FieldError
from mage_ray.evaluation.strategies import STRATEGIES
from mage_ray.files import atomic_path
from mage_ray.folder import StudyFolder
from mage_ray.generator import is_trained, needed_sets
from mage_ray.study import Study
from mage_ray.training.experts import train_experts
from mage_ray.training.rollouts import load_pool

if TYPE_CHECKING:
    from rich.console import Console

SHUFFLED = "shuffled"
_POOL = "shard-00000.parquet"


@dataclass(frozen=True)
class Variant:
    """A training of the backbones; the study's own, with all else that it trains, where ``name`` is empty."""

    name: str
    study: Study
    folder: StudyFolder
    methods: tuple[str, ...]

    def label(self, method: str) -> str:
        """What a method is called in the comparison."""
        return f"{method}@{self.name}" if self.name else method

    @property
    def sets(self) -> list[str]:
        """All that is trained here; of baselines of one kind the first is drawn on."""
        study = self.study
        more = [*study.values, *(study.guidance.baselines or study.baselines)]
        return [*study.training.backbones, *(name for name in more if is_trained(self.folder, study, name))]


def single_sets(study: Study) -> list[str]:
    """The backbone sets with one expert for each objective."""
    backbones, n = study.training.backbones, len(study.objectives)
    return [name for name, spec in backbones.items() if spec.decided and np.array_equal(spec.mix(n), np.eye(n))]


def compared_methods(study: Study) -> list[str]:
    """The methods of the comparison: those of ``compare.methods``, or all that the study says how to train.

    Raises FieldError for one that it doesn't.
    """
    drawn_on = study.guidance.baselines or study.baselines
    trained: set[str] = {study.baselines[name].kind for name in drawn_on}
    lacking: dict[str, str] = {"genarm": "arm", **{name: name for name in PER_PREFERENCE}}
    able = [method for method in KNOWN if lacking.get(method) is None or lacking[method] in trained]
    able = [method for method in (*able, *STRATEGIES) if study.values or method not in EXPLICIT]
    if not single_sets(study):
        able = [method for method in able if method not in ("rewarded-soup", "mod")]
    if study.compare.methods is None:
        return able
    for method in study.compare.methods:
        if method not in able:
            allowed = f"a study that trains what it needs, or one of {', '.join(able)}"
            raise FieldError("compare.methods", method, allowed)
    return list(dict.fromkeys(study.compare.methods))


CHANCE = ("redrawn-reference", "reference")
"""What a control is held against."""


def shuffled_methods(study: Study) -> list[str]:
    """Those that are trained once more on shuffled rewards: where none are named, if that can be, and says anything."""
    methods = compared_methods(study)
    possible = study.training.method == "dpo" and study.training.rounds == 1
    if study.compare.shuffled is None and not (possible and {*CHANCE} & {*methods}):
        return []
    return study.compare.among("shuffled", methods)


def study_variants(study: Study, folder: StudyFolder) -> list[Variant]:
    """The study itself and its variants, trained or not."""
    spec, methods = study.compare, compared_methods(study)
    made = [Variant("", study, folder, tuple(methods))]
    for steps in dict.fromkeys(spec.steps):
        if steps != study.training.steps:
            made.append(_variant(study, folder, str(steps), spec.at_steps, steps))
    if shuffled := shuffled_methods(study):
        made.append(_variant(study, folder, SHUFFLED, shuffled, study.training.steps))
    return made


def _variant(study: Study, folder: StudyFolder, name: str, methods: Sequence[str], steps: int) -> Variant:
    guidance = study.guidance.model_copy(update={"values": None, "head": None, "baselines": None})
    plain = study.model_copy(update={"guidance": guidance, "values": {}, "baselines": {}})
    # All that its methods are tuned over, as the study's own are; what training has chosen is not chosen anew.
    space = study.compare.space
    sets = {*needed_sets(folder, plain), *(space.base or ()), *(space.guide or ())}
    backbones = {
        key: spec.model_copy(update={"betas": None}) for key, spec in study.training.backbones.items() if key in sets
    }
    own = plain.model_copy(
        update={
            "training": study.training.model_copy(update={"steps": steps, "backbones": backbones}),
            "compare": study.compare.model_copy(update={"space": space.model_copy(update={"values": None})}),
        }
    )
    place = folder.comparison / "variants" / f"{name}-{own.digest}"
    within = folder.within(place, "rewards") if name == SHUFFLED else folder.within(place, "rewards", "rollouts")
    return Variant(name, own, within, tuple(dict.fromkeys(methods)))


def train_variant(variant: Variant, study: Study, folder: StudyFolder, console: Console | None) -> None:
    """Train what is missing of a variant on the study's pool. Ray must be connected. Raises UserError."""
    variant.folder.claim(variant.study)
    if not (variant.folder.rollouts / _POOL).exists():
        _shuffle_rewards(study, folder, variant.folder.rollouts)
        # With the normalisation last, by which a pool is told.
        variant.folder.publish(variant.folder.rollouts / _POOL)
        variant.folder.publish(variant.folder.rollouts)
    train_experts(variant.study, variant.folder, console)


def _shuffle_rewards(study: Study, folder: StudyFolder, rollouts: Path) -> None:
    """The study's pool with its rewards dealt out at random: each answer gets another one's, all objectives together.

    The normalisation is the study's, which a permutation leaves as it is.
    """
    pool = load_pool(folder, study)
    columns = [f"{kind}/{name}" for kind in ("raw", "reward") for name in study.objectives]
    order = np.random.default_rng([study.seed, 11]).permutation(len(pool))
    pool[columns] = pool[columns].to_numpy()[order]
    with atomic_path(rollouts) as partial:
        partial.mkdir()
        pool.to_parquet(partial / _POOL)
        shutil.copyfile(folder.normalisation, partial / folder.normalisation.name)
