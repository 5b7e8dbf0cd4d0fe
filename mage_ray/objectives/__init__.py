"""Objectives: reward functions that take a batch of prompts and completions and return an array of raw values.

``load`` makes one from a study's entry, ``score`` calls one and checks what comes back, ``probe`` tries one out, and a
``Normaliser`` brings all of them to one scale. Nothing heavy is imported before an objective is first called.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from mage_ray.errors import FieldError
from mage_ray.objectives.base import Direction, Objective, check_direction, probe, score
from mage_ray.objectives.classifier import Classifier
from mage_ray.objectives.embedding import Relevance
from mage_ray.objectives.function import load_function
from mage_ray.objectives.lexical import Brevity, Positivity, Readability
from mage_ray.objectives.normalise import Normaliser
from mage_ray.objectives.reward import load_reward

if TYPE_CHECKING:
    from mage_ray.folder import StudyFolder

__all__ = ["TYPES", "Direction", "Normaliser", "Objective", "load", "probe", "score"]

TYPES: dict[str, Callable[..., Objective]] = {
    "positivity": Positivity,
    "readability": Readability,
    "brevity": Brevity,
    "relevance": Relevance,
    "classifier": Classifier,
    "reward": load_reward,
    "function": load_function,
}
"""The types of objective. A type's options are its parameters, but for what ``load`` gives."""
_GIVEN = ("field", "direction", "folder")


def load(
    name: str,
    type: str,
    options: Mapping[str, Any],
    direction: str | None = None,
    folder: StudyFolder | None = None,
) -> Objective:
    """The objective ``name`` of the given type; ``direction`` takes the place of the type's own.

    ``folder`` is the study's, where type ``reward`` finds the models that the study has trained. Models are loaded on
    the first call, not here. Raises FieldError: an unknown type (``objectives.<name>.type``), an unknown, missing or
    wrong option (``objectives.<name>.<option>``).
    """
    field = f"objectives.{name}"
    if type not in TYPES:
        raise FieldError(f"{field}.type", type, f"one of {', '.join(TYPES)}")
    parameters = inspect.signature(TYPES[type]).parameters
    allowed = [option for option in parameters if option not in _GIVEN]
    for option, value in options.items():
        if option not in allowed:
            options_of_type = f"the options of {type}: {', '.join(allowed)}" if allowed else f"{type} has no options"
            raise FieldError(f"{field}.{option}", value, options_of_type)
    for option in allowed:
        if parameters[option].default is inspect.Parameter.empty and option not in options:
            raise FieldError(f"{field}.{option}", "nothing", f"{type} needs it")
    arguments = dict(options)
    if "field" in parameters:
        arguments["field"] = field
    if "folder" in parameters:
        arguments["folder"] = folder
    if direction is not None:
        arguments["direction"] = check_direction(direction, f"{field}.direction")
    return TYPES[type](**arguments)
