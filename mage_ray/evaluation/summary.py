"""From single generations to measures with intervals: can two methods be told apart? (docs/method.md)

Intervals come from a **cluster bootstrap over prompts**: a resample draws prompts with replacement and takes all
seeds of a drawn prompt along, which carries the variance of prompts and of seeds alike. One resample is shared by all
methods and points, so that the difference of two methods is taken on the same prompts (:func:`paired_difference`).

The bounds are percentiles of the resamples, with one exception. Hypervolume takes maxima over noisy points, which
lifts it in the sample and lifts it once more in a resample; its percentiles are therefore reflected about the value,
``2 value - high`` to ``2 value - low``, those of differences too: a front of many points is lifted more than one of
few. On synthetic fronts of 11 points with 32 to 100 prompts (95 % asked) percentiles held the true hypervolume in 75 to
91 % of the runs, reflected ones in 94 %; of a front minus one point, in 55 and in 97 %. Noise also lowers
controllability and changes front length, sparsity and spacing: their intervals say how far these vary with the
prompts at this sample size, not where a noise-free front would be. distinct-n is resampled otherwise (``_linear``).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from mage_ray.errors import FieldError
from mage_ray.evaluation import measures
from mage_ray.evaluation.measures import Floats
from mage_ray.evaluation.sample_table import check_columns, distinct_by_prompt, mean_cells, own_preferences, shared_grid

if TYPE_CHECKING:
    import pandas as pd

    from mage_ray.study import Study

MEASURES = (
    "hypervolume",
    "inner_product",
    "controllability",
    "front_length",
    "sparsity",
    "spacing",
    "kl",
    "length",
    "repetition",
    "distinct",
)


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its confidence interval; all ``nan`` where the measure is not defined."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class MethodSummary:
    """One method over its M points of N objectives, in the order of the preference grid."""

    method: str
    preferences: Floats  # [M, N]; nan where a method without a preference axis gave none
    points: Floats  # [M, N], mean normalised reward
    point_intervals: Floats  # [M, N, 2], low and high
    measures: dict[str, Interval]
    resampled: dict[str, Floats] = field(repr=False)  # measure -> [resamples]; the same resamples for every method


@dataclass(frozen=True, eq=False)
class Summary:
    """All methods of one comparison, in the order in which the samples name them."""

    objectives: tuple[str, ...]
    reference_point: tuple[float, ...]
    methods: tuple[MethodSummary, ...]
    prompts: int
    seeds: int
    resamples: int
    seed: int
    confidence: float

    def method(self, name: str) -> MethodSummary:
        """The summary of one method; ``FieldError`` if it was not compared."""
        for one in self.methods:
            if one.method == name:
                return one
        raise FieldError("method", name, ", ".join(one.method for one in self.methods))

    def to_json(self) -> str:
        """Everything but the single resamples; what is not defined is ``null``."""
        content = {
            "objectives": self.objectives,
            "reference_point": self.reference_point,
            "prompts": self.prompts,
            "seeds": self.seeds,
            "resamples": self.resamples,
            "seed": self.seed,
            "confidence": self.confidence,
            "methods": [
                {
                    "method": one.method,
                    "preferences": one.preferences.tolist(),
                    "points": one.points.tolist(),
                    "point_intervals": one.point_intervals.tolist(),
                    "measures": {name: asdict(interval) for name, interval in one.measures.items()},
                }
                for one in self.methods
            ],
        }
        return json.dumps(_null_for_nan(content), indent=2, ensure_ascii=False) + "\n"


def summary_of(study: Study, samples: pd.DataFrame, confidence: float | None = None) -> Summary:
    """``summarise`` by what a study's ``evaluation`` says; ``confidence`` in place of its own."""
    spec = study.evaluation
    confidence = spec.confidence if confidence is None else confidence
    names, point = study.objective_names, study.reference_point()
    return summarise(samples, names, point, spec.resamples, study.seed, confidence)


def summarise(
    samples: pd.DataFrame,
    objectives: Sequence[str],
    reference_point: Sequence[float],
    resamples: int = 1000,
    seed: int = 0,
    confidence: float = 0.95,
) -> Summary:
    """Measures with intervals for every method in ``samples``.

    ``samples`` has one row per generation: ``method, point, preference, prompt_id, seed, completion, tokens, kl`` and
    ``reward/<objective>`` (normalised, bigger is better). Every method must have every prompt with every seed at each
    of its points. A method with **one** point is one without a preference axis: whoever asks for what gets that
    point, so its inner product is taken over the grid of the others. With a single prompt nothing can be resampled
    and the bounds are ``nan``.

    ``reference_point`` is hypervolume's, one normalised reward per objective. Raises ``UserError`` where a column, a
    cell or a value is missing, where a cell is there twice, or where methods disagree on the preference of a point.
    """
    if len(objectives) < 2:
        raise FieldError("objectives", list(objectives), "two or more")
    if len(reference_point) != len(objectives):
        raise FieldError(
            "reference_point", list(reference_point), f"one number for each of {len(objectives)} objectives"
        )
    if resamples < 1:
        raise FieldError("resamples", resamples, "1 or more")
    if not 0 < confidence < 1:
        raise FieldError("confidence", confidence, "above 0 and below 1")
    check_columns(samples, objectives)
    prompts, seeds = samples["prompt_id"].unique(), samples["seed"].unique()
    draws = np.random.default_rng(seed).multinomial(len(prompts), np.full(len(prompts), 1 / len(prompts)), resamples)
    weights_RP = np.vstack([np.ones(len(prompts)), draws]) / len(prompts)  # row 0 is the sample itself

    frames = {str(name): frame for name, frame in samples.groupby("method", sort=False)}
    grid = shared_grid(frames, len(objectives))
    return Summary(
        objectives=tuple(objectives),
        reference_point=tuple(float(bound) for bound in reference_point),
        methods=tuple(
            _summarise_method(name, frame, objectives, reference_point, prompts, seeds, weights_RP, grid, confidence)
            for name, frame in frames.items()
        ),
        prompts=len(prompts),
        seeds=len(seeds),
        resamples=resamples,
        seed=seed,
        confidence=confidence,
    )


