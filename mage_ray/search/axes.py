"""Tune's domains as axes of a unit cube, and a point of it as the settings that it stands for."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real as Number
from typing import Any

from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform, Quantized, Uniform
from ray.tune.search.variant_generator import parse_spec_vars
from ray.tune.utils.util import flatten_dict

from mage_ray.errors import FieldError

DOMAINS = "uniform, loguniform, quniform, qloguniform, randint, lograndint, qrandint, qlograndint, choice"


@dataclass(frozen=True)
class Axis:
    """A parameter. A share u of [0, 1] stands for the u-quantile of what Tune itself would draw, or the option there.

    ``lower`` and ``upper`` of kind "float" are values; of kind "int" they count steps of ``q``, the upper exclusive.
    """

    kind: str
    lower: float = 0.0
    upper: float = 1.0
    log: bool = False
    q: float | None = None
    options: tuple[Any, ...] = ()

    @property
    def range(self) -> str:
        steps = f" in steps of {self.q}" if self.q else ""
        return f"one of {list(self.options)}" if self.options else f"{self.value(0.0)} to {self.value(1.0)}{steps}"

    def value(self, share: float) -> Any:
        if self.kind == "choice":
            return self.options[min(int(share * len(self.options)), len(self.options) - 1)]
        if self.log:
            at = math.exp(math.log(self.lower) + share * (math.log(self.upper) - math.log(self.lower)))
        else:
            at = self.lower + share * (self.upper - self.lower)
        if self.kind == "int":
            return int(min(max(math.floor(at), self.lower), self.upper - 1) * (self.q or 1))
        return float(min(max(round(at / self.q) * self.q if self.q else at, self.lower), self.upper))

    def share(self, value: Any) -> float:
        """The inverse; one share of those that stand for ``value``. Raises ``ValueError`` where none does."""
        if self.kind == "choice":
            found = [option is value or option == value for option in self.options]
            return (found.index(True) + 0.5) / len(found)
        if isinstance(value, bool) or not isinstance(value, Number):
            raise ValueError
        whole = self.kind == "int"
        at = float(value) / (self.q or 1) if whole else float(value)
        steps = at if whole or not self.q else at / self.q
        if not self.lower <= at <= self.upper - whole or ((whole or self.q) and not math.isclose(steps, round(steps))):
            raise ValueError
        at += whole / 2
        scale: Callable[[float], float] = math.log if self.log else float
        width = scale(self.upper) - scale(self.lower)
        return (scale(at) - scale(self.lower)) / width if width else 0.5


def axis_of(name: str, domain: Domain) -> Axis:
    sampler: Any = domain.get_sampler()
    q: Any = None
    if isinstance(sampler, Quantized):
        sampler, q = sampler.sampler, sampler.q
    if isinstance(domain, Categorical) and isinstance(sampler, Uniform) and domain.categories and q is None:
        return Axis("choice", options=tuple(domain.categories))
    if isinstance(domain, Float | Integer) and isinstance(sampler, Uniform | LogUniform) and (q is None or q > 0):
        lower, upper, log = domain.lower, domain.upper, isinstance(sampler, LogUniform)
        axis = Axis("float", float(lower), float(upper), log, q)
        if isinstance(domain, Integer):
            # Tune's upper bound of integers is exclusive, but with steps of more than 1.
            ends = (lower, upper) if q in (None, 1) else (-(-lower // q), upper // q + 1)
            axis = Axis("int", int(ends[0]), int(ends[1]), log, q)
        if math.isfinite(axis.lower) and math.isfinite(axis.upper) and axis.lower <= axis.upper - (axis.kind == "int"):
            return axis
    raise FieldError(name, f"{type(domain).__name__} {domain.domain_str} by {sampler}", f"{DOMAINS}, of some values")


def axes_of(space: dict[str, Any]) -> dict[str, Axis]:
    """What is to be searched, by name ("a/b" for what is nested), in the order of ``space``."""
    try:
        flat = flatten_dict(space, prevent_delimiter=True)
    except (TypeError, ValueError):
        raise FieldError("space", list(space), "keys that are text without '/'") from None
    _, domains, grids = parse_spec_vars(space)
    named = {"/".join(map(str, path)): domain for path, domain in grids + domains}
    for name, domain in named.items():
        if domain.is_grid() or not isinstance(flat.get(name), Domain):
            raise FieldError(name, type(domain).__name__, f"{DOMAINS}; not in a grid search nor within a list")
    if not named:
        raise FieldError("space", list(space), f"one parameter at least of {DOMAINS}")
    return {name: axis_of(name, domain) for name, domain in named.items()}


def filled(space: dict[str, Any], values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``space`` with a value in place of each searched parameter; what is constant is the same object."""
    return {
        key: filled(part, values, f"{prefix}{key}/") if isinstance(part, dict) else values.get(f"{prefix}{key}", part)
        for key, part in space.items()
    }


def plain(value: Any) -> Any:
    """``value`` itself where JSON keeps it, else its type."""
    with suppress(TypeError, ValueError):
        if json.loads(json.dumps(value)) == value:
            return value
    return {"not JSON": f"{type(value).__module__}.{type(value).__qualname__}"}
