"""Value models in training: targets and loss against formulas, what is learnt, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny_model
from training_pools import make_folder, make_pool, make_study, value_run, valued_study

from mage_ray.chat import Chat
from mage_ray.decoding.plan import Row
from mage_ray.decoding.runner import RowRunner
from mage_ray.errors import UserError
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator
from mage_ray.merging.adapter import HEAD_FILE, ORIGIN_FILE, load_adapter
from mage_ray.merging.bank import AdapterBank
from mage_ray.models import load_model, load_tokenizer
from mage_ray.study import Study
from mage_ray.training.checkpoint import load_adapter_weights, save_adapter
from mage_ray.training.experts import model_origin
from mage_ray.training.ray_train import fit
from mage_ray.training.run import lora_config
from mage_ray.training.value_model import ValueModel, targets
from mage_ray.training.value_trainer import collate
from mage_ray.training.values import QUALITY, measure, rank_correlation, split, train_values
from mage_ray.training.zero import full_weights


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.floats(0, 1), st.integers(0, 1000))
def test_targets_are_the_returns_written_out(tokens: int, rows: int, lam: float, seed: int) -> None:
    dice = torch.Generator().manual_seed(seed)
    value, reward = torch.randn(rows, tokens, generator=dice), torch.randn(rows, generator=dice)
    assert torch.equal(targets(value, reward, None), reward[:, None].expand(-1, tokens))
    got = targets(value, reward, lam)
    for b in range(rows):
        values = [*value[b].tolist()[:-1], float(reward[b])]
        for t in range(tokens):
            # The mean of all n-step returns, weighted by (1 - lambda) lambda^(n-1), the rest on the final reward.
            steps = tokens - 1 - t
            expected = sum((1 - lam) * lam ** (n - 1) * values[t + n] for n in range(1, steps))
            expected += lam ** max(steps - 1, 0) * float(reward[b])
            assert float(got[b, t]) == pytest.approx(expected, abs=1e-5)


def fresh(model: Path, rank: int | None = 3, lam: float | None = None) -> ValueModel:
    from peft import get_peft_model

    study = valued_study(model)
    torch.manual_seed(0)
    base = load_model(str(model))
    tokens = float(np.mean([len(row["answer_ids"]) for row in BATCH]))  # type: ignore[arg-type]
    lora = lora_config(study.values["final"].lora)
    return ValueModel(get_peft_model(base, lora), 32, rank, lam, tokens)


BATCH: list[dict[str, Any]] = [
    {"prompt_ids": [1, 2, 3], "answer_ids": [97, 98], "reward": 0.7},
    {"prompt_ids": [4], "answer_ids": [99, 100, 101, 102], "reward": -1.2},
]


@pytest.mark.parametrize("lam", [None, 0.6])
@pytest.mark.parametrize("rank", [None, 3])
def test_the_loss_is_the_formula_over_answers_one_by_one(
    tiny_model_folder: Path, rank: int | None, lam: float | None
) -> None:
    model = fresh(tiny_model_folder, rank, lam)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    loss = float(model(**collate(BATCH))["loss"])
    squares: dict[str, list[float]] = {"V": [], "Q": []}
    whole = model.backbone.get_base_model()
    for row in BATCH:
        prompt, answer, reward = row["prompt_ids"], row["answer_ids"], row["reward"]
        hidden = whole.base_model(torch.tensor([[*prompt, *answer]])).last_hidden_state[0]  # type: ignore[misc]
        value = (hidden @ model.head.weight + model.head.bias)[len(prompt) - 1 :]  # type: ignore[arg-type]
        target = targets(value.detach()[None], torch.tensor([reward]), lam)[0]
        squares["V"] += (0.5 * (value - target) ** 2).tolist()
        if rank is not None:
            matrix = model.head.up @ model.head.down
            for t, token in enumerate(answer):  # type: ignore[arg-type]
                state = hidden[len(prompt) - 1 + t]  # type: ignore[arg-type]
                more = whole.get_input_embeddings().weight[token] @ matrix @ state
                squares["Q"].append(float(0.5 * (value[t] + more - target[t + 1]) ** 2))
    expected = sum(float(np.mean(part)) for part in squares.values() if part)
    assert loss == pytest.approx(expected, rel=1e-4)


def test_every_state_counts_alike_however_answers_are_dealt_out(tiny_model_folder: Path) -> None:
    """Answers of two and four tokens together pull as they do one by one, as in two workers' shares of a batch."""
    model = fresh(tiny_model_folder, lam=0.6)

    def gradient(batches: list[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        model.zero_grad()
        for batch in batches:
            (model(**collate(batch))["loss"] / len(batches)).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    together, apart = gradient([BATCH]), gradient([[row] for row in BATCH])
    assert together.keys() == apart.keys() and any(float(tensor.abs().max()) > 1e-2 for tensor in together.values())
    for name, tensor in together.items():
        torch.testing.assert_close(apart[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_brings_the_head_back(tiny_model_folder: Path, tmp_path: Path) -> None:
    one, other = fresh(tiny_model_folder), fresh(tiny_model_folder)
    with torch.no_grad():
        for parameter in one.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape))
    save_adapter(tmp_path, full_weights(one), one.peft_config["default"])
    load_adapter_weights(tmp_path, other)
    assert float(one(**collate(BATCH))["loss"]) == float(other(**collate(BATCH))["loss"])
    head = load_adapter(tmp_path).head
    assert head is not None and head.kind == "vocabulary"
    assert torch.equal(head.weight_E, one.head.weight.detach())


def test_rank_correlation_is_spearmans() -> None:
    from scipy.stats import spearmanr

    dice = np.random.default_rng(0)
    for _ in range(20):
        one, other = dice.integers(0, 6, 30).astype(float), dice.normal(size=30)
        assert rank_correlation(one, other) == pytest.approx(spearmanr(one, other).statistic)
    assert rank_correlation(np.ones(4), np.arange(4.0)) == 0


def test_no_prompt_is_on_both_sides_of_the_split() -> None:
    pool = make_pool(prompts=9)
    for seed in range(5):
        train, test = split(pool, 0.25, seed)
        assert len(set(test["prompt_id"])) == 2 and not set(train["prompt_id"]) & set(test["prompt_id"])
        assert len(train) + len(test) == len(pool)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "head"), [("final", "vocabulary"), ("td", "scalar")])
