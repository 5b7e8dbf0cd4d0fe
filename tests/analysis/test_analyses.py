"""The analyses on a tiny study with random experts and value models, through Ray, against formulas and other routes."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapters import make_adapter
from studies import REWARDS, tiny_study

from mage_ray.analysis.compatibility import compatibility, pairs
from mage_ray.analysis.connectivity import connectivity
from mage_ray.analysis.fronts import whole_setup
from mage_ray.analysis.merging import merging
from mage_ray.analysis.run import section
from mage_ray.analysis.scores import held_out, score_rows
from mage_ray.analysis.sections import write_section
from mage_ray.analysis.sensitivity import sensitivity, sweeps
from mage_ray.decoding.methods import plan_for
from mage_ray.decoding.plan import Row
from mage_ray.errors import UserError
from mage_ray.evaluation.evaluate import evaluate_study
from mage_ray.evaluation.summary import summarise
from mage_ray.folder import StudyFolder
from mage_ray.merging.adapter import Adapter, Factors, load_adapter, save_adapter
from mage_ray.merging.export import soup
from mage_ray.merging.value_head import ValueHead
from mage_ray.study import Study, parse_study
from mage_ray.training.rollouts import sample_pool

pytestmark = pytest.mark.slow

OBJECTIVES = ("even", "short")


def small(adapter: Adapter, factor: float) -> Adapter:
    """The adapter with its deltas times ``factor``."""
    shrunk = {name: Factors(f.down, f.up, f.scale * factor) for name, f in adapter.factors.items()}
    return replace(adapter, factors=shrunk)


@pytest.fixture(scope="module")
def trained(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Study, StudyFolder]]:
    """A sampled study: two backbone sets of random experts and three sets of value models, one with heads alone."""
    import ray

    place = tmp_path_factory.mktemp("analyses")
    (place / "rewards.py").write_text(REWARDS)
    values: dict[str, Any] = {"lora": {"rank": 4}, "batch_size": 4, "held_out": 0.5}
    text = tiny_study(
        tiny_model_folder,
        training={"backbones": {"low": {"beta": 0.6}, "bone": {"beta": 0.8}, "soup": {}}},
        values={"final": values, "heads": values | {"head": "scalar"}, "own": values | {"initialisation": "own"}},
        guidance={"base": "bone", "guide": "soup", "strength": 1.0, "value_strength": 1.0, "candidates": 6},
        evaluation={"grid": 3, "max_new_tokens": 8, "resamples": 40, "methods": ["bone-soup", "mage-i-m", "mage-e-m"]},
        analysis={
            "answers": 7,
            "segment": 5,
            "simplex": 2,
            "scales": [0.02, 0.04, 1.0],
            "front_scales": [1.0],
            "strengths": [0, 2],
            "candidates": [3],
        },
    )
    study = parse_study(text)
    folder = StudyFolder.create(place / "study", study)
    dice = torch.Generator().manual_seed(0)
    for i, (name, objective) in enumerate(itertools.product(("low", "bone", "soup"), OBJECTIVES)):
        make_adapter(tiny_model_folder, folder.expert(name, objective), seed=i, scale=0.2)
    for i, (name, objective) in enumerate(itertools.product(study.values, OBJECTIVES)):
        made = load_adapter(make_adapter(tiny_model_folder, place / f"made-{i}", seed=10 + i, scale=0.2))
        low = [torch.randn(shape, generator=dice) * 0.3 for shape in ((3, 32), (32, 3))]
        head = ValueHead(torch.randn(32, generator=dice) * 0.3, 0.1 * i, *([] if name == "heads" else low))
        save_adapter(replace(small(made, 0.0 if name == "heads" else 1.0), head=head), folder.value(name, objective))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(place))
        patch.syspath_prepend(str(place))
        ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False, configure_logging=False)
        try:
            sample_pool(study, folder)
            yield study, folder
        finally:
            ray.shutdown()


def test_scores_are_the_merged_models(trained: tuple[Study, StudyFolder], tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    from mage_ray.chat import Chat
    from mage_ray.models import load_model, load_tokenizer

    study, folder = trained
    answers = held_out(study, folder, 0.5)
    assert len(answers.ids) == 7 and answers.rewards_AN.shape == (7, 2)
    lam = (1.5, -0.5)
    [values] = score_rows(study, folder, ["final"], [Row(lam, "scalar")], answers)
    [logprobs] = score_rows(study, folder, ["soup"], [Row(lam)], answers)
    chat = Chat(load_tokenizer(study.model), load_model(study.model), study.system)

    def merged(place: Any) -> tuple[Any, Adapter]:
        adapter = soup([load_adapter(place(objective)) for objective in OBJECTIVES], lam, "soup")
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float64)
        for name, factors in adapter.factors.items():
            model.get_submodule(name).weight.data += factors.delta()
        return model, adapter

    valued, adapter = merged(lambda objective: folder.value("final", objective))
    policy, _ = merged(lambda objective: folder.expert("soup", objective))
    assert adapter.head is not None
    with torch.inference_mode():
        for a, (prompt, ids) in enumerate(zip(answers.prompts, answers.ids, strict=True)):
            start = list(chat.encode(prompt))
            whole = torch.tensor([[*start, *ids]])
            hidden = valued.model(whole).last_hidden_state[0, len(start) - 1 :]
            expected = hidden @ adapter.head.weight_E.double() + adapter.head.bias
            assert np.allclose(values[a], expected.numpy(), atol=1e-4)
            logits = policy(whole).logits[0, len(start) - 1 : -1].log_softmax(-1)
            assert np.allclose(logprobs[a], logits.gather(1, torch.tensor(ids)[:, None])[:, 0].numpy(), atol=1e-4)


def test_connectivity_is_the_formula(trained: tuple[Study, StudyFolder]) -> None:
    study, folder = trained
    found = {one.set: one for one in connectivity(study, folder)}
    assert list(found) == ["final", "heads", "own"] and found["own"].initialisation == "own"
    answers = held_out(study, folder, 0.5)
    for name, one in found.items():
        [segment] = one.segments
        ends = score_rows(study, folder, [name], [Row((1.0, 0.0), "scalar"), Row((0.0, 1.0), "scalar")], answers)

        def loss(values: list[np.ndarray], lam: np.ndarray) -> float:
            errors = [own - reward for own, reward in zip(values, answers.rewards_AN @ lam, strict=True)]
            return float(0.5 * (np.concatenate(errors) ** 2).mean())

        rises, gaps = [], []
        for point in [*segment.points, *one.simplex]:
            lam = np.array(point.lam)
            [merged] = score_rows(study, folder, [name], [Row(point.lam, "scalar")], answers)
            mixed = [lam[0] * a + lam[1] * b for a, b in zip(*ends, strict=True)]
            chord = lam[0] * loss(ends[0], np.eye(2)[0]) + lam[1] * loss(ends[1], np.eye(2)[1])
            expected = (loss(merged, lam), loss(mixed, lam), chord)
            got = (point.merged.value, point.ensemble.value, point.chord.value)
            assert got == pytest.approx(expected, rel=1e-6)
            # Jensen: the ensemble never lies above the chord.
            assert point.ensemble.value <= point.chord.value + 1e-9
            rises.append(expected[0] - expected[2])
            gaps.append(expected[0] - expected[1])
        count = len(segment.points)
        assert [point.lam for point in segment.points[:: count - 1]] == [(1.0, 0.0), (0.0, 1.0)]
        assert segment.barrier.value == pytest.approx(max(rises[:count]), abs=1e-9)
        assert segment.gap.value == pytest.approx(np.mean(gaps[:count]), abs=1e-9)
        assert segment.barrier.low <= segment.barrier.high
        # Without deltas V is linear in the heads, so that the merge is the ensemble; with random ones it is not.
        flat = max(abs(gap) for gap in gaps)
        assert flat < 1e-5 if name == "heads" else flat > 1e-3


def test_merging_nears_its_second_order_as_the_deltas_shrink(trained: tuple[Study, StudyFolder]) -> None:
    study, folder = trained
    compared, labels, summary = merging(study, folder)
    assert [one.guide for one in compared] == ["implicit", "explicit"]
    for one in compared:
        tiny, double, whole = one.scales
        assert tiny.size * 2 == pytest.approx(double.size) and tiny.size * 50 == pytest.approx(whole.size)
        assert double.predicted.value == pytest.approx(4 * tiny.predicted.value)
        assert double.correlation > 0.9
        assert 3 < double.difference.value / tiny.difference.value < 5
        assert tiny.difference.value < 0.1 * tiny.guide.value
        assert whole.difference.low <= whole.difference.value <= whole.difference.high
    assert {label: own for label, own in labels.items() if own[0] == "implicit-merged"} == {
        "implicit-merged x 1": ("implicit-merged", 1.0)
    }
    # At scale 1 these are the study's own methods, drawn with the same seeds.
    spec = study.evaluation
    own = summarise(evaluate_study(study, folder), study.objective_names, study.reference_point(), spec.resamples)
    for label, method in (("implicit-merged x 1", "mage-i-m"), ("explicit-merged x 1", "mage-e-m")):
        assert np.array_equal(summary.method(label).points, own.method(method).points)
        assert not np.array_equal(own.method(method).points, own.method("bone-soup").points)


def test_compatibility_holds_every_base_and_guide(trained: tuple[Study, StudyFolder]) -> None:
    study, folder = trained
    named = pairs(whole_setup(study, folder))
    assert len(named) == 3 * 5
    given, summary = compatibility(study, folder)
    assert given == named
    assert [one.method for one in summary.methods] == list(named)
    assert summary.confidence == 0.9 and len(summary.method("reference").points) == 1
    spec = study.evaluation
    own = summarise(evaluate_study(study, folder), study.objective_names, study.reference_point(), spec.resamples)
    for label, method in (("bone-soup", "bone-soup"), ("bone-soup + explicit-merged", "mage-e-m")):
        assert np.array_equal(summary.method(label).points, own.method(method).points)
    distinct = {one.points.tobytes() for one in summary.methods}
    assert len(distinct) == len(named)


def test_sensitivity_sweeps_one_constant_at_a_time(trained: tuple[Study, StudyFolder]) -> None:
    study, folder = trained
    settings, summary = sensitivity(study, folder)
    by_constant = {
        constant: [s.value for s in own] for constant, own in itertools.groupby(settings, lambda s: s.constant)
    }
    assert by_constant == {
        "beta of the base": ["0.6", "0.8"],
        "strength": ["0", "1", "2"],
        "candidates": ["3", "6"],
        "head": ["vocabulary", "scalar"],
        "value models": ["final", "heads", "own"],
    }
    assert sum(s.label == "as in the study" for s in settings) == 5
    points = {one.method: one.points for one in summary.methods}
    assert len({own.tobytes() for own in points.values()}) == len(points)
    # At strength 0 the guide is gone, and with the candidates alone the base is not yet what it is without.
    [none] = [s.setup for s in settings if s.label == "strength 0"]
    alone = plan_for("mage-e-m", (0.5, 0.5), none)
    assert len(alone.rows) == 1 and alone.candidates == 6
    plan = plan_for("mage-e-m", (0.5, 0.5), next(s.setup for s in settings if s.label == "value models heads"))
    assert plan.rows[1].head == "scalar"


def test_sections_are_written_and_nothing_is_measured_twice(trained: tuple[Study, StudyFolder]) -> None:
    study, folder = trained
    names = ("connectivity", "merging", "compatibility", "sensitivity")
    for name in names:
        write_section(study, folder, section(name, study, folder), {"machine": "<here>"})
    kept = {path: path.stat().st_mtime_ns for path in folder.analysis.glob("*/*")}
    assert kept
    for name in names:
        write_section(study, folder, section(name, study, folder), {"machine": "<here>"})
        result = json.loads((folder.analysis / f"{name}.json").read_text())
        assert result["facts"] == {"machine": "<here>"} and result["result"]
        for dress in ("", "-dark"):
            assert (folder.report / f"{name}{dress}.png").read_bytes().startswith(b"\x89PNG")
    assert {path: path.stat().st_mtime_ns for path in folder.analysis.glob("*/*")} == kept
    page = (folder.report / "analyses.html").read_text()
    assert all(f'<h2 id="{name}">' in page for name in names)
    assert "<here>" not in page and "&lt;here&gt;" in page


def test_a_study_without_value_models_is_told(trained: tuple[Study, StudyFolder], tmp_path: Path) -> None:
    study, folder = trained
    plain = study.model_copy(update={"values": {}})
    with pytest.raises(UserError, match="analyse connectivity: no value models"):
        connectivity(plain, folder)
    setup = whole_setup(plain, folder)
    assert setup.values is None and not any("explicit" in label for label in pairs(setup))
    assert {s.constant for s in sweeps(plain, setup)} == {"beta of the base", "strength", "candidates"}
