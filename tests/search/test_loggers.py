"""Trials as MLflow keeps them, read back by its own client; and loggers that are not there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import tune
from studies import tiny_study

from mage_ray.errors import FieldError
from mage_ray.search import tuning
from mage_ray.study import parse_study

TRIED = {0.25: 1.5, 0.75: 2.5}
"""Settings and their hypervolumes."""


@pytest.fixture
def ray_here() -> Iterator[None]:
    import ray

    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


def tune_logged(place: Path, name: str) -> None:
    """Two trials of a Tuner with the study's loggers."""
    study = parse_study(tiny_study(Path("/nowhere"), search={"log_to": [name]}))
    tried = dict(TRIED)

    def trial(config: dict[str, Any]) -> None:
        tune.report({"hypervolume": tried[config["strength"]]})

    callbacks = tuning.loggers(study, place)
    results = tune.Tuner(
        trial,
        param_space={"strength": tune.grid_search(list(TRIED))},
        run_config=tune.RunConfig(storage_path=str(place), name="tune", callbacks=callbacks, verbose=0),
    ).fit()
    assert not results.errors


@pytest.mark.slow
def test_mlflow_has_every_trial(ray_here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tune_logged(tmp_path, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    assert {float(run.data.params["strength"]): run.data.metrics["hypervolume"] for run in runs} == TRIED
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_logger_that_is_not_installed_is_said(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # its import fails
    study = parse_study(tiny_study(Path("/nowhere"), search={"log_to": [name]}))
    with pytest.raises(FieldError, match=rf"search\.log_to: got {name}, allowed: .*pip install {name}"):
        tuning.loggers(study, tmp_path)
