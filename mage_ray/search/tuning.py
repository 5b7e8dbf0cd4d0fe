"""A study's search as Ray Tune sees it: the searcher, the scheduler, the loggers, and when to give up."""

from __future__ import annotations

import json
import logging
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from zipfile import ZipFile

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from mage_ray.errors import FieldError, UserError
from mage_ray.folder import StudyFolder
from mage_ray.search.pymoo_search import PymooSearch
from mage_ray.search.saved import agree, saved_trials
from mage_ray.search.space import Space
from mage_ray.search.spec import METRICS
from mage_ray.search.trial import SHARE, read_records, share_of
from mage_ray.study import Study

_log = logging.getLogger("mage_ray")

_TRIES = 10_000
"""Settings in a row that may break a constraint before the search is given up."""
_FAILURES = 3
"""So many trials that failed, and none that didn't, end a search."""
_LOOKS_EVERY = 1.0
"""Seconds between two looks at what has failed."""


def searcher(space: Space) -> Searcher:
    """The algorithm that ``search`` names. Raises UserError when it can't be made."""
    spec = space.study.search
    metrics: list[str] = list(spec.metrics)
    modes = [METRICS[name] for name in metrics]
    first = [space.defaults] if space.defaults is not None else []
    made: Searcher
    if spec.algorithm in ("optuna", "random"):
        made = Feasible(_optuna(space, metrics, modes, first), space.excess)
    else:
        made = PymooSearch(
            space.domains,
            metrics,
            modes,
            algorithm=spec.algorithm,
            population=spec.population,
            seed=space.seed,
            constraints=[space.excess],
            points_to_evaluate=first,
            tries=_TRIES,
        )
    return made


def _optuna(space: Space, metrics: list[str], modes: list[str], first: list[Any]) -> Searcher:
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    seed = space.seed
    random = space.study.search.algorithm == "random"
    sampler = optuna.samplers.RandomSampler(seed=seed) if random else optuna.samplers.TPESampler(seed=seed)
    one = len(metrics) == 1
    return OptunaSearch(
        OptunaSearch.convert_search_space(space.domains),
        metrics[0] if one else metrics,
        modes[0] if one else modes,
        first or None,
        sampler=sampler,
    )


class Feasible(Searcher):
    """Another searcher, of whose settings only those are tried that ``excess`` gives at most 0 for.

    It is told that the others failed. Raises FieldError where ``_TRIES`` in a row are among them.
    """

    def __init__(self, searcher: Searcher, excess: Callable[[Mapping[str, Any]], float]) -> None:
        super().__init__(searcher.metric, searcher.mode)
        self._searcher, self._excess = searcher, excess
        self._at_most: float = math.inf
        self._ids: dict[str, str] = {}
        """What the other searcher calls each trial."""
        self._ended: set[str] = set()

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        # Tune's limiter would count trials that a kill has lost for ever; here they are brought into agreement.
        self._at_most = max_concurrent
        return True

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return self._searcher.set_search_properties(metric, mode, config, **spec)

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        if len(self._ids.keys() - self._ended) >= self._at_most:
            return None
        for attempt in range(_TRIES):
            own = trial_id if attempt == 0 else f"{trial_id}-{attempt}"
            config = self._searcher.suggest(own)
            if config is None or not isinstance(config, dict):
                return config
            if self._excess(config) <= 0:
                self._ids[trial_id] = own
                return config
            self._searcher.on_trial_complete(own, error=True)
        raise FieldError("constraints", f"none of {_TRIES} settings met them", "a space that meets search.max_norm")

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if trial_id in self._ids:
            self._searcher.on_trial_result(self._ids[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if trial_id in self._ids and trial_id not in self._ended:
            self._ended.add(trial_id)
            self._searcher.on_trial_complete(self._ids[trial_id], result, error)

    def save(self, checkpoint_path: str) -> None:
        with tempfile.TemporaryDirectory() as scratch, ZipFile(checkpoint_path, "w") as file:  # Tune takes one file
            self._searcher.save(f"{scratch}/searcher")
            file.write(f"{scratch}/searcher", "searcher")
            file.writestr("ids.json", json.dumps([self._ids, sorted(self._ended)]))

    def restore(self, checkpoint_path: str) -> None:
        with tempfile.TemporaryDirectory() as scratch, ZipFile(checkpoint_path) as file:
            self._searcher.restore(file.extract("searcher", scratch))
            self._ids, ended = json.loads(file.read("ids.json"))
            self._ended = set(ended)

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        super().restore_from_dir(checkpoint_dir)
        waiting = self._ids.keys() - self._ended
        agree(self, checkpoint_dir, waiting, set(self._ids), lambda one: self.on_trial_complete(one, error=True))


def scheduler(study: Study) -> TrialScheduler:
    """Successive halving over the rungs, or none."""
    spec = study.search
    if spec.rungs == 1:
        return FIFOScheduler()
    last = share_of(spec.rungs)
    return ASHAScheduler(time_attr=SHARE, max_t=last, grace_period=1, reduction_factor=2, brackets=1)


def loggers(study: Study, place: Path) -> list[tune.Callback]:
    """Those that ``search.log_to`` names, beside TensorBoard's. Raises FieldError where a package isn't there."""
    made: list[tune.Callback] = []
    for name in study.search.log_to:
        try:
            if name == "mlflow":
                import mlflow  # noqa: F401
                from ray.air.integrations.mlflow import MLflowLoggerCallback

                # A database where no server is named: MLflow has given up on plain folders.
                uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{place / 'mlflow.db'}"
                made.append(MLflowLoggerCallback(tracking_uri=uri, experiment_name=study.name))
            else:
                import wandb  # noqa: F401
                from ray.air.integrations.wandb import WandbLoggerCallback

                made.append(WandbLoggerCallback(project=study.name, dir=str(place)))
        except ImportError:
            raise FieldError(
                "search.log_to", name, f"loggers whose package is installed (pip install {name})"
            ) from None
    return made


def is_readable(space: Space, place: Path) -> bool:
    """Whether what a search that was killed has left in ``place`` can be gone on with.

    Tune writes its files in place: a kill may leave half of one.
    """
    if saved_trials(str(place)) is None:
        return False
    try:
        searcher(space).restore_from_dir(str(place))
    except Exception as error:  # Optuna's is a pickle, of which half can fail in any way
        _log.warning("the search's saved state is damaged and is left aside: %s", " ".join(str(error).split())[:200])
        return False
    return True


class GivesUp(tune.Stopper):
    """Ends a search whose first trials have all failed."""

    def __init__(self, folder: StudyFolder) -> None:
        self._folder, self._looked = folder, -math.inf

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if time.monotonic() < self._looked + _LOOKS_EVERY:  # asked at every turn of Tune's loop
            return False
        self._looked = time.monotonic()
        try:
            records = read_records(self._folder, patient=False)
        except UserError:  # the trials will say it
            return False
        return len(records) >= _FAILURES and all("error" in record for record in records)
