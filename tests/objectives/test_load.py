"""From a study's entry to an objective, and every way in which the entry can be wrong."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from mage_ray.errors import FieldError
from mage_ray.folder import StudyFolder
from mage_ray.objectives import TYPES, load, score

SOURCE = """
import numpy as np

def vowels(prompts, completions):
    return np.array([sum(c in "aeiou" for c in text) for text in completions], float)

def bounded(prompts, completions):
    return [0.5] * len(completions)

bounded.direction, bounded.low, bounded.high = "minimise", 0, 1

class Longer:
    direction = "maximise"
    def __call__(self, prompts, completions):
        return [len(c) - len(p) for p, c in zip(prompts, completions)]

instance = Longer()
number = 3

class Picky:
    def __init__(self, needed):
        pass
"""


@pytest.fixture(autouse=True)
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(SOURCE)
    (tmp_path / "my_broken_rewards.py").write_text("raise RuntimeError('boom\\nand more')")
    monkeypatch.syspath_prepend(tmp_path)


def test_a_users_function() -> None:
    objective = load("vowels", "function", {"path": "my_rewards:vowels"}, "maximise")
    assert score("vowels", objective, ["", ""], ["banana", "rhythm"]).tolist() == [3, 0]
    assert (objective.direction, objective.low, objective.high) == ("maximise", -math.inf, math.inf)


def test_declarations_on_the_function_and_options_over_them() -> None:
    objective = load("b", "function", {"path": "my_rewards:bounded"})
    assert (objective.direction, objective.low, objective.high) == ("minimise", 0, 1)
    objective = load("b", "function", {"path": "my_rewards:bounded", "low": 0.25, "high": math.inf}, "maximise")
    assert (objective.direction, objective.low, objective.high) == ("maximise", 0.25, math.inf)
    with pytest.raises(FieldError, match=r"objectives\.b: got 0\.5"):
        score("b", load("b", "function", {"path": "my_rewards:bounded", "low": 0.75}), [""], [""])


@pytest.mark.parametrize("name", ["Longer", "instance"])
def test_a_class_or_an_instance(name: str) -> None:
    objective = load("longer", "function", {"path": f"my_rewards:{name}"})
    assert score("longer", objective, ["ab"], ["abcde"]).tolist() == [3]


def test_every_builtin_takes_another_direction(tmp_path: Path) -> None:
    trained = StudyFolder(tmp_path)
    (trained.rewards / "it").mkdir(parents=True)
    (trained.rewards / "it" / "mage_ray.json").write_text('{"rewards": {"label": null, "max_length": 64}}')
    options: dict[str, dict[str, Any]] = {
        "classifier": {"model": "a/b", "template": "hh"},
        "function": {"path": "my_rewards:vowels"},
    }
    for type in TYPES:
        for direction in ("maximise", "minimise"):
            assert load("it", type, options.get(type, {}), direction, trained).direction == direction


@pytest.mark.parametrize(
    ("type", "options", "field", "words"),
    [
        ("funny", {}, "type", "one of positivity, readability, brevity, relevance, classifier, reward, function"),
        ("positivity", {"model": "x"}, "model", "positivity has no options"),
        ("relevance", {"modell": "x"}, "modell", "the options of relevance: model, batch_size, max_length"),
        ("classifier", {"model": "a/b", "template": "hh", "field": "x"}, "field", "the options of classifier: model"),
        ("classifier", {"template": "hh"}, "model", "got nothing"),
        ("classifier", {"model": "a/b"}, "template", "got nothing"),
        ("classifier", {"model": "a/b", "template": "html"}, "template", "chat, pair, completion, hh"),
        ("classifier", {"model": "a/b", "template": ["hh"]}, "template", "chat, pair, completion, hh"),
        ("classifier", {"model": "", "template": "hh"}, "model", "hub id"),
        ("classifier", {"model": "a/b", "template": "hh", "output": "odds"}, "output", "logit, probability"),
        ("classifier", {"model": "a/b", "template": "hh", "label": 1.5}, "label", "the name or the index"),
        ("classifier", {"model": "a/b", "template": "hh", "batch_size": 0}, "batch_size", "1 or more"),
        ("classifier", {"model": "a/b", "template": "hh", "max_length": True}, "max_length", "1 or more"),
        ("reward", {}, "model", "got it, allowed: a reward model that has been trained"),
        ("reward", {"template": "hh"}, "template", "the options of reward: model, output, batch_size"),
        ("relevance", {"batch_size": 2.0}, "batch_size", "1 or more"),
        ("relevance", {"model": 3}, "model", "hub id"),
        ("function", {}, "path", "got nothing"),
        ("function", {"path": "my_rewards"}, "path", "module:name"),
        ("function", {"path": 7}, "path", "module:name"),
        ("function", {"path": "my_rewards:nope"}, "path", "AttributeError"),
        ("function", {"path": "my_rewards:number"}, "path", "module:name"),
        ("function", {"path": "my_rewards:Picky"}, "path", "TypeError"),
        ("function", {"path": "no_such_module_here:f"}, "path", "ModuleNotFoundError"),
        ("function", {"path": "my_broken_rewards:f"}, "path", "RuntimeError: boom"),
        ("function", {"path": "my_rewards:vowels"}, "direction", "maximise or minimise"),
        ("function", {"path": "my_rewards:bounded", "low": "zero"}, "low", "a number"),
        ("function", {"path": "my_rewards:bounded", "high": math.nan}, "high", "a number"),
        ("function", {"path": "my_rewards:bounded", "low": 2}, "low", "below high (1)"),
    ],
)
def test_a_wrong_entry_is_one_line_that_names_the_option(
    type: str, options: dict[str, Any], field: str, words: str
) -> None:
    with pytest.raises(FieldError) as caught:
        load("it", type, options)
    assert caught.value.field == f"objectives.it.{field}"
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_direction() -> None:
    with pytest.raises(FieldError) as caught:
        load("it", "brevity", {}, "down")
    assert caught.value.field == "objectives.it.direction"
