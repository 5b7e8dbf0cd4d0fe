"""The jobs of a study that lies in a bucket, each on another node, as far as its files go; one of them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from s3 import S3, s3_server
from safetensors.torch import load_file
from studies import REWARDS, tiny_study

from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator
from mage_ray.storage.store import Store

pytestmark = pytest.mark.slow

SAMPLES = ["method", "point", "prompt_id", "completion", "tokens", "kl", "raw/even", "raw/short"]


@pytest.fixture
def s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    with s3_server(tmp_path) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def mage_ray(place: Path, node: str, *arguments: str) -> subprocess.Popen[str]:
    """A command on a node that has only what it fetches; in a folder of its own, with the study's rewards."""
    own = place / node
    own.mkdir(exist_ok=True)
    (own / "rewards.py").write_text(REWARDS)
    environment = {"PYTHONPATH": str(own), "MAGE_RAY_CACHE": str(own / "cache"), "COLUMNS": "200"}
    return subprocess.Popen(
        [sys.executable, "-m", "mage_ray", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=own,
        env=os.environ | environment,
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output[-3000:]
    return output


def test_nodes_that_share_a_bucket_arrive_where_one_node_does(
    s3: S3, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = StudyFolder("s3://bucket/study")
    files, root = Store(bucket.place).files
    files.put(f"{tiny_model_folder}/", "bucket/models/tiny/", recursive=True)
    search = {"trials": 2, "prompts": 2, "workers": 1}
    (tmp_path / "here.yaml").write_text(tiny_study(tiny_model_folder, search=search))
    (tmp_path / "bucket.yaml").write_text(
        tiny_study(Path("MODEL"), search=search).replace("MODEL", "s3://bucket/models/tiny")
    )
    here, there = (
        ["--study", str(tmp_path / "here.yaml"), "--folder", str(tmp_path / "alone")],
        ["--study", str(tmp_path / "bucket.yaml"), "--folder", "s3://bucket/study"],
    )

    # One node trains, and is gone when the first expert is there; another one goes on.
    killed = mage_ray(tmp_path, "one", "train", *there)
    late = time.monotonic() + 300
    while not (done := files.glob(f"{root}/.sums/experts/*/mage_ray.json/*")):
        assert killed.poll() is None and time.monotonic() < late
        time.sleep(0.2)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    first = done[0].split("/experts/")[1].split("/")[0]
    before = s3.requests("PUT", f"/study/experts/{first}/adapter_model.safetensors")
    finished(mage_ray(tmp_path, "two", "train", *there))
    assert s3.requests("PUT", f"/study/experts/{first}/adapter_model.safetensors") == before == 1
    finished(mage_ray(tmp_path, "alone", "train", *here))
    experts = tmp_path / "alone" / "experts"
    bucket.fetch(*bucket.results)
    for name in ("bone-even", "bone-short", "soup-even", "soup-short"):
        ours, theirs = (load_file(at / name / "adapter_model.safetensors") for at in (bucket.experts, experts))
        assert all((ours[key] == theirs[key]).all() for key in theirs) and ours.keys() == theirs.keys()

    # A third one evaluates, a fourth searches and writes.
    said = finished(mage_ray(tmp_path, "three", "evaluate", *there))
    assert "report: s3://bucket/study/report/index.html" in said
    finished(mage_ray(tmp_path, "alone", "evaluate", *here))
    bucket.fetch(*bucket.results)
    frames = [
        pd.concat(map(pd.read_parquet, sorted(at.glob("*.parquet"))))[SAMPLES].sort_values(
            SAMPLES[:3], ignore_index=True
        )
        for at in (bucket.evaluation, tmp_path / "alone" / "evaluation")
    ]
    pd.testing.assert_frame_equal(*frames)
    said = finished(mage_ray(tmp_path, "four", "search", *there))
    assert "recipe: s3://bucket/study/recipe.yaml" in said
    assert "holds a search already" in mage_ray(tmp_path, "five", "search", *there).communicate(timeout=200)[0]
    finished(mage_ray(tmp_path, "five", "search", *there, "--resume"))
    trials = files.glob(f"{root}/search/trials/*.json")
    assert len(trials) == 2 and all(s3.requests("PUT", path.removeprefix("bucket")) == 1 for path in trials)

    # The front door is the same.
    asked = [
        "How was your day?",
        "--study",
        "s3://bucket/study",
        "--preference",
        "even=0.5,short=0.5",
        "--max-new-tokens",
        "8",
    ]
    said = finished(
        mage_ray(tmp_path, "six", "generate", *asked, "--recipe", "s3://bucket/study/recipe.yaml", "--seed", "3")
    )
    monkeypatch.setenv("MAGE_RAY_CACHE", str(tmp_path / "seven"))
    generator = Generator.open("s3://bucket/study", recipe="s3://bucket/study/recipe.yaml")
    assert generator.study.model == "s3://bucket/models/tiny" and said
