"""Shared beginnings of prompts are computed once for each distinct row, and change nothing but that."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import GUIDE, ZERO, Tiny, guided, ids
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.outputs import Outputs
from mage_ray.decoding.plan import Cadence, Plan, Row
from mage_ray.decoding.prefixes import PrefixStore, common_length
from mage_ray.decoding.request import Generation, Request, Sampling
from mage_ray.decoding.runner import LiveRow
from mage_ray.decoding.stream import Stream

PLAIN = Plan.of([(ZERO, 1.0)])
EXPERT = Plan.of([(GUIDE, 1.0)])
SYSTEM = ids("You are a helpful assistant, and brief. ")
TAILS = [ids(t) for t in ("What is this?", "Who are you", "Why", "Where to go from here", "W")]


class Fed:
    """How many tokens each row of coefficients was fed, and which."""

    def __init__(self, engine: Engine) -> None:
        self.tokens: Counter[tuple[float, ...]] = Counter()
        self.computed: list[tuple[tuple[float, ...], tuple[int, ...], int]] = []
        original = engine.runner.feed

        def feed(rows: Sequence[LiveRow], tokens: Sequence[Sequence[int]], keep: int = 1) -> Outputs:
            for row, fed in zip(rows, tokens, strict=True):
                self.tokens[row.row.coefficients] += len(fed)
                for n in range(len(fed)):
                    self.computed.append((row.row.coefficients, (*row.tokens, *fed[: n + 1]), keep))
            return original(rows, tokens, keep)

        engine.runner.feed = feed  # type: ignore[method-assign]

    @property
    def twice(self) -> list[object]:
        """What prefill computed though it had been computed before."""
        seen: set[object] = set()
        repeated: list[object] = []
        for coefficients, tokens, keep in self.computed:
            if keep == 0 and (coefficients, tokens) in seen:
                repeated.append((coefficients, tokens))
            seen.add((coefficients, tokens))
        return repeated


@pytest.fixture(scope="module")
def tiny(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tiny_model_folder, tmp_path_factory.mktemp("prefixes"))


@pytest.fixture(scope="module")
def unshared(tiny: Tiny) -> Callable[[Request], Generation]:
    """A request alone, on an engine that keeps nothing."""
    engine = tiny.engine(6, 200, kept=0, stop=())
    return lambda request: engine.generate([request])[0]


def same(got: Generation, expected: Generation) -> None:
    assert got.ids == expected.ids
    np.testing.assert_allclose(got.logprobs, expected.logprobs, atol=1e-4)


def distinct_beginnings(prompts: Sequence[tuple[int, ...]]) -> int:
    """Nodes of the trie of what prefill and the first step compute of some prompts."""
    return len({p[:n] for p in prompts for n in range(1, len(p) + 1)})


@pytest.mark.parametrize("chunk", [3, 16, 128])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_burst_computes_a_common_prompt_once(
    tiny: Tiny, unshared: Callable[[Request], Generation], chunk: int, fixed: bool
) -> None:
    engine = tiny.engine(8, 200, kept=0, stop=(), chunk=chunk, fixed=fixed)
    fed = Fed(engine)
    prompts = [SYSTEM + tail for tail in TAILS]
    asked = [Request(p, PLAIN, Sampling(6, 1.0, seed=i)) for i, p in enumerate(prompts)]
    got = engine.generate(asked)
    assert fed.twice == []
    # Each request's first step feeds its own last token, its others five more, whoever else has computed them.
    prefilled = distinct_beginnings([p[:-1] for p in prompts])
    assert fed.tokens[ZERO] <= prefilled + 6 * len(prompts)
    for request, generation in zip(asked, got, strict=True):
        same(generation, unshared(request))


def test_one_after_the_other_computes_a_common_prompt_once(
    tiny: Tiny, unshared: Callable[[Request], Generation]
) -> None:
    engine = tiny.engine(2, 200, kept=600, stop=())
    fed = Fed(engine)
    for i, tail in enumerate(TAILS):
        request = Request(SYSTEM + tail, PLAIN, Sampling(4, 1.0, seed=i))
        before = fed.tokens[ZERO]
        same(engine.generate([request])[0], unshared(request))
        common = max((common_length(tail, other) for other in TAILS[:i]), default=-len(SYSTEM))
        assert fed.tokens[ZERO] - before == max(len(tail) - common, 1) + 3  # the last token is always fed
    assert fed.twice == []


def test_a_continued_conversation_computes_what_is_new(tiny: Tiny, unshared: Callable[[Request], Generation]) -> None:
    engine = tiny.engine(3, 200, stop=())
    fed = Fed(engine)
    first = Request(SYSTEM, guided(), Sampling(10, 0.0))
    [answer] = engine.generate([first])
    for coefficients in (ZERO, GUIDE):
        assert fed.tokens[coefficients] == len(SYSTEM) + 9
    again = Request((*SYSTEM, *answer.ids, *ids("And")), guided(), Sampling(5, 0.0))
    same(engine.generate([again])[0], unshared(again))
    # The last token of the answer was drawn, but not fed.
    for coefficients in (ZERO, GUIDE):
        assert fed.tokens[coefficients] == len(SYSTEM) + 9 + 1 + 3 + 4
    assert fed.twice == []


def test_equal_rows_of_different_plans_share_and_different_rows_do_not(
    tiny: Tiny, unshared: Callable[[Request], Generation]
) -> None:
    engine = tiny.engine(12, 200, kept=0, stop=(), chunk=16)
    fed = Fed(engine)
    asked = [Request(SYSTEM, plan, Sampling(5, 0.0)) for plan in (guided(), EXPERT, PLAIN, guided(2.0))]
    got = engine.generate(asked)
    assert fed.twice == []
    prompt = len(SYSTEM) - 1
    assert fed.tokens == {
        guided().rows[0].coefficients: prompt + 2 * 5,
        GUIDE: prompt + 3 * 5,
        ZERO: prompt + 3 * 5,
    }
    for request, generation in zip(asked, got, strict=True):
        same(generation, unshared(request))


def by_steps(test: Callable[[], None]) -> None:
    """Within an event loop whose engines' tasks never get to run: the test takes the steps."""

    async def inside() -> None:
        test()

    asyncio.run(inside())


