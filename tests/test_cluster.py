"""Jobs on several nodes that share nothing but the cluster and a bucket, submitted by a machine outside of it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from nodes import PROJECT, RayCluster, cannot, network, ray_cluster
from s3 import S3, s3_server
from safetensors.torch import load_file
from studies import REWARDS, tiny_study

from mage_ray.folder import StudyFolder
from mage_ray.search.trial import read_records
from mage_ray.storage.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(cannot()), reason=cannot())]

SAMPLES = ["method", "point", "prompt_id", "completion", "tokens", "kl", "raw/even", "raw/short"]


class Bed:
    """A cluster, a bucket, and a folder to submit from: the project, a study and its rewards."""

    def __init__(self, cluster: RayCluster, s3: S3, place: Path, model: Path) -> None:
        self.cluster, self.s3, self.place = cluster, s3, place
        for part in ("mage_ray", "jobs"):
            shutil.copytree(PROJECT / part, place / part, ignore=shutil.ignore_patterns("__pycache__", "bench"))
        (place / "rewards.py").write_text(REWARDS)
        files, _ = Store("s3://bucket/models/tiny").files
        files.put(f"{model}/", "bucket/models/tiny/", recursive=True)

    def study(self, name: str, **changes: Any) -> StudyFolder:
        """A study of that name, to be submitted, and where its folder will be."""
        text = tiny_study(Path("MODEL"), **changes).replace("MODEL", "s3://bucket/models/tiny")
        (self.place / f"{name}.yaml").write_text(text)
        return StudyFolder(f"s3://bucket/{name}")

    def submit(self, job: str, name: str, *options: str, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        entry = ["python", f"jobs/{job}.py", "--study", f"{name}.yaml", "--folder", f"s3://bucket/{name}", *options]
        return self.cluster.submit("--working-dir", ".", *before, "--", *entry, cwd=self.place)

    def lose(self, worker: int) -> None:
        """Switch one off, and a new one on."""
        self.cluster.workers.pop(worker).kill()
        self.cluster.workers.append(self.cluster.add())

    def run(self, job: str, name: str, *options: str) -> str:
        process = self.submit(job, name, *options)
        said, _ = process.communicate(timeout=500)
        assert process.returncode == 0, said[-4000:]
        return said


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[Bed]:
    """The head has no CPUs to give out, as on real clusters; two workers have one each."""
    place = tmp_path_factory.mktemp("cluster")
    with pytest.MonkeyPatch.context() as patch, network(place) as wires, s3_server(place, wires.address) as s3:
        for name, value in s3.environment.items():
            patch.setenv(name, value)
        patch.setenv("MAGE_RAY_CACHE", str(place / "cache"))
        wires.environment |= s3.environment
        yield Bed(ray_cluster(wires, (0, 1, 1)), s3, place / "submitted", tiny_model_folder)


def alone(bed: Bed, model: Path, name: str) -> Path:
    """The same study on this machine alone; its folder."""
    text = (bed.place / f"{name}.yaml").read_text().replace("s3://bucket/models/tiny", str(model))
    own = bed.place.parent / "alone"
    own.mkdir(exist_ok=True)
    (own / f"{name}.yaml").write_text(text)
    (own / "rewards.py").write_text(REWARDS)
    for verb in ("train", "evaluate"):
        command = [sys.executable, "-m", "mage_ray", verb, "--study", f"{name}.yaml", "--folder", name]
        done = subprocess.run(command, cwd=own, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
        assert done.returncode == 0, done.stdout + done.stderr
    return own / name


def assert_same_results(folder: StudyFolder, other: Path) -> None:
    """Experts and samples, number for number."""
    folder.fetch(*folder.results)
    names = {path.name for path in folder.experts.iterdir()}
    assert names == {path.name for path in (other / "experts").iterdir()}
    for name in names:
        ours, theirs = (
            load_file(at / name / "adapter_model.safetensors") for at in (folder.experts, other / "experts")
        )
        assert ours.keys() == theirs.keys() and all((ours[key] == theirs[key]).all() for key in theirs), name
    frames = [
        pd.concat(map(pd.read_parquet, at.glob("*.parquet")))[SAMPLES].sort_values(SAMPLES[:3], ignore_index=True)
        for at in (folder.evaluation, other / "evaluation")
    ]
    pd.testing.assert_frame_equal(*frames)


def test_every_job_is_submitted_from_outside_and_gives_what_one_machine_does(bed: Bed, tiny_model_folder: Path) -> None:
    where = bed.cluster.submit(
        "--working-dir", ".", "--", "python", "-c", "import mage_ray; print(mage_ray.__file__)", cwd=bed.place
    )
    assert "runtime_resources" in where.communicate(timeout=100)[0]  # what was shipped, not what is installed
    folder = bed.study(
        "whole",
        evaluation={"grid": 3, "max_new_tokens": 12, "resamples": 50, "workers": 2},
    )
    bed.run("train", "whole")
    assert "report: s3://bucket/whole/report/index.html" in bed.run("evaluate", "whole")
    assert_same_results(folder, alone(bed, tiny_model_folder, "whole"))
    # Both workers have taken part, and each has fetched the model once for all that ran there.
    addresses = {node.address for node in bed.cluster.workers}
    fetched = bed.s3.clients("GET", "/models/tiny/model.safetensors")
    assert addresses <= fetched.keys() and all(count == 1 for count in fetched.values()), fetched


def test_a_job_that_is_stopped_goes_on_when_it_is_submitted_again(bed: Bed) -> None:
    """With a second round, too, which samples from the experts that other nodes have trained."""
    training = {"steps": 20, "rounds": 2, "backbones": {"soup": {}}}
    folder = bed.study("stopped", training=training, guidance={"base": "soup", "guide": "soup"})
    job = bed.submit("train", "stopped", before=("--submission-id", "to-be-stopped"))
    wait_for(lambda: len(steps(folder)) > 4)
    assert "stopped" in bed.cluster.job("stop", "to-be-stopped")
    said, _ = job.communicate(timeout=100)
    assert "interrupted; the same command goes on from here" in said, said[-3000:]
    before = steps(folder)
    bed.run("train", "stopped")
    after = steps(folder)
    assert after[: len(before)] == before and sorted({*after}) == list(range(1, 21))
    # From a checkpoint: at most what lies between two of them was made twice.
    assert len(after) - 20 <= 4
    folder.fetch(*folder.results)
    assert json.loads((folder.experts / "soup-short" / "mage_ray.json").read_text())["steps"] == 40


ROUNDS = int(os.environ.get("MAGE_RAY_FAULTS", "0"))
"""How often nodes are lost in each phase, each time at other moments. A round takes four minutes."""


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_node_that_is_lost_in_any_phase_costs_nothing_but_time(bed: Bed, tiny_model_folder: Path, seed: int) -> None:
    name = f"lost{seed}"
    search = {"trials": 3, "prompts": 2, "workers": 2}
    evaluation = {"grid": 3, "max_new_tokens": 12, "resamples": 50, "workers": 2}
    rollouts = {"samples_per_prompt": 4, "max_new_tokens": 12, "prompts_per_shard": 1, "workers": 2}
    folder = bed.study(name, search=search, evaluation=evaluation, rollouts=rollouts, training={"steps": 12})
    dice = random.Random(seed)

    def lost(job: str, *conditions: Callable[[], bool]) -> None:
        """A job during which a worker is switched off whenever one of these comes true, or soon after."""
        process = bed.submit(job, name)
        for condition in conditions:
            wait_for(lambda c=condition: process.poll() is not None or c())  # type: ignore[misc]
            time.sleep(dice.uniform(0, 2))
            bed.lose(dice.randrange(len(bed.cluster.workers)))
        said, _ = process.communicate(timeout=900)
        assert process.returncode == 0, said[-4000:]

    store = Store(folder.place)
    lost("train", lambda: bool(store.find(".sums/rollouts")), lambda: len(steps(folder, "bone-even")) > 3)
    lost("evaluate", lambda: bool(store.find(".sums/evaluation")))
    assert_same_results(folder, alone(bed, tiny_model_folder, name))
    lost("search", lambda: bool(store.find(".sums/search/trials")))
    folder.fetch(*folder.results)
    records = read_records(folder)
    assert len(records) == 3 and not any("error" in record for record in records)
    assert folder.recipe.exists()
    bed.cluster.wait(3)


def steps(folder: StudyFolder, expert: str = "soup-even") -> list[int]:
    """Those that an expert's training has written down, as the bucket has them."""
    path = folder.checkpoints / expert / "metrics.jsonl"
    folder.fetch(path)
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    late = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < late
        time.sleep(0.3)
