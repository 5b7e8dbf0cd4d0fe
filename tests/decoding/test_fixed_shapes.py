"""Steps of fixed shape, run uncaptured on the CPU: the same numbers as steps of any shape, at few shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import GUIDE, ZERO, Tiny, guided, ids
from tiny import make_tiny_model

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.outputs import Outputs
from mage_ray.decoding.plan import Cadence, Plan
from mage_ray.decoding.request import Request, Sampling
from mage_ray.decoding.runner import LiveRow

ROWS = 11
PLANS = (
    Plan.of([(ZERO, 1.0)]),
    guided(),
    guided(candidates=None, valued=True),
    guided().at(Cadence(every=3)),
    guided().at(Cadence(entropy=3.0)),
    guided().at(Cadence(speculate=3)),
    Plan.of([(GUIDE, 1.0)]),
)


@pytest.fixture(scope="module")
def tiny(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tiny_model_folder, tmp_path_factory.mktemp("fixed"))


def asked(count: int, seed: int = 0) -> list[Request]:
    """Requests of unequal prompts and lengths, so that the number of running rows varies."""
    dice = np.random.default_rng(seed)
    return [
        Request(
            tuple(dice.integers(0, 256, int(dice.integers(1, 70))).tolist()),
            PLANS[i % len(PLANS)],
            Sampling(int(dice.integers(1, 25)), float(dice.choice([0.0, 1.0])), seed=i),
        )
        for i in range(count)
    ]


class Shapes:
    """The (rows, tokens, positions looked at) of every forward, as the model sees them, and how many rows were fed."""

    def __init__(self, engine: Engine) -> None:
        self.steps: set[tuple[int, int]] = set()
        self.fed: set[int] = set()
        self.beside: set[int] = set()
        original = engine.runner.feed

        def feed(rows: Sequence[LiveRow], tokens: Sequence[Sequence[int]], keep: int = 1) -> Outputs:
            if keep == 1 and max(map(len, tokens)) == 1:
                self.fed.add(len(rows))
                self.beside.add(engine.runner.live - len(rows))
            return original(rows, tokens, keep)

        engine.runner.feed = feed  # type: ignore[method-assign]
        engine.runner.model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module: object, args: object, inputs: dict[str, torch.Tensor]) -> None:
        rows, tokens = inputs["input_ids"].shape
        if tokens == 1:
            self.steps.add((rows, inputs["attention_mask"].shape[-1]))


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_tokens_and_numbers_are_those_of_any_shape(tiny: Tiny, seed: int) -> None:
    """Rows that prefill sit in later slots meanwhile, and are idle in the step's shape."""
    requests = asked(16, seed)
    engine = tiny.engine(ROWS, 120, stop=(), fixed=True, chunk=8)
    shapes = Shapes(engine)
    expected = tiny.engine(ROWS, 120, stop=(), fixed=False, chunk=8).generate(requests)
    for got, want in zip(engine.generate(requests), expected, strict=True):
        assert (got.ids, got.finished, got.guided) == (want.ids, want.finished, want.guided)
        np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
        assert got.value == pytest.approx(want.value, abs=1e-3)
    assert len(shapes.fed) >= 6  # many numbers of rows were fed,
    assert max(shapes.beside) > 0  # some while others prefilled or waited for their turn
    assert engine.runner.live == 0


def test_logits_are_those_of_any_shape_for_every_number_of_rows(tiny: Tiny) -> None:
    """A step of the first n of 7 rows leaves the others as they are."""
    dice = np.random.default_rng(4)
    fixed, free = (tiny.engine(7, 120, stop=(), fixed=f).runner for f in (True, False))
    prompts = [tuple(dice.integers(0, 256, int(n)).tolist()) for n in dice.integers(1, 60, 7)]
    rows = []
    for runner in (fixed, free):
        rows.append([runner.start(PLANS[i % 3].rows[-1], p) for i, p in enumerate(prompts)])
        runner.feed(rows[-1], [p[len(r.tokens) :] for r, p in zip(rows[-1], prompts, strict=True)], keep=0)
    for count in (7, 3, 1, 5, 2, 4, 6, 7):
        tokens = [[int(t)] for t in dice.integers(0, 256, count)]
        a, b = (runner.feed(own[:count], tokens).logits() for runner, own in zip((fixed, free), rows, strict=True))
        assert a.shape == b.shape == (count, 260)
        torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


