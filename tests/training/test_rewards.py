"""Reward models in training: what is learnt, how it goes on, and what the objective makes of what is put in place."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from ray_tests import assert_same, weights_of
from training_pools import make_study

from mage_ray.cli import main
from mage_ray.errors import FieldError, UserError
from mage_ray.folder import StudyFolder
from mage_ray.models import load_classifier, load_tokenizer
from mage_ray.objectives import score
from mage_ray.objectives.classifier import Classifier
from mage_ray.study import Study
from mage_ray.training.calibration import negative_log_likelihood
from mage_ray.training.progress import read_metrics
from mage_ray.training.ray_train import fit
from mage_ray.training.reward_data import Comparison, Labelled, Row, read_rows, split
from mage_ray.training.reward_trainer import encode
from mage_ray.training.rewards import check_rewards, margins, train_rewards
from mage_ray.training.rollouts import load_objectives
from mage_ray.training.run import METRICS, Run

REWARD: dict[str, Any] = {
    "steps": 30,
    "batch_size": 8,
    "learning_rate": 1e-2,
    "lora": {"rank": 4, "alpha": 8},
    "held_out": 0.3,
    "max_length": 64,
}
HH = "\n\nHuman: say {}\n\nAssistant: {}"


def letters(early: bool, random: np.random.Generator) -> str:
    """Eight letters of a..m, or of n..z."""
    first, end = (97, 110) if early else (110, 123)
    return bytes(random.integers(first, end, 8).tolist()).decode()


def make_data(folder: Path, prompts: int = 60) -> dict[str, Path]:
    """Pairs in which letters of a..m are chosen, and texts labelled by whether they have them."""
    random = np.random.default_rng(0)
    pairs = [
        {"chosen": HH.format(i, letters(True, random)), "rejected": HH.format(i, letters(False, random))}
        for i in range(prompts)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    with open(folder / "texts.csv", "w", newline="") as file:
        rows = [(letters(label, random), label) for label in [True, False] * prompts]
        csv.writer(file).writerows([("text", "early"), *rows])
    return {"pairs": folder / "pairs.jsonl", "texts": folder / "texts.csv"}


def rewarded(model: Path, data: Mapping[str, Path], training: Mapping[str, Any] | None = None, **own: Any) -> Study:
    """A study of two reward models and of objectives that are these."""
    rewards = {
        "pairs": REWARD | {"data": str(data["pairs"])} | own,
        "texts": REWARD | {"data": str(data["texts"]), "label": "early"} | own,
    }
    objectives = {"early": {"type": "reward", "model": "pairs"}, "texts": {"type": "reward"}}
    fields = make_study(model, **(training or {})).model_dump(mode="json")
    return Study.model_validate(fields | {"objectives": objectives, "rewards": rewards})


ROWS: dict[str, list[Row]] = {
    "pairs": [Comparison(HH.format(i, "abc" + "x" * i), HH.format(i, "xyz"), str(i)) for i in range(24)],
    "texts": [Labelled("ab"[i % 2] * (3 + i), i % 2 == 0, str(i)) for i in range(24)],
}


def reward_run(study: Study, name: str, home: Path) -> Run:
    spec = study.rewards[name]
    needed = spec.steps * spec.batch_size
    rows = (ROWS[name] * needed)[:needed]
    return Run(name, study, StudyFolder(home), {}, rows=rows, reward=spec)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Path]:
    return make_data(tmp_path)


def test_what_is_too_long_loses_its_beginning(tiny_model_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_model_folder))
    assert encode(["abcdef", "xy"], tokenizer, 3) == [tokenizer("def")["input_ids"], tokenizer("xy")["input_ids"]]


def test_a_new_classifier_says_nothing_yet_and_has_the_models_weights(tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load_classifier(str(tiny_model_folder))
    ids = torch.tensor([[1, 2, 3]])
    assert model(input_ids=ids).logits.tolist() == [[0.0]]
    causal = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    assert torch.equal(model.model(ids).last_hidden_state, causal.model(ids).last_hidden_state)
    with pytest.raises(FieldError, match="model: got"):
        load_classifier("/nowhere")


def test_a_classifier_of_the_lowest_layers_alone(tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = load_classifier(str(tiny_model_folder), layers=1)
    causal = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    ids = torch.tensor([[1, 2, 3]])
    middle = causal.model(ids, output_hidden_states=True).hidden_states[1]
    assert torch.allclose(model.model(ids).last_hidden_state, causal.model.norm(middle), atol=1e-6)
    assert model.config.num_hidden_layers == 1
    with pytest.raises(FieldError, match="layers: got 99, allowed: up to 2"):
        load_classifier(str(tiny_model_folder), layers=99)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pairs", "texts"])
def test_a_paused_run_goes_on_as_an_unbroken_one(
    name: str, tiny_model_folder: Path, tmp_path: Path, data: dict[str, Path]
) -> None:
    # Dropout, so that the random numbers of each step count, too.
    study = rewarded(tiny_model_folder, data, steps=6, lora={"rank": 4, "alpha": 8, "dropout": 0.2})
    run = reward_run(study, name, tmp_path / "paused")
    fit(replace(run, until=3), in_process=True)
    paused = fit(run, in_process=True)
    whole = fit(replace(run, home=StudyFolder(tmp_path / "whole")), in_process=True)
    metrics = read_metrics(run.folder / METRICS)
    assert list(metrics) == [1, 2, 3, 4, 5, 6]
    assert metrics[1]["loss"] == pytest.approx(np.log(2), abs=1e-4)  # The head says 0 at first.
    unbroken = read_metrics(tmp_path / "whole" / "checkpoints" / name / METRICS)
    for step, entry in metrics.items():
        assert entry["loss"] == pytest.approx(unbroken[step]["loss"], rel=1e-4)
    one, other = weights_of(paused), weights_of(whole)
    assert_same(one, other)
    heads = [tensor for key, tensor in one.items() if "score" in key]
    assert len(heads) == 1 and np.abs(heads[0]).max() > 1e-3


@pytest.mark.slow
def test_two_workers_of_zero_3_arrive_where_one_process_does(
    ray_here: Path, tiny_model_folder: Path, tmp_path: Path, data: dict[str, Path]
) -> None:
    study = rewarded(tiny_model_folder, data, {"workers": 2, "zero_stage": 3}, steps=4)
    got = weights_of(fit(reward_run(study, "texts", tmp_path / "two")))
    alone = rewarded(tiny_model_folder, data, steps=4)
    assert_same(got, weights_of(fit(reward_run(alone, "texts", tmp_path / "one"), in_process=True)))


@pytest.mark.slow
def test_from_files_to_objectives_on_the_command_line(
    ray_here: Path, tiny_model_folder: Path, tmp_path: Path, data: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    study = rewarded(tiny_model_folder, data, {"parallel_experts": 2})
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json", exclude_none=True)))
    folder = StudyFolder(tmp_path / "run")
    arguments = ["rewards", "--study", str(tmp_path / "study.yaml"), "--folder", str(folder.path)]
    with pytest.raises(FieldError, match=r"^objectives\.early\.model: got pairs, allowed: .*mage-ray rewards"):
        load_objectives(study, folder)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Reward models on prompts held out" in printed and "longer answer 50.0%" in printed
    assert {path.name for path in folder.rewards.iterdir()} == {"pairs", "texts"}

    for name, held in (("pairs", 18), ("texts", 36)):
        quality = json.loads((folder.rewards / name / "quality.json").read_text())
        accuracy, calibration = quality["accuracy"], quality["calibration"]
        assert quality["held_out"] == quality["prompts"] == held and quality["trained_on"] == held / 0.3 - held
        assert accuracy["value"] > 0.85 and accuracy["low"] > quality["rival"]["high"]
        assert calibration["rows"] == held / 2 and calibration["after"]["nll"] < np.log(2)
        # The scale is in the weights.
        parts = split(read_rows(name, study.rewards[name]), study.rewards[name].held_out, study.seed)
        own = margins(name, Classifier(str(folder.rewards / name), "completion"), parts.measure)
        assert calibration["after"]["nll"] == pytest.approx(negative_log_likelihood(own), abs=1e-4)
        unscaled = negative_log_likelihood(own / quality["scale"])
        assert calibration["before"]["nll"] == pytest.approx(unscaled, abs=1e-4) and quality["scale"] != 1

    # The objectives are these models, on the texts that they were trained on, calibrated.
    objectives = load_objectives(study, folder)
    prompts, answers = ["say 3", "say 4", "what?"], ["abcdefgh", "zyxwvuts", "almost"]
    early, texts = (score(name, objective, prompts, answers) for name, objective in objectives.items())
    assert early[0] > early[1] and texts[0] > 0 > texts[1]
    for name, got, shown in (
        ("pairs", early, [f"\n\nHuman: {p}\n\nAssistant: {a}" for p, a in zip(prompts, answers, strict=True)]),
        ("texts", texts, answers),
    ):
        model = AutoModelForSequenceClassification.from_pretrained(folder.rewards / name)
        tokenizer = AutoTokenizer.from_pretrained(folder.rewards / name)
        for text, value in zip(shown, got, strict=True):
            logit = model(**tokenizer(text, return_tensors="pt")).logits
            assert logit.item() == pytest.approx(value, abs=1e-4)

    # A second time there is nothing to do; a spec that has changed is an error.
    before = {path: path.stat().st_mtime_ns for path in folder.rewards.glob("*/*")}
    data["pairs"].unlink()
    assert main(arguments) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rewards.glob("*/*")} == before
    with pytest.raises(UserError, match="trained as another `rewards` said"):
        train_rewards(rewarded(tiny_model_folder, data, steps=31), folder)
    (folder.rewards / "pairs" / "mage_ray.json").write_text("{}")
    with pytest.raises(FieldError, match=r"^objectives\.early\.model"):
        load_objectives(study, folder)


def refused(study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json", exclude_none=True)))
    arguments = ["rewards", "--study", str(tmp_path / "study.yaml"), "--folder", str(tmp_path / "run")]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("mage-ray: ") and "\n" not in error
    assert not (tmp_path / "run" / "rewards").exists()
    return error


def test_studies_that_can_not_be_trained_are_refused_in_one_line(
    tiny_model_folder: Path, tmp_path: Path, data: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def error(data: Mapping[str, Path] = data, **own: Any) -> str:
        return refused(rewarded(tiny_model_folder, data, **own), tmp_path, capsys)

    assert "rewards.pairs.data: got 42 rows to train on, of 60, allowed: at least rewards.pairs.batch_size" in error(
        batch_size=64
    )
    lines = data["pairs"].read_text().splitlines()
    data["pairs"].write_text("\n".join([*lines[:3], '{"chosen": "\\n\\nHuman: secret", "rejected": ""}', *lines[4:]]))
    assert "pairs.jsonl, line 4" in (said := error()) and "secret" not in said
    data["pairs"].write_text("\n".join(lines[:2]) + "\n")
    assert "rewards.pairs.data: got 2 groups, allowed: at least three prompts" in error(batch_size=1)
    data["pairs"].unlink()
    assert "rewards.pairs.data" in (said := error()) and "a file that exists" in said
    with pytest.raises(FieldError, match="rewards: got nothing"):
        check_rewards(make_study(tiny_model_folder))
    with pytest.raises(FieldError, match=r"batch_size: got 8, allowed: a multiple of training.workers \(3\)"):
        check_rewards(rewarded(tiny_model_folder, data, {"workers": 3, "batch_size": 6}))


def test_an_objective_of_a_reward_model_that_is_not_there_is_refused(tiny_model_folder: Path) -> None:
    fields = make_study(tiny_model_folder).model_dump(mode="json")
    fields["objectives"]["early"] = {"type": "reward"}
    with pytest.raises(ValueError, match=r"got early, allowed: a name in rewards: none"):
        Study.model_validate(fields)
