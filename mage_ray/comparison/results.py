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
from mage_ray.errors import UserError
from mage_ray.evaluation.summary import MEASURES, Interval, Summary, paired_difference
from mage_ray.study import Study

UNTRAINED = ("reference", "redrawn-reference", "prompting")
COMPARED = ("hypervolume", "inner_product", "controllability")
"""Measures of which the differences of all pairs are written down."""


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
                    one: {other: _plain(self.difference(one, other, measure)) for other in labels if other != one}
                    for one in labels
                }
                for measure in COMPARED
            },
            "training_length": self.training_length(),
        }

    def _method(self, arm: Arm) -> dict[str, Any]:
        own, trained, timing = self.summary.method(arm.label), self.trained[arm.label], self.timing.get(arm.label)
        return {
            "method": arm.method,
            "variant": arm.variant.name,
            "steps": None if arm.method in UNTRAINED else arm.variant.study.training.steps,
            "constants": dict(arm.constants),
            "tried": [
                {"constants": dict(one.constants), "score": _plain(one.score), "kl": _number(one.kl)}
                for one in arm.tried
            ],
            "measures": {name: _plain(own.measures[name]) for name in MEASURES},
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
            "win_rate": None if arm.label not in self.wins else _plain(self.wins[arm.label]),
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
        ordered = {str(steps): _plain(found[steps]) for steps in sorted(found)}
        return {"bone-soup minus rewarded-soup": ordered, "pays_from": pays_from}


def lead(content: Mapping[str, Any], label: str, measure: str, rivals: Iterable[str]) -> dict[str, list[str]]:
    """Those of ``rivals`` that a label is above, level with and below, by paired intervals that leave out 0."""
    found: dict[str, list[str]] = {"above": [], "level": [], "below": []}
    for rival in rivals:
        if rival == label:
            continue
        difference = content["differences"][measure][label][rival]
        low, high = difference["low"], difference["high"]
        apart = "level" if low is None or low <= 0 <= high else "above" if low > 0 else "below"
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


def read_comparison(path: Path) -> dict[str, Any]:
    """A ``comparison.json``. Raises UserError when it can't be read."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        for part in ("methods", "differences", "seeds"):
            _ = content[part]
        return content
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:80]
        raise UserError(f"{path}: no comparison ({reason}), allowed: a comparison.json of mage-ray compare") from None


def _plain(found: Interval) -> dict[str, float | None]:
    return {name: _number(getattr(found, name)) for name in ("value", "low", "high")}


def _number(value: float) -> float | None:
    return round(float(value), 6) if math.isfinite(value) else None
