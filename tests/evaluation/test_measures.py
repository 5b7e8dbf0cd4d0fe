"""Measures against brute force on small integer points, pymoo-free, and against hand-computed cases."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_ray.evaluation.measures import (
    controllability,
    distinct,
    front_length,
    hypervolume,
    inner_product,
    pareto_mask,
    repetition,
    spacing,
    sparsity,
)


def integer_points(n: int, most: int = 7) -> st.SearchStrategy[list[tuple[int, ...]]]:
    return st.lists(st.tuples(*[st.integers(-2, 5)] * n), min_size=1, max_size=most)


any_points = st.sampled_from([1, 2, 3]).flatmap(integer_points)


def count_cells(points: list[tuple[int, ...]]) -> int:
    """Volume over the origin as the number of unit cells below some point."""
    return sum(
        any(all(corner < coordinate for corner, coordinate in zip(cell, point, strict=True)) for point in points)
        for cell in itertools.product(range(5), repeat=len(points[0]))
    )


def dominated(one: tuple[int, ...], points: list[tuple[int, ...]]) -> bool:
    return any(other != one and all(a >= b for a, b in zip(other, one, strict=True)) for other in points)


@given(any_points)
def test_hypervolume_counts_the_cells_below_the_points(points: list[tuple[int, ...]]) -> None:
    assert hypervolume(points, np.zeros(len(points[0]))) == pytest.approx(count_cells(points))


@given(integer_points(3), st.tuples(*[st.integers(-2, 5)] * 3), st.integers(-4, 4))
def test_hypervolume_grows_with_points_and_moves_with_the_origin(
    points: list[tuple[int, ...]], extra: tuple[int, ...], shift: int
) -> None:
    volume = hypervolume(points, [0, 0, 0])
    assert hypervolume([*points, extra], [0, 0, 0]) >= volume - 1e-9
    assert hypervolume(np.array(points) + shift, [shift] * 3) == pytest.approx(volume)


def test_hypervolume_of_nothing_is_zero() -> None:
    assert hypervolume(np.zeros((0, 2)), [0, 0]) == 0
    assert hypervolume([[3.0, -1.0], [0.0, 5.0]], [0, 0]) == 0  # good in one objective only, or just on the boundary
    assert hypervolume([[2.0, 3.0]], [0, 0]) == 6


@given(any_points)
def test_pareto_mask_keeps_what_nothing_dominates_and_twins_once(points: list[tuple[int, ...]]) -> None:
    mask = pareto_mask(points)
    expected = [not dominated(one, points) and one not in points[:place] for place, one in enumerate(points)]
    assert mask.tolist() == expected
    assert front_length(points) == len({one for one in points if not dominated(one, points)})
    assert {tuple(row) for row in np.asarray(points)[pareto_mask(points)].tolist()} == {
        one for one in points if not dominated(one, points)
    }


@settings(max_examples=30)
@given(st.lists(st.lists(st.tuples(*[st.integers(0, 4)] * 2), min_size=4, max_size=4), min_size=1, max_size=4))
def test_a_batch_of_fronts_gives_what_each_front_gives(batch: list[list[tuple[int, ...]]]) -> None:
    preferences = [(0.0, 1.0), (0.3, 0.7), (0.7, 0.3), (1.0, 0.0)]
    for measure in (
        front_length,
        sparsity,
        spacing,
        lambda points: hypervolume(points, [-1, -1]),
        lambda points: inner_product(preferences, points),
        lambda points: controllability(preferences, points),
    ):
        np.testing.assert_allclose(measure(batch), [measure(points) for points in batch])


def test_inner_product_weighs_each_point_with_its_own_preference() -> None:
    assert inner_product([[1, 0], [0.25, 0.75]], [[2, 9], [4, 8]]) == pytest.approx((2 + 1 + 6) / 2)


def test_controllability_by_hand() -> None:
    preferences = np.array([[1, 0], [0.5, 0.5], [0, 1]])
    rising = np.array([[3.0, 0.0], [2.0, 1.0], [1.0, 2.0]])
    assert controllability(preferences, rising) == 1
    assert controllability(preferences, rising[::-1]) == 0
    assert controllability(preferences, np.ones((3, 2))) == 0  # ties in what was achieved are wrong
    swapped = np.array([[3.0, 0.0], [2.0, 1.0], [2.5, 2.0]])  # one of three pairs wrong in the first objective
    assert controllability(preferences, swapped) == pytest.approx(5 / 6)


def test_controllability_leaves_out_pairs_with_equal_weight() -> None:
    # 0.1 + 0.2 is 0.3 for whoever wrote it: objective 0 asks for no order, objectives 1 and 2 ask for one pair each.
    preferences = [[0.1 + 0.2, 0.5, 0.2], [0.3, 0.2, 0.5]]
    assert controllability(preferences, [[7.0, 1.0, 0.0], [0.0, 0.0, 0.0]]) == pytest.approx(1 / 2)
    assert math.isnan(controllability([[0.5, 0.5], [0.5, 0.5]], [[1.0, 2.0], [3.0, 4.0]]))


def test_sparsity_by_hand() -> None:
    # Sorted by itself, objective 0 has gaps 1 and 3, objective 1 gaps 2 and 2; the dominated point is no part of it.
    points = [[4.0, 0.0], [0.0, 4.0], [1.0, 2.0], [0.5, 1.0]]
    assert sparsity(points) == pytest.approx((1 + 9 + 4 + 4) / 2)


def test_spacing_by_hand() -> None:
    # Nearest distances (sum of absolute differences) 3, 3 and 5; their mean is 11/3.
    points = [[0.0, 4.0], [1.0, 2.0], [4.0, 0.0], [0.5, 1.0]]
    mean = 11 / 3
    assert spacing(points) == pytest.approx(math.sqrt((2 * (3 - mean) ** 2 + (5 - mean) ** 2) / 2))
    assert spacing([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]]) == 0


def test_a_front_of_one_point() -> None:
    one = [[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]
    assert front_length(one) == 1
    assert math.isnan(sparsity(one))
    assert math.isnan(spacing(one))
    assert math.isnan(controllability([[0.5, 0.5]], [[1.0, 2.0]]))


def test_points_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        sparsity([1.0, 2.0])


def test_distinct_by_hand() -> None:
    # ab bc | ab | none: 2 of 3; without the first ab of one, without the second ab bc of two, without the third as all.
    value, without = distinct([["a b c"], ["A  b"], ["x", ""]])
    assert value == pytest.approx(2 / 3)
    np.testing.assert_allclose(without, [1.0, 1.0, 2 / 3])
    assert distinct([["a b"], ["c d"]], n=1)[0] == 1.0
    assert distinct([["one"], ["two"]])[0] == 0.0
    value, without = distinct([["same words", "same words"], ["same words"]])
    assert value == pytest.approx(1 / 3)
    np.testing.assert_allclose(without, [1.0, 1 / 2])


@given(st.lists(st.lists(st.text("ab ", max_size=12), min_size=1, max_size=3), min_size=2, max_size=6))
def test_distinct_without_a_group_is_that_of_the_others(groups: list[list[str]]) -> None:
    value, without = distinct(groups)
    assert 0 <= value <= 1
    for left_out, found in enumerate(without):
        assert found == pytest.approx(distinct([g for i, g in enumerate(groups) if i != left_out])[0])


def test_repetition_by_hand() -> None:
    assert repetition("A b c d a B c d") == pytest.approx(1 - 4 / 5)  # abcd bcda cdab dabc abcd
    assert repetition("no " * 10) == pytest.approx(1 - 1 / 7)
    assert repetition("only three words") == 0
    assert repetition("a a a", n=2) == pytest.approx(1 / 2)
