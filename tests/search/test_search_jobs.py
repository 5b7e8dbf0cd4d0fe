"""Searches as users run them: real processes, killed for real, and what they hand over."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from pymoo.indicators.hv import HV
from ray import cloudpickle
from studies import REWARDS, trained_study

from mage_ray.decoding.request import Sampling
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator
from mage_ray.search.trial import read_records
from mage_ray.training.rollouts import draw_seed, search_prompts, study_prompts

pytestmark = pytest.mark.slow

SPACE = {
    "strength": {"low": 0, "high": 3},
    "extrapolation": {"low": 0, "high": 1},
    "candidates": [5, 20, 50],
    "coefficients": {"degree": 1, "spread": 0.3},
}
SEARCH: dict[str, Any] = {"space": SPACE, "trials": 9, "population": 4, "prompts": 4, "grid": 3}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "rewards.py").write_text(REWARDS)
    return tmp_path


def searching(place: Path, *options: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mage_ray", "search", "--study", str(place / "run"), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(place), "COLUMNS": "120"} | environment,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == status, output[-3000:]
    return output


def when(process: subprocess.Popen[str], holds: Callable[[], Any], seconds: float = 300) -> Any:
    late = time.monotonic() + seconds
    while not (found := holds()):
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < late
        time.sleep(0.02)
    return found


@pytest.fixture
def left_over() -> Iterator[None]:
    """Ends the processes of drivers that were killed: their children belong to this process group's sessions."""
    yield
    for process in psutil.process_iter(["environ"]):
        if str((process.info["environ"] or {}).get("MAGE_RAY_TEST")) == str(os.getpid()):
            process.kill()


def records(place: Path) -> list[dict[str, Any]]:
    return read_records(StudyFolder(place / "run"))


def files(place: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (place / "run/search/cells").glob("*.parquet")}


@pytest.mark.parametrize("algorithm", ["nsga2", "optuna"])
def test_a_killed_search_goes_on_and_repeats_nothing(
    place: Path,
    tiny_model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    left_over: None,
    algorithm: str,
) -> None:
    monkeypatch.setenv("MAGE_RAY_TEST", str(os.getpid()))
    folder = trained_study(place / "run", tiny_model_folder, search=SEARCH | {"algorithm": algorithm})
    begun = searching(place)
    when(begun, lambda: len(records(place)) >= 4)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    before = {json.dumps(record["config"]): record for record in records(place) if "error" not in record}
    samples = files(place)
    # Tune's count of trials is saved by itself, and may be ahead of its table of them, or behind.
    count = max((folder.search / "tune").glob("search_gen_state-*.json"))
    state = cloudpickle.loads(count.read_bytes())
    state["counter"] += {"nsga2": 2, "optuna": -2}[algorithm]
    count.write_bytes(cloudpickle.dumps(state))

    # Neither silently over what is there, nor as another search.
    assert "holds a search already, allowed: --resume" in ended(searching(place), 2)
    text = folder.study_file.read_text()
    other = yaml.safe_load(text)
    other["search"]["max_norm"] = 4.0
    folder.study_file.write_text(yaml.safe_dump(other))
    assert "--resume: got a search of another search" in ended(searching(place, "--resume"), 2)
    folder.study_file.write_text(text)

    resumed = searching(place, "--resume")
    # And one of its engines' processes, and one of Tune's, are killed while it goes on.
    engine = when(resumed, lambda: workers_of(resumed, "ResidentEngine"))[0]
    when(resumed, lambda: len(records(place)) > len(before))
    trial = when(resumed, lambda: workers_of(resumed, "ImplicitFunc"))[0]
    engine.kill()
    trial.kill()
    output = ended(resumed)

    after = {json.dumps(record["config"]): record for record in records(place)}
    assert len(after) == SEARCH["trials"]
    assert all("error" not in record for record in after.values())
    for config, record in before.items():
        assert after[config] == record  # to the time when it ended
    assert files(place).items() >= samples.items()
    # The study's own constants are tried first; trials that start side by side may begin in either order.
    first = sorted(after.values(), key=lambda record: record["began"])[: folder.study.search.concurrent]
    assert any(one["config"]["strength"] == 1.0 and one["config"]["extrapolation"] == 0.0 for one in first)

    check_recipe(folder, list(after.values()))
    assert "hypervolume on unseen prompts" in output and str(folder.recipe) in output
    # What has ended is only read.
    recipe, samples = folder.recipe.read_bytes(), files(place)
    ended(searching(place, "--resume"))
    assert folder.recipe.read_bytes() == recipe and files(place) == samples
    events = list((folder.search / "tune").rglob("events.out.tfevents*"))
    assert len(events) >= SEARCH["trials"] - len(before)
    assert any(b"hypervolume" in path.read_bytes() for path in events)


