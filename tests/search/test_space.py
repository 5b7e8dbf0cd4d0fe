"""A study's search space: what it may turn, what a point of it means, and what is refused before anything runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from studies import tiny_study

from mage_ray.decoding.methods import plan_for
from mage_ray.errors import FieldError, UserError
from mage_ray.merging.coefficients import circulant_mix, merging_coefficients
from mage_ray.search.recipe import Recipe, load_recipe, own_recipe
from mage_ray.search.space import Space
from mage_ray.study import Study, parse_study

WIDE: dict[str, Any] = {
    "method": ["mage-i-m", "extrapolated-soup", "bone-soup"],
    "base": ["bone", "soup"],
    "strength": {"even": {"low": 0, "high": 2}, "short": {"low": 0.5, "high": 3}},
    "extrapolation": {"low": -0.5, "high": 1},
    "candidates": {"low": 5, "high": 50, "log": True},
    "temperature": {"low": 0.3, "high": 1.2},
    "entropy": [0, 0.5],
    "coefficients": {"of": ["base", "guide"], "degree": 2, "spread": 0.4},
}


def study(**search: Any) -> Study:
    return parse_study(tiny_study(Path("/nowhere"), search=search))


def drawn(space: Space, seed: int) -> dict[str, Any]:
    np.random.seed(seed)  # Tune's samplers draw from numpy's own generator
    return {name: domain.sample() for name, domain in space.domains.items()}


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000))
def test_a_point_of_the_space_is_a_recipe_of_its_constants(seed: int) -> None:
    space = Space(study(space=WIDE))
    config = drawn(space, seed)
    recipe = space.recipe(config)
    assert recipe.method == config["method"] and recipe.temperature == config["temperature"]
    guidance = recipe.guidance
    assert (guidance.base, guidance.entropy, guidance.candidates) == (
        config["base"],
        config["entropy"],
        config["candidates"],
    )
    assert guidance.strength == {"even": config["strength.even"], "short": config["strength.short"]}
    soup = config["method"] == "extrapolated-soup"
    assert (guidance.extrapolation if soup else guidance.base_extrapolation) == config["extrapolation"]
    assert (guidance.base_extrapolation if soup else guidance.extrapolation) == (0.0 if soup else 0.5)
    # The base's control points are the formula's, moved; at a corner the map meets its own.
    mix = circulant_mix(2, 0.7) if config["base"] == "bone" else np.eye(2)
    moved = [config[f"coefficients.base.0.{name}"] for name in ("even", "short")]
    expected = merging_coefficients(mix, (0.0, 1.0)) + np.array(moved)
    setup = space.setup(recipe)
    assert setup.base_map is not None
    np.testing.assert_allclose(setup.base_map((0.0, 1.0)), expected, atol=1e-9)
    # All plans run on one bank, and are those of a study with these constants.
    applied = recipe.applied(space.study)
    assert space.plans(recipe) == [plan_for(recipe.method, mu, setup) for mu in applied.search_grid()]
    assert {len(row.coefficients) for plan in space.plans(recipe) for row in plan.rows} == {4}
    assert Recipe.model_validate(yaml.safe_load(recipe.text())) == recipe


def test_the_studys_own_constants_are_a_point_where_the_space_holds_them() -> None:
    space = Space(study(space=WIDE))
    assert space.defaults is not None
    own = space.recipe(space.defaults)
    grid = space.study.search_grid()
    expected = [plan_for("mage-i-m", mu, space.setup(own_recipe(space.study, "mage-i-m"))) for mu in grid]
    for got, wanted in zip(space.plans(own), expected, strict=True):
        for row, other in zip(got.rows, wanted.rows, strict=True):
            np.testing.assert_allclose(row.coefficients, other.coefficients, atol=1e-9)
        np.testing.assert_allclose(got.weights, wanted.weights, atol=1e-9)
    for outside in (
        {"strength": {"low": 2, "high": 3}},
        {"candidates": [5, 10]},
        {"candidates": {"low": 8, "high": 64, "step": 8}},  # 50 is no multiple of 8
        {"strength": {"low": 0, "high": 3}, "base": ["soup"]},
        {"extrapolation": {"low": 0, "high": 1}, "method": ["bone-soup"]},
    ):
        assert Space(study(space=outside)).defaults is None
    stepped = Space(study(space={"candidates": {"low": 10, "high": 60, "step": 10}, "base": ["bone"]}))
    assert stepped.defaults == {"candidates": 50}


def test_engines_hold_what_the_winner_is_held_against_too() -> None:
    space = Space(study(space={"base": ["soup"], "strength": {"low": 0, "high": 3}}))
    assert space.sets == ["soup"] and space.engine_sets == ["bone", "soup"]
    explicit = tiny_study(Path("/x"), values={"q": {}, "v": {}}, search={"method": "mage-e-m", "space": {
        "method": ["mage-i-m"], "strength": {"low": 0, "high": 3}}})  # fmt: skip
    assert Space(parse_study(explicit)).engine_sets == ["bone", "soup", "q"]


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 10_000), st.floats(1.2, 6))
def test_what_is_within_the_norm_stays_within_it_at_every_preference(seed: int, limit: float) -> None:
    space = Space(study(space=WIDE, max_norm=limit))
    config = drawn(space, seed)
    recipe = space.recipe(config)
    setup = space.setup(recipe)
    alpha = setup.extrapolation if recipe.method == "extrapolated-soup" else setup.base_extrapolation
    worst = 0.0
    for first in np.linspace(0, 1, 41):
        mu = (first, 1 - first)
        base = np.abs(setup.base_coefficients(mu, alpha)).sum()
        guide = np.abs(setup.guide_coefficients(setup.guide, mu)).sum() if recipe.method == "mage-i-m" else 0.0
        worst = max(worst, base, guide)
    if space.excess(config) <= 0:
        assert worst <= limit + 1e-9
    else:
        assert space.excess(config) + limit >= worst - 1e-9  # the bound is one


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"space": {}}, "search.space: got nothing to turn, allowed: one of method, base"),
        ({"space": {"strength": [1.0], "candidates": [5]}}, "search.space: got nothing to turn"),
        ({"method": "nope"}, "search.method: got nope, allowed: one of reference"),
        ({"method": "mage-e-m"}, "search.method: got mage-e-m, allowed: one of reference"),
        ({"method": "nope", "space": {"method": ["bone-soup", "mage-i-m"]}}, "search.method: got nope, allowed"),
        ({"space": {"strength": {"low": -1, "high": 2}}}, "search.space.strength: got -1.0, allowed: greater than"),
        ({"space": {"entropy": {"low": -1, "high": 2}}}, "search.space.entropy: got -1.0, allowed: greater than"),
        ({"space": {"temperature": {"low": -0.5, "high": 1}}}, "search.space.temperature: got -0.5, allowed: greater"),
        ({"space": {"method": ["bone-soup", "foo"]}}, "search.space.method: got foo"),
        ({"space": {"base": ["bone", "x"]}}, "search.space.base: got x, allowed: one of bone, soup"),
        ({"space": {"values": ["v", "w"]}}, "search.space.values: got v, allowed: one of none"),
        ({"space": {"strength": {"x": {"low": 0, "high": 1}}}}, "search.space.strength.x: got x, allowed: one of even"),
        ({"method": "bone-soup"}, "search.space.strength: got a constant that bone-soup has no use for"),
        ({"space": {"head": ["scalar", "vocabulary"]}}, "search.space.head: got a constant that mage-i-m has no use"),
        ({"method": "mod", "space": {"entropy": [0, 1]}}, "search.space.entropy: got a constant that mod has no use"),
        ({"method": "mage-i-m", "space": {"value_strength": [1, 2]}}, "search.space.value_strength: got a constant"),
    ],
)
def test_an_empty_or_contradictory_space_is_one_line(search: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        Space(study(**search))
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_constants_that_do_not_go_together_are_one_line() -> None:
    text = tiny_study(Path("/x"), guidance={"speculate": 4}, search={"space": {"every": [1, 2]}})
    with pytest.raises(FieldError, match=r"^search\.space\.every: got 2, allowed: [^\n]*$"):
        Space(parse_study(text))


def test_value_heads_that_do_not_exist_are_not_tried() -> None:
    values = {"q": {}, "v": {"head": "scalar"}}
    space = {"values": ["q", "v"], "head": ["vocabulary", "scalar"], "value_strength": {"low": 1, "high": 9}}
    made = Space(parse_study(tiny_study(Path("/x"), values=values, search={"method": "mage-e-m", "space": space})))
    pairs = {(v, h): made.excess({"values": v, "head": h, "value_strength": 2.0}) <= 0 for v in "qv" for h in
             ("vocabulary", "scalar")}  # fmt: skip
    assert pairs == {
        ("q", "vocabulary"): True,
        ("q", "scalar"): True,
        ("v", "scalar"): True,
        ("v", "vocabulary"): False,
    }
    assert made.sets == ["bone", "soup", "q", "v"]


RECIPE = """version: 1
method: mage-i-m
guidance: {base: bone, guide: soup, strength: {even: 1.5}, candidates: 7}
temperature: 0.4
"""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("version: 1", "version: 2"), "r.yaml: version: got 2, allowed: 1"),
        (("mage-i-m", "mage"), "recipe.method: got mage, allowed: one of reference"),
        (("base: bone", "base: x"), "recipe: guidance.base: got x, allowed: one of bone, soup"),
        (("even: 1.5", "odd: 1.5"), "recipe: guidance.strength.odd: got odd, allowed: one of even, short"),
        (("candidates: 7", "candidates: 0"), "r.yaml: guidance.candidates: got 0"),
        (("temperature: 0.4", "temperature: 0"), "r.yaml: temperature: got 0"),
        (("temperature: 0.4", "temprature: 0.4"), "r.yaml: temp"),
        (("version: 1", "["), "r.yaml: not YAML"),
    ],
)
def test_a_recipe_that_is_wrong_is_one_line(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE.replace(*change))
    with pytest.raises(UserError) as caught:
        load_recipe(tmp_path / "r.yaml").applied(study())
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_takes_the_place_of_a_studys_constants(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE)
    ours = study()
    applied = load_recipe(tmp_path / "r.yaml").applied(ours)
    assert (applied.guidance.candidates, applied.evaluation.temperature) == (7, 0.4)
    assert applied.guidance.strength == {"even": 1.5}
    assert applied.model_copy(update={"guidance": ours.guidance, "evaluation": ours.evaluation}) == ours
    assert applied.digest == ours.digest  # the experts are the same
    with pytest.raises(UserError, match=r"none\.yaml: cannot be read as a recipe"):
        load_recipe(tmp_path / "none.yaml")


def test_a_recipe_of_another_study_is_refused(tmp_path: Path) -> None:
    ours, other = study(), parse_study(tiny_study(Path("/nowhere"), seed=1))
    fields: dict[str, Any] = {key: {} for key in ("searched", "unseen", "defaults", "gain", "versions")}
    fields |= {"prompts": "", "algorithm": "random", "metrics": [], "trials": 1, "trial": "", "seed": 0, "date": ""}
    text = own_recipe(ours, "mage-i-m").model_dump() | {
        "provenance": {"study": "tiny", "digest": ours.digest, "confidence": 0.9, **fields}
    }
    recipe = Recipe.model_validate(text)
    assert recipe.applied(ours).guidance == ours.guidance
    with pytest.raises(FieldError, match=rf"recipe: got one of study tiny \({ours.digest}\)"):
        recipe.applied(other)
