"""The main job as users run it: real processes, killed for real, and submitted to a real Ray cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from clusters import job_cluster, submit_command, with_token
from nodes import cannot
from studies import REWARDS, tiny_study

from mage_ray.generator import Generator

pytestmark = pytest.mark.slow

EXPERTS = ("bone-even", "bone-short", "soup-even", "soup-short")


@pytest.fixture
def place(tiny_model_folder: Path, tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(REWARDS)
    (tmp_path / "study.yaml").write_text(tiny_study(tiny_model_folder))
    return tmp_path


def mage_ray(place: Path, verb: str, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "mage_ray",
            verb,
            "--study",
            str(place / "study.yaml"),
            "--folder",
            str(place / "run"),
            *options,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(place), "COLUMNS": "120"},
        start_new_session=True,
    )


def finished(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    return output


def kill_when(process: subprocess.Popen[str], there: Path, seconds: float = 300) -> None:
    """Kill the job and all that it started, without warning, once ``there`` exists."""
    end = time.monotonic() + seconds
    while not there.exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < end, f"{there} never came"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_train_and_evaluate_killed_at_every_stage_end_where_an_unbroken_run_would(place: Path) -> None:
    run = place / "run"
    kill_when(mage_ray(place, "train"), run / "rollouts" / "shard-00000.parquet")
    first_shard = (run / "rollouts" / "shard-00000.parquet").stat().st_mtime_ns
    finished(mage_ray(place, "train"))
    assert (run / "rollouts" / "shard-00000.parquet").stat().st_mtime_ns == first_shard
    assert len(list((run / "rollouts").glob("shard-*.parquet"))) == 2
    pool = pd.concat(pd.read_parquet(p) for p in (run / "rollouts").glob("shard-*.parquet"))
    assert len(pool) == 6 * 4
    assert pool.groupby("prompt_id")["sample"].nunique().eq(4).all()
    assert {p.name for p in (run / "experts").iterdir()} == set(EXPERTS)

    kill_when(mage_ray(place, "evaluate"), run / "evaluation")
    output = finished(mage_ray(place, "evaluate"))
    cells = sorted((run / "evaluation").glob("*.parquet"))
    assert len(cells) == 1 + 7 * 3  # the reference has no preference axis
    assert "hypervolume" in output
    assert "mage-i-m" in output
    assert (run / "report" / "index.html").exists()
    summary = json.loads((run / "report" / "summary.json").read_text())
    assert len(summary["methods"]) == 8
    # Everything is there: a third run generates nothing.
    times = [cell.stat().st_mtime_ns for cell in cells]
    finished(mage_ray(place, "evaluate"))
    assert [cell.stat().st_mtime_ns for cell in cells] == times
    assert not [p for p in run.rglob("*") if p.suffix in (".pkl", ".pt", ".pth", ".bin")]

    # What the report shows is what the library gives for the same preference, prompt and seed.
    frame = pd.concat([pd.read_parquet(cell) for cell in cells])
    shown = frame[(frame.method == "bone-soup") & (frame.point == 1)].iloc[0]
    check_reproduced(run, shown)


def check_reproduced(run: Path, shown: pd.Series) -> None:
    from mage_ray.decoding.request import Sampling
    from mage_ray.training.rollouts import draw_seed

    generator = Generator.open(run)
    spec = generator.study.evaluation
    seed = draw_seed(generator.study.seed, shown.prompt_id, int(shown.seed))
    [again] = generator.generate(
        [shown.prompt],
        list(shown.preference),
        "bone-soup",
        sampling=Sampling(spec.max_new_tokens, spec.temperature, spec.top_p, seed),
    )
    assert again.text == shown.completion


@pytest.mark.skipif(not cannot(), reason="on several nodes in test_cluster.py")
def test_a_job_is_submitted_by_the_real_job_api(place: Path, tiny_model_folder: Path) -> None:
    """With a second round, too, which samples from the experts and scores what they said by the reference."""
    one_set = {"backbones": {"soup": {}}, "rounds": 2}
    guidance = {"base": "soup", "guide": "soup"}
    (place / "study.yaml").write_text(tiny_study(tiny_model_folder, training=one_set, guidance=guidance))
    root = Path(__file__).parent.parent
    entry = f"{sys.executable} jobs/train.py --study {place / 'study.yaml'} --folder {place / 'run'}"
    environment = json.dumps({"env_vars": {"PYTHONPATH": str(place)}, "excludes": [".venv", "runs", ".git"]})
    with job_cluster(place) as cluster:
        done = subprocess.run(
            submit_command(cluster, "--working-dir", ".", "--runtime-env-json", environment, "--", *entry.split()),
            cwd=root,
            env=with_token(),
            capture_output=True,
            text=True,
            timeout=400,
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "succeeded" in done.stdout.lower() + done.stderr.lower()
    assert "rollouts: 24/24" in done.stdout
    assert {p.name for p in (place / "run" / "experts").iterdir()} == {"soup-even", "soup-short"}
    record = json.loads((place / "run" / "experts" / "soup-short" / "mage_ray.json").read_text())
    assert record["steps"] == 2 * 4