def workers_of(driver: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """The workers of a driver's own cluster whose command line has this name."""
    found = []
    for process in psutil.Process(driver.pid).children(recursive=True):
        with suppress(psutil.Error):
            if name in " ".join(process.cmdline()):
                found.append(process)
    return found


def check_recipe(folder: StudyFolder, tried: list[dict[str, Any]]) -> None:
    """It is the best record's, its scores are those of its samples, and anybody gets the same texts by it."""
    study = folder.study
    recipe = yaml.safe_load(folder.recipe.read_text())
    best = max(tried, key=lambda record: record["scores"]["hypervolume"])
    assert {k: v for k, v in recipe.items() if k != "provenance"} == best["recipe"]
    assert recipe["provenance"]["trials"] == len(tried) and recipe["provenance"]["digest"] == study.digest

    generator = Generator.open(folder.path, recipe=folder.recipe)
    spec = study.evaluation
    prompts = search_prompts(study)
    assert not {p.id for p in prompts} & {p.id for part in study_prompts(study) for p in part}
    found = {}
    for path in (folder.search / "cells").glob("*.parquet"):
        for row in pd.read_parquet(path).itertuples():
            found.setdefault((row.preference[0], row.prompt_id, row.completion), row)
    points = []
    for preference in study.search_grid():
        rewards = []
        for prompt in prompts:
            seed = draw_seed(study.seed, prompt.id, 0)
            sampling = Sampling(spec.max_new_tokens, recipe["temperature"], recipe["top_p"], seed)
            [again] = generator.generate([prompt.text], preference, sampling=sampling)
            row = found[preference[0], prompt.id, again.text]
            rewards.append([getattr(row, row._fields[-2]), getattr(row, row._fields[-1])])
        points.append(np.mean(rewards, axis=0))
    expected = HV(ref_point=-np.array(study.reference_point()))(-np.array(points))
    assert best["scores"]["hypervolume"] == pytest.approx(expected)

    # So it is on the unseen prompts, which the search's own engines answered.
    paths = sorted(folder.evaluation.glob("recipe-*.parquet"))
    assert len(paths) == len(study.evaluation_grid())
    for row in [next(pd.read_parquet(path).itertuples()) for path in paths]:
        seed = draw_seed(study.seed, row.prompt_id, int(row.seed))
        sampling = Sampling(spec.max_new_tokens, recipe["temperature"], recipe["top_p"], seed)
        [again] = generator.generate([row.prompt], list(row.preference), sampling=sampling)
        assert again.text == row.completion


def test_halving_stops_the_worse_and_several_engines_share_the_work(place: Path, tiny_model_folder: Path) -> None:
    search = SEARCH | {"algorithm": "random", "rungs": 3, "trials": 8, "workers": 2, "prompts": 8}
    folder = trained_study(place / "run", tiny_model_folder, search=search)
    ended(searching(place))
    tried = records(place)
    assert len(tried) == 8
    by_rung = {rung: [r for r in tried if r["rung"] == rung] for rung in (1, 2, 3)}
    assert by_rung[1] and by_rung[3]
    for rung, prompts in ((1, 2), (2, 4), (3, 8)):
        assert all(r["scores"]["prompts"] == prompts and r["last"] == (rung == 3) for r in by_rung[rung])
    recipe = yaml.safe_load(folder.recipe.read_text())
    assert recipe["provenance"]["trial"] in {r["trial"] for r in by_rung[3]}


def test_several_metrics_end_in_a_front_of_recipes(place: Path, tiny_model_folder: Path) -> None:
    metrics = ["hypervolume", "controllability", "cost"]
    space = {"strength": [0.0, 1.0, 2.0], "entropy": {"low": 0, "high": 4}, "every": [1, 2, 4]}
    folder = trained_study(place / "run", tiny_model_folder, search=SEARCH | {"metrics": metrics, "space": space})
    ended(searching(place))
    tried = records(place)
    values = {
        r["trial"]: np.array([r["scores"][m] * s for m, s in zip(metrics, (1, 1, -1), strict=True)]) for r in tried
    }
    front = {
        trial
        for trial, own in values.items()
        if not any((other >= own).all() and (other > own).any() for other in values.values())
    }
    kept = [yaml.safe_load(path.read_text()) for path in sorted((folder.search / "recipes").glob("*.yaml"))]
    assert {recipe["provenance"]["trial"] for recipe in kept} <= front
    assert {tuple(values[r["provenance"]["trial"]]) for r in kept} == {tuple(values[trial]) for trial in front}
    assert yaml.safe_load(folder.recipe.read_text()) == kept[0]
    assert kept[0]["provenance"]["searched"]["hypervolume"] == max(r["scores"]["hypervolume"] for r in tried).__round__(
        4
    )


def test_an_objective_that_always_fails_ends_the_search_until_it_is_mended(
    place: Path, tiny_model_folder: Path
) -> None:
    objectives = {
        "even": {"type": "function", "path": "rewards:nan_at_last", "direction": "maximise", "low": 0, "high": 1},
        "short": {"type": "brevity"},
    }
    folder = trained_study(place / "run", tiny_model_folder, search=SEARCH | {"trials": 12}, objectives=objectives)
    output = ended(searching(place), 2)
    assert "trials ended well: " in output and "even" in output.splitlines()[-1]
    assert 3 <= len(records(place)) < 12  # and doesn't go on through all of them
    assert not folder.recipe.exists()
    (place / "rewards.py").write_text(REWARDS.replace("math.nan if len(completions) > 1 else 0.5", "0.25"))
    ended(searching(place, "--resume"))
    after = records(place)
    assert len(after) == 12 and all("error" not in record for record in after)
    assert folder.recipe.exists()


def test_a_damaged_state_of_tune_costs_no_trial(place: Path, tiny_model_folder: Path) -> None:
    """A kill while Tune writes it may leave half a file; the trials' own reports are whole."""
    space = {"base": ["soup"], "strength": {"low": 0, "high": 3}}  # the defaults' base is another one
    search = SEARCH | {"algorithm": "nsga2", "trials": 5, "prompts": 2, "space": space}
    folder = trained_study(place / "run", tiny_model_folder, search=search)
    ended(searching(place))
    before, recipe = records(place), yaml.safe_load(folder.recipe.read_text())
    assert recipe["guidance"]["base"] == "soup" and len(before) == 5
    shutil.rmtree(folder.search / "recipes")
    state = max((folder.search / "tune").glob("searcher-state-*.json"))
    state.write_text(state.read_text()[:-40])
    ended(searching(place, "--resume"))
    assert records(place) == before
    assert yaml.safe_load(folder.recipe.read_text())["guidance"] == recipe["guidance"]


def test_a_search_outlives_a_node(place: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("PYTHONPATH", str(place))  # the nodes' workers have it from here
    trained_study(place / "run", tiny_model_folder, search=SEARCH | {"workers": 2, "trials": 6})
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        lost = cluster.add_node(num_cpus=1)
        searched = searching(place, RAY_ADDRESS=cluster.address)
        when(searched, lambda: len(records(place)) >= 2)
        cluster.add_node(num_cpus=1)
        cluster.remove_node(lost, allow_graceful=False)
        before = {record["trial"]: record for record in records(place) if "error" not in record}
        ended(searched)
    finally:
        cluster.shutdown()
    after = {record["trial"]: record for record in records(place)}
    assert len(after) == 6 and all("error" not in record for record in after.values())
    assert after.items() >= before.items()


def test_constraints_that_nobody_satisfies_end_it_at_once(place: Path, tiny_model_folder: Path) -> None:
    search = SEARCH | {"max_norm": 1.01, "space": {"strength": {"low": 0, "high": 1}}}
    trained_study(place / "run", tiny_model_folder, search=search)
    output = ended(searching(place), 2)
    assert "max_norm" in output.splitlines()[-1] or "constraints" in output.splitlines()[-1], output[-500:]
