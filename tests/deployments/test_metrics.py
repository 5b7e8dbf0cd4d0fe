"""What a replica's metrics say of one gang, and of two during a reload."""

from __future__ import annotations

import pytest

from deployments.metrics import Metrics
from deployments.workers import Batch, Piece
from mage_ray.decoding.request import Token

PIECES = (Piece("one", Token(5, -1.0)), Piece("one", Token(6, -1.0, "length")), Piece("two", Token.end("cancelled")))


def figure(metrics: Metrics, name: str) -> float:
    lines = metrics.text().decode().splitlines()
    return next(float(line.split()[-1]) for line in lines if line.startswith(f"mage_ray_{name} "))


def test_the_fullest_worker_counts() -> None:
    metrics = Metrics()
    metrics.stands("a", Batch(PIECES, 2, 1, 6, {0: 300, 1: 450}, 0.0, 10), [1000, 1000, 500])
    assert figure(metrics, "kv_use") == pytest.approx(0.45)
    metrics.stands("a", Batch((), 2, 1, 6, {0: 300, 1: 450, 2: 400}, 0.0, 11), [1000, 1000, 500])
    assert figure(metrics, "kv_use") == pytest.approx(0.8)
    assert [figure(metrics, name) for name in ("running", "waiting", "rows", "tokens_total")] == [2, 1, 6, 2]


def test_two_gangs_add_up_and_neither_is_timed_by_the_others_clock() -> None:
    metrics = Metrics()

    def told(gang: str, running: int, waited: float, steps: int) -> None:
        metrics.stands(gang, Batch((), running, 0, 3 * running, {0: 10 * running}, waited, steps), [100])

    told("old", 4, 1.0, 1000)  # 1 ms a step, as all that follow
    told("new", 1, 0.002, 2)
    told("old", 3, 1.004, 1004)
    told("new", 2, 0.010, 10)
    assert figure(metrics, "guide_wait_seconds_count") == 4
    assert figure(metrics, "guide_wait_seconds_sum") == pytest.approx(0.004)
    assert [figure(metrics, name) for name in ("running", "rows")] == [5, 15]
    assert figure(metrics, "kv_use") == pytest.approx(0.3)
    metrics.closed("old")
    assert [figure(metrics, name) for name in ("running", "rows", "kv_use")] == [2, 6, pytest.approx(0.2)]
    # A new engine counts from its beginning.
    told("new", 1, 0.001, 1)
    told("new", 1, 0.003, 3)
    assert figure(metrics, "guide_wait_seconds_sum") == pytest.approx(0.005)
