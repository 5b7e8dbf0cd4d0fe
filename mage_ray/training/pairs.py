"""From a pool of scored samples to preference pairs for one expert. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mage_ray.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame

LEAST_GAP = 0.05
"""In standard deviations of the reference's rewards: a smaller difference says nothing about what is preferred."""


class Sample(NamedTuple):
    """A user's text and the tokens of an answer to it, as they were sampled.

    They end with the model's stop token only where the model stopped, so that an answer which ran into the length limit
    teaches nobody to stop there.
    """

    prompt: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Pair:
    """Two samples of one prompt; ``gap`` is how much more the chosen one's reward is, above 0.

    ``margin`` is what is taken off DPO's logit (MODPO).
    """

    chosen: Sample
    rejected: Sample
    gap: float
    margin: float = 0.0


def mixed_reward(pool: DataFrame, weights: Mapping[str, float]) -> np.ndarray:
    """``h = sum_k b_k r_k`` for each row of the pool, float64 [rows] (docs/method.md).

    ``weights`` is a row of the mix B by the objectives' names.
    """
    rewards = pool[[f"reward/{name}" for name in weights]].to_numpy(dtype=np.float64)
    return rewards @ np.array(list(weights.values()), dtype=np.float64)


def preference_pairs(
    pool: DataFrame, weights: Mapping[str, float], per_prompt: int, margins: Mapping[str, float] | None = None
) -> list[Pair]:
    """Up to ``per_prompt`` pairs for each prompt: best with worst, second best with second worst, and so on.

    What is better is said by the reward that ``weights`` mix; a pair's margin is its difference in the one of
    ``margins``.
    A sample is in one pair at most; identical completions count once; pairs nearer than ``LEAST_GAP`` are left out. The
    result doesn't depend on the order of the pool's rows, and lists the prompts by ``prompt_id``.
    """
    table = pool.assign(mixed=mixed_reward(pool, weights), other=mixed_reward(pool, margins or {}))
    table = table.sort_values(["prompt_id", "mixed", "sample"], ascending=[True, False, True], kind="stable")
    table = table.drop_duplicates(["prompt_id", "completion"])
    pairs = []
    for _, group in table.groupby("prompt_id", sort=True):
        samples = [
            Sample(str(prompt), tuple(map(int, ids))) for prompt, ids in zip(group["prompt"], group["ids"], strict=True)
        ]
        mixed, other = group["mixed"].to_numpy(), group["other"].to_numpy()
        for place in range(min(per_prompt, len(samples) // 2)):
            gap = float(mixed[place] - mixed[-1 - place])
            if gap >= LEAST_GAP:
                margin = float(other[place] - other[-1 - place])
                pairs.append(Pair(samples[place], samples[-1 - place], gap, margin))
    return pairs


def modpo_weights(weights: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Whose pairs MODPO trains on at a preference, and the other objectives' weights ``w_j / w_k`` in their margin.

    MODPO's logit is ``(1 / w_k) [beta (log-ratio difference) - sum_j!=k w_j (difference in r_j)]`` on the pairs of one
    objective k (arXiv:2310.03708, docs/method.md), for any k of weight above 0. The authors' code keeps the same
    k for all preferences, which leaves out those where its weight is 0 and blows up the logit where it is next to
    that. Here every objective has pairs in the pool, so k is the one that weighs most, the first of equals: 1 / w_k is
    n at most, and at a corner this is DPO on its objective.
    """
    k = max(weights, key=lambda name: weights[name])
    others = {name: weight / weights[k] for name, weight in weights.items() if name != k}
    return {k: 1.0}, others


def expert_pairs(
    pool: DataFrame,
    weights: Mapping[str, float],
    *,
    per_prompt: int,
    batch_size: int,
    expert: str,
    margins: Mapping[str, float] | None = None,
) -> list[Pair]:
    """``preference_pairs``, at least one batch of them. Raises UserError, naming the expert, where there are fewer."""
    pairs = preference_pairs(pool, weights, per_prompt, margins)
    if len(pairs) < batch_size:
        raise UserError(
            f"expert {expert}: the pool has {len(pairs)} pairs of samples that its reward tells apart, allowed: at "
            f"least training.batch_size ({batch_size}); sample more prompts or more per prompt"
        )
    return pairs


def training_order(count: int, needed: int, seed: int) -> list[int]:
    """Which of ``count`` examples a run takes, one after the other: ``needed`` places, each epoch shuffled anew.

    A pure function of its arguments, so a resumed run finds its place by counting.
    """
    random = np.random.default_rng(seed)
    epochs: Sequence[np.ndarray] = [random.permutation(count) for _ in range(-(-needed // count))]
    return [int(place) for place in np.concatenate(epochs)[:needed]]
