"""What cheaper guidance and a changed preference cost: ``python jobs/bench/tradeoffs.py --out FILE.json``.

See README.md beside this file.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import command
import numpy as np
from command import Results, say

PROMPT_TOKENS, NEW_TOKENS = 32, 64
BATCHES = (1, 8)
CONTEXTS = (64, 256, 1024)
OFFSETS = (0, 1, 2, 4, 8, 16, 32)
OLD, NEW = (0.7, 0.2, 0.1), (0.1, 0.2, 0.7)


def cadences(rounds: int, name: str) -> list[dict[str, Any]]:
    """Tokens per second and the guide's score of each cadence, sampled at temperature 1; all arms in turn."""
    from setting import PREFERENCES, Prompts, guided, load, random_experts, unguided

    from mage_ray.decoding.engine import Engine
    from mage_ray.decoding.plan import Cadence
    from mage_ray.decoding.request import Request, Sampling
    from mage_ray.decoding.runner import RowRunner
    from mage_ray.merging.bank import AdapterBank

    full = guided(PREFERENCES[0])
    arms = {"unguided": unguided(PREFERENCES[0]), "every token": full}
    arms |= {f"every {n}": full.at(Cadence(every=n)) for n in (2, 4, 8)}
    arms |= {f"entropy {h:g}": full.at(Cadence(entropy=h)) for h in (0.5, 1.0, 2.0)}
    arms |= {f"speculate {m}": full.at(Cadence(speculate=m)) for m in (2, 4, 8)}
    model = load(name)
    experts = random_experts(model, 3)
    rows, length = 3 * max(BATCHES), PROMPT_TOKENS + NEW_TOKENS
    engine = Engine(RowRunner(model, AdapterBank(experts), rows, length), stop=[])
    prompts = Prompts.of(name)
    seconds: dict[tuple[str, int], list[float]] = {(arm, batch): [] for arm in arms for batch in BATCHES}
    scores: dict[str, list[float]] = {arm: [] for arm in arms}
    shares: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in range(rounds + 1):
        # Every arm gets the same prompts and seeds: what differs is its doing alone. Kept prompts are known to all.
        asked = prompts.take(sum(BATCHES), PROMPT_TOKENS)
        for arm, plan in arms.items():
            start = 0
            for batch in BATCHES:
                requests = [
                    Request(prompt, plan, Sampling(NEW_TOKENS, temperature=1.0, seed=1000 * number + start + i))
                    for i, prompt in enumerate(asked[start : start + batch])
                ]
                start += batch
                began = time.perf_counter()
                answers = [answer.require() for answer in engine.generate(requests)]
                if number > 0:
                    seconds[arm, batch].append(time.perf_counter() - began)
                    shares[arm] += [answer.guided / len(answer.ids) if plan.values else 0.0 for answer in answers]
                    texts = [[*r.prompt, *a.ids] for r, a in zip(requests, answers, strict=True)]
                    begins = [PROMPT_TOKENS] * len(texts)
                    guide, reference = (engine.runner.score(row, texts, begins) for row in full.rows[1:])
                    scores[arm] += [float((g - r).mean()) for g, r in zip(guide, reference, strict=True)]
        say(f"cadences: round {number} of {rounds}")
    plain, whole = (statistics.fmean(scores[arm]) for arm in ("unguided", "every token"))
    points = []
    for arm in arms:
        low, high = _interval(scores[arm])
        point: dict[str, Any] = {"arm": arm, "guided_share": statistics.fmean(shares[arm])}
        for batch in BATCHES:
            middle = statistics.median(seconds[arm, batch])
            point[f"tokens_per_s_b{batch}"] = batch * NEW_TOKENS / middle
        point |= {"guide_score": statistics.fmean(scores[arm]), "low": low, "high": high, "texts": len(scores[arm])}
        point["control"] = (point["guide_score"] - plain) / (whole - plain)
        points.append(point)
    return points


