"""Real Ray Train jobs of value models: ZeRO stages, and a driver that is killed between two of them."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray_tests import assert_same, checkpointed, driver_to_kill, steps_made, wait_for, weights_of
from training_pools import make_folder, make_pool, value_run, valued_study

from mage_ray.merging.adapter import CONFIG_FILE, HEAD_FILE, ORIGIN_FILE, WEIGHTS_FILE
from mage_ray.training.checkpoint import load_state
from mage_ray.training.ray_train import fit
from mage_ray.training.rollouts import load_pool
from mage_ray.training.run import METRICS
from mage_ray.training.values import QUALITY, set_run, split, train_values

pytestmark = pytest.mark.slow

SHORT: dict[str, Any] = {"steps": 6, "target": "td", "lam": 0.8}
LONG: dict[str, Any] = {"steps": 40, "learning_rate": 2e-3}
EVERY = 5


@pytest.fixture(scope="module")
def alone(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """A value model trained in this process, without DeepSpeed: what all workers together must arrive at."""
    study = valued_study(tiny_model_folder, **SHORT)
    return weights_of(fit(value_run(study, make_pool(), tmp_path_factory.mktemp("alone")), in_process=True))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_two_workers_arrive_where_one_does(
    ray_here: Path, tiny_model_folder: Path, tmp_path: Path, alone: dict[str, np.ndarray], stage: int
) -> None:
    """Though their shares of a batch have different numbers of tokens."""
    study = valued_study(tiny_model_folder, {"workers": 2, "zero_stage": stage}, **SHORT)
    folder = fit(value_run(study, make_pool(), tmp_path))
    got = weights_of(folder)
    assert_same(got, alone)
    assert {"head.weight", "head.bias", "head.down", "head.up"} < got.keys()
    assert all(np.abs(tensor).max() > 1e-3 for tensor in got.values())  # Nothing is left as it began, at 0.
    assert load_state(folder).workers == 2


def test_in_bfloat16_a_value_model_learns_the_same(
    ray_here: Path, tiny_model_folder: Path, tmp_path: Path, alone: dict[str, np.ndarray]
) -> None:
    study = valued_study(tiny_model_folder, {"precision": "bfloat16"}, **SHORT)
    got = weights_of(fit(value_run(study, make_pool(), tmp_path)))
    assert got.keys() == alone.keys()
    off = {name: float(np.linalg.norm(got[name] - alone[name]) / np.linalg.norm(alone[name])) for name in got}
    # Adam makes a step of one size of any gradient, rounding alone included.
    assert max(off.values()) < 0.3, off


def test_killed_driver_goes_on_when_started_again_and_leaves_finished_value_models_alone(
    ray_here: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    study = valued_study(tiny_model_folder, {"checkpoint_every": EVERY}, **LONG)
    folder = make_folder(tmp_path / "study", study, make_pool())
    runs = {name: set_run(study, folder, make_pool(), "final", name).folder for name in study.objective_names}
    with driver_to_kill(train_values, folder):
        wait_for(lambda: folder.value("final", "early").exists())
        wait_for(lambda: checkpointed(runs["late"]))
    files = {WEIGHTS_FILE, CONFIG_FILE, HEAD_FILE, ORIGIN_FILE}
    assert [path.name for path in (folder.path / "values").iterdir()] == ["final-early"]
    first = {path: path.stat().st_mtime_ns for path in folder.value("final", "early").iterdir()}
    assert {path.name for path in first} == files

    train_values(study, folder)
    assert {path: path.stat().st_mtime_ns for path in first} == first
    steps = steps_made(runs["late"] / METRICS)
    assert sorted(set(steps)) == list(range(1, LONG["steps"] + 1))
    back = [now for before, now in pairwise(steps) if now <= before]
    # From a checkpoint, not from the start; none is repeated where the kill came right after one.
    assert len(back) <= 1 and all(now > EVERY and now % EVERY == 1 for now in back)
    assert len(steps_made(runs["early"] / METRICS)) == LONG["steps"]

    pool = load_pool(folder, study)
    train, _ = split(pool, study.values["final"].held_out, study.seed)
    unbroken = value_run(study, train, tmp_path / "unbroken", "late")
    assert_same(weights_of(folder.value("final", "late")), weights_of(fit(unbroken, in_process=True)))
    assert {path.name for path in (folder.path / "values").iterdir()} == {"final-early", "final-late"}
    for name in study.objective_names:
        assert {path.name for path in folder.value("final", name).iterdir()} == files | {QUALITY}
        quality = json.loads((folder.value("final", name) / QUALITY).read_text())
        assert quality["answers"] > 0 and all(np.isfinite(row["error"]) for row in quality["by_share"])


def test_a_training_by_other_constants_never_goes_on_from_this_ones_checkpoints(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    one, other = (valued_study(tiny_model_folder, **LONG | {"learning_rate": rate}) for rate in (1e-3, 2e-3))
    folder = make_folder(tmp_path / "study", one, make_pool())
    places = {set_run(study, folder, make_pool(), "final", "late").folder for study in (one, other, one)}
    assert len(places) == 2