def until(engine: Engine, done: Callable[[], bool], most: int = 300) -> int:
    for n in range(most):
        if done():
            return n
        engine.step()
    raise AssertionError(f"not within {most} steps")


def answer(stream: Stream) -> tuple[int, ...]:
    return tuple(stream.running.history[len(stream.running.request.prompt) :])


@pytest.mark.parametrize("cancelled_after", [0, 1, 2, 5])
def test_the_one_who_computes_for_others_may_leave(
    tiny: Tiny, unshared: Callable[[Request], Generation], cancelled_after: int
) -> None:
    def scene() -> None:
        engine = tiny.engine(6, 200, kept=0, stop=(), chunk=4)
        fed = Fed(engine)
        other = engine.submit(Request((9, 9), PLAIN, Sampling(100, 0.0)))
        until(engine, lambda: other.running.generated > 0)
        leader, *followers = (engine.submit(Request(SYSTEM + tail, EXPERT, Sampling(4, 0.0))) for tail in TAILS[:3])
        for _ in range(cancelled_after):
            engine.step()
        leader.cancel()
        until(engine, lambda: all(f.running.ended for f in followers))
        for follower in followers:
            assert answer(follower) == unshared(follower.running.request).ids
        # What the leader had computed in its last chunk alone may be computed again.
        assert len(fed.twice) <= 4
        other.cancel()

    by_steps(scene)


@pytest.mark.parametrize("longer", [0, 1, 7])
def test_nobody_waits_for_a_guide_that_seldom_runs(
    tiny: Tiny, unshared: Callable[[Request], Generation], longer: int
) -> None:
    def scene() -> None:
        engine = tiny.engine(6, 200, kept=0, stop=(), chunk=8)
        lazy = engine.submit(Request(SYSTEM, guided().at(Cadence(entropy=1e9)), Sampling(100, 0.0)))
        until(engine, lambda: lazy.running.generated > 3)
        request = Request(SYSTEM + TAILS[3][:longer], EXPERT, Sampling(4, 0.0))
        stream = engine.submit(request)
        assert until(engine, lambda: stream.running.ended) <= 8
        assert answer(stream) == unshared(request).ids
        assert not lazy.running.ended
        lazy.cancel()

    by_steps(scene)


