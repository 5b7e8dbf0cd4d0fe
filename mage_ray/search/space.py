"""The space of a search: from what the study says to Tune's domains, and from a point of them to a recipe."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from pydantic import ValidationError
from ray import tune

from mage_ray.decoding.methods import EXPLICIT, METHODS, Setup, plan_for
from mage_ray.decoding.plan import Plan
from mage_ray.errors import FieldError, UserError
from mage_ray.fields import one_line
from mage_ray.generator import bank_setup
from mage_ray.merging.coefficient_map import control_places, formula_map
from mage_ray.search.recipe import Recipe, own_recipe
from mage_ray.search.spec import RangeSpec
from mage_ray.specs import MapSpec
from mage_ray.study import Study

Config = Mapping[str, Any]
"""A value for each dimension, as Tune has it."""

_PER_OBJECTIVE = ("strength", "value_strength", "extrapolation")


@dataclass(frozen=True)
class Space:
    """A study's search space. Raises UserError, one line, for one that is empty, contradictory or of unknown names.

    Dimensions have flat names: ``candidates``, ``strength.<objective>``, ``coefficients.base.<point>.<objective>``.
    """

    study: Study

    def __post_init__(self) -> None:
        spec = self.study.search
        if not self.dimensions:
            raise FieldError("search.space", "nothing to turn", f"one of {', '.join(type(spec.space).model_fields)}")
        for field, allowed in (
            ("method", tuple(m for m in METHODS if self.study.values or m not in EXPLICIT)),
            ("base", tuple(self.study.training.backbones)),
            ("guide", tuple(self.study.training.backbones)),
            ("values", tuple(self.study.values)),
        ):
            named = [(f"search.space.{field}", name) for name in getattr(spec.space, field) or ()]
            # The search's own method is what the winner is held against, whatever the space names.
            for where, name in [*named, *([("search.method", spec.method)] if field == "method" else [])]:
                if name not in allowed:
                    raise FieldError(where, name, f"one of {', '.join(allowed) or 'none: the study has none'}")
        for field in _PER_OBJECTIVE:
            given = getattr(spec.space, field)
            for name in given if isinstance(given, dict) else ():
                if name not in self.study.objectives:
                    raise FieldError(f"search.space.{field}.{name}", name, f"one of {', '.join(self.study.objectives)}")
        self._check_values()
        self._check_each_matters()

    @property
    def seed(self) -> int:
        """Of the algorithm."""
        return self.study.seed if self.study.search.seed is None else self.study.search.seed

    @cached_property
    def dimensions(self) -> dict[str, RangeSpec | list[Any]]:
        """What each may be; those with a single value are none."""
        found: dict[str, RangeSpec | list[Any]] = {}
        for name, value in self.study.search.space.named.items():
            if name == "coefficients":
                moves = RangeSpec(low=-value.spread, high=value.spread)
                places = len(control_places(len(self.study.objectives), value.degree))
                for of in value.of:
                    for point in range(places):
                        found |= {f"coefficients.{of}.{point}.{o}": moves for o in self.study.objectives}
            elif isinstance(value, dict):
                found |= {f"{name}.{objective}": own for objective, own in value.items()}
            else:
                found[name] = value
        return {name: value for name, value in found.items() if isinstance(value, RangeSpec) or len(value) > 1}

    @property
    def domains(self) -> dict[str, Any]:
        """The dimensions as Tune's domains."""
        return {name: domain(value, whole=name == "candidates") for name, value in self.dimensions.items()}

    @cached_property
    def single(self) -> dict[str, Any]:
        """What is no dimension, since the space has one value for it, and that value."""
        named = self.study.search.space.named
        return {name: value[0] for name, value in named.items() if isinstance(value, list) and len(value) == 1}

    def recipe(self, config: Config) -> Recipe:
        """The constants at a point of the space; those that it doesn't turn are the study's.

        Raises UserError for constants that don't go together.
        """
        study, space = self.study, self.study.search.space
        given = self.single | dict(config)
        method = given.pop("method", study.search.method)
        temperature = given.pop("temperature", study.evaluation.temperature)
        guidance = study.guidance.model_dump()
        for name, value in given.items():
            field, _, objective = name.partition(".")
            if field == "coefficients":
                continue
            if field == "extrapolation" and method != "extrapolated-soup":
                field = "base_extrapolation"
            if objective:
                own = guidance[field]
                own = own if isinstance(own, dict) else dict.fromkeys(study.objectives, own)
                guidance[field] = own | {objective: value}
            else:
                guidance[field] = value
        if space.coefficients is not None:
            for of in space.coefficients.of:
                guidance[f"{of}_map"] = self._map(of, method, guidance, given).model_dump()
        own_constants = own_recipe(study, method).model_dump()
        try:
            return Recipe.model_validate(own_constants | {"guidance": guidance, "temperature": temperature})
        except ValidationError as error:
            raise one_line(error, Recipe, "search.space") from None

    def _map(self, of: str, method: str, guidance: Mapping[str, Any], config: Config) -> MapSpec:
        """The formula's control points for the set that is base or guide, moved as the config says."""
        free, study = self.study.search.space.coefficients, self.study
        assert free is not None
        setup = bank_setup(study, self.sets)
        explicit = method in EXPLICIT and of == "guide"
        name = str((guidance["values"] or study.value_set) if explicit else guidance[of])
        formula = formula_map(setup.sets[name].mix, free.degree)
        names = study.objective_names
        offsets = [[config.get(f"coefficients.{of}.{p}.{o}", 0.0) for o in names] for p in range(len(formula.control))]
        return MapSpec(degree=free.degree, control=[list(point) for point in formula.moved(offsets).control])

    @cached_property
    def sets(self) -> list[str]:
        """Those whose experts its plans may draw on."""
        study, space = self.study, self.study.search.space
        base, guide = space.base or [study.guidance.base], space.guide or [study.guidance.guide]
        return self._drawn_on(space.method or [study.search.method], [*base, *guide], space.values)

    @cached_property
    def engine_sets(self) -> list[str]:
        """``sets``, and those that the study's own constants draw on, which the winner is held against."""
        own = self.study.guidance
        wanted = {*self.sets, *self._drawn_on([self.study.search.method], [own.base, own.guide], None)}
        return [name for name in (*self.study.training.backbones, *self.study.values) if name in wanted]

    def _drawn_on(self, methods: Sequence[str], backbones: Sequence[str], values: Sequence[str] | None) -> list[str]:
        study = self.study
        wanted = {*backbones}
        if {"rewarded-soup", "mod"}.intersection(methods):
            n = len(study.objectives)
            wanted |= {name for name, spec in study.training.backbones.items() if (spec.mix(n) == _eye(n)).all()}
        if set(methods) & set(EXPLICIT):
            wanted |= {*(values or [str(study.value_set)])}
        return [name for name in (*study.training.backbones, *study.values) if name in wanted]

    def setup(self, recipe: Recipe) -> Setup:
        """What a recipe's plans draw on: the same bank for all recipes of the space. Raises UserError."""
        return bank_setup(recipe.applied(self.study), self.sets)

    def plans(self, recipe: Recipe) -> list[Plan]:
        """A recipe's plan for each preference of the search's grid. Raises UserError."""
        setup = self.setup(recipe)
        return [plan_for(recipe.method, mu, setup) for mu in self.study.search_grid()]

    def excess(self, config: Config) -> float:
        """By how much a config breaks what the study asks of one: at most 0 for one that may be tried."""
        limit = self.study.search.max_norm
        try:
            recipe = self.recipe(config)
            setup = self.setup(recipe)
            return -1.0 if limit is None else self._norm(recipe, setup) - limit
        except UserError:  # constants that don't go together, a head that these value models don't have
            return math.inf

    def _norm(self, recipe: Recipe, setup: Setup) -> float:
        """A bound of ``||lam||_1`` over all preferences, of the base and of the guide."""
        base = setup.base_map or formula_map(setup.sets[setup.base].mix, 1)
        alpha = setup.extrapolation if recipe.method == "extrapolated-soup" else setup.base_extrapolation
        norms = [base.norm * max(abs(1 + a) for a in alpha)]
        if any(plan.values for plan in self.plans(recipe)):
            name = setup.values if recipe.method in EXPLICIT else setup.guide
            assert name is not None
            norms.append((setup.guide_map or formula_map(setup.sets[name].mix, 1)).norm)
        return max(norms)

    @cached_property
    def defaults(self) -> dict[str, Any] | None:
        """The study's own constants as a point of the space; None where they are outside."""
        found = {name: self._own(name) for name in self.dimensions}
        if any(value is None or not _holds(self.dimensions[name], value) for name, value in found.items()):
            return None
        # A space may also have one value for a constant, which needn't be the study's.
        if any(self._own(name) != value for name, value in self.single.items()):
            return None
        return found if self.excess(found) <= 0 else None

    def _own(self, name: str) -> Any:
        """The study's own value of a dimension; None where it has no single one."""
        study, guidance = self.study, self.study.guidance
        field, _, objective = name.partition(".")
        if field == "method":
            return study.search.method
        if field == "temperature":
            return study.evaluation.temperature
        if field == "coefficients":
            return 0.0
        if field == "values":
            return study.value_set
        if field == "head":
            return guidance.head or (study.value_spec.head if study.value_spec is not None else None)
        plain = study.search.method == "extrapolated-soup" or field != "extrapolation"
        value = getattr(guidance, field if plain else "base_extrapolation")
        if isinstance(value, dict):
            return value.get(objective, 0.0) if objective else None
        return value

    def _check_values(self) -> None:
        """Raises FieldError for a value, the ends of ranges among them, that its constant may not have."""
        for name, value in (self.dimensions | {name: [one] for name, one in self.single.items()}).items():
            for one in _values(value):
                try:
                    self.recipe({name: one})
                except UserError as error:
                    field = f"search.space.{name.split('.')[0]}"
                    allowed = error.allowed if isinstance(error, FieldError) else str(error)
                    raise FieldError(field, one, allowed) from None

    def _check_each_matters(self) -> None:
        """Raises FieldError for a dimension along which no plan changes: its method doesn't know that constant."""
        far = {name: _far(value) for name, value in self.dimensions.items()}
        methods = self.study.search.space.method or [self.study.search.method]
        for name, value in self.dimensions.items():
            if name in ("method", "temperature"):
                continue
            tried = [self._outcome({**far, name: one, **_method(far, m)}) for m in methods for one in _values(value)]
            count = len(_values(value))
            groups = [tried[i : i + count] for i in range(0, len(tried), count)]
            if not any(one != other for group in groups for one, other in pairwise(group)):
                field = f"search.space.{name.split('.')[0]}"
                raise FieldError(
                    field, f"a constant that {', '.join(methods)} has no use for", "one that matters there"
                )

    def _outcome(self, config: Config) -> Sequence[Plan] | None:
        try:
            return self.plans(self.recipe(config))
        except UserError:
            return None


