"""Timed rounds with all arms in turn, and the time to a first token. Seconds of wall time throughout."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import numpy as np
from arms import Arm
from naive import Agreement, NaiveReference
from setting import PREFERENCES, Prompts, guided

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.request import Request, Sampling


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
        first = number % len(timings)
        for timing in timings[first:] + timings[:first]:
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
