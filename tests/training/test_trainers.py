"""Both trainers in this process, on the tiny model: what is learnt, and what is left on disk."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from training_pools import END, make_folder, make_pool, make_study

from mage_ray.chat import Chat
from mage_ray.folder import StudyFolder
from mage_ray.models import load_model, load_tokenizer
from mage_ray.training.checkpoint import load_state
from mage_ray.training.pairs import Sample, preference_pairs, training_order
from mage_ray.training.progress import read_metrics
from mage_ray.training.ray_train import fit
from mage_ray.training.reference import sample_logps
from mage_ray.training.run import METRICS, Run, learning_rate_factor

pytestmark = pytest.mark.slow


def dpo_run(model: Path, home: Path, weights: dict[str, float], **training: object) -> Run:
    study = make_study(model, **training)
    spec = study.training
    found = preference_pairs(make_pool(), weights, spec.pairs_per_prompt)
    pairs = [found[i] for i in training_order(len(found), spec.steps * spec.batch_size, study.seed)]
    samples = sorted({sample for pair in pairs for sample in (pair.chosen, pair.rejected)})
    reference = load_model(str(model))
    logps = sample_logps(reference, Chat(load_tokenizer(str(model)), reference), samples)
    return Run("run", study, StudyFolder(home), weights, pairs, dict(zip(samples, logps, strict=True)))


def test_sample_logps_are_those_of_one_sequence_at_a_time(tiny_model_folder: Path) -> None:
    import torch

    model = load_model(str(tiny_model_folder))
    chat = Chat(load_tokenizer(str(tiny_model_folder)), model)
    samples = [Sample("a", (97, 98, END)), Sample("a longer prompt", (120,)), Sample("b", tuple(range(97, 110)))]
    for sample, got in zip(samples, sample_logps(model, chat, samples), strict=True):
        prompt = chat.encode(sample.prompt)
        logits = model(torch.tensor([[*prompt, *sample.ids]])).logits[0].double()
        steps = logits.log_softmax(-1)[len(prompt) - 1 : -1]
        want = sum(steps[place, token].item() for place, token in enumerate(sample.ids))
        assert got == pytest.approx(want, abs=1e-4)


def test_dpo_learns_the_preference_and_peft_loads_the_result(tiny_model_folder: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file

    run = dpo_run(tiny_model_folder, tmp_path, {"early": 1.0, "late": 0.0}, steps=12)
    folder = fit(run, in_process=True)
    metrics = read_metrics(run.folder / METRICS)
    assert list(metrics) == list(range(1, 13))
    # Before the first step the policy is the reference: the log-ratios that came with the data cancel exactly.
    assert metrics[1]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert metrics[1]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert metrics[12]["rewards/margins"] > 0.2 and metrics[12]["loss"] < 0.6
    assert load_state(folder).step == 12

    stored = load_file(folder / "adapter_model.safetensors")
    assert stored and all(tensor.dtype == torch.float32 for tensor in stored.values())
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == run.study.model and config["r"] == 4

    base = load_model(str(tiny_model_folder))
    chat = Chat(load_tokenizer(str(tiny_model_folder)), base)
    tuned = PeftModel.from_pretrained(load_model(str(tiny_model_folder)), str(folder)).eval()
    pair = run.pairs[-run.study.training.batch_size]
    chosen, rejected = sample_logps(tuned, chat, [pair.chosen, pair.rejected])
    assert chosen - run.reference[pair.chosen] > rejected - run.reference[pair.rejected]


def test_opposite_preferences_start_alike_and_part(tiny_model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    found = []
    for name, weights in (("early", {"early": 1.0, "late": 0.0}), ("late", {"early": 0.0, "late": 1.0})):
        # With a learning rate of next to nothing, the adapter that is left is the one that training began with.
        run = dpo_run(tiny_model_folder, tmp_path / name, weights, steps=1, learning_rate=1e-12)
        found.append(load_file(fit(run, in_process=True) / "adapter_model.safetensors"))
    for name, tensor in found[0].items():
        assert np.allclose(tensor.numpy(), found[1][name].numpy(), atol=1e-9)
        assert bool(tensor.abs().max() > 1e-3) == ("lora_A" in name)


@pytest.mark.parametrize("wanted", ["early", "late"])
def test_grpo_moves_towards_the_weighted_reward(tiny_model_folder: Path, tmp_path: Path, wanted: str) -> None:
    other = {"early": "late", "late": "early"}[wanted]
    study = make_study(
        tiny_model_folder,
        method="grpo",
        steps=30,
        batch_size=32,
        generations_per_prompt=16,
        learning_rate=3e-2,
        kl_strength=0.0,
    )
    folder = make_folder(tmp_path / "study", study, make_pool())
    run = Run(
        "run",
        study,
        StudyFolder(tmp_path),
        {name: float(name == wanted) for name in ("early", "late")},
        prompts=[f"say {i % 5}" for i in range(60)],
        normalisation=folder.normalisation.read_text(),
    )
    fit(run, in_process=True)
    metrics = read_metrics(run.folder / METRICS)
    assert len(metrics) == 30 and all(np.isfinite(entry["loss"]) for entry in metrics.values())
    first, last = ([metrics[step] for step in steps] for steps in ((1, 2, 3), (28, 29, 30)))
    gain = {name: _mean(last, name) - _mean(first, name) for name in ("early", "late")}
    assert gain[wanted] > 0.3 and gain[wanted] > gain[other]
    # The reward that TRL optimises is the row times the normalised rewards of our own functions.
    assert metrics[1]["reward"] == pytest.approx(metrics[1][f"rewards/{wanted}/mean"], abs=1e-4)


def _mean(entries: list[dict], name: str) -> float:
    return float(np.mean([entry[f"rewards/{name}/mean"] for entry in entries]))


def test_schedule_rises_then_falls_and_depends_on_the_step_alone() -> None:
    factors = [learning_rate_factor(step, 50) for step in range(50)]
    assert factors[0] > 0 and max(factors) == pytest.approx(1) and factors.index(max(factors)) == 5
    assert factors[5:] == sorted(factors[5:], reverse=True) and factors[-1] == pytest.approx(0.1, abs=0.01)
    assert learning_rate_factor(0, 1) > 0