def test_a_short_request_does_not_wait_for_a_long_one_of_equal_beginning(
    tiny: Tiny, unshared: Callable[[Request], Generation]
) -> None:
    def scene() -> None:
        engine = tiny.engine(6, 200, kept=0, stop=(), chunk=4)
        fed = Fed(engine)
        stream = engine.submit(Request((1, 2), PLAIN, Sampling(150, 0.0)))
        until(engine, lambda: stream.running.generated > 0)
        [first, long] = (engine.submit(Request((*head, *range(120)), PLAIN)) for head in ((3,), (65, 66)))
        engine.step()
        short = engine.submit(Request((65, 66, 67, 68), PLAIN, Sampling(3, 0.0)))
        assert until(engine, lambda: short.running.ended) <= 4 + 3
        assert answer(short) == unshared(short.running.request).ids
        until(engine, lambda: long.running.generated > 0 and first.running.generated > 0)
        assert fed.twice == []
        for s in (stream, first, long):
            s.cancel()

    by_steps(scene)


def test_an_approximate_row_serves_nobody(tiny: Tiny, unshared: Callable[[Request], Generation]) -> None:
    """Neither while it lives, nor by what it leaves behind."""

    def scene() -> None:
        engine = tiny.engine(6, 200, stop=())
        request = Request(SYSTEM, EXPERT, Sampling(12, 0.0))
        expected = unshared(request).ids
        changed = engine.submit(Request(SYSTEM, PLAIN, Sampling(60, 0.0)))
        grown = engine.submit(Request(SYSTEM, PLAIN, Sampling(60, 0.0)))
        until(engine, lambda: changed.running.generated > 2)
        changed.change(EXPERT, recompute=False)
        grown.change(guided(), recompute=False)
        engine.step()
        living = engine.submit(request)
        until(engine, lambda: living.running.ended)
        assert answer(living) == expected
        changed.cancel()
        grown.cancel()
        assert engine.runner.live == 0
        later = engine.submit(request)
        until(engine, lambda: later.running.ended)
        assert answer(later) == expected
        approximate = tuple(changed.running.history[len(SYSTEM) :])
        assert approximate[:3] != expected[:3]

    by_steps(scene)


def test_exactly_recomputed_rows_do_serve(tiny: Tiny, unshared: Callable[[Request], Generation]) -> None:
    def scene() -> None:
        engine = tiny.engine(6, 200, stop=())
        fed = Fed(engine)
        changed = engine.submit(Request(SYSTEM, PLAIN, Sampling(60, 0.0)))
        until(engine, lambda: changed.running.generated > 2)
        changed.change(EXPERT, recompute=True)
        until(engine, lambda: changed.running.generated > 4)
        changed.cancel()
        before = fed.tokens[GUIDE]
        request = Request(SYSTEM, EXPERT, Sampling(5, 0.0))
        stream = engine.submit(request)
        until(engine, lambda: stream.running.ended)
        assert answer(stream) == unshared(request).ids
        assert fed.tokens[GUIDE] - before == 5

    by_steps(scene)


def test_the_least_recently_used_prompt_goes(tiny: Tiny) -> None:
    """Room for two kept sequences of 20 prompt tokens and the one fed."""
    engine = tiny.engine(2, 200, kept=45, stop=())
    fed = Fed(engine)

    def cost(first: int) -> int:
        before = fed.tokens[ZERO]
        engine.generate([Request((first, *range(20)), PLAIN, Sampling(1, 0.0))])
        return fed.tokens[ZERO] - before

    assert [cost(n) for n in (100, 101)] == [21, 21]
    assert [cost(n) for n in (100, 101, 100)] == [1, 1, 1]
    assert cost(102) == 21  # 101 goes
    assert [cost(n) for n in (100, 102)] == [1, 1]
    assert cost(101) == 21


