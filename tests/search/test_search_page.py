"""The page of a search as a reader gets it: the summary's numbers, told honestly, in files that stand alone."""

from __future__ import annotations

import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from studies import tiny_study

sys.path.append(str(Path(__file__).parents[1] / "evaluation"))
from evaluation_samples import front, make_samples
from test_report import HOSTILE, Page

from mage_ray.errors import FieldError
from mage_ray.evaluation import measures
from mage_ray.evaluation.report import write_page, write_report
from mage_ray.evaluation.summary import Summary, paired_difference, summarise
from mage_ray.evaluation.tables import COLUMNS, number
from mage_ray.folder import StudyFolder
from mage_ray.search.history import ENOUGH, best_so_far, importance, read_settings
from mage_ray.search.outcome import winners
from mage_ray.search.page import write_search_page
from mage_ray.search.recipe import Recipe
from mage_ray.search.space import Space
from mage_ray.study import parse_study

SPACE: dict[str, Any] = {
    "strength": {"low": 0, "high": 3},
    "extrapolation": {"low": 0, "high": 1},
    "candidates": [5, 10, 20, 50],
}
Record = dict[str, Any]


def made_space(objectives: int = 2, name: str = "tiny", **search: Any) -> Space:
    rule = {"type": "function", "path": "rewards:even", "direction": "maximise"}
    study = tiny_study(
        Path("/nowhere"),
        name=name,
        objectives={f"o{i}": rule for i in range(objectives)},
        search={"space": SPACE, "prompts": 8, "grid": 3, **search},
    )
    return Space(parse_study(study))


def made_record(space: Space, number: int, config: dict[str, Any], **changes: Any) -> Record:
    """Strength is best at 2, the cost is the number of candidates', and nothing else matters."""
    noise = np.random.default_rng(number).normal(scale=0.02, size=2)
    grid = space.study.search_grid()
    points = front(1 - 0.2 * (config.get("strength", 1) - 2) ** 2 + noise[0], grid)
    scores = {
        "hypervolume": float(measures.hypervolume(points, space.study.reference_point())),
        "inner_product": float(measures.inner_product(grid, points)),
        "controllability": float(measures.controllability(grid, points)),
        "cost": 1 + config.get("candidates", 50) / 50 + 0.01 * noise[1],
        "kl": 0.5,
        "length": 12.0,
        "prompts": 8,
        "tokens": 100,
        "engine_seconds": 2.0,
    }
    recipe = space.recipe(config).model_dump(mode="json", exclude_none=True)
    record = {"trial": f"t{number}", "config": config, "began": float(number), "ended": number + 1.0, "recipe": recipe}
    return record | {"rung": 1, "last": True, "scores": scores, "points": points.tolist()} | changes


def made_records(space: Space, count: int, seed: int = 0) -> list[Record]:
    """The defaults, one that failed, one that was stopped early, and so many drawn ones."""
    dice = np.random.default_rng(seed)
    assert space.defaults is not None
    records = [made_record(space, 0, space.defaults)]
    failed = {name: record for name, record in records[0].items() if name in ("trial", "began", "ended")}
    records.append(failed | {"trial": "t1", "config": drawn(dice), "error": HOSTILE})
    stopped = made_record(space, 2, drawn(dice), last=False)
    stopped["scores"] |= {"hypervolume": 99.0, "prompts": 4}
    records.append(stopped)
    return records + [made_record(space, number, drawn(dice)) for number in range(3, 3 + count)]


def drawn(dice: np.random.Generator) -> dict[str, Any]:
    strength, extrapolation = dice.uniform([0, 0], [3, 1]).tolist()
    return {"strength": strength, "extrapolation": extrapolation, "candidates": int(dice.choice([5, 10, 20, 50]))}


def winner(space: Space, records: Sequence[Record]) -> Recipe:
    best = winners([record for record in records if record.get("last")], space.study.search.metrics)
    return Recipe.model_validate(best[0]["recipe"])


def made_summary(space: Space, gain: float, noise: float = 0.1) -> Summary:
    """Of a recipe that is better than the defaults by so much."""
    grid = space.study.evaluation_grid()
    means = {"recipe": front(0.8 + gain, grid), space.study.search.method: front(0.8, grid)}
    samples = make_samples(means, grid, noise=noise)
    return summarise(samples, space.study.objective_names, space.study.reference_point(), resamples=100)


def written(place: Path, space: Space, records: Sequence[Record], summary: Summary, **facts: str) -> str:
    path = write_search_page(space, StudyFolder(place), records, summary, winner(space, records), facts)
    assert path == place / "report" / "search.html"
    return path.read_text(encoding="utf-8")


