"""Known values of the word-counting objectives."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mage_ray.objectives import Objective, load, score


def values(type: str, *completions: str, direction: str | None = None) -> list[float]:
    objective = load("it", type, {}, direction)
    return score("it", objective, ["Say something."] * len(completions), list(completions)).tolist()


def test_positivity_orders_plain_sentences() -> None:
    awful, dull, fine, great = values(
        "positivity",
        "I hate this horrible, disgusting place.",
        "The box is on the table.",
        "It was a good day.",
        "I absolutely love it, what a wonderful, fantastic gift!",
    )
    assert awful < -0.7 < dull == 0 < fine < 0.7 < great


def test_positivity_is_vaders_formula() -> None:
    # One word of valence 1.9, nothing that modifies it: compound = v / sqrt(v^2 + 15), rounded to four places.
    assert values("positivity", "good") == [round(1.9 / (1.9**2 + 15) ** 0.5, 4)]


def test_positivity_of_nothing_is_neutral() -> None:
    assert values("positivity", "", " \n") == [0, 0]


def test_readability_is_the_flesch_formula() -> None:
    easy = "The cat sat on the mat. The dog ran to the barn."  # 12 words of one syllable, 2 sentences
    # 13 words of 3 1 2 3 3 3 1 3 2 2 1 2 2 = 28 syllables, 1 sentence
    hard = "Yesterday the happy carpenter carefully discovered an important letter under the winter garden."
    expected = [206.835 - 1.015 * 12 / 2 - 84.6 * 12 / 12, 206.835 - 1.015 * 13 / 1 - 84.6 * 28 / 13]
    assert values("readability", easy, hard) == pytest.approx(expected, abs=1e-9)


def test_readability_is_bounded() -> None:
    assert values("readability", "Internationalization", "so " * 500) == [-100, -100]


@pytest.mark.parametrize("wordless", ["", "   \n", "...", "🙂 !!"])
def test_saying_nothing_is_no_way_to_read_easily(wordless: str) -> None:
    assert values("readability", wordless) == [-100]
    assert values("readability", wordless, direction="minimise") == [121.22]


def test_brevity_counts_words() -> None:
    assert values("brevity", "", "one", " two\n\twords ", "it's a hyphen-ated line, with 7 words") == [0, 1, 2, 7]


@pytest.mark.parametrize(
    ("type", "direction", "low", "high"),
    [
        ("positivity", "maximise", -1, 1),
        ("readability", "maximise", -100, 121.22),
        ("brevity", "minimise", 0, float("inf")),
    ],
)
def test_declarations(type: str, direction: str, low: float, high: float) -> None:
    objective: Objective = load("it", type, {})
    assert (objective.direction, objective.low, objective.high) == (direction, low, high)


def test_readability_is_silent_and_importing_objectives_is_light() -> None:
    code = (
        "import sys, mage_ray.objectives as o\n"
        "heavy = {'torch', 'transformers', 'textstat', 'vaderSentiment', 'datasets', 'ray'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "o.load('r', 'classifier', {'model': 'a/b', 'template': 'hh'}); assert 'torch' not in sys.modules\n"
        "o.probe('r', o.load('r', 'readability', {}))"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
