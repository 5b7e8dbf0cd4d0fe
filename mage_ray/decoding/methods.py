"""The methods: each is a function from a preference to a plan. Nothing past this module knows a method's name.

Most of them are a *base*, the coefficients of one merged policy, steered by a *guide*, weighted rows of value models.

Legend: n objectives, K experts in the bank, mu [n] the preference, lam [n] merging coefficients, w guidance strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np

from mage_ray.decoding.plan import Cadence, Plan, Row
from mage_ray.errors import FieldError
from mage_ray.merging.coefficient_map import CoefficientMap
from mage_ray.merging.coefficients import Vector, extrapolated, merging_coefficients
from mage_ray.preference import TOLERANCE, Preference

if TYPE_CHECKING:
    from mage_ray.merging.value_head import Kind

Terms = list[tuple[Vector | Row, float]]

Baseline = Literal["morlhf", "modpo", "arm"]
"""What a set that only a baseline draws on was trained as (``mage_ray.training.baselines``)."""

Strength = float | tuple[float, ...]
"""w: for all preferences, or [n], one for each objective, of which a preference mu gets ``w . mu`` (derived)."""


@dataclass(frozen=True)
class Backbones:
    """A set of experts in the bank: ``experts[i]`` is the bank's index of the one trained on row i of ``mix`` [m, n].

    Those of a set of value models are no policies. Those of a ``baseline`` are merged with nothing: policies, each
    trained for the preference that is its row, or autoregressive reward models, one for each objective.
    """

    experts: tuple[int, ...]
    mix: np.ndarray
    value_models: bool = False
    baseline: Baseline | None = None

    @property
    def single(self) -> bool:
        """Whether each expert is a policy that was trained on one objective alone, to be merged."""
        n = self.mix.shape[1]
        return not self.value_models and self.baseline is None and bool(np.array_equal(self.mix, np.eye(n)))


@dataclass(frozen=True)
class Setup:
    """What a method may draw on, and the constants that a request may override.

    ``size`` is K; ``extrapolation`` [n] is alpha for each objective's corner, of the extrapolated soup, and
    ``base_extrapolation`` that of every other method's base. ``base_map`` and ``guide_map`` give the coefficients of
    these sets where the formula's aren't wanted.
    """

    size: int
    sets: Mapping[str, Backbones]
    base: str
    guide: str
    strength: Strength = 1.0
    candidates: int = 50
    extrapolation: tuple[float, ...] = ()
    base_extrapolation: tuple[float, ...] = ()
    base_map: CoefficientMap | None = None
    guide_map: CoefficientMap | None = None
    cadence: Cadence = Cadence()  # noqa: RUF009 (frozen)
    valued: bool = False
    """Whether guided plans report the guide's scores even at strength 0."""
    values: str | None = None
    """The set of explicit value models; None where none were trained."""
    head: Kind = "vocabulary"
    """Which of their heads guides."""
    value_strength: Strength | None = None
    """Of explicit guides, whose scores are in units of reward; ``strength`` where it is None."""
    guides: Setup | None = None
    """What guides draw on where they are another model's, with a bank of its own; their rows live at home 1."""

    def __post_init__(self) -> None:
        for field in ("strength", "value_strength"):
            value = getattr(self, field)
            if value is not None and not all(math.isfinite(w) and w >= 0 for w in _each(value)):
                raise FieldError(field, value, "a finite number, 0 or more")
        if self.candidates < 1:
            raise FieldError("candidates", self.candidates, "1 or more")

    def given(
        self,
        strength: float | None = None,
        candidates: int | None = None,
        cadence: Cadence | None = None,
        valued: bool = False,
    ) -> Setup:
        """The same with what a request gives in place of the study's constants; one strength is for every guide."""
        given = {"strength": strength, "candidates": candidates, "cadence": cadence}
        setup = replace(self, valued=valued, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        return setup if strength is None else replace(setup, value_strength=None)

    def over_bank(self, backbones: Backbones, lam: Vector) -> np.ndarray:
        """Coefficients of a set's experts as coefficients [K] over the whole bank."""
        coefficients = np.zeros(self.size)
        coefficients[list(backbones.experts)] = lam
        return coefficients

    def base_coefficients(self, mu: Vector, alpha: Vector) -> np.ndarray:
        """The bank coefficients [K] of the base's soup for a preference, extrapolated by ``alpha`` [n]; () is none."""
        own = self.sets[self.base]
        lam = merging_coefficients(own.mix, mu) if self.base_map is None else self.base_map(mu)
        return self.over_bank(own, extrapolated(lam, mu, alpha) if len(alpha) else lam)

    def guide_coefficients(self, name: str, mu: Vector) -> np.ndarray:
        """The coefficients [n] of a guide's set for a preference."""
        return merging_coefficients(self.sets[name].mix, mu) if self.guide_map is None else self.guide_map(mu)

    def strength_at(self, mu: Vector, explicit: bool) -> float:
        """w of explicit guides, or of the others, at a preference."""
        strength = self.value_strength if explicit and self.value_strength is not None else self.strength
        return float(np.dot(strength, mu)) if isinstance(strength, tuple) else strength

    def guided(self, base: Vector, guide: Terms, mu: Vector) -> Plan:
        """The base steered by the guide's terms, with this setup's strength, candidates and cadence."""
        explicit = any(isinstance(term, Row) and term.head is not None for term, _ in guide)
        strength = self.strength_at(mu, explicit)
        return Plan.guided(base, guide, strength, self.candidates, self.valued).at(self.cadence)

    def single_experts(self) -> Backbones:
        """The set with one expert per objective. Raises FieldError when none was trained."""
        for backbones in self.sets.values():
            if backbones.single:
                return backbones
        raise FieldError("method", "one that mixes single-objective experts", "a study with a backbone set of B = I")

    def baseline_set(self, baseline: Baseline) -> Backbones:
        """The first set that was trained as this baseline. Raises FieldError when none was."""
        for backbones in self.sets.values():
            if backbones.baseline == baseline:
                return backbones
        raise FieldError(
            "method", f"one that needs {baseline}", f"a study whose {baseline} is trained (mage-ray baselines)"
        )

    def value_set(self) -> str:
        """The name of the set of explicit value models. Raises FieldError when there are none."""
        if self.values is None:
            raise FieldError("method", "one guided by explicit values", "a study with value models (mage-ray values)")
        return self.values

    def one_by_one(self, name: str, mu: Vector) -> list[tuple[np.ndarray, float]]:
        """Each expert of a guide's set as (its row's coefficients [K], its merging coefficient)."""
        lam = self.guide_coefficients(name, mu)
        units = np.eye(len(lam))
        return [(self.over_bank(self.sets[name], unit), float(x)) for unit, x in zip(units, lam, strict=True)]


def _each(strength: Strength) -> tuple[float, ...]:
    return strength if isinstance(strength, tuple) else (strength,)


def _reference(mu: Vector, setup: Setup) -> np.ndarray:
    return np.zeros(setup.size)


def _rewarded_soup(mu: Vector, setup: Setup) -> np.ndarray:
    return setup.over_bank(setup.single_experts(), mu)


def _bone_soup(mu: Vector, setup: Setup) -> np.ndarray:
    return setup.base_coefficients(mu, setup.base_extrapolation)


BASES: dict[str, Callable[[Vector, Setup], np.ndarray]] = {
    "reference": _reference,
    "rewarded-soup": _rewarded_soup,
    "bone-soup": _bone_soup,
}
"""The coefficients of a base: the model that the experts were trained from; single-objective experts merged with
``lam = mu`` (Rewarded Soups, arXiv:2306.04488); the base's backbones merged with ``B^T lam = mu`` (Bone Soup,
arXiv:2502.10762)."""


def _implicit_merged(mu: Vector, setup: Setup) -> Terms:
    merged = setup.over_bank(setup.sets[setup.guide], setup.guide_coefficients(setup.guide, mu))
    return [(merged, 1.0), (np.zeros(setup.size), -1.0)]


def _implicit_ensembled(mu: Vector, setup: Setup) -> Terms:
    guides: Terms = [*setup.one_by_one(setup.guide, mu)]
    return [*guides, (np.zeros(setup.size), -sum(lam for _, lam in guides))]


def _explicit_merged(mu: Vector, setup: Setup) -> Terms:
    name = setup.value_set()
    merged = setup.over_bank(setup.sets[name], setup.guide_coefficients(name, mu))
    return [(Row(tuple(merged.tolist()), setup.head), 1.0)]


def _explicit_ensembled(mu: Vector, setup: Setup) -> Terms:
    models = setup.one_by_one(setup.value_set(), mu)
    return [(Row(tuple(coefficients.tolist()), setup.head), lam) for coefficients, lam in models]


GUIDES: dict[str, Callable[[Vector, Setup], Terms]] = {
    "implicit-merged": _implicit_merged,
    "implicit-ensembled": _implicit_ensembled,
    "explicit-merged": _explicit_merged,
    "explicit-ensembled": _explicit_ensembled,
}
"""The rows of a guide and their weights: the log-ratio of experts to the reference, or the values of value models,
whose parameters (a value model's head included) or whose scores are mixed by ``lam`` (docs/method.md)."""


def steered(base: str, guide: str | None, mu: Vector, setup: Setup) -> Plan:
    """A base by its name in ``BASES``, steered by a guide by its name in ``GUIDES``, or alone."""
    coefficients = BASES[base](mu, setup)
    return Plan.of([(coefficients, 1.0)]) if guide is None else _steered(coefficients, GUIDES[guide], mu, setup)


def _steered(base: Vector, guide: Callable[[Vector, Setup], Terms], mu: Vector, setup: Setup) -> Plan:
    """A base steered by a guide, wherever its rows live."""
    if setup.guides is None:
        return setup.guided(base, guide(mu, setup), mu)
    rows = [(term if isinstance(term, Row) else Row(tuple(term)), weight) for term, weight in guide(mu, setup.guides)]
    return setup.guided(base, [(replace(row, home=1), weight) for row, weight in rows], mu)


def extrapolated_soup(mu: Vector, setup: Setup) -> Plan:
    """The base's soup pushed away from the reference: ``(1 + alpha . mu) lam(mu)`` (docs/method.md)."""
    return Plan.of([(setup.base_coefficients(mu, setup.extrapolation), 1.0)])


def mod(mu: Vector, setup: Setup) -> Plan:
    """Single-objective experts ensembled: ``sum_i mu_i log pi_i`` (MOD, arXiv:2406.18853)."""
    single = setup.single_experts()
    return Plan.of([(setup.over_bank(single, unit), x) for unit, x in zip(np.eye(len(mu)), mu, strict=True)])


METHODS: dict[str, Callable[[Vector, Setup], Plan]] = {
    "reference": partial(steered, "reference", None),
    "rewarded-soup": partial(steered, "rewarded-soup", None),
    "bone-soup": partial(steered, "bone-soup", None),
    "extrapolated-soup": extrapolated_soup,
    "mod": mod,
    "proxy-tuning": partial(steered, "reference", "implicit-ensembled"),  # arXiv:2401.08565
    "mage-i-m": partial(steered, "bone-soup", "implicit-merged"),  # MAGE, arXiv:2510.03782
    "mage-i-e": partial(steered, "bone-soup", "implicit-ensembled"),
    "mage-e-m": partial(steered, "bone-soup", "explicit-merged"),
    "mage-e-e": partial(steered, "bone-soup", "explicit-ensembled"),
}
EXPLICIT = ("mage-e-m", "mage-e-e")
"""Methods for studies with explicit value models."""


def own_policy(baseline: Baseline, mu: Vector, setup: Setup) -> Plan:
    """The policy that was trained for this very preference. Raises FieldError, naming those that were, for another."""
    trained = setup.baseline_set(baseline)
    apart_M = np.abs(trained.mix - np.asarray(mu)).max(axis=1)
    if apart_M.min() > TOLERANCE:
        listed = ", ".join(f"({', '.join(f'{weight:g}' for weight in row)})" for row in trained.mix.tolist())
        got = f"({', '.join(f'{weight:g}' for weight in mu)})"
        raise FieldError("preference", got, f"those that {baseline} was trained for: {listed}")
    return Plan.of([(setup.over_bank(trained, np.eye(len(apart_M))[apart_M.argmin()]), 1.0)])


def _reward_models(mu: Vector, setup: Setup) -> Terms:
    models = setup.baseline_set("arm")
    return [(setup.over_bank(models, unit), float(x)) for unit, x in zip(np.eye(len(mu)), mu, strict=True)]


def genarm(mu: Vector, setup: Setup) -> Plan:
    """The reference guided by autoregressive reward models: ``log pi_ref + w sum_i mu_i log pi_i`` (arXiv:2410.08193).

    No reference is subtracted, so the weights add up to 1 + w; what temperature means then is said at ``Plan``.
    """
    return _steered(_reference(mu, setup), _reward_models, mu, setup)


PER_PREFERENCE: tuple[Baseline, ...] = ("morlhf", "modpo")
"""Baselines, and methods of the same names, that are a policy for each of some preferences."""

BASELINES: dict[str, Callable[[Vector, Setup], Plan]] = {
    **{name: partial(own_policy, name) for name in PER_PREFERENCE},
    "genarm": genarm,
}
"""Methods for studies that have trained what nothing else draws on (``study.baselines``)."""

KNOWN = METHODS | BASELINES
"""Every method that has plans."""


def planned_at(method: str, setup: Setup) -> list[Preference] | None:
    """The preferences that a method has a plan for; None for all. Raises FieldError when nothing was trained for it."""
    for baseline in PER_PREFERENCE:
        if method == baseline:
            return [tuple(row) for row in setup.baseline_set(baseline).mix.tolist()]
    return None


def plan_for(method: str, mu: Vector, setup: Setup) -> Plan:
    """The plan of a method by its name in ``KNOWN``.

    Raises FieldError: for a name that isn't there, for experts that the method needs and that aren't, or for a
    preference that it isn't trained for.
    """
    if method not in KNOWN:
        raise FieldError("method", method, f"one of {', '.join(KNOWN)}")
    return KNOWN[method](mu, setup)


def compact(plans: Sequence[Plan], setup: Setup) -> tuple[list[str], list[Plan]]:
    """The names of the sets that these plans draw on, and the same plans over a bank of those sets alone.

    The smaller bank holds them one after the other, in ``setup``'s order.
    """
    used = {k for plan in plans for row in plan.rows for k, c in enumerate(row.coefficients) if c != 0}
    names = [name for name, backbones in setup.sets.items() if used.intersection(backbones.experts)]
    kept = [k for name in names for k in setup.sets[name].experts]

    def smaller(row: Row) -> Row:
        return replace(row, coefficients=tuple(row.coefficients[k] for k in kept))

    return names, [replace(plan, rows=tuple(map(smaller, plan.rows))) for plan in plans]
