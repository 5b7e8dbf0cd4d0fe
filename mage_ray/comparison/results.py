"""``comparison.json``: what a comparison has found, whether two of them agree, and the questions that it answers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from mage_ray.comparison.costs import Trained
from mage_ray.comparison.tuning import Arm
from mage_ray.comparison.variants import SHUFFLED
from mage_ray.errors import FieldError, UserError
from mage_ray.evaluation.summary import MEASURES, Interval, Summary, paired_difference
from mage_ray.study import Study

COMPARED = ("hypervolume", "inner_product", "controllability")
"""The measures that say which method is better; the others are shapes and prices."""


@dataclass(frozen=True)
class Found:
    """All of one comparison."""

    study: Study
    arms: Sequence[Arm]
    summary: Summary
    trained: Mapping[str, Trained]
    timing: Mapping[str, Mapping[str, float]]
    forwards: Mapping[str, float]
    wins: Mapping[str, Interval]
    facts: Mapping[str, str]

    def difference(self, method: str, other: str, measure: str) -> Interval:
        """The paired difference of two labels."""
        return paired_difference(self.summary, method, other, measure)

    def content(self) -> dict[str, Any]:
        """As ``comparison.json`` has it: plain numbers, null for what is not defined."""
        study, labels = self.study, [arm.label for arm in self.arms]
        return {
            "study": study.name,
            "digest": study.digest,
            "objectives": study.objective_names,
            "seeds": {"study": study.seed, "evaluation": list(study.evaluation.seeds)},
            "prompts": {
                "source": study.prompts.source,
                "train": study.prompts.train,
                "validation": study.compare.prompts,
                "test": self.summary.prompts,
            },
            "grid": [list(mu) for mu in study.evaluation_grid()],
            "validation_grid": [list(mu) for mu in study.validation_grid()],
            "reference_point": study.reference_point(),
            "confidence": self.summary.confidence,
            "resamples": self.summary.resamples,
            "measure": study.compare.measure,
            **self.facts,
            "methods": {arm.label: self._method(arm) for arm in self.arms},
            "differences": {
                measure: {
                    one: {other: _rounded(self.difference(one, other, measure)) for other in labels[i + 1 :]}
                    for i, one in enumerate(labels[:-1])
                }
                for measure in MEASURES
            },
            "training_length": self.training_length(),
        }

    def _method(self, arm: Arm) -> dict[str, Any]:
        own, trained, timing = self.summary.method(arm.label), self.trained[arm.label], self.timing.get(arm.label)
        return {
            "method": arm.method,
            "variant": arm.variant.name,
            "steps": sorted(trained.steps),
            "constants": dict(arm.constants),
            "tried": [
                {"constants": dict(one.constants), "score": _rounded(one.score), "kl": _number(one.kl)}
                for one in arm.tried
            ],
            "kl_goal": None if arm.kl_goal is None else _number(arm.kl_goal),
            "measures": {name: _rounded(own.measures[name]) for name in MEASURES},
            "preferences": [[_number(x) for x in mu] for mu in own.preferences.tolist()],
            "points": [[_number(x) for x in point] for point in own.points.tolist()],
            "cost": {
                "training_tokens": trained.tokens,
                "models": trained.models,
                "stored_bytes": trained.bytes,
                "forwards_per_token": _number(self.forwards[arm.label]),
                "tokens_per_second": None if timing is None else _number(timing["best"]),
                "tokens_per_second_median": None if timing is None else _number(timing["median"]),
                "memory_bytes": None if timing is None else trained.bytes + timing["bytes"],
            },
            "win_rate": None if arm.label not in self.wins else _rounded(self.wins[arm.label]),
        }

    def training_length(self) -> dict[str, Any] | None:
        """Bone Soup minus Rewarded Soup in hypervolume by steps of training; from where on it is above 0 for good."""
        pair, own = ("bone-soup", "rewarded-soup"), self.study.training.steps
        found: dict[int, Interval] = {}
        for variant in dict.fromkeys(arm.variant.name for arm in self.arms if arm.variant.name != SHUFFLED):
            labels = [f"{method}@{variant}" if variant else method for method in pair]
            if all(label in {arm.label for arm in self.arms} for label in labels):
                found[int(variant or own)] = self.difference(labels[0], labels[1], "hypervolume")
        if len(found) < 2:
            return None
        pays_from = None
        for steps in sorted(found, reverse=True):
            if not found[steps].low > 0:
                break
            pays_from = steps
        ordered = {str(steps): _rounded(found[steps]) for steps in sorted(found)}
        return {"bone-soup minus rewarded-soup": ordered, "pays_from": pays_from}


def difference(content: Mapping[str, Any], one: str, other: str, measure: str) -> dict[str, float | None]:
    """The paired difference of two labels, ``one`` minus ``other``; the file has each pair in one order."""
    own = content["differences"][measure]
    if other in own.get(one, {}):
        found: dict[str, float | None] = own[one][other]
        return found
    value, low, high = (own[other][one][part] for part in ("value", "low", "high"))
    turned = [None if number is None else -number for number in (value, high, low)]
    return dict(zip(("value", "low", "high"), turned, strict=True))


def lead(content: Mapping[str, Any], label: str, measure: str, rivals: Iterable[str]) -> dict[str, list[str]]:
    """Those of ``rivals`` that a label is above, level with and below, by paired intervals that leave out 0."""
    found: dict[str, list[str]] = {"above": [], "level": [], "below": []}
    for rival in rivals:
        if rival == label:
            continue
        found_one = difference(content, label, rival, measure)
        low, high = found_one["low"], found_one["high"]
        apart = "level" if low is None or high is None or low <= 0 <= high else "above" if low > 0 else "below"
        found[apart].append(rival)
    return found


def agreement(ours: Mapping[str, Any], theirs: Mapping[str, Any], measure: str) -> dict[str, list[list[str]]]:
    """Pairs of labels that both comparisons tell apart, by intervals that don't overlap: ``kept`` or ``turned``.

    And ``apart_once``: those that only one of them tells apart.
    """
    found: dict[str, list[list[str]]] = {"kept": [], "turned": [], "apart_once": []}
    for one, other in combinations([label for label in ours["methods"] if label in theirs["methods"]], 2):
        orders = [_order(content, one, other, measure) for content in (ours, theirs)]
        if all(orders):
            found["kept" if orders[0] == orders[1] else "turned"].append([one, other])
        elif any(orders):
            found["apart_once"].append([one, other])
    return found


def _order(content: Mapping[str, Any], one: str, other: str, measure: str) -> int:
    """1 or -1 where the intervals of two labels don't overlap, else 0."""
    a, b = (content["methods"][label]["measures"][measure] for label in (one, other))
    if a["low"] is None or b["low"] is None:
        return 0
    return 1 if a["low"] > b["high"] else -1 if b["low"] > a["high"] else 0


def read_comparison(path: Path, study: Study) -> dict[str, Any]:
    """A ``comparison.json`` that another one of ``study`` can be held against.

    Raises UserError when it can't be read, or is over other objectives, preferences or another reference point.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        theirs = {part: content[part] for part in ("objectives", "grid", "reference_point")}
        for own in content["methods"].values():
            for measure in COMPARED:
                _ = own["measures"][measure]["low"], own["measures"][measure]["high"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"{path}: no comparison ({reason}), allowed: a comparison.json of mage-ray compare") from None
    grid = [list(mu) for mu in study.evaluation_grid()]
    ours = {"objectives": study.objective_names, "grid": grid, "reference_point": study.reference_point()}
    for part, value in ours.items():
        if theirs[part] != value:
            raise FieldError("--against", f"one of another {part.replace('_', ' ')}", f"{path} of the same study")
    return content


def _rounded(found: Interval) -> dict[str, float | None]:
    return {name: _number(getattr(found, name)) for name in ("value", "low", "high")}


def _number(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None
