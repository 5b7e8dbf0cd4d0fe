"""Rows and plans: every decode-time method is a weighted list of rows (METHOD.md section 3).

A *row* is one forward of the model under one coefficient vector over the adapter bank. A *plan* says which rows a
request runs and how their log-probabilities are added up. Nothing past this module knows a method's name; a new method
is a new function from a preference to a plan.

Legend: n objectives, K experts in the bank, mu [n] the preference, lam [n] merging coefficients, w guidance strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from mage_ray.errors import FieldError
from mage_ray.merging.coefficients import Vector, extrapolated, merging_coefficients


@dataclass(frozen=True)
class Row:
    """One forward of the backbone with experts mixed by ``coefficients`` [K]; all zeros is the reference model."""

    coefficients: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """``log pi(a|s) = sum_r weights[r] * log pi_rows[r](a|s) - log Z(s)``.

    With ``candidates`` set, ``a`` ranges over that many most likely tokens of ``rows[0]``, the base; else over the
    whole vocabulary. The temperature divides the sum, so where the weights add up to S the temperature of a single row
    would be ``temperature / S``; the weights of every method here add up to 1.
    """

    rows: tuple[Row, ...]
    weights: tuple[float, ...]
    candidates: int | None = None

    @classmethod
    def of(cls, terms: Iterable[tuple[Vector, float]], candidates: int | None = None) -> Plan:
        """A plan from (coefficients, weight) terms: equal rows become one, their weights added; a row of weight 0 goes.

        The first term's row stays first, whatever its weight, when it chooses the candidates.
        """
        weights: dict[Row, float] = {}
        for coefficients, weight in terms:
            # + 0.0 turns -0.0 into 0.0, so that both are one row in prints and exports.
            row = Row(tuple(float(c) + 0.0 for c in coefficients))
            weights[row] = weights.get(row, 0.0) + float(weight)
        base = next(iter(weights))
        kept = {row: w for row, w in weights.items() if w != 0 or (row == base and candidates is not None)}
        if not any(kept.values()):
            raise FieldError("plan.weights", list(weights.values()), "at least one that is not 0")
        if not all(math.isfinite(number) for row, w in kept.items() for number in (w, *row.coefficients)):
            raise FieldError("plan", list(kept.values()), "finite weights and coefficients")
        return cls(tuple(kept), tuple(kept.values()), candidates)


@dataclass(frozen=True)
class Backbones:
    """A set of experts in the bank: ``experts[i]`` is the bank's index of the expert trained on row i of ``mix``."""

    experts: tuple[int, ...]
    mix: np.ndarray

    @property
    def single(self) -> bool:
        """Whether each expert was trained on one objective alone."""
        return bool(np.array_equal(self.mix, np.eye(len(self.mix))))


@dataclass(frozen=True)
class Setup:
    """What a method may draw on, and the constants that a request may override.

    ``size`` is K; ``extrapolation`` [n] is alpha for each objective's corner.
    """

    size: int
    sets: Mapping[str, Backbones]
    base: str
    guide: str
    strength: float = 1.0
    candidates: int = 50
    extrapolation: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength >= 0):
            raise FieldError("strength", self.strength, "a finite number, 0 or more")
        if self.candidates < 1:
            raise FieldError("candidates", self.candidates, "1 or more")

    def over_bank(self, backbones: Backbones, lam: Vector) -> np.ndarray:
        """Coefficients of a set's experts as coefficients [K] over the whole bank."""
        coefficients = np.zeros(self.size)
        coefficients[list(backbones.experts)] = lam
        return coefficients

    def merged(self, name: str, mu: Vector) -> np.ndarray:
        """The bank coefficients [K] of the merge of set ``name`` for a preference."""
        return self.over_bank(self.sets[name], merging_coefficients(self.sets[name].mix, mu))

    def single_experts(self) -> Backbones:
        """The set with one expert per objective. Raises FieldError when none was trained."""
        for backbones in self.sets.values():
            if backbones.single:
                return backbones
        raise FieldError("method", "one that mixes single-objective experts", "a study with a backbone set of B = I")

    def one_by_one(self, name: str, mu: Vector) -> list[tuple[np.ndarray, float]]:
        """Each expert of a set as (its row's coefficients [K], its merging coefficient)."""
        backbones = self.sets[name]
        lam = merging_coefficients(backbones.mix, mu)
        units = np.eye(len(lam))
        return [(self.over_bank(backbones, unit), float(x)) for unit, x in zip(units, lam, strict=True)]


