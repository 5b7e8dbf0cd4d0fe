"""Baselines in training: losses and gradients against float64 formulas, what is trained, and what is left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from adapters import make_adapter
from hypothesis import given
from hypothesis import strategies as st
from training_pools import make_folder, make_pool, make_study

from mage_ray.chat import Chat
from mage_ray.errors import FieldError, UserError
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator
from mage_ray.merging.adapter import ORIGIN_FILE, load_adapter
from mage_ray.models import load_model, load_tokenizer
from mage_ray.study import Study
from mage_ray.training import experts
from mage_ray.training.baselines import baseline_experts, check_baselines, train_baselines
from mage_ray.training.dpo import dpo_trainer
from mage_ray.training.experts import train_experts
from mage_ray.training.pairs import LEAST_GAP, modpo_weights, preference_pairs
from mage_ray.training.rollouts import load_pool
from mage_ray.training.run import Run
from mage_ray.training.worker import trainer_arguments


def study_of(model: Path, objectives: int = 2, training: dict[str, Any] | None = None, **changes: Any) -> Study:
    """The tests' study with a third objective where it is wanted, and what else is given."""
    fields = make_study(model, **({"steps": 2, "kl_strength": 0.2} | (training or {}))).model_dump(mode="json")
    if objectives == 3:
        fields["objectives"]["third"] = fields["objectives"]["late"]
    return Study.model_validate(fields | changes)


def pool_of(objectives: int = 2) -> pd.DataFrame:
    pool = make_pool()
    if objectives == 3:
        pool["raw/third"] = np.random.default_rng(5).normal(size=len(pool))
        pool["reward/third"] = pool["raw/third"]
    return pool


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=4), st.integers(0, 99))
def test_margins_are_the_others_differences_by_weight(raw: list[float], seed: int) -> None:
    names = [f"o{i}" for i in range(len(raw))]
    weights = dict(zip(names, [w / sum(raw) for w in raw], strict=True))
    dice = np.random.default_rng(seed)
    rows = [(f"p{p}", s) for p in range(3) for s in range(5)]
    table = {"prompt_id": [p for p, _ in rows], "prompt": [p for p, _ in rows], "sample": [s for _, s in rows]}
    table |= {"completion": [str(i) for i in range(len(rows))], "ids": [[i] for i in range(len(rows))]}
    pool = pd.DataFrame(table | {f"reward/{name}": dice.normal(size=len(rows)) for name in names})
    own, others = modpo_weights(weights)
    [k] = own
    assert weights[k] == max(weights.values()) and set(others) == set(names) - {k}
    pairs = preference_pairs(pool, own, 2, others)
    assert pairs
    for pair in pairs:
        one, other = (pool.loc[sample.ids[0]] for sample in (pair.chosen, pair.rejected))
        difference = {name: one[f"reward/{name}"] - other[f"reward/{name}"] for name in names}
        assert difference[k] == pytest.approx(pair.gap) and pair.gap >= LEAST_GAP
        expected = sum(weights[j] * difference[j] for j in names if j != k) / weights[k]
        assert pair.margin == pytest.approx(expected, abs=1e-12)


def test_at_a_corner_modpo_has_no_margins_and_the_pairs_of_its_objective() -> None:
    pool = pool_of(3)
    for name in ("early", "late", "third"):
        own, others = modpo_weights({o: float(o == name) for o in ("early", "late", "third")})
        assert own == {name: 1.0} and not any(others.values())
        assert preference_pairs(pool, own, 2, others) == preference_pairs(pool, {name: 1.0}, 2)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """The runs that would be trained; none is."""
    runs: list[Run] = []
    monkeypatch.setattr(experts, "fit_all", lambda found, *_: runs.extend(found))
    return runs


def loss_and_gradient(run: Run, scratch: Path) -> tuple[float, dict[str, np.ndarray]]:
    """What TRL's trainer makes of the run's first batch, with an adapter that isn't the reference any more."""
    trainer = dpo_trainer(run, 0, trainer_arguments(run.spec, 0, run.spec.steps, 1, False, str(scratch)))
    nudge(trainer.model)
    [batch] = [next(iter(trainer.get_train_dataloader()))]
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradient = {n: p.grad.numpy().copy() for n, p in trainer.model.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradient


def nudge(model: torch.nn.Module) -> None:
    dice = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=dice))


