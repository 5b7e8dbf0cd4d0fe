"""One affine map per objective, so that objectives of any unit can be weighed against each other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mage_ray.errors import FieldError, UserError
from mage_ray.objectives.base import Direction

# A spread below this share of the largest value is rounding noise: dividing by it would turn noise into reward.
_NOISE = 1e-9


@dataclass(frozen=True)
class Normaliser:
    """``normalised = (sign * raw - mean) / std``: bigger is always better, the reference model has mean 0 and std 1.

    Fitted once, on the reference model's rollouts; all methods of a comparison share it (docs/method.md).
    All fields have length M, in the order of ``names``. ``sign`` is 1 for an objective to maximise and -1 for one to
    minimise; ``mean`` and ``std`` (population, ddof 0) are those of ``sign * raw``.
    """

    names: tuple[str, ...]
    sign: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def fit(cls, names: Sequence[str], directions: Sequence[Direction], raw_NM: np.ndarray) -> Normaliser:
        """Fit to N raw values of M objectives. Raises FieldError ``objectives.<name>`` when its values are all equal,
        or too large to have a finite spread."""
        raw_NM = np.asarray(raw_NM, dtype=np.float64)
        if not len(names) == len(directions) or raw_NM.ndim != 2 or raw_NM.shape[1] != len(names) or not len(raw_NM):
            raise ValueError(f"{len(names)} names, {len(directions)} directions, values of shape {raw_NM.shape}")
        sign_M = np.array([1 if direction == "maximise" else -1 for direction in directions])
        with np.errstate(all="ignore"):
            mean_M, std_M = (raw_NM * sign_M).mean(axis=0), raw_NM.std(axis=0)
        for name, column_N, mean, std in zip(names, raw_NM.T, mean_M, std_M, strict=True):
            if not (math.isfinite(mean) and math.isfinite(std)):
                raise FieldError(f"objectives.{name}", f"mean {mean:g}, std {std:g}", "values with a finite spread")
            if std <= _NOISE * np.abs(column_N).max():
                allowed = "an objective whose values differ between the reference model's completions"
                raise FieldError(f"objectives.{name}", f"{column_N[0]:g} for all {len(column_N)} of them", allowed)
        return cls(tuple(names), tuple(sign_M.tolist()), tuple(mean_M.tolist()), tuple(std_M.tolist()))

    def apply(self, raw_NM: np.ndarray) -> np.ndarray:
        """Raw values [N, M], columns in the order of ``names``, to normalised ones [N, M], float64."""
        raw_NM = np.asarray(raw_NM, dtype=np.float64)
        if raw_NM.ndim != 2 or raw_NM.shape[1] != len(self.names):
            raise ValueError(f"values of shape {raw_NM.shape} for {len(self.names)} objectives")
        return (raw_NM * np.array(self.sign) - np.array(self.mean)) / np.array(self.std)

    def to_json(self) -> str:
        """A JSON object with the four fields; ``from_json`` gives back an equal Normaliser."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str, names: Sequence[str] | None = None) -> Normaliser:
        """Read and check what ``to_json`` wrote; with ``names``, it must be of just these objectives in this order.

        Raises FieldError ``normalisation.<field>``.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise UserError(f"normalisation: not JSON ({' '.join(str(error).split())})") from None
        if not isinstance(data, dict):
            raise FieldError("normalisation", type(data).__name__, "an object with names, sign, mean and std")
        for key in data.keys() - {"names", "sign", "mean", "std"}:
            raise FieldError(f"normalisation.{key}", "an unknown field", "names, sign, mean and std")
        found = _column(
            data, "names", lambda v: isinstance(v, str) and v != "", "a list of the objectives' names", None
        )
        if len(set(found)) != len(found) or not found:
            raise FieldError("normalisation.names", found, "at least one name, each once")
        if names is not None and list(names) != found:
            raise FieldError("normalisation.names", ", ".join(found), f"the study's objectives: {', '.join(names)}")
        n = len(found)
        sign = _column(data, "sign", lambda v: _finite(v) and v in (1, -1), f"{n} signs, each 1 or -1", n)
        mean = _column(data, "mean", _finite, f"{n} finite numbers", n)
        std = _column(data, "std", lambda v: _finite(v) and v > 0, f"{n} finite numbers above 0", n)
        return cls(tuple(found), tuple(map(int, sign)), tuple(map(float, mean)), tuple(map(float, std)))


def _column(data: dict, key: str, valid: Callable[[Any], bool], allowed: str, length: int | None) -> list:
    if key not in data:
        raise FieldError(f"normalisation.{key}", "nothing", allowed)
    values = data[key]
    if not isinstance(values, list) or length not in (None, len(values)) or not all(map(valid, values)):
        raise FieldError(f"normalisation.{key}", values, allowed)
    return values


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
