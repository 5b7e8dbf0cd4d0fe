"""A reward model that the study itself has trained (``mage-ray rewards``) as an objective."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mage_ray.errors import FieldError
from mage_ray.objectives.base import Direction
from mage_ray.objectives.classifier import Classifier

if TYPE_CHECKING:
    from mage_ray.folder import StudyFolder


RECORDS = ("mage_ray.json", "quality.json")


def load_reward(
    folder: StudyFolder | None,
    field: str = "objectives.reward",
    model: str | None = None,
    direction: Direction = "maximise",
    output: str = "logit",
    batch_size: int = 32,
    precision: str = "float32",
) -> Classifier:
    """The entry ``model`` of the study's ``rewards``; the one of the objective's own name unless given.

    It sees a prompt and a completion as it was trained to. ``output``, ``batch_size`` and ``precision`` are the
    classifier's. Raises FieldError ``<field>.model`` when it isn't in ``folder``.
    """
    name = model or field.rpartition(".")[2]
    spec = None if folder is None else _trained_as(folder.rewards / name)
    if folder is None or spec is None:
        raise FieldError(f"{field}.model", name, "a reward model that has been trained (mage-ray rewards)")
    return Classifier(
        str(folder.rewards / name),
        "hh" if spec.get("label") is None else "completion",
        field,
        direction,
        output=output,
        batch_size=batch_size,
        max_length=spec["max_length"],
        precision=precision,
    )


def reward_digests(folder: StudyFolder, models: Iterable[str]) -> dict[str, str]:
    """By name what tells these trained reward models from others of the same training: their records and qualities.

    Empty of those that aren't trained.
    """
    found = {}
    for name in models:
        with suppress(OSError):
            records = [(folder.rewards / name / file).read_bytes() for file in RECORDS]
            found[name] = hashlib.sha256(b"\n".join(records)).hexdigest()[:12]
    return found


def _trained_as(place: Path) -> dict[str, Any] | None:
    """What the record of a reward model in ``place`` says of its training; None where there is no such record."""
    try:
        spec = json.loads((place / "mage_ray.json").read_text())["rewards"]
        return spec if isinstance(spec["max_length"], int) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