def test_rows_that_are_not_the_first_ones_get_right_numbers_too(tiny: Tiny) -> None:
    fixed, free = (tiny.engine(4, 120, stop=(), fixed=f).runner for f in (True, False))
    prompt = ids("a prompt")
    got = []
    for runner in (fixed, free):
        rows = [runner.start(PLANS[0].rows[0], (n, *prompt)) for n in range(4)]
        runner.feed(rows, [[n, *prompt] for n in range(4)], keep=0)
        got.append(
            torch.cat(
                [runner.feed([rows[i] for i in some], [[7]] * len(some)).logits() for some in ((2, 3), (3, 1), (1,))]
            )
        )
    torch.testing.assert_close(got[0], got[1], atol=2e-5, rtol=0)


def test_a_vacant_slot_in_a_steps_shape_is_harmless(tiny: Tiny) -> None:
    """Slots of ended requests, of other coefficients, stand idle beside the ones that run on."""
    engine = tiny.engine(ROWS, 120, stop=(), fixed=True)
    engine.generate([Request((1, 2, 3), guided(), Sampling(5, seed=s)) for s in range(9)])
    request = Request((5, 6), guided(), Sampling(15, 0.0))
    [got] = engine.generate([request])
    [want] = tiny.engine(ROWS, 120, stop=(), fixed=False).generate([request])
    assert got.ids == want.ids


def test_rows_at_their_last_position(tiny: Tiny) -> None:
    """Beside idle ones, whose writes go behind it."""
    request = Request(tuple(range(50)), guided(), Sampling(14, 0.0))
    for length in (64, 65):  # a slot's places are counted in sixty-fours
        engine = tiny.engine(ROWS, length, stop=(), fixed=True)
        [got, again] = engine.generate([request, request])
        [want] = tiny.engine(ROWS, 120, stop=(), fixed=False).generate([request])
        assert got.ids == again.ids == want.ids


@pytest.mark.parametrize(("rows", "length"), [(11, 120), (16, 512)])
def test_steps_take_few_shapes(tiny: Tiny, rows: int, length: int) -> None:
    engine = tiny.engine(rows, length, stop=(), fixed=True, chunk=16)
    shapes = Shapes(engine)
    eager = [r for r in asked(40) if r.plan.eager]  # guides of rare turns run in forwards of any shape
    engine.generate(eager)
    sizes = {size for size, _ in shapes.steps}
    assert sizes <= {1, 2, 4, 8, rows}
    assert {reach for _, reach in shapes.steps} == {length}
    assert len(shapes.steps) <= math.log2(rows) + 2
    assert len(shapes.fed) > len(sizes)


@pytest.mark.slow
def test_reaches_double(tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("far")
    tiny = Tiny(make_tiny_model(place / "model", max_position_embeddings=4096), place)
    engine = tiny.engine(4, 2200, stop=(), fixed=True)
    shapes = Shapes(engine)
    dice = np.random.default_rng(0)
    requests = [
        Request(tuple(dice.integers(0, 256, n).tolist()), PLANS[0], Sampling(5, 0.0))
        for n in (3, 509, 1022, 1500, 2047, 2190)
    ]
    expected = tiny.engine(4, 2200, stop=(), fixed=False, kept=0).generate(requests)
    assert [g.ids for g in engine.generate(requests)] == [g.ids for g in expected]
    assert {reach for _, reach in shapes.steps} <= {512, 1024, 2048, 2200}
    assert {2048, 2200} <= {reach for _, reach in shapes.steps}