def paired_difference(summary: Summary, method_a: str, method_b: str, measure: str) -> Interval:
    """``measure(method_a) - measure(method_b)``, its interval taken over differences on the same resampled prompts.

    The noise that two methods share (hard prompts, say) cancels: this may tell apart what two separate intervals don't.
    Raises ``FieldError`` for an unknown method or measure.
    """
    if measure not in MEASURES:
        raise FieldError("measure", measure, ", ".join(MEASURES))
    a, b = summary.method(method_a), summary.method(method_b)
    difference = a.measures[measure].value - b.measures[measure].value
    resampled = a.resampled[measure] - b.resampled[measure]
    return interval(difference, resampled, summary.confidence, reflect=measure == "hypervolume")


def _summarise_method(
    name: str,
    frame: pd.DataFrame,
    objectives: Sequence[str],
    reference_point: Sequence[float],
    prompts: Any,
    seeds: Any,
    weights_RP: Floats,
    grid: dict[int, Floats],
    confidence: float,
) -> MethodSummary:
    n = len(objectives)
    cells_JPK = mean_cells(name, frame, objectives, prompts, seeds)
    points, p = cells_JPK.shape[0], len(prompts)
    means = weights_RP @ cells_JPK.transpose(1, 0, 2).reshape(p, -1)
    # Points whose texts are equal must tie exactly, and a matrix product may round equal columns differently.
    means_RJK = np.round(means, 12).reshape(len(weights_RP), points, -1)
    points_RJN = means_RJK[..., :n]

    preferences = own_preferences(name, frame, n)
    asked = preferences if points > 1 else np.stack([grid[point] for point in sorted(grid)])
    values = {
        "hypervolume": measures.hypervolume(points_RJN, reference_point),
        "inner_product": measures.inner_product(asked, points_RJN),
        "controllability": measures.controllability(preferences, points_RJN),
        "front_length": measures.front_length(points_RJN),
        "sparsity": measures.sparsity(points_RJN),
        "spacing": measures.spacing(points_RJN),
        "kl": means_RJK[..., n].mean(-1),
        "length": means_RJK[..., n + 1].mean(-1),
        "repetition": means_RJK[..., n + 2].mean(-1),
        "distinct": _linear(*distinct_by_prompt(frame, prompts), weights_RP),
    }
    if p == 1:
        values = {measure: np.append(value[:1], np.full(len(value) - 1, np.nan)) for measure, value in values.items()}
        points_RJN[1:] = np.nan
    return MethodSummary(
        method=name,
        preferences=preferences,
        points=points_RJN[0],
        point_intervals=np.stack(_bounds(points_RJN[1:], confidence), axis=-1),
        measures={
            measure: interval(
                value[0], value[1:], confidence, reflect=measure == "hypervolume", least=_LEAST.get(measure)
            )
            for measure, value in values.items()
        },
        resampled={measure: value[1:] for measure, value in values.items()},
    )


def _linear(value: float, without_P: Floats, weights_RP: Floats) -> Floats:
    """[R] A statistic over resamples of the prompts, to first order in their weights, from it without each prompt.

    For what counts different things: a prompt that is drawn twice adds nothing new, so that resamples as they are would
    all lie below the value. Derived: the infinitesimal jackknife (Efron 1982).
    """
    influence_P = (len(without_P) - 1) * (value - without_P)
    return np.asarray(value + (weights_RP - weights_RP[0]) @ influence_P)


_LEAST = {"hypervolume": 0.0}


def interval(
    value: float, resampled: Floats, confidence: float, reflect: bool = False, least: float | None = None
) -> Interval:
    """A value with the percentiles of its resamples, reflected about it where asked; bounds begin at ``least``."""
    low, high = (float(bound) for bound in _bounds(resampled, confidence))
    if reflect:
        low, high = 2 * value - high, 2 * value - low
    low = low if least is None else max(least, low)
    defined = not math.isnan(value + high)
    return Interval(float(value), low if defined else math.nan, high if defined else math.nan)


def _bounds(resampled: Floats, confidence: float) -> tuple[Floats, Floats]:
    """Percentile bounds over axis 0, of the resamples in which the measure is defined."""
    tail = (1 - confidence) / 2
    undefined = np.isnan(resampled).all(axis=0)
    low, high = np.nanquantile(np.where(undefined, 0.0, resampled), [tail, 1 - tail], axis=0)
    return np.where(undefined, np.nan, low), np.where(undefined, np.nan, high)


def _null_for_nan(content: Any) -> Any:
    if isinstance(content, float):
        return None if math.isnan(content) else content
    if isinstance(content, dict):
        return {key: _null_for_nan(value) for key, value in content.items()}
    return [_null_for_nan(value) for value in content] if isinstance(content, list | tuple) else content