def formula(
    run: Run, logit: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]
) -> tuple[float, dict[str, np.ndarray]]:
    """The mean of ``-log sigmoid(logit(pair, log-ratio of the chosen, of the rejected))``, in float64 by autograd.

    ``logit`` is given (pair, log pi of chosen minus rejected, log pi_ref of chosen minus rejected).
    """
    from peft import get_peft_model

    from mage_ray.training.run import lora_config

    reference = load_model(run.study.model).double()
    policy = get_peft_model(load_model(run.study.model), lora_config(run.spec.lora))
    nudge(policy)
    policy = policy.double()
    chat = Chat(load_tokenizer(run.study.model), reference)

    def logprob(model: Any, sample: Any) -> torch.Tensor:
        prompt = list(chat.encode(sample.prompt))
        logits = model(input_ids=torch.tensor([[*prompt, *sample.ids]])).logits[0, len(prompt) - 1 : -1]
        return logits.log_softmax(-1).gather(1, torch.tensor(sample.ids)[:, None]).sum()

    losses = []
    for pair in run.pairs[: run.spec.batch_size]:
        with torch.no_grad():
            ratio = logprob(reference, pair.chosen) - logprob(reference, pair.rejected)
        own = logprob(policy, pair.chosen) - logprob(policy, pair.rejected)
        losses.append(-torch.nn.functional.logsigmoid(logit(pair, own, ratio)))
    loss = torch.stack(losses).mean()
    loss.backward()
    gradient = {n: p.grad.numpy().copy() for n, p in policy.named_parameters() if p.grad is not None}
    return float(loss.detach()), gradient


def agree(got: tuple[float, dict[str, np.ndarray]], want: tuple[float, dict[str, np.ndarray]]) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-4)
    assert got[1].keys() == want[1].keys() and max(np.abs(g).max() for g in want[1].values()) > 1e-3
    largest = max(np.abs(g).max() for g in want[1].values())
    for name, gradient in want[1].items():
        np.testing.assert_allclose(got[1][name], gradient, atol=2e-4 * largest, rtol=2e-3, err_msg=name)


@pytest.mark.slow
def test_losses_and_gradients_are_the_papers_formulas(
    tiny_model_folder: Path, tmp_path: Path, ray_here: Path, captured: list[Run]
) -> None:
    """MODPO of three objectives inside the simplex and at a corner, and an autoregressive reward model."""
    preferences = [[0.45, 0.05, 0.5], [0.0, 1.0, 0.0]]
    baselines = {"own": {"kind": "modpo", "grid": preferences}, "arm": {"kind": "arm", "kl_strength": 0.05}}
    study = study_of(tiny_model_folder, 3, baselines=baselines)
    folder = make_folder(tmp_path / "study", study, pool_of(3))
    train_baselines(study, folder)
    inside, corner, *arms = captured
    assert [run.name.rsplit("-", 1)[0] for run in captured] == [
        "own-0.45-0.05-0.5", "own-0-1-0", "arm-early", "arm-late", "arm-third",
    ]  # fmt: skip
    rewards = {
        (str(row["prompt"]), tuple(map(int, row["ids"]))): [row[f"reward/{name}"] for name in study.objectives]
        for _, row in load_pool(folder, study).iterrows()
    }

    def modpo(mu: list[float], k: int) -> Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]:
        def logit(pair: Any, own: torch.Tensor, ratio: torch.Tensor) -> torch.Tensor:
            chosen, rejected = (np.array(rewards[sample.prompt, sample.ids]) for sample in (pair.chosen, pair.rejected))
            assert chosen[k] > rejected[k]
            others = sum(mu[j] * (chosen[j] - rejected[j]) for j in range(3) if j != k)
            return (study.training.kl_strength * (own - ratio) - others) / mu[k]

        return logit

    agree(loss_and_gradient(inside, tmp_path), formula(inside, modpo(preferences[0], 2)))
    assert any(abs(pair.margin) > 0.5 for pair in inside.pairs)
    agree(loss_and_gradient(corner, tmp_path), formula(corner, lambda _, own, ratio: 0.2 * (own - ratio)))
    agree(loss_and_gradient(arms[1], tmp_path), formula(arms[1], lambda _, own, ratio: 0.05 * own))
    assert arms[1].pairs == corner.pairs and set(arms[1].reference.values()) == {0.0}