def _method(far: Config, method: str) -> dict[str, str]:
    return {"method": method} if "method" in far else {}


def _eye(n: int) -> Any:
    import numpy as np

    return np.eye(n)


def _values(value: RangeSpec | list[Any]) -> list[Any]:
    return [value.low, value.high] if isinstance(value, RangeSpec) else value


def _far(value: RangeSpec | list[Any]) -> Any:
    """A value at which the other constants matter: no guide of strength 0."""
    every = _values(value)
    return max(every) if all(isinstance(one, int | float) for one in every) else every[-1]


def _holds(allowed: RangeSpec | list[Any], value: Any) -> bool:
    if isinstance(allowed, list):
        return value in allowed
    on_step = allowed.step is None or abs(value / allowed.step - round(value / allowed.step)) <= 1e-9
    return allowed.low <= value <= allowed.high and on_step


def domain(value: RangeSpec | Sequence[Any], whole: bool) -> Any:
    """Tune's domain of a range, in whole numbers or not, or of options."""
    if not isinstance(value, RangeSpec):
        return tune.choice(list(value))
    if whole:
        low, high, step = int(value.low), int(value.high), int(value.step or 1)
        if value.log:
            return tune.lograndint(low, high + 1) if step == 1 else tune.qlograndint(low, high, step)
        return tune.randint(low, high + 1) if step == 1 else tune.qrandint(low, high, step)
    if value.step is not None:
        quantised = tune.qloguniform if value.log else tune.quniform
        return quantised(value.low, value.high, value.step)
    return (tune.loguniform if value.log else tune.uniform)(value.low, value.high)
