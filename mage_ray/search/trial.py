"""A trial: one setting over the grid of preferences, on more prompts at each rung. Light: engines do the work.

A trial's process is Tune's, and there may be many: nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mage_ray.evaluation import measures
from mage_ray.files import write_atomic
from mage_ray.folder import StudyFolder
from mage_ray.preference import Preference

if TYPE_CHECKING:
    import pandas as pd


SHARE = "share"
"""What a trial reports its rung by: successive halving halves wherever it doubles."""


def share_of(rung: int) -> int:
    """How many times the first rung's share of the prompts a rung (from 1) has."""
    return int(2 ** (rung - 1))


@dataclass(frozen=True)
class Share:
    """An engine's part of a setting: its samples' numbers, and what it took to make those that weren't there yet."""

    samples: pd.DataFrame
    seconds: float
    tokens: int
    recipe: dict[str, Any]


@dataclass(frozen=True)
class Trials:
    """What all trials of a search share. ``rungs`` tells how many prompts each rung has in all."""

    folder: StudyFolder
    engines: tuple[Any, ...]
    rungs: tuple[int, ...]
    objectives: tuple[str, ...]
    grid: tuple[Preference, ...]
    reference_point: tuple[float, ...]

    def run(self, config: Mapping[str, Any]) -> None:
        """One trial, in a process of Tune's, to which it reports. Raises UserError."""
        from ray import tune

        path = record_path(self.folder, config)
        self.folder.fetch(path)
        record = {"trial": str(tune.get_context().get_trial_id()), "config": dict(config), "began": time.time()}
        try:
            self._climb(config, path, record)
        except Exception as error:
            reason = " ".join(f"{error}".split())[:300] or type(error).__name__
            self._keep(path, record | {"error": reason})
            raise

    def _climb(self, config: Mapping[str, Any], path: Path, record: Mapping[str, Any]) -> None:
        """Rung by rung, as long as Tune lets it. What was reached before is reported again, and not run."""
        import pandas as pd
        from ray import tune

        known = _known(path)
        asked, seconds, tokens = 0.0, 0.0, 0
        for rung, prompts in enumerate(self.rungs, start=1):
            if known is not None and known["rung"] >= rung:
                if known["rung"] == rung:
                    tune.report(known["scores"] | {SHARE: share_of(rung)})
                continue
            submitted = time.monotonic()
            shares = self._shares(config, prompts)
            asked += time.monotonic() - submitted
            seconds += max(share.seconds for share in shares)
            tokens += sum(share.tokens for share in shares)
            samples = pd.concat([share.samples for share in shares], ignore_index=True)
            points_MN = self._points(samples)
            found = self._scores(samples, points_MN)
            found |= {"prompts": prompts, "asked_seconds": asked, "engine_seconds": seconds, "tokens": tokens}
            found["tokens_per_second"] = tokens / seconds if tokens else 0.0
            kept = {"rung": rung, "last": prompts == self.rungs[-1], "scores": found, "points": points_MN.tolist()}
            kept["recipe"] = shares[0].recipe
            # Before Tune hears of it: what it hears of is never lost.
            self._keep(path, {**record, **kept})
            tune.report(found | {SHARE: share_of(rung)})

    def _keep(self, path: Path, record: Mapping[str, Any]) -> None:
        write_atomic(path, json.dumps({**record, "ended": time.time()}, indent=1) + "\n")
        self.folder.publish(path)

    def _shares(self, config: Mapping[str, Any], prompts: int) -> list[Share]:
        """The setting's samples on so many prompts, from all engines."""
        import ray

        from mage_ray.errors import UserError

        n = len(self.engines)
        try:
            return list(ray.get([e.run.remote(dict(config), prompts, i, n) for i, e in enumerate(self.engines)]))
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, UserError) else error) from None

    def _points(self, samples: pd.DataFrame) -> np.ndarray:
        """The mean rewards [M, N] at each preference of the grid."""
        means = samples.groupby("point")[[f"reward/{name}" for name in self.objectives]].mean().to_numpy()
        # One plan for all preferences is one point.
        return np.repeat(means, len(self.grid), axis=0) if len(means) == 1 else means

    def _scores(self, samples: pd.DataFrame, points_MN: np.ndarray) -> dict[str, float]:
        """The measures of a setting, over all preferences of the grid."""
        return {
            "hypervolume": float(measures.hypervolume(points_MN, self.reference_point)),
            "inner_product": float(measures.inner_product(self.grid, points_MN)),
            "controllability": float(measures.controllability(self.grid, points_MN)),
            "cost": float(samples.groupby("point")["forwards"].mean().mean()),
            "kl": float(samples["kl"].mean()),
            "length": float(samples["tokens"].mean()),
        }


def record_path(folder: StudyFolder, config: Mapping[str, Any]) -> Path:
    """Where a setting's last report is kept."""
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode()).hexdigest()[:12]
    return folder.search / "trials" / f"{digest}.json"


def forget_failures(folder: StudyFolder) -> None:
    """Delete the reports of trials that failed: they are run again."""
    for path in (folder.search / "trials").glob("*.json"):
        if "error" in json.loads(path.read_text()):
            folder.remove(path)


def read_records(folder: StudyFolder, patient: bool = True) -> list[dict[str, Any]]:
    """The settings' last reports, in the order in which they began.

    Each has ``trial, config, began, ended`` and either ``error`` or ``recipe, rung, last`` (whether it was on all
    prompts), ``points`` [M, N] and ``scores``: the measures, and how many prompts, seconds and tokens they took.
    """
    place = folder.search / "trials"
    folder.fetch(place, patient=patient)
    found = [json.loads(path.read_text()) for path in place.glob("*.json")]
    return sorted(found, key=lambda record: (record["began"], record["trial"]))


def _known(path: Path) -> dict[str, Any] | None:
    """What is kept of a setting that didn't fail."""
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return None if "error" in record else record
