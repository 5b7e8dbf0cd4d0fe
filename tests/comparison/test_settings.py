"""What is tuned for each method, and the settings that are tried: on a study with everything trained, at random."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from studies import add_baselines, add_value_models, trained_study

from mage_ray.comparison.checks import check_comparison
from mage_ray.comparison.results import agreement, lead, read_comparison
from mage_ray.comparison.settings import constants_that_matter, settings, with_constants
from mage_ray.comparison.tuning import crossing, setup_with, tuned_arms, validation_prompts
from mage_ray.comparison.variants import compared_methods, study_variants
from mage_ray.decoding.methods import METHODS
from mage_ray.errors import FieldError, UserError
from mage_ray.evaluation.strategies import STRATEGIES
from mage_ray.folder import StudyFolder
from mage_ray.study import Study
from mage_ray.training.rollouts import study_prompts

SPACE = {
    "base": ["bone", "soup"],
    "strength": {"low": 0, "high": 3},
    "value_strength": {"low": 1, "high": 16, "log": True},
    "extrapolation": {"low": 0, "high": 2},
    "candidates": [5, 20],
}


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    made = trained_study(
        tmp_path_factory.mktemp("settings") / "study",
        tiny_model_folder,
        objectives={"positive": {"type": "positivity"}, "short": {"type": "brevity"}},
        values={"final": {"head": "vocabulary", "rank": 3}},
        baselines={"morlhf": {"kind": "morlhf"}, "arm": {"kind": "arm"}},
        compare={"space": SPACE, "settings": 7, "prompts": 5},
    )
    add_value_models(made, tiny_model_folder)
    add_baselines(made, tiny_model_folder)
    return made


def changed(study: Study, **compare: Any) -> Study:
    return Study.model_validate(study.model_dump() | {"compare": study.compare.model_dump() | compare})


def test_tuned_is_what_a_method_has_a_use_for(folder: StudyFolder) -> None:
    [own, shuffled] = study_variants(folder.study, folder)
    grid = folder.study.validation_grid()

    def matter(method: str) -> set[str]:
        return {*constants_that_matter(folder.study, method, lambda chosen: setup_with(own, chosen), grid)}

    assert {method: matter(method) for method in own.methods} == {
        "reference": set(),
        "rewarded-soup": set(),
        "bone-soup": set(),  # it takes part with each of its sets
        "extrapolated-soup": {"base", "extrapolation"},
        "mod": set(),
        "proxy-tuning": {"strength", "candidates"},
        "mage-i-m": {"base", "strength", "candidates"},
        "mage-i-e": {"base", "strength", "candidates"},
        "mage-e-m": {"base", "value_strength", "candidates"},
        "mage-e-e": {"base", "value_strength", "candidates"},
        "morlhf": set(),
        "genarm": {"strength", "candidates"},
        "best-of-n": {"base", "candidates"},
        "beam-search": {"base", "candidates"},
        "prompting": set(),
        "redrawn-reference": set(),
    }
    assert shuffled.methods == ("mage-i-m",) and shuffled.label("mage-i-m") == "mage-i-m@shuffled"


def test_as_many_settings_for_each_the_studys_own_first_and_all_over_the_space(folder: StudyFolder) -> None:
    study = folder.study
    one = settings(study, "mage-i-m", ["base", "strength", "candidates"])
    other = settings(study, "mage-e-m", ["value_strength"])
    assert len(one) == len(other) == 7 and one[0] == other[0] == {}
    assert settings(study, "mage-i-m", ["base", "strength", "candidates"]) == one
    assert {setting["base"] for setting in one[1:]} == {"bone", "soup"}
    assert {setting["candidates"] for setting in one[1:]} == {5, 20}
    strengths = np.array(sorted(setting["strength"] for setting in one[1:]))
    assert strengths.min() >= 0 and strengths.max() <= 3 and np.diff(strengths).max() < 1.2
    logs = np.log2([setting["value_strength"] for setting in other[1:]])
    assert logs.min() >= 0 and logs.max() <= 4 and np.diff(np.sort(logs)).max() < 1.6
    # Where there are fewer, each once; where there is nothing to choose, one.
    assert settings(study, "genarm", ["candidates"]) == [{}, {"candidates": 20}, {"candidates": 5}] or settings(
        study, "genarm", ["candidates"]
    ) == [{}, {"candidates": 5}, {"candidates": 20}]
    assert settings(study, "mod", []) == [{}]
    applied = with_constants(study, one[1])
    assert {name: getattr(applied.guidance, name) for name in one[1]} == one[1]
    with pytest.raises(UserError, match=r"guidance\.strength"):
        with_constants(study, {"strength": -1.0})


def test_all_that_the_study_trains_takes_part_and_no_more(folder: StudyFolder, tiny_model_folder: Path) -> None:
    study = folder.study
    assert compared_methods(study) == [*METHODS, "morlhf", "genarm", *STRATEGIES]
    with pytest.raises(FieldError, match=r"compare\.methods: got modpo, allowed: a study that trains what it needs"):
        compared_methods(changed(study, methods=["modpo", "mage-i-m"]))
    bare = study.model_copy(update={"values": {}, "baselines": {}})
    assert not {"mage-e-m", "morlhf", "genarm"} & {*compared_methods(bare)}
    for wrong, told in (
        ({"methods": ["nonsense"]}, "'nonsense' is not among"),
        ({"shuffled": ["mage-e-m"]}, "'mage-e-m' is not among"),
        ({"space": {"base": ["bone"]}}, "at least 2 items"),
        ({"grid": [[0.5, 0.6]]}, "compare.grid.0"),
        ({"rounds": 4}, "greater than or equal to 5"),
    ):
        with pytest.raises(ValueError, match=told):
            changed(study, **wrong)


def test_what_would_end_it_after_hours_ends_it_at_once(folder: StudyFolder) -> None:
    fields = folder.study.model_dump()
    check_comparison(Study.model_validate(fields), folder)
    bone = {"training": fields["training"] | {"backbones": {"bone": {"beta": 0.7}}}, "guidance": {"guide": "bone"}}
    without = {"values": {}, "baselines": {}, "compare": {}}
    check_comparison(Study.model_validate(fields | bone | without), folder)
    grpo = {"training": fields["training"] | {"method": "grpo", "batch_size": 8}}
    check_comparison(Study.model_validate(fields | grpo), folder)
    wrong: list[tuple[dict[str, Any], str]] = [
        (
            {"baselines": {"few": {"kind": "morlhf", "grid": 2}}},
            r"baselines\.few\.grid: got 2, allowed: a grid that has",
        ),
        ({"compare": {"space": {"base": ["bone", "x"]}}}, r"compare\.space\.base: got x, allowed: one of bone, soup"),
        ({"compare": {"methods": ["mage-i-m"], "judge": {"model": "x"}}}, "reference among them"),
        ({"compare": {"methods": ["mage-i-m"], "shuffled": ["mod"]}}, "redrawn-reference or reference among them"),
        ({"compare": {"judge": {"model": "no such model"}}}, r"compare\.judge\.model: got no such model"),
        ({"compare": {"methods": ["reference"], "matched": ["mod"]}}, r"compare\.matched: got mod"),
        ({"compare": {"matched": ["morlhf"], "grid": 5}}, "preference: got"),
        (grpo | {"compare": {"shuffled": ["mage-i-m"]}}, r"compare\.shuffled: .*only the pool is shuffled"),
        (bone | without | {"compare": {"steps": [3]}}, "single-objective experts"),
        (bone | without | {"compare": {"methods": ["mod"]}}, r"compare\.methods: got mod"),
        ({"strategies": {"method": "rewarded-soup"}}, r"strategies\.method: got rewarded-soup"),
        ({"strategies": {"method": "mage-e-m"}} | without, "value models"),
        ({"compare": {"space": {"strength": {"low": -1, "high": 1}}}}, r"guidance\.strength"),
        ({"evaluation": {"reference_point": -math.inf}}, "reference_point"),
    ]
    for change, told in wrong:
        with pytest.raises(UserError, match=told):
            check_comparison(Study.model_validate(fields | change), folder)
    with pytest.raises(ValueError, match="each seed once"):
        Study.model_validate(fields | {"evaluation": {"seeds": [0, 0]}})


def test_bone_soup_takes_part_with_each_of_its_sets(folder: StudyFolder) -> None:
    more = {"bone": {"beta": 0.7}, "wide": {"beta": 0.8}, "soup": {}}
    study = Study.model_validate(
        folder.study.model_dump()
        | {"training": {"backbones": more}, "values": {}, "baselines": {}}
        | {"compare": {"methods": ["bone-soup", "reference"], "matched": []}}
    )
    arms = tuned_arms(study_variants(study, folder)[0], None)  # nothing to choose, so nothing is run
    assert {arm.label: dict(arm.constants) for arm in arms} == {
        "bone-soup": {},
        "reference": {},
        "bone-soup-wide": {"base": "wide"},
    }


def test_nobody_chooses_by_prompts_that_are_trained_or_tested_on(folder: StudyFolder) -> None:
    chosen = {prompt.id for prompt in validation_prompts(folder.study)}
    assert len(chosen) == 5
    assert not chosen & {prompt.id for part in study_prompts(folder.study) for prompt in part}
    with pytest.raises(FieldError, match=r"compare\.prompts"):
        validation_prompts(changed(folder.study, prompts=100_000))


def test_the_example_of_its_page_is_a_study(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs" / "comparison.md").read_text()
    [example] = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    fields = {"objectives": {"positive": {"type": "positivity"}, "short": {"type": "brevity"}}}
    study = Study.model_validate(yaml.safe_load(example) | fields)
    check_comparison(study, StudyFolder(tmp_path))
    assert {*yaml.safe_load(example)["compare"]} <= {*type(study.compare).model_fields}
    # A variant trains all that its methods are tuned over, and no more.
    more = {"bone": {"beta": 0.7}, "soup": {}, "other": {"beta": 0.6}, "idle": {"beta": 0.8}}
    wide = study.model_dump() | {"training": {"backbones": more}}
    wide["compare"]["space"]["base"] = ["bone", "other"]
    [_, longer, shuffled] = study_variants(Study.model_validate(wide), StudyFolder(tmp_path))
    assert longer.name == "20" and longer.study.training.steps == 20
    assert shuffled.study.training.steps == 100
    for variant in (longer, shuffled):
        assert [*variant.study.training.backbones] == ["bone", "soup", "other"]
        assert variant.study.compare.space.base == ["bone", "other"]


def test_where_a_curve_comes_to_a_goal() -> None:
    assert crossing([0, 1, 2], [0.0, 1.0, 3.0], 2.0) == pytest.approx(1.5)
    assert crossing([0, 1, 2], [0.0, 1.0, 3.0], 1.0) == pytest.approx(1.0)
    assert crossing([0, 1, 2], [3.0, 1.0, 0.0], 2.0) == pytest.approx(0.5)
    assert crossing([0, 1, 2], [0.0, 1.0, 3.0], 9.0) == 2 and crossing([0, 1, 2], [0.5, 1.0, 3.0], -1.0) == 0


def interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def content(**values: tuple[float, float, float]) -> dict[str, Any]:
    return {
        "methods": {label: {"measures": {"hypervolume": interval(*value)}} for label, value in values.items()},
        "differences": {
            "hypervolume": {
                a: {b: interval(x[0] - y[0], x[1] - y[2], x[2] - y[1]) for b, y in values.items() if b != a}
                for a, x in values.items()
            }
        },
    }


def test_a_lead_and_an_order_are_what_intervals_tell_apart() -> None:
    ours = content(a=(3, 2.5, 3.5), b=(1, 0.5, 1.5), c=(2.4, 2, 2.8), only=(0, 0, 0))
    assert lead(ours, "a", "hypervolume", ["a", "b", "c"]) == {"above": ["b"], "level": ["c"], "below": []}
    assert lead(ours, "b", "hypervolume", ["a", "c"]) == {"above": [], "level": [], "below": ["a", "c"]}
    theirs = content(a=(3, 2.9, 3.1), b=(4, 3.9, 4.1), c=(5, 4.9, 5.1))
    assert agreement(ours, theirs, "hypervolume") == {
        "kept": [["b", "c"]],
        "turned": [["a", "b"]],
        "apart_once": [["a", "c"]],
    }
    undefined = content(a=(1, 1, 1), b=(2, 2, 2))
    undefined["methods"]["a"]["measures"]["hypervolume"] = {"value": None, "low": None, "high": None}
    assert agreement(ours, undefined, "hypervolume") == {"kept": [], "turned": [], "apart_once": [["a", "b"]]}


def test_a_comparison_to_hold_it_against_is_one_of_the_same(folder: StudyFolder, tmp_path: Path) -> None:
    study = folder.study
    grid = [list(mu) for mu in study.evaluation_grid()]
    defined = {measure: interval(1, 0, 2) for measure in ("hypervolume", "inner_product", "controllability")}
    whole = {
        "objectives": study.objective_names,
        "grid": grid,
        "reference_point": study.reference_point(),
        "methods": {"a": {"measures": defined}},
    }
    path = tmp_path / "comparison.json"
    path.write_text(json.dumps(whole))
    assert read_comparison(path, study) == whole
    for change, told in (
        ({"grid": grid[:-1]}, "--against: got one of another grid"),
        ({"reference_point": [0.0, 0.0]}, "--against: got one of another reference point"),
        ({"methods": {"a": {"measures": {}}}}, "no comparison"),
        ({"methods": []}, "no comparison"),
    ):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=told):
            read_comparison(path, study)
    with pytest.raises(UserError, match="no comparison"):
        read_comparison(tmp_path / "none.json", study)
