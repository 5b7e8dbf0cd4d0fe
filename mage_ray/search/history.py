"""What a search's records say: its settings, the best so far, and which constants mattered."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mage_ray.errors import FieldError
from mage_ray.search.recipe import Recipe
from mage_ray.search.space import Space
from mage_ray.search.spec import METRICS, RangeSpec
from mage_ray.study import Study

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

ENOUGH = 8
"""Settings on all prompts, from which on importance is told."""
_SHUFFLES = 100


@dataclass(frozen=True)
class Setting:
    """One that was tried; ``number`` counts from 1, in the order in which they began. One that failed has no scores."""

    number: int
    trial: str
    state: Literal["finished", "stopped", "failed"]
    winner: bool
    own: bool
    """Whether it is the study's own constants."""
    front: int | None
    """Its place on the front of several metrics, which its recipe's file is named by."""
    config: Mapping[str, Any]
    scores: Mapping[str, float]
    points: list[list[float]]
    reason: str
    """Why it failed."""

    @property
    def kind(self) -> str:
        """What it is above all: ``winner, defaults, front, finished, stopped, failed``."""
        if self.state != "finished":
            return self.state
        return "winner" if self.winner else "defaults" if self.own else self.state if self.front is None else "front"


@dataclass(frozen=True)
class Weight:
    """What a constant has to do with a metric: its share of all constants' importance, and what chance gives it."""

    constant: str
    share: float
    chance: float
    """95 % of its shares are lower where the metric is dealt out anew among the settings."""


def read_settings(space: Space, records: Sequence[Mapping[str, Any]], recipe: Recipe) -> list[Setting]:
    """The settings of a search's records. Raises FieldError where none that is finished has the recipe's constants."""
    from mage_ray.search.outcome import finished, winners

    several = len(set(space.study.search.metrics)) > 1
    ended = finished(records)
    front = winners(ended, space.study.search.metrics) if ended else []
    constants = recipe.model_copy(update={"provenance": None})
    winner = next((one for one in [*front, *ended] if Recipe.model_validate(one["recipe"]) == constants), None)
    if winner is None:
        raise FieldError("recipe", "constants of no setting on all prompts", "those of one that the search has tried")
    places = {id(one): place for place, one in enumerate(front)}
    return [
        Setting(
            number=number,
            trial=record["trial"],
            state="failed" if "error" in record else "finished" if record["last"] else "stopped",
            winner=record is winner,
            own=_same(record["config"], space.defaults),
            front=places.get(id(record)) if several else None,
            config=record["config"],
            scores=record.get("scores", {}),
            points=record.get("points", []),
            reason=record.get("error", ""),
        )
        for number, record in enumerate(records, start=1)
    ]


def best_so_far(settings: Sequence[Setting], metric: str) -> list[float]:
    """After each setting began, the best of those up to it that were tried on all prompts; nan before the first."""
    better = np.fmax if METRICS[metric] == "max" else np.fmin
    values = [one.scores[metric] if one.state == "finished" else math.nan for one in settings]
    return [float(value) for value in better.accumulate(values)]


def importance(space: Space, settings: Sequence[Setting], metric: str) -> list[Weight]:
    """Of the constants for a metric, the largest first, by PED-ANOVA (arXiv 2304.10255) over those on all prompts.

    It compares where the best settings lie along each constant with where all of them do. None where there are fewer
    than ``ENOUGH``, or where nothing differs.
    """
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    ended = [one for one in settings if one.state == "finished" and math.isfinite(one.scores[metric])]
    sign = -1.0 if METRICS[metric] == "max" else 1.0
    losses = np.array([sign * one.scores[metric] for one in ended])
    if len(ended) < ENOUGH or np.ptp(losses) == 0:
        return []
    ranges = {
        name: _distribution(allowed, [one.config[name] for one in ended]) for name, allowed in space.dimensions.items()
    }
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    study.add_trials([optuna.create_trial(params=dict(one.config), distributions=ranges, value=0.0) for one in ended])
    # A handful of settings at least among the best, which its authors' default of a tenth wouldn't give a short search.
    evaluator = PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, 5 / len(ended))))

    def measured(values: np.ndarray) -> dict[str, float]:
        return get_param_importances(
            study, evaluator=evaluator, target=lambda trial: float(values[trial.number]), normalize=False
        )

    dice = np.random.default_rng(space.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that less is better here, and that its raw numbers may change
        found = measured(losses)
        shuffled = [measured(dice.permutation(losses)) for _ in range(_SHUFFLES)]
    total = sum(found.values())
    if total <= 0:
        return []
    chance = {name: float(np.quantile([one[name] for one in shuffled], 0.95)) for name in found}
    ranked = sorted(found, key=lambda name: -found[name])
    return [Weight(name, found[name] / total, chance[name] / total) for name in ranked]


def constant(study: Study, recipe: Recipe, name: str) -> Any:
    """What a recipe has for a constant by its name in a space, but for coefficients."""
    field, _, objective = name.partition(".")
    if field in ("method", "temperature"):
        return getattr(recipe, field)
    if field == "extrapolation" and recipe.method != "extrapolated-soup":
        field = "base_extrapolation"
    value = getattr(recipe.guidance, field)
    if value is None:  # left to the study
        return study.value_set if field == "values" else study.value_spec and study.value_spec.head
    return value.get(objective, 0.0) if objective and isinstance(value, Mapping) else value


def _distribution(allowed: RangeSpec | list[Any], tried: Sequence[Any]) -> BaseDistribution:
    """A dimension as Optuna's, without steps, and as wide as rounding makes it."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(allowed, list):
        return CategoricalDistribution(allowed)
    low, high = min(allowed.low, *tried), max(allowed.high, *tried)
    if all(isinstance(value, int) for value in tried):
        return IntDistribution(int(low), int(high), log=allowed.log)
    return FloatDistribution(low, high, log=allowed.log)


def _same(config: Mapping[str, Any], other: Mapping[str, Any] | None) -> bool:
    """Whether they are one point; an algorithm that counts in other units may have rounded."""
    if other is None or config.keys() != other.keys():
        return False
    pairs = [(config[name], other[name]) for name in config]
    return all(
        math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12) if isinstance(a, int | float) else a == b for a, b in pairs
    )
