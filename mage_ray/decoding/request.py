"""What goes into the engine and what comes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mage_ray.decoding.plan import Plan
from mage_ray.errors import FieldError

FinishReason = Literal["stop", "length", "vetoed"]
"""``stop``: a stop token; ``length``: max_new_tokens; ``vetoed``: the rows left no candidate with any probability."""


@dataclass(frozen=True)
class Sampling:
    """How one request draws its tokens. Temperature 0 is greedy. Raises FieldError for a value that isn't allowed."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise FieldError("max_new_tokens", self.max_new_tokens, "1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise FieldError("temperature", self.temperature, "a finite number, 0 or more")
        if not 0 < self.top_p <= 1:
            raise FieldError("top_p", self.top_p, "above 0, at most 1")
        if not 0 <= self.seed < 2**63:
            raise FieldError("seed", self.seed, "0 to 2^63 - 1")


@dataclass(frozen=True)
class Request:
    """A prompt's tokens, the plan that decodes it, and how its tokens are drawn."""

    prompt: tuple[int, ...]
    plan: Plan
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Token:
    """One generated token.

    ``logprob`` is its guided log-probability at temperature 1, before top-p, over the plan's candidates.
    ``finished`` is set on a request's last token.
    """

    id: int
    logprob: float
    finished: FinishReason | None = None


@dataclass(frozen=True)
class Generation:
    """A finished request. ``ids`` ends with the stop token if there was one; ``logprobs`` has one number for each."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: FinishReason

    @classmethod
    def of(cls, tokens: Sequence[Token]) -> Generation:
        """All the tokens of a request that has ended. A token that was vetoed was never drawn and is left out."""
        last = tokens[-1].finished
        if last is None:
            raise ValueError("the request hasn't ended")
        drawn = tokens[:-1] if last == "vetoed" else tokens
        return cls(tuple(t.id for t in drawn), tuple(t.logprob for t in drawn), last)
