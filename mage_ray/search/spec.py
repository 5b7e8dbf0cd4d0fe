"""What a study says of its search: which constants may turn, how far, and what for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mage_ray.errors import FieldError
from mage_ray.fields import Part
from mage_ray.merging.coefficient_map import MAX_DEGREE
from mage_ray.specs import Name, NotNegative, Positive


class RangeSpec(Part):
    """Numbers from ``low`` to ``high``: by their logarithm with ``log``, multiples of ``step`` where it is given."""

    low: float = Field(allow_inf_nan=False)
    high: float = Field(allow_inf_nan=False)
    log: bool = False
    step: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _in_order(self) -> RangeSpec:
        if self.high <= self.low:
            raise FieldError("high", self.high, f"more than low ({self.low:g})")
        if self.log and self.low <= 0:
            raise FieldError("low", self.low, "more than 0 where log is set")
        for field in ("low", "high"):
            value = getattr(self, field)
            if self.step is not None and abs(value / self.step - round(value / self.step)) > 1e-9:
                raise FieldError(field, value, f"a multiple of step ({self.step:g})")
        return self


class FreeSpec(Part):
    """Free coefficients: control points that may move off the formula's."""

    of: list[Literal["base", "guide"]] = Field(default=["base"], min_length=1)
    degree: int = Field(default=2, ge=1, le=MAX_DEGREE)
    spread: float = Field(default=0.5, gt=0)
    """How far each coefficient may move, either way."""


class SpaceSpec(Part):
    """Which constants a search turns, each in a range or among a list. What isn't named stays as the study has it."""

    method: list[str] | None = None
    base: list[Name] | None = None
    """Backbone sets: with them their beta."""
    guide: list[Name] | None = None
    values: list[Name] | None = None
    head: list[Literal["scalar", "vocabulary"]] | None = None
    strength: RangeSpec | list[NotNegative] | dict[str, RangeSpec] | None = None
    """For all preferences, or one for each objective; of implicit guides."""
    value_strength: RangeSpec | list[NotNegative] | dict[str, RangeSpec] | None = None
    """Of explicit ones."""
    extrapolation: RangeSpec | list[float] | dict[str, RangeSpec] | None = None
    """alpha of the base's soup."""
    candidates: RangeSpec | list[Positive] | None = None
    """Whole numbers."""
    temperature: RangeSpec | list[Annotated[float, Field(gt=0)]] | None = None
    entropy: RangeSpec | list[NotNegative] | None = None
    every: list[Positive] | None = None
    coefficients: FreeSpec | None = None

    @field_validator("candidates")
    @classmethod
    def _whole(cls, value: RangeSpec | list[int] | None) -> RangeSpec | list[int] | None:
        if isinstance(value, RangeSpec):
            for field in ("low", "high", "step"):
                number = getattr(value, field)
                if number is not None and (number < 1 or number != int(number)):
                    raise FieldError(field, number, "a whole number, 1 or more")
        return value

    @property
    def named(self) -> dict[str, Any]:
        """The dimensions that there are."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


METRICS = {"hypervolume": "max", "inner_product": "max", "controllability": "max", "cost": "min"}
"""What a search may be after. ``cost`` is forwards per token, the mean over the grid."""


class SearchSpec(Part):
    """What ``mage-ray search`` tries. Seeds, lengths and the reference point are those of ``evaluation``."""

    space: SpaceSpec = SpaceSpec(
        strength=RangeSpec(low=0, high=3), extrapolation=RangeSpec(low=0, high=1), candidates=[5, 10, 20, 50]
    )
    method: str = "mage-i-m"
    """Where the space names none."""
    algorithm: Literal["nsga2", "cmaes", "de", "optuna", "random"] = "optuna"
    """Of several metrics ``nsga2`` unless given. For one: jobs/bench/results/README.md."""
    metrics: list[Literal["hypervolume", "inner_product", "controllability", "cost"]] = Field(
        default=["hypervolume"], min_length=1
    )
    """One for a single answer, several for a front of settings."""
    trials: Positive = 32
    population: int = Field(default=8, ge=4)
    """Settings of a generation, of ``nsga2``, ``cmaes`` and ``de``."""
    seed: int | None = Field(default=None, ge=0)
    """Of the algorithm alone; the study's unless given."""
    prompts: Positive = 16
    """Of the search alone: they were neither trained on, nor are they evaluated on."""
    grid: int | list[list[float]] | None = 5
    """Points along an edge, the preferences themselves, or null for the evaluation's."""
    rungs: Positive = 1
    """With more than one, each setting is tried on a few prompts first, on twice as many at each rung, and on all
    at the last; at each the worse half stops."""
    max_norm: float | None = Field(default=None, ge=1)
    """Settings by which ``||lam||_1`` may be more, at any preference, are not tried: noise grows with it."""
    workers: Positive = 1
    """Resident engines."""
    concurrent: Positive = 2
    """Trials at once, which share the engines."""
    log_to: list[Literal["mlflow", "wandb"]] = Field(default_factory=list)
    """Beside TensorBoard's files, which are always written."""

    @model_validator(mode="before")
    @classmethod
    def _by_metrics(cls, given: Any) -> Any:
        if isinstance(given, dict) and "algorithm" not in given:
            several = isinstance(metrics := given.get("metrics"), list) and len(metrics) > 1
            return given | {"algorithm": "nsga2" if several else "optuna"}
        return given

    @model_validator(mode="after")
    def _consistent(self) -> SearchSpec:
        if len(set(self.metrics)) > 1 and self.algorithm in ("cmaes", "de"):
            raise FieldError("algorithm", self.algorithm, "nsga2, optuna or random where there are several metrics")
        if len(self.metrics) > 1 and self.rungs > 1:
            raise FieldError(
                "rungs", self.rungs, "1 where there are several metrics: no single one says which half stops"
            )
        if 2 ** (self.rungs - 1) > self.prompts:
            raise FieldError("rungs", self.rungs, f"few enough that the first has a prompt ({self.prompts} in all)")
        return self
