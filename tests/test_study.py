from __future__ import annotations

from pathlib import Path

import pytest

from mage_ray.errors import UserError
from mage_ray.folder import StudyFolder
from mage_ray.study import load_study, parse_study

BASE = "objectives: {positive: {type: positivity}, short: {type: brevity}}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo: 1", "study: foo: got 1, allowed: fields here: name, seed, model"),
        ("training: {stepz: 3}", "training.stepz: got 3, allowed: fields here: method, backbones"),
        ("training: {lora: {rnk: 3}}", "training.lora.rnk: got 3, allowed: fields here: rank, alpha"),
        ("training: {zero_stage: 7}", "training.zero_stage: got 7, allowed: 0, 1, 2 or 3"),
        ("training: {steps: 0}", "training.steps: got 0, allowed: greater than or equal to 1"),
        ("training: {backbones: {bone: {beta: 0.5}}}", "training.backbones.bone.beta: got 0.5, allowed: an invertible"),
        ("training: {backbones: {bone: {beta: 0.7, matrix: [[1]]}}}", "give beta or matrix, not both"),
        ("training: {backbones: {bone: {matrix: [[0.5, 0.5], [0.5, 0.5]]}}}", "training.backbones.bone.matrix"),
        ("training: {backbones: {'../x': {}}}", "String should match pattern"),
        ("guidance: {base: x}", "guidance.base: got x, allowed: one of bone, soup"),
        ("guidance: {strength: -1}", "guidance.strength: got -1"),
        ("guidance: {extrapolation: {kind: 1}}", "guidance.extrapolation.kind"),
        ("guidance: {strength: {even: 1, kind: -1}}", "guidance.strength.kind: got -1, allowed: greater than or"),
        ("guidance: {strength: {kind: 1}}", "guidance.strength.kind: got kind, allowed: one of"),
        ("guidance: {strength: high}", "guidance.strength: got high, allowed: a valid number"),
        ("baselines: {m: {kind: magic}}", "baselines.m.kind: got magic, allowed: 'morlhf', 'modpo' or 'arm'"),
        ("baselines: {m: {kind: modpo, grid: 1}}", "baselines.m.grid: got 1"),
        ("baselines: {m: {kind: modpo, grid: [[1, 1]]}}", "baselines.m.grid.0: got a sum of 2"),
        ("baselines: {a: {kind: arm, grid: 3}}", "baselines.a.grid: got 3, allowed: nothing for arm"),
        ("baselines: {a: {kind: arm, kl_strength: 0}}", "baselines.a.kl_strength: got 0"),
        ("baselines: {bone: {kind: arm}}", "baselines: got bone, allowed: a name that no set of"),
        ("guidance: {baselines: [x]}", "guidance.baselines.0: got x, allowed: one of none"),
        ("strategies: {method: magic}", "strategies.method: got magic, allowed: one of reference"),
        ("strategies: {n: 0}", "strategies.n: got 0"),
        ("evaluation: {methods: [magic]}", "'magic' is not a method; allowed: reference"),
        ("guidance: {base_map: {degree: 1, control: [[1, 0]]}}", "guidance.base_map.control: got 1 points of 2"),
        ("guidance: {guide_map: {degree: 5, control: [[1, 0]]}}", "guidance.guide_map.degree: got 5"),
        (
            "search: {space: {strength: {low: 2, high: 1}}}",
            "search.space.strength.high: got 1.0, allowed: more than low",
        ),
        ("search: {space: {strength: {low: 2, top: 1}}}", "search.space.strength.high: got nothing"),
        ("search: {space: {strength: [1, -2]}}", "search.space.strength.1: got -2, allowed: greater than or equal"),
        (
            "search: {space: {strength: {low: 0.1, high: 1, step: 0.25}}}",
            "search.space.strength.low: got 0.1, allowed: a",
        ),
        ("search: {space: {candidates: [0]}}", "search.space.candidates.0: got 0"),
        ("search: {space: {beta: [0.6]}}", "search.space.beta: got [0.6], allowed: fields here: method, base"),
        ("search: {algorithm: cmaes, metrics: [hypervolume, cost]}", "search.algorithm: got cmaes, allowed: nsga2"),
        ("search: {rungs: 6}", "search.rungs: got 6, allowed: few enough"),
        ("evaluation: {methods: [foo]}", "'foo' is not a method; allowed: reference"),
        ("evaluation: {grid: [[0.5, 0.6]]}", "evaluation.grid.0: got a sum of 1.1"),
        ("evaluation: {reference_point: [1]}", "evaluation.reference_point: got [1.0], allowed: a number, or 2"),
        ("rollouts: {temperature: 0}", "rollouts.temperature: got 0"),
        ("values: {bone: {}}", "values: got bone, allowed: a name that no set of training.backbones has"),
        ("values: {'../x': {}}", "String should match pattern"),
        ("values: {v: {held_out: 1}}", "values.v.held_out: got 1"),
        ("values: {v: {}}\nguidance: {values: w}", "guidance.values: got w, allowed: one of v"),
        ("guidance: {values: w}", "guidance.values: got w, allowed: one of none"),
        ("values: {v: {head: scalar}}\nguidance: {head: vocabulary}", "guidance.head: got vocabulary, allowed: scalar"),
        ("analysis: {grid: [[0.5, 0.6]]}", "analysis.grid.0: got a sum of 1.1"),
        ("analysis: {scales: [0]}", "analysis.scales.0: got 0"),
        ("model: [1]", "study: model"),
        ("objectives: {positive: {type: positivity}}", "study: objectives"),
        ("objectives: {a: {}, b: {type: brevity}}", "objectives.a.type: got nothing, allowed: Field required"),
        ("- 1", "study: got list, allowed: a mapping"),
        ("a: [", "study: not YAML"),
    ],
)
def test_every_mistake_is_one_line_that_names_the_field(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_study(text if text.startswith(("objectives", "-", "a:")) else BASE + text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read as a study"):
        load_study(tmp_path / "none.yaml")


def test_the_folder_keeps_the_study_and_refuses_another(tmp_path: Path) -> None:
    study = parse_study(BASE + "training: {backbones: {b: {beta: 0.8}}}\nguidance: {base: b, guide: b}")
    folder = StudyFolder.create(tmp_path / "s", study)
    assert folder.study == study
    other = parse_study(BASE + "training: {backbones: {b: {beta: 0.6}}}\nguidance: {base: b, guide: b}")
    with pytest.raises(UserError, match="differs in training"):
        StudyFolder.create(tmp_path / "s", other)
    assert folder.study == study
    stronger = study.model_copy(update={"guidance": study.guidance.model_copy(update={"strength": 2.0})})
    assert StudyFolder.create(tmp_path / "s", stronger).study.guidance.strength == 2


def test_a_null_in_place_of_a_default_is_kept(tmp_path: Path) -> None:
    study = parse_study(BASE + "search: {grid: null}\ncompare: {grid: null, space: {strength: null}}\n")
    folder = StudyFolder.create(tmp_path / "run", study)
    assert folder.study == study
    assert folder.study.search.grid is None and folder.study.compare.space.strength is None


def test_options_of_objectives_ride_beside_their_type() -> None:
    study = parse_study("objectives: {a: {type: classifier, model: org/m, template: chat}, b: {type: brevity}}")
    assert study.objectives["a"].options == {"model": "org/m", "template": "chat"}


def test_shipped_studies_are_valid() -> None:
    root = Path(__file__).parent.parent
    found = [root / "mage_ray/data/demo.yaml", *(root / "jobs/configs").glob("*.yaml")]
    assert all(load_study(path).objectives for path in found)