def rows(page: str, title: str) -> list[list[str]]:
    """The cells of the first table below a title."""
    table = page[page.index(title) :].split("</table>")[0]
    found = re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1], re.DOTALL)
    return [[re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)] for row in found]


def pictures(*names: str) -> set[str]:
    return {f"search-{name}{dress}.png" for name in names for dress in ("", "-dark")}


@pytest.mark.slow
def test_the_page_stands_alone_and_its_numbers_are_the_summarys(tmp_path: Path) -> None:
    space = made_space(name=HOSTILE)
    records = made_records(space, 12)
    summary = made_summary(space, 0.3)
    text = written(tmp_path, space, records, summary, model=HOSTILE)
    page = Page(text)
    assert not {"script", "b"} & set(page.tags) and not re.search(r"@import|url\(", text)
    drawn_there = pictures("unseen", "history", "fronts", "importance")
    assert set(page.addresses) == drawn_there
    assert {path.name for path in (tmp_path / "report").iterdir()} == drawn_there | {"search.html"}
    for name in drawn_there:
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
    assert page.words.count(HOSTILE.strip()) == 4  # twice the title, the failure's reason, the fact

    # The measures of both, and their difference.
    measured = {row[0]: row[2:] for row in rows(text, "never saw</h3>")}
    [(_, *gained)] = rows(text, "The difference</h3>")
    history = json.loads((tmp_path / "search" / "history.json").read_text())
    for place, column in enumerate(COLUMNS):
        for label in ("recipe", "mage-i-m"):
            one = summary.method(label).measures[column.measure]
            expected = f"{number(one.value, column.digits)}{number(one.low, column.digits)} … "
            assert expected in measured[label][place]
        gain = paired_difference(summary, "recipe", "mage-i-m", column.measure)
        low, high = (number(bound, column.digits, signed=True) for bound in (gain.low, gain.high))
        assert f"{number(gain.value, column.digits, signed=True)}{low} … {high}" in gained[place]
        assert gained[place].startswith("↑" if gain.low > 0 else "↓" if gain.high < 0 else gained[place][0])
        assert history["gain"][column.measure]["value"] == pytest.approx(gain.value)
    assert history["unseen"] == json.loads(summary.to_json())
    assert [one["scores"] for one in history["settings"]] == [record.get("scores", {}) for record in records]

    # The constants, the scores that the search saw, and all settings.
    best = max((r for r in records if r.get("last")), key=lambda r: r["scores"]["hypervolume"])
    shown = {name: f"{value:.4g}" for name, value in best["config"].items()}
    assert rows(text, "The answer</h2>") == [
        ["strength", "0 to 3", "1", shown["strength"]],
        ["extrapolation", "0 to 1", "0", shown["extrapolation"]],
        ["candidates", "5, 10, 20, 50", "50", shown["candidates"]],
    ]
    seen = {row[0]: row[1:] for row in rows(text, "own prompts</h3>")}
    for label, record in (("winner", best), ("defaults", records[0])):
        assert seen[label][0] == number(record["scores"]["hypervolume"], 3) and seen[label][-1] == "8"
    assert "These numbers flatter the winner" in page.words
    states = {int(row[0]): row[1] for row in rows(text, "All settings</h2>")}
    expected_states = dict.fromkeys(range(1, 16), "on all prompts")
    expected_states |= {1: "defaults: on all prompts", 2: "failed", 3: "stopped early"}
    expected_states[records.index(best) + 1] = "winner: on all prompts"
    assert states == expected_states
    assert "13 on all 8 prompts, 1 stopped early, 1 failed" in page.words


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gain", "told"), [(0.3, "the winner is better"), (-0.3, "the winner is worse"), (0.002, "The interval includes 0")]
)
def test_what_is_said_of_the_gain_is_what_its_interval_says(gain: float, told: str, tmp_path: Path) -> None:
    space = made_space()
    summary = made_summary(space, gain, noise=0.2)
    difference = paired_difference(summary, "recipe", "mage-i-m", "hypervolume")
    assert (difference.low > 0, difference.high < 0) == ("better" in told, "worse" in told)  # as it is meant to be
    words = Page(written(tmp_path, space, made_records(space, 2), summary)).words
    said = [one for one in ("is better:", "the winner is better", "the winner is worse", "includes 0") if one in words]
    assert said == [told.removeprefix("The interval ")]
    low, high = (number(bound, 3, signed=True) for bound in (difference.low, difference.high))
    assert f"a difference of {number(difference.value, 3, signed=True)} [{low}, {high}]" in words


