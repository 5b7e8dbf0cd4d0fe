"""Rows and plans: every decode-time method is a weighted list of rows (METHOD.md section 3).

A *row* is one forward of the model under one coefficient vector over the adapter bank. A *plan* says which rows a
request runs and how their log-probabilities are added up. Nothing past this module knows a method's name; a new method
is a new function from a preference to a plan.

Legend: n objectives, K experts in the bank, mu [n] the preference, lam [n] merging coefficients, w guidance strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from mage_ray.errors import FieldError
from mage_ray.merging.coefficients import Vector, extrapolated, merging_coefficients
from mage_ray.merging.value_head import Kind


@dataclass(frozen=True)
class Row:
    """One forward of the backbone with experts mixed by ``coefficients`` [K]; all zeros is the reference model.

    Without a ``head`` it is a policy, whose log-probabilities count. With one it is a value model, its head mixed by
    the same coefficients: a *vocabulary* head scores all tokens from the state at hand, ``Q(s, a)``; a *scalar* head
    looks ahead at each candidate, ``V(s + a)``.
    """

    coefficients: tuple[float, ...]
    head: Kind | None = None


@dataclass(frozen=True)
class Cadence:
    """At which tokens the guide runs; the base alone draws the others. The defaults guide every token.

    ``every`` b guides the first of every b tokens. ``entropy`` guides where the base's next-token entropy, in nats over
    the whole vocabulary, is at least that; skipped tokens are caught up in one forward. Both may be combined: a token
    is guided when both say so. ``speculate`` m lets the base propose m tokens that the guide checks in one forward, by
    the rule of speculative sampling (arXiv:2211.17192), so that the distribution is exactly the guided one; it goes
    with neither of the others. Raises FieldError for a value that isn't allowed.
    """

    every: int = 1
    entropy: float = 0.0
    speculate: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise FieldError("every", self.every, "1 or more")
        if not (math.isfinite(self.entropy) and self.entropy >= 0):
            raise FieldError("entropy", self.entropy, "a finite number of nats, 0 or more")
        if self.speculate < 0:
            raise FieldError("speculate", self.speculate, "0 or more")
        if self.speculate and (self.every > 1 or self.entropy > 0):
            raise FieldError("speculate", self.speculate, "0 where every or entropy is set")

    @property
    def always(self) -> bool:
        """Whether all rows run at every token."""
        return self == Cadence()


@dataclass(frozen=True)
class Plan:
    """``log pi(a|s) = sum_r weights[r] * S_r(s, a) - log Z(s)``, S a row's log-probability or, of a value model, value.

    With ``candidates`` set, ``a`` ranges over that many most likely tokens of ``rows[0]``, the base; else over the
    whole vocabulary. The temperature divides the sum, so where the weights add up to S the temperature of a single row
    would be ``temperature / S``; the weights of every method here add up to 1.

    ``values``, one for each row, make up the guide's own score ``G(s, a) = sum_r values[r] * S_r(s, a)``, with values
    centred over the candidates; empty where the plan has no guide. ``cadence`` says when the guide runs, ``valued``
    whether its scores of the drawn tokens are wanted.

    Raises FieldError for no rows, another number of weights or values than rows, fewer than 1 candidate, a base that is
    a value model, or rows that look ahead at no candidates in particular or at what is speculated.
    """

    rows: tuple[Row, ...]
    weights: tuple[float, ...]
    candidates: int | None = None
    values: tuple[float, ...] = ()
    cadence: Cadence = Cadence()
    valued: bool = False

    def __post_init__(self) -> None:
        if not self.rows:
            raise FieldError("plan.rows", "none", "1 or more")
        for name, numbers in (("weights", self.weights), ("values", self.values)):
            if len(numbers) != len(self.rows) and (name == "weights" or numbers):
                raise FieldError(f"plan.{name}", list(numbers), f"{len(self.rows)} numbers, one for each row")
        if self.candidates is not None and self.candidates < 1:
            raise FieldError("candidates", self.candidates, "1 or more")
        if self.rows[0].head is not None:
            raise FieldError("plan.rows", f"a value model ({self.rows[0].head}) first", "a policy first, the base")
        if any(row.head == "scalar" for row in self.rows):
            if self.candidates is None:
                raise FieldError("candidates", None, "a number, where scalar values look ahead at each candidate")
            if self.cadence.speculate:
                raise FieldError("speculate", self.cadence.speculate, "0 where scalar values look ahead")

    @classmethod
    def of(cls, terms: Iterable[tuple[Vector | Row, float]], candidates: int | None = None) -> Plan:
        """A plan from (coefficients, weight) terms: equal rows become one, their weights added; a row of weight 0 goes.

        The first term's row stays first, whatever its weight, when it chooses the candidates.
        """
        weights = _by_row(terms)
        base = next(iter(weights), None)
        kept = [row for row, w in weights.items() if w != 0 or (row == base and candidates is not None)]
        return cls._checked(kept, weights, candidates)

    @classmethod
    def guided(
        cls,
        base: Vector,
        guide: Iterable[tuple[Vector | Row, float]],
        strength: float,
        candidates: int | None = None,
        valued: bool = False,
    ) -> Plan:
        """The base plus ``strength`` times the guide's terms (METHOD.md section 2): ``log pi_base + w * G``.

        At strength 0 no guide row runs, unless ``valued`` asks for the guide's scores all the same.
        """
        values = _by_row(guide)
        terms: list[tuple[Vector | Row, float]] = [(base, 1.0)]
        terms += [(row, strength * value) for row, value in values.items()]
        weights = _by_row(terms)
        first = next(iter(weights))
        kept = [row for row, w in weights.items() if w != 0 or row == first or (valued and values[row] != 0)]
        plan = cls._checked(kept, weights, candidates)
        with_values = tuple(values.get(row, 0.0) for row in kept)
        return replace(plan, values=with_values if any(with_values) else (), valued=valued)

    @classmethod
    def _checked(cls, rows: list[Row], weights: Mapping[Row, float], candidates: int | None) -> Plan:
        if not any(weights[row] for row in rows):
            raise FieldError("plan.weights", list(weights.values()), "at least one that is not 0")
        if not all(math.isfinite(number) for row in rows for number in (weights[row], *row.coefficients)):
            raise FieldError("plan", [weights[row] for row in rows], "finite weights and coefficients")
        return cls(tuple(rows), tuple(weights[row] for row in rows), candidates)

    def at(self, cadence: Cadence) -> Plan:
        """The same plan, guided at the tokens that ``cadence`` says. Raises FieldError when there is no guide."""
        if not cadence.always and not self.values and len(self.rows) > 1:
            raise FieldError("cadence", cadence, "one that guides every token: this plan has no guide to leave out")
        return replace(self, cadence=cadence)

    @property
    def ahead(self) -> int:
        """Positions that it takes beyond its tokens, to look at candidates."""
        return self.candidates or 0 if any(row.head == "scalar" for row in self.rows) else 0

    @property
    def eager(self) -> bool:
        """Whether all rows run at every token."""
        return self.cadence.always or len(self.rows) == 1


def _by_row(terms: Iterable[tuple[Vector | Row, float]]) -> dict[Row, float]:
    """The weights of the terms' rows, equal rows added up, in order of appearance."""
    weights: dict[Row, float] = {}
    for term, weight in terms:
        given = term if isinstance(term, Row) else Row(tuple(term))
        # + 0.0 turns -0.0 into 0.0, so that both are one row in prints and exports.
        row = Row(tuple(float(c) + 0.0 for c in given.coefficients), given.head)
        weights[row] = weights.get(row, 0.0) + float(weight)
    return weights


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
    cadence: Cadence = Cadence()
    valued: bool = False
    """Whether guided plans report the guide's scores even at strength 0."""
    values: str | None = None
    """The set of explicit value models, one for each row of its mix; None where none were trained."""
    head: Kind = "vocabulary"
    """Which of their heads guides."""

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

    def guided(self, base: Vector, guide: Iterable[tuple[Vector | Row, float]]) -> Plan:
        """The base steered by the guide's terms, with this setup's strength, candidates and cadence."""
        return Plan.guided(base, guide, self.strength, self.candidates, self.valued).at(self.cadence)

    def single_experts(self) -> Backbones:
        """The set with one expert per objective. Raises FieldError when none was trained."""
        for backbones in self.sets.values():
            if backbones.single:
                return backbones
        raise FieldError("method", "one that mixes single-objective experts", "a study with a backbone set of B = I")

    def value_set(self) -> str:
        """The name of the set of explicit value models. Raises FieldError when there are none."""
        if self.values is None:
            raise FieldError("method", "one guided by explicit values", "a study with value models (mage-ray values)")
        return self.values

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
    guide = [(setup.merged(setup.guide, mu), 1.0), (np.zeros(setup.size), -1.0)]
    return setup.guided(setup.merged(setup.base, mu), guide)


