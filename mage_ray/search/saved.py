"""What a Tuner has saved of its trials, and a searcher that was saved beside it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import cloudpickle
from ray.tune.search import Searcher
from ray.tune.search.search_generator import SearchGenerator

from mage_ray.files import write_atomic


@dataclass(frozen=True)
class SavedTrial:
    """What a Tuner has saved of a trial."""

    config: Any
    ended: bool
    failed: bool
    result: dict[str, Any] | None


def saved_trials(folder: str) -> dict[str, SavedTrial] | None:
    """The Tuner's trials by their ids, in the order of their making; None where it has saved none that can be read."""
    found: dict[str, SavedTrial] = {}
    try:
        newest = max(Path(folder).glob("experiment_state-*.json"))
        for state, run in json.loads(newest.read_text())["trial_data"]:
            trial, status = json.loads(state), json.loads(state)["status"]
            result = json.loads(run).get("last_result") or None
            ended = status in ("TERMINATED", "ERROR")
            found[trial["trial_id"]] = SavedTrial(trial["config"], ended, status == "ERROR", result)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return found


def agree(searcher: Searcher, folder: str, waiting: set[str], known: set[str], lost: Callable[[str], None]) -> None:
    """Bring a restored searcher to where the table of trials in ``folder`` is, which may be older or newer.

    ``waiting`` are the trials that it has no result of, ``known`` all that it has proposed. What has ended by the table
    is told; what began is asked for again, and is the same setting; the others are ``lost``.
    """
    table = saved_trials(folder)
    if table is None:
        return
    for trial_id, trial in table.items():
        if trial_id in waiting and trial.ended:
            searcher.on_trial_complete(trial_id, trial.result, trial.failed)
    for trial_id in sorted(waiting - table.keys()):
        lost(trial_id)
    for trial_id, trial in table.items():
        if trial_id in known:
            continue
        if searcher.suggest(trial_id) != trial.config:
            lost(trial_id)
        elif trial.ended:
            searcher.on_trial_complete(trial_id, trial.result, trial.failed)


def recount(folder: str) -> None:
    """Make the Tuner's own count of the trials that it has begun that of its table of trials.

    Both are saved one after the other: a count that a kill leaves ahead ends a search early, one that it leaves behind
    lets it try too many.
    """
    table = saved_trials(folder)
    for path in sorted(Path(folder).glob(SearchGenerator.CKPT_FILE_TMPL.format("*")))[-1:]:
        state = cloudpickle.loads(path.read_bytes())
        if table is not None and state["counter"] != len(table):
            write_atomic(path, cloudpickle.dumps(state | {"counter": len(table)}))
