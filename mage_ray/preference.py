"""A preference: a point of the simplex over the study's objectives, and grids of such points."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product

from mage_ray.errors import FieldError

TOLERANCE = 1e-3
"""How far a preference's sum may be from 1; within it, the preference is divided by its sum."""

# The 13 points that the Bone Soup reference code evaluates for three objectives (docs/method.md).
_PAPER_GRID_3 = (
    (1, 0, 0), (0, 1, 0), (0, 0, 1),
    (.1, .1, .8), (.1, .8, .1), (.8, .1, .1),
    (.2, .2, .6), (.2, .6, .2), (.6, .2, .2),
    (.2, .4, .4), (.4, .2, .4), (.4, .4, .2),
    (1 / 3, 1 / 3, 1 / 3),
)  # fmt: skip

Preference = tuple[float, ...]


def check_preference(values: Sequence[float], objectives: Sequence[str], field: str = "preference") -> Preference:
    """The preference as floats in the order of ``objectives``, summing to 1.

    Raises FieldError: a wrong number of values, a value that is not finite or negative, or a sum that is further from
    1 than ``TOLERANCE``.
    """
    if len(values) != len(objectives):
        raise FieldError(field, list(values), f"{len(objectives)} numbers, one for each of {', '.join(objectives)}")
    numbers = []
    for name, value in zip(objectives, values, strict=True):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise FieldError(f"{field}.{name}", value, "a finite number, 0 or more")
        if value < 0:
            raise FieldError(f"{field}.{name}", value, "0 or more")
        numbers.append(float(value))
    total = sum(numbers)
    if abs(total - 1) > TOLERANCE:
        raise FieldError(field, f"a sum of {total:.6g}", f"weights that sum to 1 (within {TOLERANCE:g})")
    return tuple(number / total for number in numbers)


def named_preference(weights: Mapping[str, float], objectives: Sequence[str], field: str = "preference") -> Preference:
    """A preference given by name; objectives that it leaves out weigh 0. Raises FieldError as ``check_preference``."""
    for name in weights:
        if name not in objectives:
            raise FieldError(f"{field}.{name}", weights[name], f"objectives of this study: {', '.join(objectives)}")
    return check_preference([weights.get(name, 0.0) for name in objectives], objectives, field)


def parse_preference(text: str, objectives: Sequence[str], field: str = "preference") -> Preference:
    """A preference written ``helpful=0.7,short=0.3``. Raises FieldError for anything else."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, separator, number = (piece.strip() for piece in part.partition("="))
        if not separator or name in weights:
            raise FieldError(field, text, f"each once, as name=weight,…, of: {', '.join(objectives)}")
        try:
            weights[name] = float(number)
        except ValueError:
            raise FieldError(f"{field}.{name}", number, "a finite number, 0 or more") from None
    return named_preference(weights, objectives, field)


def preference_label(preference: Preference) -> str:
    """A preference as part of a file's name: its weights to six digits, ``0.7-0.3``."""
    return "-".join(f"{weight:.6g}" for weight in preference)


def preference_grid(objectives: int, points: int | None = None, field: str = "evaluation.grid") -> list[Preference]:
    """A grid on the simplex of ``objectives`` corners.

    ``points`` None gives the grids of the Bone Soup reference code: 11 points for two objectives, 13 for three
    (docs/method.md), and steps of a quarter beyond. Otherwise ``points`` is the number of equal divisions of an
    edge plus one, so for two objectives the number of points. Order: for two objectives from the second's corner to
    the first's.

    Raises FieldError when ``points``, given as ``field``, is under 2 or there are fewer than two objectives.
    """
    if objectives < 2:
        raise FieldError("objectives", objectives, "two or more")
    if points is None:
        if objectives == 3:
            return [tuple(float(x) for x in point) for point in _PAPER_GRID_3]
        points = 11 if objectives == 2 else 5
    if points < 2:
        raise FieldError(field, points, "2 or more points on an edge")
    steps = points - 1
    heads = product(range(points), repeat=objectives - 1)
    return [tuple(k / steps for k in (*head, steps - sum(head))) for head in heads if sum(head) <= steps]