@pytest.mark.slow
def test_several_metrics_and_three_objectives(tmp_path: Path) -> None:
    space = made_space(3, metrics=["hypervolume", "cost", "inner_product"], algorithm="random")
    records = made_records(space, 10)
    text = written(tmp_path, space, records, made_summary(space, 0.1))
    assert set(Page(text).addresses) == pictures("unseen", "history", "fronts", "importance", "metrics")
    ended = [record for record in records if record.get("last")]
    names = [f"recipes/{place:02d}.yaml" for place in range(len(winners(ended, space.study.search.metrics)))]
    by_name = {name: records[int(row[0]) - 1] for row in rows(text, "All settings") for name in names if name in row[1]}
    assert len(names) > 1
    assert [by_name[name] for name in names] == winners(ended, space.study.search.metrics)
    words = Page(text).words
    assert f"No other setting beats the {len(names)} on the front" in words
    assert "Forwards per token: not measured on unseen prompts" in words
    history = json.loads((tmp_path / "search" / "history.json").read_text())
    assert history["importance"]["cost"][0]["constant"] == "candidates"


@pytest.mark.slow
def test_what_there_is_to_say_of_the_defaults(tmp_path: Path) -> None:
    space = made_space()
    summary = made_summary(space, 0.0)
    records = made_records(space, 3)
    stopped = [records[0] | {"last": False}, *records[1:]]
    assert "The defaults were stopped early" in written(tmp_path, space, stopped, summary)
    assert "The defaults were not tried" in written(tmp_path, space, records[1:], summary)
    alone = written(tmp_path, space, records[:3], summary)
    assert "The winner is the study’s own constants" in alone and "winner, defaults: on all" in alone
    elsewhere = made_space(space=SPACE | {"strength": {"low": 2, "high": 3}})
    config = {"strength": 2.5, "extrapolation": 0.5, "candidates": 5}
    text = written(tmp_path, elsewhere, [made_record(elsewhere, 0, config)], summary)
    assert "The defaults lie outside the space" in text
    assert rows(text, "The answer")[0] == ["strength", "2 to 3", "1", "2.5"]


@pytest.mark.slow
def test_constants_of_every_kind_stand_beside_the_defaults(tmp_path: Path) -> None:
    space = made_space(
        space={
            "method": ["mage-i-m", "extrapolated-soup"],
            "strength": {"o1": {"low": 0, "high": 3}},
            "extrapolation": {"low": -0.5, "high": 1, "step": 0.25},
            "candidates": {"low": 5, "high": 50, "log": True},
            "temperature": [0.7],
            "coefficients": {"degree": 1},
        }
    )
    moves = {name: 0.0 for name in space.dimensions if name.startswith("coefficients")}
    config = {"method": "extrapolated-soup", "strength.o1": 2.0, "extrapolation": -0.25, "candidates": 7}
    text = written(
        tmp_path,
        space,
        [made_record(space, 0, config | moves | {"coefficients.base.1.o0": -0.123456})],
        made_summary(space, 0.1),
    )
    found = {row[0]: row[1:] for row in rows(text, "The answer")}
    assert found["method"] == ["mage-i-m, extrapolated-soup", "mage-i-m", "extrapolated-soup"]
    assert found["strength.o1"] == ["0 to 3", "1", "2"]
    assert found["extrapolation"] == ["−0.5 to 1, in steps of 0.25", "0", "−0.25"]
    assert found["candidates"] == ["5 to 50, by its logarithm", "50", "7"]
    assert found["temperature"] == ["0.7", "1", "0.7"]
    assert found["coefficients.base.1.o0"] == ["−0.5 to 0.5", "0", "−0.1235"]
    assert len(found) == 5 + 4


@pytest.mark.slow
def test_too_few_settings_are_told_instead_of_an_importance(tmp_path: Path) -> None:
    space = made_space()
    for count, enough in ((ENOUGH - 2, False), (ENOUGH - 1, True)):  # and the defaults
        text = written(tmp_path / str(count), space, made_records(space, count), made_summary(space, 0.1))
        assert ("Too few settings to tell" in text) is not enough
        assert ("search-importance.png" in text) is enough


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("metric", "first"), [("hypervolume", "strength"), ("cost", "candidates")])
def test_the_constant_that_matters_is_the_most_important_and_above_chance(seed: int, metric: str, first: str) -> None:
    space = made_space()
    records = made_records(space, 24, seed)
    settings = read_settings(space, records, winner(space, records))
    weights = importance(space, settings, metric)
    assert weights[0].constant == first and weights[0].share > weights[0].chance
    assert {weight.constant for weight in weights} == set(space.dimensions)
    assert sum(weight.share for weight in weights) == pytest.approx(1)
    assert weights == importance(space, settings, metric)