def mage_i_e(mu: Vector, setup: Setup) -> Plan:
    """Base soup steered by the *ensemble* of implicit value models (MAGE, arXiv:2510.03782)."""
    return _ensembled_guide(setup.merged(setup.base, mu), mu, setup)


def _ensembled_guide(base: np.ndarray, mu: Vector, setup: Setup) -> Plan:
    guides = setup.one_by_one(setup.guide, mu)
    total = sum(lam for _, lam in guides)
    return setup.guided(base, [*guides, (np.zeros(setup.size), -total)])


def mage_e_m(mu: Vector, setup: Setup) -> Plan:
    """Base soup steered by the *merged* explicit value model, head included: weights 1, w (MAGE, arXiv:2510.03782)."""
    merged = Row(tuple(setup.merged(setup.value_set(), mu).tolist()), setup.head)
    return setup.guided(setup.merged(setup.base, mu), [(merged, 1.0)])


def mage_e_e(mu: Vector, setup: Setup) -> Plan:
    """Base soup steered by the *ensemble* of explicit value models, ``w lam_i`` each (MAGE, arXiv:2510.03782)."""
    models = setup.one_by_one(setup.value_set(), mu)
    guide = [(Row(tuple(coefficients.tolist()), setup.head), lam) for coefficients, lam in models]
    return setup.guided(setup.merged(setup.base, mu), guide)


METHODS: dict[str, Callable[[Vector, Setup], Plan]] = {
    "reference": reference,
    "rewarded-soup": rewarded_soup,
    "bone-soup": bone_soup,
    "extrapolated-soup": extrapolated_soup,
    "mod": mod,
    "proxy-tuning": proxy_tuning,
    "mage-i-m": mage_i_m,
    "mage-i-e": mage_i_e,
    "mage-e-m": mage_e_m,
    "mage-e-e": mage_e_e,
}


EXPLICIT = ("mage-e-m", "mage-e-e")
"""Methods for studies with explicit value models."""


def plan_for(method: str, mu: Vector, setup: Setup) -> Plan:
    """The plan of a method by its name. Raises FieldError for a name that isn't one."""
    if method not in METHODS:
        raise FieldError("method", method, f"one of {', '.join(METHODS)}")
    return METHODS[method](mu, setup)