def changes(samples: int, name: str) -> list[dict[str, Any]]:
    """Time to the next token after a change of preference, keys and values kept or recomputed, and how far off it is.

    ``kl_<n>`` is KL(recomputed || kept), in nats, of the next-token distribution n tokens after the change;
    ``kl_unchanged`` the same at once for a request that keeps its old preference.
    """
    from setting import Prompts, load, random_experts, unguided

    from mage_ray.decoding.engine import Engine
    from mage_ray.decoding.request import Request, Sampling
    from mage_ray.decoding.runner import RowRunner
    from mage_ray.merging.bank import AdapterBank

    old, new = unguided(OLD), unguided(NEW)
    model = load(name)
    experts = random_experts(model, 3)
    contexts = [n for n in CONTEXTS if n + max(OFFSETS) < model.config.max_position_embeddings]
    length = max(contexts) + max(OFFSETS) + 2
    engine = Engine(RowRunner(model, AdapterBank(experts), 3, length, kept=0), stop=[])
    prompts = Prompts.of(name)
    points = []
    for context in contexts:
        seconds: dict[bool, list[float]] = {True: [], False: []}
        kls: dict[str, list[float]] = {f"kl_{n}": [] for n in OFFSETS} | {"kl_unchanged": []}
        for number in range(samples):
            [prompt] = prompts.take(1, context // 2)
            [answer] = engine.generate([Request(prompt, old, Sampling(context - len(prompt), 0.0))])
            history = [*prompt, *answer.require().ids]
            for recompute in (True, False) if number % 2 else (False, True):
                passed = _seconds_to_next(engine.runner, history, old.rows[0], new.rows[0], recompute)
                seconds[recompute].append(passed)
            for key, value in _divergences(engine.runner, history, old.rows[0], new.rows[0]).items():
                kls[key].append(value)
        point: dict[str, Any] = {"context": context, "samples": samples}
        point |= {"keep_s": statistics.median(seconds[False]), "recompute_s": statistics.median(seconds[True])}
        for key, values in kls.items():
            low, high = _interval(values)
            point |= {key: statistics.fmean(values), f"{key}_low": low, f"{key}_high": high}
        points.append(point)
        say(f"changes: {context} tokens of context")
    return points


def _seconds_to_next(runner: Any, history: list[int], old: Any, new: Any, recompute: bool) -> float:
    """Seconds from the change to the logits of the next token, for a row that has come as far as ``history``."""
    row = runner.start(old)
    try:
        runner.feed([row], [history[:-1]], keep=0)
        began = time.perf_counter()
        if recompute:
            runner.end(row)
            row = runner.start(new)
            runner.feed([row], [history]).logits()
        else:
            runner.adopt(row, new)
            runner.feed([row], [history[-1:]]).logits()
        return time.perf_counter() - began
    finally:
        runner.end(row)


def _divergences(runner: Any, history: list[int], old: Any, new: Any) -> dict[str, float]:
    """KL(recomputed || kept) at each offset, along the greedy text of the recomputed one."""
    exact, kept, same = runner.start(new), runner.start(old), runner.start(old)
    try:
        runner.feed([exact, kept, same], [history[:-1]] * 3, keep=0)
        runner.adopt(kept, new)
        token, found = history[-1], {}
        for n in range(max(OFFSETS) + 1):
            logprobs_RV = runner.feed([exact, kept, same], [[token]] * 3).logits().double().log_softmax(-1)
            if n in OFFSETS:
                found[f"kl_{n}"] = _kl(logprobs_RV[0], logprobs_RV[1])
            if n == 0:
                found["kl_unchanged"] = _kl(logprobs_RV[0], logprobs_RV[2])
            token = int(logprobs_RV[0].argmax())
        return found
    finally:
        for row in (same, kept, exact):
            runner.end(row)


def _kl(one_V: Any, other_V: Any) -> float:
    return float((one_V.exp() * (one_V - other_V)).sum())


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean's 90 % bootstrap interval."""
    dice = np.random.default_rng(0)
    means = dice.choice(np.asarray(values), (2000, len(values))).mean(1)
    low, high = np.quantile(means, (0.05, 0.95))
    return float(low), float(high)


def main(arguments: list[str] | None = None) -> int:
    """``command.run`` of this benchmark."""
    options = command.parser("Measures cheaper guidance, and a preference that changes.").parse_args(arguments)
    return command.run(options, arguments, _measure, _show)


def _measure(options: argparse.Namespace) -> Results:
    how = (options.rounds, options.model)
    return {"cadences": cadences(*how), "changes": changes(*how)}


def _show(results: Results) -> None:
    from results import show

    for part in ("cadences", "changes"):
        show(part.capitalize(), list(results[part][0]), [list(point.values()) for point in results[part]])


if __name__ == "__main__":
    sys.exit(main())
