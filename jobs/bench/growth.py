"""How the cost grows: tokens per second over batch, experts and context. Tokens aren't compared here."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from arms import Arm, ours
from setting import CANDIDATES, PREFERENCES, STRENGTH, BenchError, Prompts, guided, random_experts, unguided
from timing import Timing, time_rounds
from transformers import PreTrainedModel

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Request, Sampling
from mage_ray.decoding.runner import RowRunner
from mage_ray.merging.bank import AdapterBank

BATCHES = (1, 2, 4, 8, 16, 32)
EXPERTS = (1, 2, 4, 8, 16)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096)
CONTEXT_BATCHES = (1, 4)
_WINDOW = 16
"""Steps in each timed window of the context curve."""
_CHUNK = 2048
"""Prompt tokens that are computed between two steps, in the context curve."""

Say = Callable[[str], None]


def curves(
    model: PreTrainedModel, prompts: Prompts, rounds: int, prompt_tokens: int, new_tokens: int, say: Say
) -> tuple[dict[str, list[dict[str, Any]]], list[str]]:
    """The points of the three curves, and notes on what was left out."""
    longest = model.config.max_position_embeddings
    contexts = [length for length in CONTEXTS if length <= longest]
    notes = []
    if left := [length for length in CONTEXTS if length > longest]:
        notes.append(f"contexts {left} left out: the model holds {longest} positions")
    say("batches")
    batch = _over_batch(model, prompts, rounds, prompt_tokens, new_tokens, say)
    say("experts")
    experts = _over_experts(model, prompts, rounds, prompt_tokens, new_tokens, say)
    say("contexts")
    context = _over_context(model, prompts, rounds, contexts, say)
    return {"batch": batch, "experts": experts, "context": context}, notes


def plot(curves: dict[str, Any], path: Path) -> None:
    """The curves as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    panels = (
        ("batch", "batch", "requests"),
        ("experts", "experts", "experts in the bank"),
        ("context", "tokens", "tokens of context"),
    )
    for axis, (curve, over, label) in zip(axes, panels, strict=True):
        points = curves[curve]
        for kind in dict.fromkeys((p["kind"], p["batch"] if curve != "batch" else None) for p in points):
            mine = [p for p in points if (p["kind"], p["batch"] if curve != "batch" else None) == kind]
            name = kind[0] if kind[1] is None else f"{kind[0]}, batch {kind[1]}"
            axis.plot([p[over] for p in mine], [p["tokens_per_s_median"] for p in mine], marker="o", label=name)
        axis.set_xscale("log", base=2)
        ticks = sorted({p[over] for p in points})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.set_ylim(0, 1.1 * max(p["tokens_per_s_median"] for p in points))
        axis.set_xlabel(label)
        axis.set_ylabel("tokens per second")
        axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _runner(model: PreTrainedModel, experts: int, rows: int, length: int) -> RowRunner:
    own = copy.deepcopy(model)
    return RowRunner(own, AdapterBank(random_experts(own, experts)), rows=rows, length=length)


def _over_batch(
    model: PreTrainedModel, prompts: Prompts, rounds: int, prompt_tokens: int, new_tokens: int, say: Say
) -> list[dict[str, Any]]:
    base, steered = unguided(PREFERENCES[0]), guided(PREFERENCES[0])
    runner = _runner(model, 3, max(BATCHES) * len(steered.rows), prompt_tokens + new_tokens)
    engine = Engine(runner, stop=[])
    arms = [
        ours(kind, engine, [plan] * batch, new_tokens)
        for batch in BATCHES
        for kind, plan in (("unguided", base), ("guided", steered))
    ]
    timings = time_rounds(arms, rounds, prompts, prompt_tokens, new_tokens, None, say)
    return sorted(({"kind": t.arm.name, **_point(t)} for t in timings), key=lambda p: (p["kind"], p["batch"]))


def _over_experts(
    model: PreTrainedModel, prompts: Prompts, rounds: int, prompt_tokens: int, new_tokens: int, say: Say
) -> list[dict[str, Any]]:
    arms: list[Arm] = []
    for count in EXPERTS:
        plan = _dense_plan(count)
        engine = Engine(_runner(model, count, 8 * len(plan.rows), prompt_tokens + new_tokens), stop=[])
        arms.append(ours(f"guided, {count} experts", engine, [plan] * 8, new_tokens))
    timings = time_rounds(arms, rounds, prompts, prompt_tokens, new_tokens, None, say)
    return [{"kind": "guided", "experts": n, **_point(t)} for n, t in zip(EXPERTS, timings, strict=True)]


def _dense_plan(experts: int) -> Plan:
    """Three rows: base and guide with other coefficients for every expert, none of them 0, and the reference."""
    dice = np.random.default_rng(experts)
    base, guide = dice.uniform(0.5, 1.5, (2, experts)) / experts
    return Plan.of([(base, 1.0), (guide, STRENGTH), (np.zeros(experts), -STRENGTH)], CANDIDATES)


def _over_context(
    model: PreTrainedModel, prompts: Prompts, rounds: int, contexts: Sequence[int], say: Say
) -> list[dict[str, Any]]:
    """Steps alone, with all requests at it: ``rounds`` windows of steps, the last ones before each length.

    Each point runs once, since a long prompt takes far longer than its steps; its windows follow one another.
    """
    plans = {"unguided": unguided(PREFERENCES[0]), "guided": guided(PREFERENCES[0])}
    rows = max(CONTEXT_BATCHES) * len(plans["guided"].rows)
    engine = Engine(_runner(model, 3, rows, max(contexts)), stop=[], chunk=_CHUNK)
    points = []
    for kind, plan in plans.items():
        for batch in CONTEXT_BATCHES:
            for length in contexts:
                # The first request goes ahead by a token for each chunk of the others' prompts.
                ahead = 4 + 2 * math.ceil(batch * len(plan.rows) * length / _CHUNK)
                new = rounds * _WINDOW + 1 + ahead
                sampling = Sampling(new, temperature=0.0)
                asked = [Request(prompt, plan, sampling) for prompt in prompts.take(batch, length - new)]
                stamps = _stamps(engine, asked, rounds * _WINDOW + 1)
                windows = [stamps[(i + 1) * _WINDOW] - stamps[i * _WINDOW] for i in range(rounds)]
                point = {
                    "kind": kind,
                    "batch": batch,
                    "tokens": length,
                    "tokens_per_s_best": batch * _WINDOW / min(windows),
                    "tokens_per_s_median": batch * _WINDOW / statistics.median(windows),
                    "windows": rounds,
                    "prompt_seconds": stamps[0],
                }
                points.append(point)
                say(f"{kind}, batch {batch}, {length} tokens: {point['tokens_per_s_median']:.1f} tokens/s")
    return points


def _stamps(engine: Engine, requests: Sequence[Request], steps: int) -> list[float]:
    """Seconds from the start until each of ``steps`` steps that all requests take together is done.

    Raises BenchError when one ends before.
    """
    start = time.perf_counter()
    made = [0] * len(requests)
    stamps: list[float] = []
    with closing(engine.events(requests)) as events:
        for index, token in events:
            made[index] += 1
            # From the last request's first token on, each gets one a step.
            if min(made) > len(stamps):
                stamps.append(time.perf_counter() - start)
            if len(stamps) == steps:
                break
            if token.finished is not None:
                raise BenchError(f"growth over context: request {index} of {len(requests)} ended ahead of the others")
    return stamps


def _point(timing: Timing) -> dict[str, Any]:
    entry = timing.as_json()
    return {key: entry[key] for key in ("batch", "tokens_per_s_best", "tokens_per_s_median", "rounds")}
