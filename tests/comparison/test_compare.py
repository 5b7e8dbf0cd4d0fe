"""A comparison as users run it: a real process, killed for real, and its figures computed anew from its samples."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
import yaml
from pymoo.indicators.hv import HV
from studies import REWARDS, add_baselines, add_value_models, trained_study
from transformers import AutoModelForCausalLM, AutoTokenizer

from mage_ray.comparison.judge import preferences_of
from mage_ray.comparison.results import difference
from mage_ray.comparison.spec import JudgeSpec
from mage_ray.comparison.variants import study_variants, train_variant
from mage_ray.folder import StudyFolder
from mage_ray.training.rollouts import load_normaliser, study_prompts

pytestmark = pytest.mark.slow

METHODS = [
    "reference",
    "rewarded-soup",
    "bone-soup",
    "mage-i-m",
    "mage-e-m",
    "morlhf",
    "best-of-n",
    "redrawn-reference",
]


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """Everything but the pool and the variants is trained, at random."""
    place = tmp_path_factory.mktemp("compare")
    (place / "rewards.py").write_text(REWARDS)
    made = trained_study(
        place / "run",
        tiny_model_folder,
        training={
            "steps": 2,
            "checkpoint_every": 1,
            "parallel_experts": 2,
            "backbones": {"bone": {"beta": 0.7}, "soup": {}},
        },
        evaluation={"grid": 3, "max_new_tokens": 8, "resamples": 60, "workers": 2},
        values={"final": {"rank": 3}},
        baselines={"morlhf": {"kind": "morlhf"}},
        strategies={"n": 2},
        compare={
            "methods": METHODS,
            "space": {"strength": [0.5, 2.0], "value_strength": None, "extrapolation": {"low": 0, "high": 2}},
            "settings": 2,
            "prompts": 2,
            "steps": [1],
            "at_steps": ["rewarded-soup", "bone-soup"],
            "judge": {"model": str(tiny_model_folder)},
            "timed_prompts": 2,
        },
    )
    made.normalisation.unlink()  # it is fitted on the pool
    add_value_models(made, tiny_model_folder)
    add_baselines(made, tiny_model_folder)
    record = {"baseline": {"kind": "morlhf", "steps": 2, "learning_rate": 0.01, "kl_strength": 0.1}, "answer_tokens": 7}
    for path in [*made.experts.iterdir(), *made.baselines.iterdir(), *made.values.iterdir()]:
        own = path / "mage_ray.json"
        known = json.loads(own.read_text()) if own.exists() else {}
        values = {"values": made.study.values["final"].model_dump(mode="json")} if path.parent == made.values else {}
        own.write_text(json.dumps(known | record | values))
        if path.parent == made.values:
            (path / "quality.json").write_text("{}")
    # Of the variants one is trained for real.
    [_, shorter, _] = study_variants(made.study, made)
    StudyFolder.create(shorter.folder.path, shorter.study)
    for path in made.experts.iterdir():
        shutil.copytree(path, shorter.folder.experts / path.name)
    return made


def comparing(folder: StudyFolder, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mage_ray", "compare", "--study", str(folder.path), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"PYTHONPATH": str(folder.path.parent), "MAGE_RAY_TEST": f"compare-{os.getpid()}"},
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], status: int = 0) -> str:
    output, _ = process.communicate(timeout=600)
    assert process.returncode == status, output[-3000:]
    return output


def killed_when(process: subprocess.Popen[str], holds: Callable[[], bool]) -> None:
    late = time.monotonic() + 400
    while not holds():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < late
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for one in psutil.process_iter(["environ"]):
        if (one.info["environ"] or {}).get("MAGE_RAY_TEST") == f"compare-{os.getpid()}":
            one.kill()


def cells_of(folder: StudyFolder, place: str) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.comparison.rglob(f"{place}/*.parquet")}


@pytest.mark.timeout(900)
def test_a_killed_comparison_goes_on_and_its_figures_are_those_of_its_samples(folder: StudyFolder) -> None:
    killed_when(comparing(folder), lambda: len(cells_of(folder, "test")) >= 3)
    validated, tested = cells_of(folder, "validation"), cells_of(folder, "test")
    output = ended(comparing(folder))
    assert cells_of(folder, "validation") == validated and cells_of(folder, "test").items() >= tested.items()

    content = json.loads((folder.comparison / "comparison.json").read_text())
    matched, shuffled = "extrapolated-soup@kl-of-mage-i-m", "mage-i-m@shuffled"
    labels = [*METHODS, matched, "rewarded-soup@1", "bone-soup@1", shuffled]
    assert list(content["methods"]) == labels
    check_figures(folder, content, labels)
    check_choice(folder, content)
    assert content["seeds"] == {"study": 0, "evaluation": [0]} and content["study"] == "tiny"
    assert content["date"] and content["machine"] and "compare" in content["command"]
    costs = {label: own["cost"] for label, own in content["methods"].items()}
    assert costs["reference"]["models"] == 0 and costs["reference"]["training_tokens"] == 0
    assert costs["rewarded-soup"]["models"] == 2 and costs["morlhf"]["models"] == 3
    assert costs["morlhf"]["training_tokens"] == 21 and costs["mage-i-m"]["training_tokens"] == 28
    assert costs["bone-soup@1"]["training_tokens"] == 14 and costs[shuffled]["training_tokens"] > 50
    assert costs["best-of-n"]["forwards_per_token"] > 1.5 and costs["mage-e-m"]["forwards_per_token"] == 2
    assert costs["mage-i-m"]["memory_bytes"] > costs["bone-soup"]["memory_bytes"] > 0
    for label, own in content["methods"].items():
        assert (own["cost"]["tokens_per_second"] or 0) > 0 or "@1" in label or label == shuffled
        assert (own["win_rate"] is None) == (label == "reference")
    assert set(content["training_length"]["bone-soup minus rewarded-soup"]) == {"1", "2"}
    assert "Control: mage-i-m@shuffled minus redrawn-reference" in output
    assert "Control: mage-i-m@shuffled minus reference" in output and f"{matched}: KL" in output
    steps = {label: own["steps"] for label, own in content["methods"].items()}
    assert steps["reference"] == [] and steps[shuffled] == [2]
    page = (folder.report / "comparison.html").read_text()
    assert all(label in page for label in labels) and (folder.report / "comparison-fronts-dark.png").exists()

    # What has ended is only read; it agrees with itself.
    again = ended(comparing(folder, "--against", str(folder.comparison / "comparison.json")))
    assert "the other way round: none" in again
    assert json.loads((folder.comparison / "comparison.json").read_text()) == content

    # The test prompts aren't used for another one, unless that is said.
    text = folder.study_file.read_text()
    other = yaml.safe_load(text)
    other["guidance"]["strength"] = 1.25
    folder.study_file.write_text(yaml.safe_dump(other))
    told = ended(comparing(folder), 2).splitlines()[-1]
    assert "the test prompts were used by a comparison" in told and "--fresh to forget it" in told
    folder.study_file.write_text(text)


def check_figures(folder: StudyFolder, content: dict[str, Any], labels: list[str]) -> None:
    """Means, hypervolume, inner product, KL and differences, from the samples, by pymoo and by hand."""
    test = {prompt.id for prompt in study_prompts(folder.study)[1]}
    frames = [pd.read_parquet(path) for path in cells_of(folder, "test")]
    samples = pd.concat(frames)
    assert set(samples["method"]) == set(labels) and set(samples["prompt_id"]) == test
    grid = np.array(content["grid"])
    volumes = {}
    for label in labels:
        own, found = samples[samples["method"] == label], content["methods"][label]
        points = own.groupby("point")[["reward/even", "reward/short"]].mean().to_numpy()
        np.testing.assert_allclose(found["points"], points, atol=1e-5)
        volumes[label] = float(HV(ref_point=np.array([2.0, 2.0]))(-points))
        assert found["measures"]["hypervolume"]["value"] == pytest.approx(volumes[label], abs=1e-5)
        asked = np.broadcast_to(points, grid.shape) if len(points) == 1 else points
        assert found["measures"]["inner_product"]["value"] == pytest.approx((grid * asked).sum(1).mean(), abs=1e-5)
        assert found["measures"]["kl"]["value"] == pytest.approx(own["kl"].mean(), abs=1e-5)
        assert len(points) == (1 if label == "reference" else 3)
        assert found["measures"]["hypervolume"]["low"] <= volumes[label] <= found["measures"]["hypervolume"]["high"]
    for one, other in combinations(labels, 2):
        found = content["differences"]["hypervolume"][one][other]
        assert found["value"] == pytest.approx(volumes[one] - volumes[other], abs=1e-5)
        assert found["low"] <= found["value"] <= found["high"]
        turned = difference(content, other, one, "hypervolume")
        assert turned == {"value": -found["value"], "low": -found["high"], "high": -found["low"]}


def check_choice(folder: StudyFolder, content: dict[str, Any]) -> None:
    """What was tested is what was best in validation, on other prompts; what was matched has the KL of its rival."""
    samples = pd.concat([pd.read_parquet(path) for path in cells_of(folder, "validation")])
    samples = samples[~samples["method"].str.contains("shuffled")]
    assert not set(samples["prompt_id"]) & {p.id for part in study_prompts(folder.study) for p in part}
    own = content["methods"]["mage-i-m"]
    points = [
        frame.groupby("point")[["reward/even", "reward/short"]].mean().to_numpy()
        for _, frame in samples[samples["method"].str.startswith("mage-i-m.")].groupby("method")
    ]
    volumes = [float(HV(ref_point=np.array([2.0, 2.0]))(-one)) for one in points]
    np.testing.assert_allclose([one["score"]["value"] for one in own["tried"]], volumes, atol=1e-5)
    assert own["constants"] == own["tried"][int(np.argmax(volumes))]["constants"]
    assert content["methods"]["rewarded-soup"]["tried"] == [] and content["methods"]["mage-e-m"]["tried"] == []
    goal = own["tried"][int(np.argmax(volumes))]["kl"]
    matched = content["methods"]["extrapolated-soup@kl-of-mage-i-m"]
    [*looked, last] = [(one["constants"]["extrapolation"], one["kl"]) for one in matched["tried"]]
    assert [alpha for alpha, _ in looked] == list(range(len(looked))) and len(looked) in (3, 6, 9)
    assert looked[-1][1] >= goal or len(looked) == 9
    assert matched["constants"]["extrapolation"] == last[0] and matched["kl_goal"] == pytest.approx(goal)
    between = [
        (one, other) for one, other in pairwise(looked) if min(one[1], other[1]) <= goal <= max(one[1], other[1])
    ]
    if between:
        [one, other] = between[0]
        assert last[0] == pytest.approx(one[0] + (goal - one[1]) / (other[1] - one[1]), abs=1e-3)


def test_shuffled_rewards_are_another_answers(folder: StudyFolder) -> None:
    """After the comparison, which has made that variant."""
    [shuffled] = [variant for variant in study_variants(folder.study, folder) if variant.name == "shuffled"]
    train_variant(shuffled, folder.study, folder, None)  # only read
    columns = ["raw/even", "raw/short"]
    ours = pd.concat([pd.read_parquet(path) for path in sorted(folder.rollouts.glob("*.parquet"))])
    theirs = pd.read_parquet(shuffled.folder.rollouts / "shard-00000.parquet")
    assert list(ours["completion"]) == list(theirs["completion"])
    moved = (ours[columns].to_numpy() != theirs[columns].to_numpy()).any(axis=1)
    assert moved.mean() > 0.8
    # Whole rows: how the objectives go together is as it was.
    assert sorted(map(tuple, ours[columns].to_numpy())) == sorted(map(tuple, theirs[columns].to_numpy()))
    assert load_normaliser(shuffled.folder, folder.study) == load_normaliser(folder, folder.study)


def test_a_judge_is_asked_in_both_orders(tiny_model_folder: Path) -> None:
    from mage_ray.chat import Chat
    from mage_ray.models import load_model, load_tokenizer

    judge = JudgeSpec(model=str(tiny_model_folder), batch_size=2)
    model = load_model(judge.model)
    chat = Chat(load_tokenizer(judge.model), model)
    triples = [("Why?", "Because.", "I don't know, and nobody does."), ("How?", "So.", "So."), ("Who?", "Me", "You")]
    found = preferences_of(judge, model, chat, triples)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder).double()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    for (prompt, first, second), value in zip(triples, found, strict=True):
        text = (
            f"Somebody asked:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}\n\n"
            "Which answer is better? Say A or B, and nothing else."
        )
        messages = [{"role": "user", "content": text}]
        asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            chances = plain(ids).logits[0, -1].softmax(-1)
        a, b = (chances[tokenizer(letter, add_special_tokens=False)["input_ids"][0]] for letter in "AB")
        assert value == pytest.approx(float(a / (a + b)), abs=1e-4)
