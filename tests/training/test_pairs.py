from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from training_pools import make_pool

from mage_ray.errors import UserError
from mage_ray.training.pairs import LEAST_GAP, expert_pairs, mixed_reward, preference_pairs, training_order


def pool_of(rewards: list[list[float]], completions: list[list[str]] | None = None) -> pd.DataFrame:
    """One prompt for each list of rewards; sample s of prompt p answers with the ids (p, s)."""
    rows = [
        {
            "prompt_id": f"p{p}",
            "prompt": f"prompt {p}",
            "sample": s,
            "completion": completions[p][s] if completions else f"answer {p} {s}",
            "ids": [p, s],
            "reward/one": reward,
        }
        for p, row in enumerate(rewards)
        for s, reward in enumerate(row)
    ]
    return pd.DataFrame(rows)


def picked(pool: pd.DataFrame, per_prompt: int) -> list[tuple[int, int, int]]:
    pairs = preference_pairs(pool, {"one": 1.0}, per_prompt)
    return [(pair.chosen.ids[0], pair.chosen.ids[1], pair.rejected.ids[1]) for pair in pairs]


def test_reward_is_the_row_of_the_mix_times_the_rewards() -> None:
    pool = pd.DataFrame({"reward/a": [1.0, -2.0], "reward/b": [4.0, 0.5]})
    assert mixed_reward(pool, {"b": 0.25, "a": 0.75}).tolist() == [1.75, -1.375]


def test_best_goes_with_worst_then_second_best_with_second_worst() -> None:
    pool = pool_of([[0.0, 3.0, 1.0, 2.0, -1.0]])
    assert picked(pool, 1) == [(0, 1, 4)]
    assert picked(pool, 2) == [(0, 1, 4), (0, 3, 0)]
    assert picked(pool, 9) == [(0, 1, 4), (0, 3, 0)]


def test_pairs_without_a_difference_are_left_out() -> None:
    assert picked(pool_of([[1.0, 1.0 + LEAST_GAP / 2], [1.0, 1.0 + 2 * LEAST_GAP]]), 1) == [(1, 1, 0)]


def test_identical_completions_are_one_sample() -> None:
    pool = pool_of([[2.0, 2.0, 0.0]], [["same", "same", "other"]])
    assert picked(pool, 2) == [(0, 0, 2)]
    assert picked(pool_of([[2.0, 0.0]], [["same", "same"]]), 1) == []


def test_mix_decides_what_is_preferred() -> None:
    pool = make_pool()
    for weights, sign in (({"early": 1.0, "late": 0.0}, 1), ({"early": 0.0, "late": 1.0}, -1)):
        for pair in preference_pairs(pool, weights, 1):
            early = [sum(97 <= x < 110 for x in sample.ids) for sample in (pair.chosen, pair.rejected)]
            assert sign * (early[0] - early[1]) > 0


@settings(max_examples=50)
@given(
    st.lists(st.lists(st.floats(-3, 3), min_size=1, max_size=6), min_size=1, max_size=4),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_every_sample_is_used_once_and_the_order_of_the_pool_does_not_matter(rewards, per_prompt, random) -> None:
    pool = pool_of(rewards)
    order = list(range(len(pool)))
    random.shuffle(order)
    pairs = preference_pairs(pool, {"one": 1.0}, per_prompt)
    assert pairs == preference_pairs(pool.iloc[order], {"one": 1.0}, per_prompt)
    used = [sample for pair in pairs for sample in (pair.chosen, pair.rejected)]
    assert len(used) == len(set(used))
    for pair in pairs:
        prompt, chosen = pair.chosen.ids
        rejected = pair.rejected.ids[1]
        assert pair.rejected.ids[0] == prompt and pair.chosen.prompt == pair.rejected.prompt
        assert pair.gap == pytest.approx(rewards[prompt][chosen] - rewards[prompt][rejected]) and pair.gap >= LEAST_GAP
    for prompt, row in enumerate(rewards):
        if max(row) - min(row) >= LEAST_GAP:
            gaps = [pair.gap for pair in pairs if pair.chosen.ids[0] == prompt]
            assert gaps[0] == pytest.approx(max(row) - min(row)) and gaps == sorted(gaps, reverse=True)


def test_too_few_pairs_name_the_expert() -> None:
    pool = pool_of([[0.0, 1.0], [0.0, 1.0]])
    assert len(expert_pairs(pool, {"one": 1.0}, per_prompt=1, batch_size=2, expert="bone-funny")) == 2
    with pytest.raises(UserError, match=r"bone-funny.* 2 pairs.*batch_size \(3\)"):
        expert_pairs(pool, {"one": 1.0}, per_prompt=1, batch_size=3, expert="bone-funny")


@given(st.integers(1, 30), st.integers(1, 100), st.integers(0, 5))
def test_order_goes_through_all_examples_before_it_repeats(count, needed, seed) -> None:
    order = training_order(count, needed, seed)
    assert len(order) == needed
    for start in range(0, needed - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))
    assert order == training_order(count, needed + 7, seed)[:needed]
    assert count < 10 or needed < count or order[:count] != np.arange(count).tolist()
