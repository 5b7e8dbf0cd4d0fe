"""What goes into the engine and what comes out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mage_ray.decoding.plan import Plan
from mage_ray.errors import FieldError, UserError

FinishReason = Literal["stop", "length", "vetoed", "cancelled", "error"]
"""``stop``: a stop token or stop string; ``length``: max_new_tokens; ``vetoed``: the rows left no candidate with any
probability; ``cancelled``: by its owner; ``error``: it could not run, or not on, and says why."""


@dataclass(frozen=True)
class Sampling:
    """How one request draws its tokens and ends. Temperature 0 is greedy; ``stop`` are strings that end the text.

    Raises FieldError for a value that isn't allowed.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise FieldError("max_new_tokens", self.max_new_tokens, "1 or more")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise FieldError("temperature", self.temperature, "a finite number, 0 or more")
        if not 0 < self.top_p <= 1:
            raise FieldError("top_p", self.top_p, "above 0, at most 1")
        if not 0 <= self.seed < 2**63:
            raise FieldError("seed", self.seed, "0 to 2^63 - 1")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise FieldError("stop", self.stop, "a tuple of strings of 1 character or more")


@dataclass(frozen=True)
class Request:
    """A prompt's tokens, the plan that decodes it, and how its tokens are drawn.

    ``answer`` are tokens of its answer that are there already: it goes on after them as if it had drawn them, and
    gives the rest. ``schedule`` lists (generated tokens, plan) pairs: from then on that plan draws, as after a change
    with ``recompute``.

    Raises FieldError for an answer that is as long as it may be, or a schedule that doesn't rise from 1.
    """

    prompt: tuple[int, ...]
    plan: Plan
    sampling: Sampling = Sampling()
    answer: tuple[int, ...] = ()
    schedule: tuple[tuple[int, Plan], ...] = ()

    def __post_init__(self) -> None:
        if len(self.answer) >= self.sampling.max_new_tokens:
            allowed = f"fewer than max_new_tokens, {self.sampling.max_new_tokens}"
            raise FieldError("answer", f"{len(self.answer)} tokens", allowed)
        last = 0
        for at, _ in self.schedule:
            if at <= last:
                raise FieldError("schedule", [at for at, _ in self.schedule], "numbers of tokens that rise from 1")
            last = at

    def check_length(self, length: int) -> None:
        """Raises FieldError where it takes more than ``length`` tokens, whichever of its plans draws."""
        for plan in (self.plan, *(plan for _, plan in self.schedule)):
            check_length(len(self.prompt), self.sampling.max_new_tokens, plan, length)

    def plan_at(self, generated: int) -> Plan:
        """The plan that draws the token after so many."""
        return next((plan for at, plan in reversed(self.schedule) if at <= generated), self.plan)


def check_length(prompt: int, new: int, plan: Plan, length: int) -> None:
    """Raises FieldError where so many tokens, and what the plan takes beyond them, are more than ``length``."""
    if prompt + new + plan.ahead > length:
        candidates = f" and {plan.ahead} candidates to look at" if plan.ahead else ""
        what = f"{prompt} tokens and {new} new ones{candidates}"
        raise FieldError("prompt", what, f"at most {length} together")


@dataclass(frozen=True)
class Token:
    """One generated token.

    ``logprob`` is its log-probability at temperature 1, before top-p, over the plan's candidates: the guided one, or
    the base's where the plan's cadence left the guide out, as ``guided`` tells. ``value`` is the guide's score
    ``G(s, a)`` of it (Plan), 0 where no guide ran. ``text`` is what it adds to the answer, which may lag behind while
    a character or a possible stop string is incomplete. ``finished`` is set on a request's last token; when that is
    "vetoed", "cancelled" or "error", it stands for no token, and only the reason counts.
    """

    id: int
    logprob: float
    finished: FinishReason | None = None
    text: str = ""
    guided: bool = True
    value: float = 0.0
    error: UserError | None = None
    plan: Plan | None = None
    """Which drew it."""

    @classmethod
    def end(cls, reason: FinishReason, text: str = "", error: UserError | None = None) -> Token:
        """The end of a request for which no token was drawn."""
        return cls(-1, math.nan, reason, text, error=error)


@dataclass(frozen=True)
class Generation:
    """A finished request. ``ids`` ends with the stop token if there was one; ``logprobs`` has one number for each.

    ``text`` is empty for an engine without a tokenizer, and ends before a stop string. ``value`` is the guide's
    accumulated score, ``guided`` the number of tokens for which the guide ran.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finished: FinishReason
    text: str = ""
    value: float = 0.0
    guided: int = 0
    error: UserError | None = None

    @classmethod
    def of(cls, tokens: Sequence[Token]) -> Generation:
        """All the tokens of a request that has ended."""
        last = tokens[-1]
        if last.finished is None:
            raise ValueError("the request hasn't ended")
        drawn = [t for t in tokens if t.id >= 0]
        return cls(
            ids=tuple(t.id for t in drawn),
            logprobs=tuple(t.logprob for t in drawn),
            finished=last.finished,
            text="".join(t.text for t in tokens),
            value=sum(t.value for t in drawn),
            guided=sum(t.guided for t in drawn),
            error=last.error,
        )

    def require(self) -> Generation:
        """This generation. Raises its error when it has one."""
        if self.error is not None:
            raise self.error
        return self