@pytest.mark.slow
def test_morlhf_is_the_expert_of_that_mix(
    tiny_model_folder: Path, tmp_path: Path, ray_here: Path, captured: list[Run]
) -> None:
    for method in ("dpo", "grpo"):
        study = study_of(
            tiny_model_folder,
            training={"backbones": {"bone": {"beta": 0.6}, "soup": {}}, "method": method},
            baselines={"m": {"kind": "morlhf", "grid": [[0.6, 0.4]]}},
        )
        folder = make_folder(tmp_path / method, study, pool_of())
        captured.clear()
        train_experts(study, folder)
        train_baselines(study, folder)
        expert, *_, own = captured
        assert dict(own.weights) == pytest.approx(dict(expert.weights))
        # Their weights, and so the gaps, may differ by rounding.
        ours, theirs = ([(pair.chosen, pair.rejected, pair.margin) for pair in run.pairs] for run in (own, expert))
        assert ours == theirs
        assert own.reference == expert.reference and own.prompts == expert.prompts
        assert (own.study, own.normalisation) == (expert.study, expert.normalisation)
        assert (method == "dpo") == bool(own.pairs) and (method == "grpo") == bool(own.prompts)


@pytest.mark.slow
def test_baselines_are_trained_once_and_answer_where_they_were_trained(
    tiny_model_folder: Path, tmp_path: Path, ray_here: Path
) -> None:
    baselines: dict[str, Any] = {
        "m": {"kind": "morlhf", "steps": 1},
        "o": {"kind": "modpo", "grid": [[0.6, 0.4]]},
    }
    study = study_of(tiny_model_folder, baselines=baselines, evaluation={"grid": [[0.6, 0.4]]})
    folder = make_folder(tmp_path / "study", study, pool_of())
    for name in study.objective_names:
        make_adapter(tiny_model_folder, folder.expert("soup", name))
    train_baselines(study, folder)
    places = {path.name: path for path in folder.baselines.iterdir()}
    assert set(places) == {"m-0.6-0.4", "o-0.6-0.4"}
    record = json.loads((places["o-0.6-0.4"] / ORIGIN_FILE).read_text())
    assert record["baseline"] == {"kind": "modpo", "steps": 2, "learning_rate": 0.01, "kl_strength": 0.2}
    assert record["weights"] == {"early": 0.6, "late": 0.4} and record["steps"] == 2
    assert all(load_adapter(place).base_model == record["base_model"] for place in places.values())
    before = {path: path.stat().st_mtime_ns for path in folder.baselines.glob("*/*")}
    train_baselines(study, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.baselines.glob("*/*")} == before

    generator = Generator.open(folder.path, rows=8, length=120)
    for method in ("morlhf", "modpo"):
        [answer] = generator.generate(["say 1"], [0.6, 0.4], method)
        assert answer.ids
    with pytest.raises(FieldError, match=r"preference: got \(0.5, 0.5\), allowed: those that morlhf .*: \(0.6, 0.4\)"):
        generator.plan([0.5, 0.5], "morlhf")
    other = study.model_copy(update={"baselines": study_of(
        tiny_model_folder, baselines={"m": {"kind": "morlhf", "steps": 3}}, evaluation={"grid": [[0.6, 0.4]]}
    ).baselines})  # fmt: skip
    with pytest.raises(UserError, match=r"m-0\.6-0\.4: trained as another `baselines` said"):
        train_baselines(other, folder)


def test_what_is_trained_follows_the_grid_and_runs_of_other_constants_have_other_checkpoints(tmp_path: Path) -> None:
    def names(**spec: Any) -> list[str]:
        own = study_of(tmp_path, baselines={"m": {"kind": "morlhf"} | spec}, evaluation={"grid": 3})
        return [expert.name for expert in baseline_experts(own, StudyFolder(tmp_path), "m")]

    assert [name.rsplit("-", 1)[0] for name in names()] == ["m-0-1", "m-0.5-0.5", "m-1-0"]
    assert [name.rsplit("-", 1)[0] for name in names(grid=2)] == ["m-0-1", "m-1-0"]
    assert names(grid=2)[0] == names()[0] != names(steps=9)[0]
    assert len(names(grid=[[0.5, 0.5], [0.5, 0.5]])) == 1
    with pytest.raises(FieldError, match="baselines: got nothing"):
        check_baselines(study_of(tmp_path))
    uneven = study_of(tmp_path, training={"batch_size": 6, "workers": 4}, baselines={"arm": {"kind": "arm"}})
    with pytest.raises(FieldError, match=r"training\.batch_size"):
        check_baselines(uneven)
