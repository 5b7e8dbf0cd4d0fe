"""What only baselines need, trained from the pool as experts are: a policy for each preference, or reward models.

MORLHF: ``training.method`` on the reward that the preference mixes. MODPO: DPO on one objective's pairs with margins
from the others (arXiv:2310.03708). ARM: GenARM's autoregressive reward models, DPO without a reference
(arXiv:2410.08193).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mage_ray.decoding.methods import PER_PREFERENCE
from mage_ray.errors import FieldError, UserError
from mage_ray.folder import StudyFolder
from mage_ray.merging.adapter import ORIGIN_FILE, read_json
from mage_ray.specs import BaselineSpec
from mage_ray.study import Study
from mage_ray.training.experts import Expert, check_training, is_expert, train_missing

if TYPE_CHECKING:
    from rich.console import Console


OWN = ("steps", "learning_rate", "kl_strength")
"""Fields of ``training`` that a set of baselines may have of its own."""


def train_baselines(study: Study, folder: StudyFolder, console: Console | None = None) -> None:
    """Train what is missing of the study's baselines, set after set; as ``train_missing``.

    Raises UserError, too, when one that is there was trained as another study says.
    """
    check_baselines(study)
    experts = {name: baseline_experts(study, folder, name) for name in study.baselines}
    for expert in (expert for own in experts.values() for expert in own):
        _check_trained_as(expert)
    for name, own in experts.items():
        train_missing(own_study(study, study.baselines[name]), folder, own, console)


def check_baselines(study: Study) -> None:
    """Raises FieldError when the study has no ``baselines``, or fields of ``training`` don't go together with them."""
    if not study.baselines:
        raise FieldError("baselines", "nothing", "a part of the study that says which baselines are trained")
    for spec in study.baselines.values():
        check_training(own_study(study, spec))


def own_study(study: Study, spec: BaselineSpec) -> Study:
    """The study whose ``training`` is that of a set of baselines."""
    own: dict[str, Any] = {name: value for name in OWN if (value := getattr(spec, name)) is not None}
    if spec.kind != "morlhf":
        own["method"] = "dpo"
    if spec.kind == "arm":
        own["rounds"] = 1  # A reward model has no samples of its own to go on with.
    return study.model_copy(update={"training": study.training.model_copy(update=own)})


def baseline_experts(study: Study, folder: StudyFolder, name: str) -> list[Expert]:
    """The experts of a set of baselines, in the order of ``Study.members``."""
    spec, names = study.baselines[name], study.objective_names
    n = len(names)
    units = [tuple(float(i == j) for j in range(n)) for i in range(n)]
    rows = study.baseline_grid(name) if spec.kind in PER_PREFERENCE else units
    training = own_study(study, spec).training
    record = {"baseline": {"kind": spec.kind} | {name: getattr(training, name) for name in OWN}}
    # Checkpoints of a training that was another one are none of this one's.
    variant = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:8]
    return [
        Expert(
            dict(zip(names, row, strict=True)),
            (folder.baseline(name, member),),
            variant,
            "mixed" if spec.kind == "morlhf" else spec.kind,
            record,
        )
        for row, member in zip(rows, study.members(name), strict=True)
    ]


def _check_trained_as(expert: Expert) -> None:
    place: Path = expert.places[0]
    if not is_expert(place):
        return
    if read_json(place / ORIGIN_FILE, place.name).get("baseline") != expert.record["baseline"]:
        raise UserError(
            f"{place}: trained as another `baselines` said, allowed: the same, or delete it to train it anew"
        )