def test_importance_takes_every_kind_of_dimension_and_tells_nothing_of_what_is_even() -> None:
    kinds = {
        "strength": {"low": 0.25, "high": 3, "log": True, "step": 0.25},
        "candidates": {"low": 5, "high": 50, "step": 5},
        "base": ["bone", "soup"],
        "extrapolation": {"low": 0, "high": 1, "step": 0.25},
    }
    space = made_space(space=kinds)
    dice = np.random.default_rng(0)
    records = []
    for place in range(16):
        config = {"strength": float(dice.integers(1, 13)) / 4, "candidates": int(5 * dice.integers(1, 11))}
        config |= {"base": ["bone", "soup"][place % 2], "extrapolation": float(dice.integers(0, 5)) / 4}
        records.append(made_record(space, place, config))
    records[0]["config"]["strength"] = 0.25 - 1e-12  # as rounding may leave it
    settings = read_settings(space, records, winner(space, records))
    assert {weight.constant for weight in importance(space, settings, "cost")} == set(kinds)
    for record in records:
        record["scores"]["cost"] = 3.0
    assert importance(space, read_settings(space, records, winner(space, records)), "cost") == []
    for record in records:
        record["scores"]["controllability"] = math.nan
    assert importance(space, read_settings(space, records, winner(space, records)), "controllability") == []


@hypothesis_settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from(["finished", "stopped", "failed"]), st.floats(-5, 5)), max_size=8),
    st.sampled_from(["hypervolume", "cost"]),
)
def test_the_best_so_far_is_the_best_of_those_on_all_prompts(states: list[tuple[str, float]], metric: str) -> None:
    space = made_space(metrics=[metric])
    better: Callable[..., float] = max if metric == "hypervolume" else min
    records = [made_record(space, 0, drawn(np.random.default_rng(0)))]
    for place, (state, value) in enumerate(states, start=1):
        record = made_record(space, place, drawn(np.random.default_rng(place)), last=state == "finished")
        record["scores"][metric] = value
        records.append(record if state != "failed" else {"trial": "f", "config": record["config"], "error": "broken"})
    settings = read_settings(space, records, winner(space, records))
    assert [setting.state for setting in settings[1:]] == [state for state, _ in states]
    best = best_so_far(settings, metric)
    assert all(better(a, b) == b for a, b in itertools.pairwise(best))
    for place, found in enumerate(best, start=1):
        assert found == better(one.scores[metric] for one in settings[:place] if one.state == "finished")
    late = [made_record(space, 0, drawn(np.random.default_rng(0)), last=False), *records]
    assert math.isnan(best_so_far(read_settings(space, late, winner(space, late)), metric)[0])


def test_a_recipe_or_a_summary_that_is_not_the_searchs_leaves_nothing_behind(tmp_path: Path) -> None:
    space = made_space()
    records, summary = made_records(space, 3), made_summary(space, 0.1)
    stopped = Recipe.model_validate(records[2]["recipe"])
    with pytest.raises(FieldError, match="recipe: got constants of no setting on all prompts"):
        write_search_page(space, StudyFolder(tmp_path), records, summary, stopped, {})
    samples = make_samples({"recipe": front(1, [(0, 1), (1, 0)])}, [(0, 1), (1, 0)])
    other = summarise(samples, ["o0", "o1"], [-1, -1], resamples=10)
    with pytest.raises(FieldError, match="mage-i-m"):
        write_search_page(space, StudyFolder(tmp_path), records, other, winner(space, records), {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_report_links_to_what_lies_beside_it_in_whatever_order_they_are_written(tmp_path: Path) -> None:
    space = made_space()
    records, summary = made_records(space, 2), made_summary(space, 0.1)
    grid = space.study.evaluation_grid()
    samples = make_samples({"recipe": front(0.9, grid), "mage-i-m": front(0.8, grid)}, grid)

    def report(place: Path) -> None:
        write_report(place / "report", title="<!-- pages -->", summary=summary, samples=samples, facts={})

    writers: dict[str, Callable[[Path], object]] = {
        "index": report,
        "search": lambda place: write_page(place / "report", "search", "t", "<p>x</p>"),
        "analyses": lambda place: write_page(place / "report", "analyses", "t", "<p>x</p>"),
    }
    whole = set()
    for order in itertools.permutations(writers):
        place = tmp_path / "-".join(order)
        for done, name in enumerate(order, start=1):
            writers[name](place)
            if "index" in order[:done]:
                index = (place / "report" / "index.html").read_text()
                links = [address for address in Page(index).addresses if address.endswith(".html")]
                assert links == [f"{one}.html" for one in ("analyses", "search") if one in order[:done]]
        whole.add(index)
    assert len(whole) == 1
    (place / "report" / "search.html").unlink()
    report(place)
    assert "search.html" not in (place / "report" / "index.html").read_text()
    for _ in range(2):
        written(place, space, records, summary)
        assert (place / "report" / "index.html").read_text() == index
