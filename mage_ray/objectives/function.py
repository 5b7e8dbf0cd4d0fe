"""A user's own Python function as an objective."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mage_ray.errors import FieldError
from mage_ray.objectives.base import Direction, check_direction, describe_error

_FORM = "module:name of a function f(prompts, completions) that returns an array"


@dataclass(frozen=True)
class Function:
    """A callable with a declared direction and range; ``score`` checks what it returns."""

    target: Callable[[Sequence[str], Sequence[str]], np.ndarray]
    direction: Direction
    low: float
    high: float

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        return self.target(prompts, completions)


def load_function(
    path: str,
    field: str = "objectives.function",
    direction: Direction | None = None,
    low: float | None = None,
    high: float | None = None,
) -> Function:
    """The function, object or class at ``path`` = ``package.module:name``; a class is made once, without arguments.

    ``direction`` (needed), ``low`` and ``high`` (without bound) may be attributes of the target instead. The module is
    imported now. Raises FieldError ``<field>.<option>``.
    """
    target = _find(path, f"{field}.path")
    declared = direction or getattr(target, "direction", None)
    checked = check_direction("nothing" if declared is None else declared, f"{field}.direction")
    bounds = []
    for name, value, default in (("low", low, -math.inf), ("high", high, math.inf)):
        bound = value if value is not None else getattr(target, name, default)
        if isinstance(bound, bool) or not isinstance(bound, int | float) or math.isnan(bound):
            raise FieldError(f"{field}.{name}", bound, "a number, .inf or -.inf")
        bounds.append(float(bound))
    if not bounds[0] < bounds[1]:
        raise FieldError(f"{field}.low", bounds[0], f"a number below high ({bounds[1]:g})")
    return Function(target, checked, *bounds)


def _find(path: object, field: str) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    module_name, _, name = path.partition(":") if isinstance(path, str) else ("", "", "")
    if not (module_name and name) or module_name.startswith("."):
        raise FieldError(field, path, _FORM)
    try:
        target: Any = importlib.import_module(module_name)
        for part in name.split("."):
            target = getattr(target, part)
        if isinstance(target, type):
            target = target()
    except Exception as error:  # A user's module may raise anything while it is imported.
        raise FieldError(field, path, f"{_FORM}, importable here ({describe_error(error)})") from error
    if not callable(target):
        raise FieldError(field, path, _FORM)
    return target
