"""Timed rounds of all arms in turn, or of their steps; the time to a first token. Seconds of wall time throughout."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from arms import Arm
from naive import Agreement, NaiveReference
from setting import PREFERENCES, BenchError, Prompt, Prompts, guided

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Request, Sampling

_Arm = TypeVar("_Arm")


@dataclass
class Timing:
    """The seconds of one arm's rounds; ``tokens`` are made in each."""

    arm: Arm
    tokens: int
    seconds: list[float] = field(default_factory=list)
    agreement: Agreement | None = None

    def as_json(self) -> dict[str, object]:
        """The arm's entry in the results."""
        best, median = min(self.seconds), statistics.median(self.seconds)
        return {
            "name": self.arm.name,
            "batch": len(self.arm.plans),
            "seconds_min": best,
            "seconds_median": median,
            "tokens_per_s_best": self.tokens / best,
            "tokens_per_s_median": self.tokens / median,
            "rounds": len(self.seconds),
            "seconds": self.seconds,
        }


def time_rounds(
    arms: Sequence[Arm],
    rounds: int,
    prompts: Prompts,
    prompt_tokens: int,
    new_tokens: int,
    naive: NaiveReference | None,
    say: Callable[[str], None],
) -> list[Timing]:
    """One untimed round, then ``rounds`` timed ones; each round starts with another arm and runs all of them.

    Every run gets fresh prompts, and outside its time its tokens are held against ``naive``. Raises BenchError when
    they differ.
    """
    timings = [Timing(arm, len(arm.plans) * new_tokens) for arm in arms]
    for number in range(rounds + 1):
        start = time.perf_counter()
        for timing in _turned(timings, number):
            arm = timing.arm
            asked = prompts.take(len(arm.plans), prompt_tokens)
            gc.collect()
            began = time.perf_counter()
            made = arm.run(asked)
            passed = time.perf_counter() - began
            if number > 0:
                timing.seconds.append(passed)
            if naive is not None:
                agreement = naive.check(arm.key, arm.plans, asked, made, new_tokens)
                timing.agreement = agreement if timing.agreement is None else timing.agreement + agreement
        what = "untimed round" if number == 0 else f"round {number} of {rounds}"
        if number == 0 and naive is not None:
            what += ", tokens compared with the naive reference"
        say(f"{what}: {time.perf_counter() - start:.1f} s")
    return timings


def joint_steps(
    engine: Engine, plan: Plan, prompts: Sequence[Prompt], new_tokens: int
) -> tuple[float, list[list[int]]]:
    """Mean seconds of the steps that all of these greedy requests take together, and their tokens.

    Prompts are left out, and so are steps in which some are still computed or some requests have ended. Raises
    BenchError when there are not two others.
    """
    made: list[list[int]] = [[] for _ in prompts]
    stamps: list[float] = []
    ended = False
    for index, token in engine.events(
        [Request(prompt, plan, Sampling(new_tokens, temperature=0.0)) for prompt in prompts]
    ):
        if token.error is not None:
            raise token.error
        made[index].append(token.id)
        # From the last request's first token on, each gets one a step.
        if not ended and min(map(len, made)) > len(stamps):
            stamps.append(time.perf_counter())
        ended = ended or token.finished is not None
    if len(stamps) < 2:
        raise BenchError(f"{len(prompts)} requests of {new_tokens} tokens take no two steps together")
    return (stamps[-1] - stamps[0]) / (len(stamps) - 1), made


@dataclass
class Steps:
    """Mean seconds of a step in each of an arm's runs, and how their tokens compare with the naive reference's."""

    seconds: list[float] = field(default_factory=list)
    agreement: Agreement = field(default_factory=Agreement)


def time_steps(
    engine: Engine,
    plans: Mapping[str, Plan],
    batch: int,
    rounds: int,
    prompts: Prompts,
    prompt_tokens: int,
    new_tokens: int,
    naive: NaiveReference,
) -> dict[str, Steps]:
    """``joint_steps`` of each plan at a batch, in rounds as those of ``time_rounds``.

    Raises BenchError when tokens differ from ``naive``'s.
    """
    steps = {kind: Steps() for kind in plans}
    for number in range(rounds + 1):
        for kind in _turned(list(plans), number):
            asked = prompts.take(batch, prompt_tokens)
            gc.collect()
            seconds, made = joint_steps(engine, plans[kind], asked, new_tokens)
            if number > 0:
                steps[kind].seconds.append(seconds)
            steps[kind].agreement += naive.check(f"{kind} steps", [plans[kind]] * batch, asked, made, new_tokens)
    return steps


def _turned(arms: Sequence[_Arm], number: int) -> Sequence[_Arm]:
    """In the order of a round: each starts with another one."""
    first = number % len(arms)
    return [*arms[first:], *arms[:first]]


def first_tokens(engine: Engine, prompts: Prompts, prompt_tokens: int, samples: int) -> dict[str, list[float]]:
    """Seconds from a preference to its request's first guided token: preferences never seen, and one often seen.

    In turn, on fresh prompts. What a preference costs in front of the engine (its plan) is in the time.
    """
    dice = np.random.default_rng(7)
    passed: dict[str, list[float]] = {"new": [], "seen": []}
    for i in range(-1, samples):
        for kind in ("seen", "new") if i % 2 else ("new", "seen"):
            preference = PREFERENCES[0] if kind == "seen" else tuple(dice.dirichlet(np.ones(3)).tolist())
            [prompt] = prompts.take(1, prompt_tokens)
            began = time.perf_counter()
            with closing(engine.stream(Request(prompt, guided(preference), Sampling(8, temperature=0.0)))) as stream:
                next(stream)
                seconds = time.perf_counter() - began
            if i >= 0:
                passed[kind].append(seconds)
    return passed
