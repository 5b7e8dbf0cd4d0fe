"""Objectives that count words: cheap, deterministic, no model. They look at the completion only."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np

from mage_ray.errors import UserError
from mage_ray.objectives.base import Direction

_INSTALL = "install it with: pip install 'mage-ray[objectives]'"


@dataclass(frozen=True)
class Positivity:
    """How positive the wording is: VADER's compound score, in [-1, 1]; 0 for a text without sentiment, or none.

    Source: Hutto and Gilbert, "VADER: a parsimonious rule-based model for sentiment analysis of social media text"
    (2014). Raises UserError where the vaderSentiment package is missing.
    """

    low: ClassVar[float] = -1.0
    high: ClassVar[float] = 1.0
    direction: Direction = "maximise"

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        analyser = _vader()
        return np.array([analyser.polarity_scores(text)["compound"] for text in completions], dtype=np.float64)


@dataclass(frozen=True)
class Readability:
    """How easy the text reads: Flesch reading ease, clipped to [-100, 121.22].

    206.835 - 1.015 (words / sentences) - 84.6 (syllables / words), with textstat's counts. 121.22 is its largest value:
    one-syllable words in one-word sentences. It has no smallest one: a run-on sentence falls without end, so one
    degenerate sample could rule the normalisation; the clip stops that. A text without words gets the worst value, so
    that silence is no way to read easily. Source: Flesch, "A new readability yardstick" (1948). Raises UserError where
    textstat is missing.
    """

    low: ClassVar[float] = -100.0
    high: ClassVar[float] = 121.22
    direction: Direction = "maximise"

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        counts = _textstat()
        worst = self.low if self.direction == "maximise" else self.high
        values = [_flesch(counts, text) if any(map(str.isalnum, text)) else worst for text in completions]
        return np.clip(np.array(values, dtype=np.float64), self.low, self.high)


@dataclass(frozen=True)
class Brevity:
    """The length of the completion in words (runs of characters between white space); fewer is better."""

    low: ClassVar[float] = 0.0
    high: ClassVar[float] = math.inf
    direction: Direction = "minimise"

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
        return np.array([len(text.split()) for text in completions], dtype=np.float64)


@lru_cache(maxsize=1)
def _vader() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError(f"positivity needs the vaderSentiment package; {_INSTALL}") from None
    return SentimentIntensityAnalyzer()


def _flesch(counts: Any, text: str) -> float:
    # Not textstat.flesch_reading_ease: it rounds syllables per word to one decimal place, 8.46 points of the result.
    words = counts.lexicon_count(text)
    return 206.835 - 1.015 * words / counts.sentence_count(text) - 84.6 * counts.syllable_count(text) / words


@lru_cache(maxsize=1)
def _textstat() -> Any:
    with warnings.catch_warnings():
        # textstat imports pkg_resources, which announces its own removal.
        warnings.simplefilter("ignore")
        try:
            import textstat
        except ImportError:  # Also when setuptools is too new to have pkg_resources.
            raise UserError(f"readability needs the textstat package; {_INSTALL}") from None
    return textstat
