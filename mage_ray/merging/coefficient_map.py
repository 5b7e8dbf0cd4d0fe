"""A smooth map from preferences to merging coefficients, in place of the formula's ``B^-T mu``.

Legend: n objectives and as many backbones, mu [n] a preference, lam [n] coefficients, d the degree, P control points.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mage_ray.errors import FieldError
from mage_ray.merging.coefficients import Vector, merging_coefficients, noise_amplification
from mage_ray.preference import preference_grid

MAX_DEGREE = 4
"""Beyond it control points say little of the map, and there are more of them than a search could try."""


@dataclass(frozen=True)
class CoefficientMap:
    """``lam(mu) = sum_a d!/(a_1! ... a_n!) mu^a c_a``: a polynomial of degree d on the simplex in Bernstein's form.

    ``control`` [P, n] are the c_a, in the order of ``preference_grid(n, d + 1)``, whose points are a/d. At the corners
    the map meets its control points; in between it stays in their convex hull (Farin, Curves and Surfaces for CAGD,
    chapter 17), so no ``||lam||_1`` is greater than the greatest of theirs. The formula is the map whose control points
    are its own values there (linear precision).

    Raises FieldError for a degree out of 1 to 4, another number of points, or coefficients that aren't finite.
    """

    degree: int
    control: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if not 1 <= self.degree <= MAX_DEGREE:
            raise FieldError("degree", self.degree, f"1 to {MAX_DEGREE}")
        n = len(self.control[0]) if self.control else 0
        if n < 2:
            raise FieldError("control", [list(point) for point in self.control], "points of 2 coefficients or more")
        wanted = len(control_places(n, self.degree))
        if len(self.control) != wanted or any(len(point) != n for point in self.control):
            got = f"{len(self.control)} points of {n}"
            raise FieldError("control", got, f"{wanted} points of {n} coefficients each, for degree {self.degree}")
        if not np.isfinite(self.control).all():
            raise FieldError("control", [list(point) for point in self.control], "finite numbers")

    def __call__(self, mu: Vector) -> np.ndarray:
        """lam [n] for a preference."""
        powers_Pn = np.power(np.asarray(mu, dtype=np.float64), self._exponents_Pn)
        weights_P = self._multinomials_P * powers_Pn.prod(axis=1)
        return weights_P @ np.asarray(self.control)

    @property
    def norm(self) -> float:
        """The greatest ``||lam||_1`` that a preference may get, as the control points bound it."""
        return max(noise_amplification(np.asarray(point)) for point in self.control)

    def moved(self, offsets_Pn: Sequence[Sequence[float]]) -> CoefficientMap:
        """The map whose control points are these further on."""
        moved = np.asarray(self.control) + np.asarray(offsets_Pn)
        return CoefficientMap(self.degree, tuple(tuple(point) for point in moved.tolist()))

    @cached_property
    def _exponents_Pn(self) -> np.ndarray:
        return np.rint(np.asarray(control_places(len(self.control[0]), self.degree)) * self.degree)

    @cached_property
    def _multinomials_P(self) -> np.ndarray:
        return np.array(
            [math.factorial(self.degree) / math.prod(math.factorial(int(a)) for a in row) for row in self._exponents_Pn]
        )


def control_places(n: int, degree: int) -> list[tuple[float, ...]]:
    """The preference that each control point belongs to, [P, n]."""
    return preference_grid(n, degree + 1)


def formula_map(mix: np.ndarray, degree: int) -> CoefficientMap:
    """``B^T lam = mu`` as a map of that degree, exactly."""
    places = control_places(len(mix), degree)
    return CoefficientMap(degree, tuple(tuple(merging_coefficients(mix, place).tolist()) for place in places))