def reference(mu: Vector, setup: Setup) -> Plan:
    """The model that the experts were trained from, whatever the preference."""
    return Plan.of([(np.zeros(setup.size), 1.0)])


def rewarded_soup(mu: Vector, setup: Setup) -> Plan:
    """Single-objective experts merged with ``lam = mu`` (Rewarded Soups, arXiv:2306.04488)."""
    return Plan.of([(setup.over_bank(setup.single_experts(), mu), 1.0)])


def bone_soup(mu: Vector, setup: Setup) -> Plan:
    """The base's backbones merged with ``B^T lam = mu`` (Bone Soup, arXiv:2502.10762)."""
    return Plan.of([(setup.merged(setup.base, mu), 1.0)])


def extrapolated_soup(mu: Vector, setup: Setup) -> Plan:
    """The base's soup pushed away from the reference: ``(1 + alpha . mu) lam(mu)`` (METHOD.md section 1)."""
    lam = merging_coefficients(setup.sets[setup.base].mix, mu)
    return Plan.of([(setup.over_bank(setup.sets[setup.base], extrapolated(lam, mu, setup.extrapolation)), 1.0)])


def mod(mu: Vector, setup: Setup) -> Plan:
    """Single-objective experts ensembled: ``sum_i mu_i log pi_i`` (MOD, arXiv:2406.18853)."""
    single = setup.single_experts()
    return Plan.of([(setup.over_bank(single, unit), x) for unit, x in zip(np.eye(len(mu)), mu, strict=True)])


def proxy_tuning(mu: Vector, setup: Setup) -> Plan:
    """The reference steered by each guide expert's own log-ratio, ``w lam_i`` each (proxy tuning, arXiv:2401.08565)."""
    return _ensembled_guide(np.zeros(setup.size), mu, setup)


def mage_i_m(mu: Vector, setup: Setup) -> Plan:
    """Base soup steered by the *merged* implicit value model: weights 1, w, -w (MAGE, arXiv:2510.03782)."""
    base, guide, w = setup.merged(setup.base, mu), setup.merged(setup.guide, mu), setup.strength
    return Plan.of([(base, 1.0), (guide, w), (np.zeros(setup.size), -w)], setup.candidates)


def mage_i_e(mu: Vector, setup: Setup) -> Plan:
    """Base soup steered by the *ensemble* of implicit value models (MAGE, arXiv:2510.03782)."""
    return _ensembled_guide(setup.merged(setup.base, mu), mu, setup)


def _ensembled_guide(base: np.ndarray, mu: Vector, setup: Setup) -> Plan:
    guides = setup.one_by_one(setup.guide, mu)
    w, total = setup.strength, sum(lam for _, lam in guides)
    terms = [(base, 1.0), *((row, w * lam) for row, lam in guides), (np.zeros(setup.size), -w * total)]
    return Plan.of(terms, setup.candidates)


METHODS: dict[str, Callable[[Vector, Setup], Plan]] = {
    "reference": reference,
    "rewarded-soup": rewarded_soup,
    "bone-soup": bone_soup,
    "extrapolated-soup": extrapolated_soup,
    "mod": mod,
    "proxy-tuning": proxy_tuning,
    "mage-i-m": mage_i_m,
    "mage-i-e": mage_i_e,
}


def plan_for(method: str, mu: Vector, setup: Setup) -> Plan:
    """The plan of a method by its name. Raises FieldError for a name that isn't one."""
    if method not in METHODS:
        raise FieldError("method", method, f"one of {', '.join(METHODS)}")
    return METHODS[method](mu, setup)
