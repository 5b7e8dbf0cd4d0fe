"""What searches are worth: the hypervolume of what each found by equally many tokens, on prompts that none has seen.

Legend: S searches of one algorithm, by their seeds; R resamples of the prompts, the same for all settings.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from searched import Runs, Searched

from mage_ray.evaluation.measures import Floats
from mage_ray.evaluation.summary import Interval, interval
from mage_ray.search.recipe import Recipe, own_recipe

HOW = {
    "budget": "tokens that the search which generated the fewest generated in all; of each search counts the best "
    "setting among the trials that had ended by then",
    "unseen": "each search's setting and the study's own constants on the evaluation's prompts and grid, which no "
    "search and no training saw; hypervolume of the mean normalised rewards",
    "ratios": "hypervolume on unseen prompts, the mean over one algorithm's seeds over the mean over the other's (the "
    "defaults are one setting)",
    "intervals": "percentiles of resamples that draw prompts with replacement, the same for all settings, and at once "
    "each algorithm's seeds with replacement; with S seeds the seeds' part is too narrow by sqrt((S - 1) / S)",
}

DEFAULTS = "defaults"

Searches = Mapping[tuple[str, int], Searched]
"""By algorithm and seed."""


def quality(runs: Runs, searches: Searches, pairs: Mapping[str, tuple[str, str]]) -> dict[str, Any]:
    """What goes into the results: ``budget``, ``searches``, ``defaults``, and the ``intervals`` of the ratios.

    ``pairs`` has for each ratio two algorithms, or ``DEFAULTS``. Ray must be connected. Raises BenchError, UserError.
    """
    budget = min(searched.tokens[-1] for searched in searches.values())
    best = {key: searched.best(budget) for key, searched in searches.items()}
    recipes = {key: Recipe.model_validate(record["recipe"]) for key, record in best.items()}
    own = own_recipe(runs.study, runs.study.search.method)
    labels = {_content(own): DEFAULTS}
    for (algorithm, seed), recipe in recipes.items():
        labels.setdefault(_content(recipe), f"{algorithm}-{seed}")
    summary = runs.unseen({label: Recipe.model_validate_json(content) for content, label in labels.items()})

    def volume(recipe: Recipe) -> tuple[Interval, Floats]:
        one = summary.method(labels[_content(recipe)])
        value = one.measures["hypervolume"]
        return value, np.append(value.value, one.resampled["hypervolume"])

    volumes = {algorithm: [volume(recipes[key])[1] for key in recipes if key[0] == algorithm] for algorithm, _ in best}
    volumes[DEFAULTS] = [volume(own)[1]]
    dice = np.random.default_rng([runs.study.seed, 8])
    ratios = {
        name: ratio_of_means(np.stack(volumes[one]), np.stack(volumes[other]), summary.confidence, dice)
        for name, (one, other) in pairs.items()
    }
    return {
        "budget": budget,
        "searches": [
            {
                "algorithm": key[0],
                "seed": key[1],
                "trials": len(searched.records),
                "tokens": searched.tokens[-1],
                "trials_within_budget": sum(spent <= budget for spent in searched.tokens),
                "history": _history(searched),
                "trial": best[key]["trial"],
                "config": best[key]["config"],
                "searched_hypervolume": best[key]["scores"]["hypervolume"],
                "unseen_hypervolume": _bounds(volume(recipes[key])[0]),
                "same_as": labels[_content(recipes[key])],
            }
            for key, searched in searches.items()
        ],
        "defaults": {"unseen_hypervolume": _bounds(volume(own)[0])},
        "unseen": {"prompts": summary.prompts, "resamples": summary.resamples, "confidence": summary.confidence},
        "intervals": {name: _bounds(found) for name, found in ratios.items()},
    }


def ratio_of_means(one_SR: Floats, other_SR: Floats, confidence: float, dice: np.random.Generator) -> Interval:
    """The mean of one algorithm's hypervolumes over that of another's.

    Column 0 of both is the sample itself, the others are resamples of the prompts, the same in both; for each, seeds
    are drawn with replacement, too. ``nan`` where the other's is 0.
    """
    one_R, other_R = _resampled_means(one_SR, dice), _resampled_means(other_SR, dice)
    ratio_R = np.divide(one_R, other_R, out=np.full_like(one_R, np.nan), where=other_R > 0)
    return interval(ratio_R[0], ratio_R[1:], confidence)


def _resampled_means(volumes_SR: Floats, dice: np.random.Generator) -> Floats:
    """The mean over all seeds in column 0, over as many that are drawn with replacement in every other one, [R]."""
    seeds, columns = volumes_SR.shape
    drawn_SR = dice.integers(0, seeds, (seeds, columns))
    drawn_SR[:, 0] = np.arange(seeds)
    return np.take_along_axis(volumes_SR, drawn_SR, axis=0).mean(axis=0)


def _history(searched: Searched) -> list[dict[str, float]]:
    """After each trial: tokens generated so far, its hypervolume on the search's prompts, and the best one so far."""
    volumes = [record["scores"]["hypervolume"] for record in searched.records]
    best: Sequence[float] = np.maximum.accumulate(volumes).tolist()
    rows = zip(searched.tokens, volumes, best, strict=True)
    return [{"tokens": tokens, "hypervolume": volume, "best": so_far} for tokens, volume, so_far in rows]


def _content(recipe: Recipe) -> str:
    return json.dumps(recipe.model_dump(mode="json", exclude={"provenance"}), sort_keys=True)


def _bounds(found: Interval) -> dict[str, float | None]:
    named = {"value": found.value, "low": found.low, "high": found.high}
    return {name: number if math.isfinite(number) else None for name, number in named.items()}
