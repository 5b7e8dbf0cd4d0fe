"""Real Ray Train jobs on the tiny model: every ZeRO stage, workers and drivers that are killed, a study's experts."""

from __future__ import annotations

import io
import json
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from ray_tests import assert_same, checkpointed, driver_to_kill, kill_a_worker, steps_made, wait_for, weights_of
from rich.console import Console
from test_trainers import dpo_run
from training_pools import make_folder, make_pool, make_study

from mage_ray.errors import UserError
from mage_ray.merging.adapter import ORIGIN_FILE
from mage_ray.models import fingerprint
from mage_ray.training.checkpoint import load_state
from mage_ray.training.experts import study_experts, train_experts
from mage_ray.training.ray_train import fit
from mage_ray.training.run import METRICS

pytestmark = pytest.mark.slow

WEIGHTS = {"early": 1.0, "late": 0.0}
LONG: dict[str, Any] = {"steps": 30, "checkpoint_every": 5, "learning_rate": 2e-3}


@pytest.fixture(scope="module")
def alone(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """The adapter of an unbroken run in this process, without DeepSpeed: what all jobs must arrive at."""
    run = dpo_run(tiny_model_folder, tmp_path_factory.mktemp("alone"), WEIGHTS)
    return weights_of(fit(run, in_process=True))


@pytest.fixture(scope="module")
def alone_for_long(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    run = dpo_run(tiny_model_folder, tmp_path_factory.mktemp("alone_for_long"), WEIGHTS, **LONG)
    return weights_of(fit(run, in_process=True))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_workers_arrive_where_one_does_at_every_zero_stage(
    ray_here: Path, tiny_model_folder: Path, tmp_path: Path, alone: dict[str, np.ndarray], stage: int
) -> None:
    """And that no stale lock of a DeepSpeed build is in their way, since nothing is built."""
    run = dpo_run(tiny_model_folder, tmp_path, WEIGHTS, workers=2, zero_stage=stage)
    folder = fit(run)
    assert_same(weights_of(folder), alone)
    assert {path.name for path in ray_here.rglob("*") if path.is_file()} == {"lock"}
    assert load_state(folder).workers == 2
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".json", *[".safetensors"] * 3]


@pytest.mark.parametrize("stage", [0, 2])
def test_killed_worker_is_replaced_and_goes_on_from_the_last_checkpoint(
    ray_here: Path, tiny_model_folder: Path, tmp_path: Path, alone_for_long: dict[str, np.ndarray], stage: int
) -> None:
    run = dpo_run(tiny_model_folder, tmp_path, WEIGHTS, workers=2, zero_stage=stage, **LONG)
    killed: list[int] = []
    killer = Thread(target=kill_a_worker, args=(run.folder, killed))
    killer.start()
    folder = fit(run)
    killer.join()
    assert len(killed) == 1
    assert_same(weights_of(folder), alone_for_long)
    steps = steps_made(run.folder / METRICS)
    assert sorted(set(steps)) == list(range(1, LONG["steps"] + 1))
    back = [now for before, now in pairwise(steps) if now <= before]
    # From a checkpoint, not from the start; none is repeated where the kill came right after one.
    assert len(back) <= 1
    assert all(step > 1 and step % LONG["checkpoint_every"] == 1 for step in back)


def test_killed_driver_goes_on_when_started_again_and_leaves_finished_experts_alone(
    ray_here: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    # Two sets of the same rows: two experts to train, four places.
    backbones = {"soup": {}, "bone": {"beta": 1.0}}
    study = make_study(tiny_model_folder, backbones=backbones, **LONG)
    folder = make_folder(tmp_path / "study", study, make_pool())
    names = [expert.name for expert in study_experts(study, folder)]
    assert names == ["soup-early", "soup-late"]

    with driver_to_kill(train_experts, folder):
        wait_for(lambda: (folder.expert("soup", "early") / ORIGIN_FILE).exists())
        wait_for(lambda: checkpointed(folder.checkpoints / "soup-late"))
    first = (folder.expert("soup", "early") / ORIGIN_FILE).stat().st_mtime_ns
    assert not (folder.expert("soup", "late") / ORIGIN_FILE).exists()

    printed = Console(file=io.StringIO(), force_terminal=False, width=120)
    train_experts(study, folder, printed)
    assert (folder.expert("soup", "early") / ORIGIN_FILE).stat().st_mtime_ns == first
    steps = steps_made(folder.checkpoints / "soup-late" / METRICS)
    assert sorted(set(steps)) == list(range(1, LONG["steps"] + 1))
    back = [now for before, now in pairwise(steps) if now <= before]
    assert len(back) <= 1 and all(now > LONG["checkpoint_every"] for now in back)
    assert len(steps_made(folder.checkpoints / "soup-early" / METRICS)) == LONG["steps"]

    record = json.loads((folder.expert("bone", "late") / ORIGIN_FILE).read_text())
    assert record["weights"] == {"early": 0.0, "late": 1.0} and record["steps"] == LONG["steps"]
    assert record["base_model"] == fingerprint(study.model) and record["metrics"]["loss"] < 0.7
    shared = [weights_of(folder.expert(backbone, "early")) for backbone in ("soup", "bone")]
    assert all(np.array_equal(shared[0][name], shared[1][name]) for name in shared[0])
    other = weights_of(folder.expert("soup", "late"))
    assert any(not np.array_equal(other[name], shared[0][name]) for name in other)
    assert "soup-late: step 30/30  loss" in printed.file.getvalue()  # type: ignore[attr-defined]
    assert not any(path.suffix in (".pt", ".pkl", ".bin", ".pth") for path in folder.path.rglob("*"))


def test_failure_names_the_expert_and_its_cause(
    ray_here: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mage_ray.training.ray_train._RESTARTS", 0)
    study = make_study(tiny_model_folder, lora={"rank": 4, "targets": ["no_such_layer"]}, backbones={"soup": {}})
    folder = make_folder(tmp_path / "study", study, make_pool())
    with pytest.raises(UserError, match=r"^expert soup-early: training failed: .*no_such_layer") as error:
        train_experts(study, folder)
    assert "\n" not in str(error.value)


def test_more_than_the_cluster_has_is_refused_at_once(ray_here: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    study = make_study(tiny_model_folder, workers=4)
    folder = make_folder(tmp_path / "study", study, make_pool())
    with pytest.raises(UserError, match=r"4 CPUs .* 2 that"):
        train_experts(study, folder)