def test_what_a_reward_depends_on_is_learnt(tiny_model_folder: Path, tmp_path: Path, target: str, head: str) -> None:
    study = valued_study(tiny_model_folder, target=target, head=head)
    train, test = split(make_pool(prompts=30, samples=6), 0.2, 0)
    checkpoint = fit(value_run(study, train, tmp_path), in_process=True)
    quality = measure(study, checkpoint, test, "reward/early")
    none, half, whole = (row["correlation"] for row in quality["by_share"] if row["seen"] in (0.0, 0.5, 1.0))
    assert whole > 0.6 and whole > half > none
    assert quality["by_share"][-1]["error"] < 0.8 * quality["variance"]
    model = load_model(str(tiny_model_folder))
    chat = Chat(load_tokenizer(str(tiny_model_folder)), model)
    prompt = list(chat.encode("say 3"))
    runner = RowRunner(model, AdapterBank([load_adapter(checkpoint)]), 8, 100)
    good, bad = runner.values(Row((1.0,)), [[*prompt, *[100] * 6], [*prompt, *[120] * 6]], [len(prompt)] * 2)
    assert good[-1] > bad[-1] + 0.5


@pytest.mark.slow
def test_a_studys_value_models_are_trained_once_and_guide(tiny_model_folder: Path, tmp_path: Path) -> None:
    study = valued_study(tiny_model_folder, steps=4)
    folder = make_folder(tmp_path / "study", study, make_pool())
    train_values(study, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.path.glob("values/*/*")}
    assert {path.parent.name for path in before} == {"final-early", "final-late"}
    quality = json.loads((folder.value("final", "early") / QUALITY).read_text())
    assert [row["seen"] for row in quality["by_share"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
    # Answers of eight or nine tokens: after eight of them few go on.
    lengths = [(row["seen"], row["answers"]) for row in quality["by_length"]]
    assert [seen for seen, _ in lengths] in ([0, 4], [0, 4, 8]) and lengths[0][1] == quality["answers"]
    train_values(study, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.path.glob("values/*/*")} == before
    for name in study.objective_names:
        shutil.copytree(folder.value("final", name), folder.expert("soup", name))
        (folder.expert("soup", name) / "value_head.safetensors").unlink()
    generator = Generator.open(folder.path, rows=16, length=120)
    for method in ("mage-e-m", "mage-e-e"):
        [answer] = generator.generate(["say 1"], {"early": 0.5, "late": 0.5}, method, candidates=5)
        assert answer.guided == len(answer.ids) > 0
    other = valued_study(tiny_model_folder, steps=5)
    with pytest.raises(UserError, match="trained as another `values` said"):
        train_values(other, folder)


def untrained(study: Study, place: Path) -> Path:
    """A value model as it is before its first step: it says 0 of everything."""
    model = fresh(Path(study.model))
    save_adapter(place, full_weights(model), model.peft_config["default"])
    record = model_origin(study.model) | {"values": study.values["final"].model_dump(mode="json")}
    (place / ORIGIN_FILE).write_text(json.dumps(record))
    return place


def test_answers_that_fill_the_models_positions_are_measured(tmp_path: Path) -> None:
    pool = make_pool(prompts=3)
    whole = make_tiny_model(tmp_path / "whole")
    chat = Chat(load_tokenizer(str(whole)), load_model(str(whole)))
    longest = max(len(chat.encode(prompt)) + len(ids) for prompt, ids in zip(pool["prompt"], pool["ids"], strict=True))
    study = valued_study(make_tiny_model(tmp_path / "model", max_position_embeddings=longest))
    quality = measure(study, untrained(study, tmp_path / "value"), pool, "reward/early")
    assert quality["answers"] == len(pool) and quality["variance"] == pytest.approx(1)
    assert all(row["error"] == pytest.approx(1) and row["correlation"] == 0 for row in quality["by_share"])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda place: (place / ORIGIN_FILE).write_text("{"), "mage_ray.json is not readable JSON"),
        (lambda place: (place / ORIGIN_FILE).write_text("[]"), "mage_ray.json holds no JSON object"),
        (lambda place: (place / HEAD_FILE).unlink(), "late: a value model without its head"),
        (lambda place: (place / HEAD_FILE).write_bytes(b"\x08" * 99), r"value_head\.safetensors is corrupt"),
        (
            lambda place: set_origin(place, base_model="0123456789abcdef"),
            "final-late: got one of another base model",
        ),
        (
            lambda place: set_origin(place, tokenizer="0123456789abcdef"),
            "final-late: got one of another tokenizer",
        ),
    ],
)
def test_value_models_that_are_there_but_of_no_use_are_not_measured(
    damage: Callable[[Path], Any], message: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    study = valued_study(tiny_model_folder)
    folder = make_folder(tmp_path / "study", study, make_pool())
    for name in study.objective_names:
        untrained(study, folder.value("final", name))
    damage(folder.value("final", "late"))
    with pytest.raises(UserError, match=message) as caught:
        train_values(study, folder)
    assert "\n" not in str(caught.value) and not (folder.value("final", "late") / QUALITY).exists()


def set_origin(place: Path, **content: str) -> None:
    (place / ORIGIN_FILE).write_text(json.dumps(json.loads((place / ORIGIN_FILE).read_text()) | content))


def test_pools_that_can_not_teach_are_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    study = valued_study(tiny_model_folder)
    with pytest.raises(UserError, match="values: got nothing"):
        train_values(
            make_study(tiny_model_folder), make_folder(tmp_path / "none", make_study(tiny_model_folder), make_pool())
        )

    with pytest.raises(UserError, match="no rollouts"):
        train_values(study, StudyFolder.create(tmp_path / "empty", study))
    pool = make_pool()
    pool.loc[3, "raw/early"] = np.nan
    folder = make_folder(tmp_path / "nan", study, make_pool())
    pool.assign(logprob=0.0).drop(columns=["reward/early", "reward/late"]).to_parquet(
        folder.rollouts / "shard-00000.parquet"
    )
    with pytest.raises(UserError, match="value model final-early: 1 rewards of the pool are not finite"):
        train_values(study, folder)
    assert not (folder.path / "values").exists()
    without = StudyFolder(shutil.copytree(folder.path, tmp_path / "without"))
    pool.assign(logprob=0.0).drop(columns=["raw/late"]).to_parquet(without.rollouts / "shard-00000.parquet")
    with pytest.raises(UserError, match="has no column raw/late, allowed: the rollouts of this study"):
        train_values(study, without)
    assert not (without.path / "values").exists()
    with pytest.raises(UserError, match=r"allowed: at least values\.final\.batch_size"):
        small = valued_study(tiny_model_folder, batch_size=64)
        train_values(small, make_folder(tmp_path / "small", small, make_pool(prompts=3)))