def test_an_engine_that_was_cleared_away_leaves_the_next_ones_rows_alone(
    tiny: Tiny, unshared: Callable[[Request], Generation]
) -> None:
    """Its requests may end later than its rows, which another engine has by then."""

    def scene() -> None:
        engine = tiny.engine(6, 200, stop=())
        stale = engine.submit(Request(SYSTEM, guided(), Sampling(60, 0.0)))
        until(engine, lambda: stale.running.generated > 2)
        engine.runner.clear()
        later = Engine(engine.runner, ())
        request = Request(SYSTEM, EXPERT, Sampling(8, 0.0))
        stream = later.submit(request)
        until(later, lambda: stream.running.generated > 2)
        stale.cancel()
        until(later, lambda: stream.running.ended)
        assert answer(stream) == unshared(request).ids

    by_steps(scene)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_random_families_of_prompts_get_what_they_get_alone_and_compute_nothing_twice(
    tiny: Tiny, unshared: Callable[[Request], Generation], seed: int
) -> None:
    dice = np.random.default_rng(seed)
    engine = tiny.engine(10, 200, kept=100_000, stop=(), chunk=int(dice.integers(2, 30)))
    fed = Fed(engine)
    texts: list[tuple[int, ...]] = [()]
    for _ in range(50):  # a random tree of beginnings
        parent = texts[dice.integers(len(texts))]
        texts.append((parent + tuple(dice.integers(0, 3, int(dice.integers(1, 25))).tolist()))[:80])
    plans = (PLAIN, EXPERT, guided(), guided().at(Cadence(every=3)), guided().at(Cadence(speculate=2)))
    asked = [
        Request(t, plans[dice.integers(len(plans))], Sampling(int(dice.integers(1, 9)), seed=i))
        for i, t in enumerate(texts[1:])
    ]
    for request, generation in zip(asked, engine.generate(asked), strict=True):
        same(generation, unshared(request))
    assert fed.twice == []


sequences = st.lists(st.integers(0, 2), max_size=12)


@given(sequences, sequences)
def test_common_length_is_what_counting_gives(one: list[int], other: list[int]) -> None:
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    assert common_length(one, tuple(other)) == count


class Plainly:
    """What PrefixStore promises, written out: kept sequences, least recently used first, with when they came.

    Of several that do equally well, the one that came first is used.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.kept: OrderedDict[tuple[int, tuple[int, ...]], int] = OrderedDict()
        self.came = 0

    def find(self, row: int, goal: tuple[int, ...]) -> int:
        shares = {key: common_length(key[1], goal) for key in self.kept if key[0] == row}
        best = max(shares.values(), default=0)
        if best > 0:
            self.kept.move_to_end(min((key for key, n in shares.items() if n == best), key=self.kept.__getitem__))
        return best

    def add(self, row: int, tokens: tuple[int, ...]) -> None:
        if len(tokens) > self.capacity:
            return
        covering = [key for key in self.kept if key[0] == row and key[1][: len(tokens)] == tokens]
        if covering:
            self.kept.move_to_end(min(covering, key=self.kept.__getitem__))
            return
        self.kept = OrderedDict((k, n) for k, n in self.kept.items() if k[0] != row or tokens[: len(k[1])] != k[1])
        self.came += 1
        self.kept[row, tokens] = self.came
        while sum(len(key[1]) for key in self.kept) > self.capacity:
            self.kept.popitem(last=False)


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, 30),
    st.lists(st.tuples(st.booleans(), st.integers(0, 1), sequences.filter(bool)), max_size=40),
)
def test_a_store_is_what_brute_force_gives(capacity: int, calls: list[tuple[bool, int, list[int]]]) -> None:
    store, plainly = PrefixStore(capacity), Plainly(capacity)
    for number, (adds, row, tokens) in enumerate(calls):
        if adds:
            kept = [torch.tensor([*tokens, number])]
            store.add(Row((float(row),)), tokens, lambda kept=kept: kept)  # type: ignore[misc]
            plainly.add(row, tuple(tokens))
        else:
            found = store.find(Row((float(row),)), tokens)
            assert (found.common if found is not None else 0) == plainly.find(row, tuple(tokens))
            if found is not None:
                assert found.parts[0][: found.common].tolist() == tokens[: found.common]
        assert store.used == sum(len(key[1]) for key in plainly.kept) <= capacity
