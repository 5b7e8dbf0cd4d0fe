"""Many random requests that arrive, leave and change at random moments; what breaks; memory; who gets which step."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import Tiny, ids
from tiny import make_tiny_model, make_tiny_tokenizer

from mage_ray.decoding.engine import Busy, Engine
from mage_ray.decoding.methods import EXPLICIT, METHODS, Backbones, Setup, plan_for
from mage_ray.decoding.plan import Cadence, Plan
from mage_ray.decoding.request import Generation, Request, Sampling, Token
from mage_ray.decoding.seeds import uniform
from mage_ray.decoding.stream import Stream
from mage_ray.errors import FieldError, UserError
from mage_ray.merging.coefficients import circulant_mix

LENGTH, ROWS = 90, 9
PLAIN = Plan.of([((0.0,) * 4, 1.0)])
NOT_FINITE = Plan.of([((1e30, 0.0, 0.0, 0.0), 1.0)])
SETUP = Setup(
    4,
    {"bone": Backbones((0, 1), circulant_mix(2, 0.7)), "soup": Backbones((2, 3), np.eye(2))},
    "bone",
    "soup",
    strength=1.3,
    candidates=12,
    extrapolation=(0.5, 0.5),
)
PREFERENCES = ((1.0, 0.0), (0.25, 0.75), (0.5, 0.5))
CADENCES = (Cadence(), Cadence(every=3), Cadence(entropy=3.0), Cadence(every=2, entropy=2.5), Cadence(speculate=3))
_tokenizer = make_tiny_tokenizer()


def decode(tokens: object) -> str:
    return str(_tokenizer.decode(tokens, skip_special_tokens=True))


@pytest.fixture(scope="module")
def tiny(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tiny_model_folder, tmp_path_factory.mktemp("robust"))


def random_plan(dice: np.random.Generator) -> Plan:
    setup = replace(SETUP, valued=bool(dice.integers(2)), candidates=int(dice.choice([3, 12, 260])))
    plan = plan_for(str(dice.choice([m for m in METHODS if m not in EXPLICIT])), PREFERENCES[dice.integers(3)], setup)
    if dice.random() < 0.3:
        plan = replace(plan, candidates=None)
    return plan.at(CADENCES[dice.integers(len(CADENCES))]) if plan.values else plan


def random_request(dice: np.random.Generator) -> Request:
    shared = ids("a system prompt that many share, ")[: int(dice.integers(0, 34))] if dice.random() < 0.4 else ()
    prompt = (*shared, *dice.integers(0, 256, int(dice.integers(1, 61 - len(shared)))).tolist())
    letters = tuple(chr(c) for c in dice.choice(np.arange(33, 127), 12, replace=False))
    sampling = Sampling(
        int(dice.integers(1, 25)),
        float(dice.choice([0.0, 0.7, 1.0, 1.5])),
        float(dice.choice([1.0, 1.0, 0.9, 0.5])),
        seed=int(dice.integers(1000)),
        stop=letters if dice.random() < 0.3 else (),
    )
    return Request(prompt, random_plan(dice), sampling)


INVALID: tuple[tuple[Request, str], ...] = (
    (Request((), PLAIN), "prompt: got no tokens"),
    (Request((1,) * 80, PLAIN, Sampling(20)), "at most 90 together"),
    (Request((1, 260), PLAIN), "token ids 0 to 259"),
    (Request((1, -1), PLAIN), "token ids 0 to 259"),
    (Request((1,), Plan.of([((float(i), 0, 0, 0), 1.0) for i in range(10)])), "10 rows"),
    (Request((1,), Plan.of([((1.0,), 1.0)])), "4 numbers"),
)


@dataclass
class Course:
    """What happened to one request: its tokens as they came, and what was done to it when so many had come."""

    request: Request
    tokens: list[Token] = field(default_factory=list)
    error: UserError | None = None
    cancelled: bool = False
    changed: Plan | None = None
    changed_after: int = 0
    exact: bool = True

    @property
    def drawn(self) -> list[Token]:
        return [t for t in self.tokens if t.id >= 0]


async def one_course(engine: Engine, course: Course, dice: np.random.Generator) -> None:
    fate = dice.choice(
        ["run", "cancel", "leave", "abandon", "change", "approximate"], p=[0.55, 0.1, 0.05, 0.05, 0.2, 0.05]
    )
    after = int(dice.integers(0, 12))
    other = random_plan(dice)
    stream = engine.submit(course.request)
    try:
        if fate == "cancel" and dice.random() < 0.3:
            await asyncio.sleep(float(dice.exponential(0.01)))  # most likely while it waits or prefills
            course.cancelled = True
            stream.cancel()
        async with stream:
            while True:
                if len(course.tokens) == after:
                    if fate == "cancel":
                        course.cancelled = True
                        stream.cancel()
                    elif fate in ("change", "approximate"):
                        course.changed, course.changed_after = other, after
                        course.exact = fate == "change"
                        stream.change(other, recompute=course.exact)
                    elif fate == "leave":
                        course.cancelled = True
                        return
                    elif fate == "abandon":
                        course.cancelled = True
                        waiter = asyncio.ensure_future(anext(stream))
                        await asyncio.sleep(0)
                        waiter.cancel()
                        await asyncio.gather(waiter, return_exceptions=True)
                        return
                course.tokens.append(await anext(stream))
    except StopAsyncIteration:
        return
    except UserError as error:
        course.error = error


async def at_rest(engine: Engine) -> None:
    """Wait until the engine's task is gone; then nothing may be left of it."""
    for _ in range(500):
        if len(asyncio.all_tasks()) == 1:
            break
        await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == {asyncio.current_task()}
    assert not engine.step()  # neither running nor waiting requests, nor word from anybody
    assert engine.runner.live == 0
    assert [t.name for t in threading.enumerate() if t.name.startswith("mage-ray-engine")] == []


async def all_courses(engine: Engine, courses: list[Course], dice: np.random.Generator) -> None:
    waiting: list[Awaitable[None]] = []
    for i, course in enumerate(courses):
        waiting.append(asyncio.ensure_future(one_course(engine, course, np.random.default_rng(i))))
        if dice.random() < 0.1:
            refused, message = INVALID[dice.integers(len(INVALID))]
            with pytest.raises(FieldError, match=message):
                engine.submit(refused)
        while engine.runner.live == engine.runner.rows and dice.random() < 0.9:
            await asyncio.sleep(0.002)  # a queue of some, not of all
        if dice.random() < 0.5:
            await asyncio.sleep(float(dice.exponential(0.004)))
    await asyncio.gather(*waiting)
    await at_rest(engine)


def allocated(engine: Engine) -> int:
    """Bytes of all keys and values that the engine's runner holds."""
    runner = engine.runner
    slots = [t for layer in runner._slots.layers for t in (layer.keys, layer.values) if t is not None]
    kept = [t for entries in runner._kept._of_row.values() for parts in entries.values() for t in parts]
    return sum(t.numel() * t.element_size() for t in (*slots, *kept))


ROUNDING = 3e-6


def by_rounding(tiny: Tiny, request: Request, answer: tuple[int, ...], one: int, other: int) -> bool:
    """Whether two tokens may both be drawn after ``answer``, within what rounding does to the log-probabilities.

    Two tokens of equal probability at the border of a nucleus may change places in it, which moves the draw. A plan
    with a cadence may have drawn from its base.
    """
    sampling = request.sampling
    if not request.plan.eager or sampling.temperature == 0:
        return False
    number = uniform(sampling.seed, len(answer))
    exact_V = tiny.logprobs(request.plan, [*request.prompt, *answer])[-1] / sampling.temperature
    drawn = set()
    for _ in range(200):
        probs_V = (exact_V + ROUNDING * torch.randn(exact_V.shape, dtype=torch.float64)).softmax(-1)
        order_V = probs_V.argsort(descending=True)
        out_V = probs_V[order_V].cumsum(0) - probs_V[order_V] >= sampling.top_p
        probs_V[order_V[out_V]] = 0
        cumulative_V = probs_V.cumsum(0)
        drawn.add(int(torch.searchsorted(cumulative_V, number * cumulative_V[-1], right=True)))
    return {one, other} <= drawn


def candidates_by_rounding(tiny: Tiny, request: Request, answer: tuple[int, ...], logprobs: tuple[float, ...]) -> bool:
    """Whether the last token of ``answer`` may have had each of ``logprobs``: the k-th candidate is the base's k-th
    token or its k+1-st where rounding decides between the two, and the others' probabilities share what it leaves."""
    possible = [
        float(tiny.logprobs(request.plan, [*request.prompt, *answer[:-1]], rounding=ROUNDING)[-1, answer[-1]])
        for _ in range(30)
    ]
    return all(min(abs(p - got) for p in possible) < 1e-4 for got in logprobs)


def check_unchanged(course: Course, alone: Generation, tiny: Tiny) -> bool:
    """That it is what it is alone; False where the two part at a draw, or in a candidate, that rounding decides."""
    drawn = course.drawn
    for n, (token, other) in enumerate(zip(drawn, alone.ids, strict=False)):
        if token.id != other:
            assert by_rounding(tiny, course.request, alone.ids[:n], token.id, other), (course.request, n)
            return False
    assert len(drawn) <= len(alone.ids)
    got = np.array([t.logprob for t in drawn])
    apart = np.flatnonzero(np.abs(got - alone.logprobs[: len(got)]) > 1e-4)
    for n in apart:
        pair = (drawn[n].logprob, alone.logprobs[n])
        assert drawn[n].guided and candidates_by_rounding(tiny, course.request, alone.ids[: n + 1], pair), (n, pair)
    if course.cancelled and (not course.tokens or course.tokens[-1].finished in (None, "cancelled")):
        return True
    whole = Generation.of(course.tokens)
    assert (whole.finished, len(whole.ids), whole.text) == (alone.finished, len(alone.ids), alone.text)
    assert whole.guided == alone.guided
    assert whole.value == pytest.approx(alone.value, abs=1e-3)
    return len(apart) == 0


def check_changed(course: Course, alone: Callable[[Request], Generation], tiny: Tiny) -> None:
    """Up to some token its numbers are the old plan's, from there on the new one's; greedy ones go on as a new request.

    Tokens that had come when the change was asked for are those of an unchanged run.
    """
    request, drawn, other = course.request, course.drawn, course.changed
    assert other is not None
    if not drawn:
        assert course.tokens and course.tokens[-1].finished in ("error", "vetoed")
        return
    first = alone(request)
    seen = min(course.changed_after, len(drawn))
    answer = [t.id for t in drawn]
    assert tuple(answer[:seen]) == first.ids[:seen]
    got = np.array([t.logprob for t in drawn])
    np.testing.assert_allclose(got[:seen], first.logprobs[:seen], atol=1e-4)
    if not course.exact:
        assert course.tokens[-1].finished in ("stop", "length", "vetoed")
    if seen == len(drawn) or not course.exact:
        return
    fits = []
    for plan in (request.plan, other):
        guided, base = (tiny.drawn(plan, request.prompt, answer, alone=a).numpy() for a in (False, True))
        expected = np.where([t.guided for t in drawn], guided, base)
        fits.append(np.abs(got - expected) < 3e-4)
    switches = [k for k in range(seen, len(drawn) + 1) if fits[0][:k].all() and fits[1][k:].all()]
    assert switches, (got, fits)
    if request.sampling.temperature == 0 and other.eager and not request.sampling.stop:
        rest = [
            alone(Request((*request.prompt, *answer[:k]), other, replace(request.sampling, max_new_tokens=left))).ids
            for k in switches
            if (left := request.sampling.max_new_tokens - k) > 0
        ]
        assert tuple(answer[switches[-1] :]) == () or any(
            tuple(answer[k:]) == ids for k, ids in zip(switches, rest, strict=False)
        )


@pytest.mark.parametrize(
    ("count", "seed", "fixed"),
    [
        (30, 1, False),
        pytest.param(1000, 2, False, marks=pytest.mark.slow),
        pytest.param(200, 3, True, marks=pytest.mark.slow),
    ],
)
def test_random_requests_end_as_if_each_had_been_alone(tiny: Tiny, count: int, seed: int, fixed: bool) -> None:
    dice = np.random.default_rng(seed)
    engine = tiny.engine(ROWS, LENGTH, decode=decode, chunk=16, kept=200, fixed=fixed)
    courses = []
    for _ in range(count):
        request = random_request(dice)
        if dice.random() < 0.06:
            request = replace(request, plan=NOT_FINITE)
        courses.append(Course(request))
    asyncio.run(all_courses(engine, courses, dice))
    assert allocated(engine) <= engine.runner.memory.total

    quiet = tiny.engine(ROWS, LENGTH, decode=decode, kept=0)
    ended: Counter[str] = Counter()
    parted = 0
    for course in courses:
        ended[str(course.tokens[-1].finished if course.tokens else course.error)[:8]] += 1
        if course.request.plan is NOT_FINITE and course.changed is None:
            assert not course.drawn
            assert course.cancelled or "not finite" in str(course.error)
        elif course.request.plan is NOT_FINITE:
            assert course.error is not None or course.changed_after == 0
        elif course.changed is None:
            assert course.error is None
            parted += not check_unchanged(course, quiet.generate([course.request])[0], tiny)
        else:
            assert course.error is None
            check_changed(course, lambda r: quiet.generate([r])[0], tiny)
    assert parted <= count // 250
    assert ended["length"] > count / 4
    if count > 100:
        assert {"length", "stop", "plan: go"} <= set(ended)


def steps_until(engine: Engine, done: Callable[[], bool], most: int = 400) -> int:
    for n in range(most):
        if done():
            return n
        engine.step()
    raise AssertionError(f"not within {most} steps")


def running(engine: Engine, request: Request) -> Stream:
    """A stream whose first token has come. The test takes the steps: it never waits, so the engine's task does not."""
    stream = engine.submit(request)
    steps_until(engine, lambda: stream.running.generated > 0)
    return stream


def by_steps(test: Callable[[], None]) -> None:
    async def inside() -> None:
        test()

    asyncio.run(inside())


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("cancelled", ["in prefill", "never"])
def test_what_is_not_finite_reaches_neither_neighbours_nor_later_users_of_its_slot(
    tiny: Tiny, fixed: bool, cancelled: str
) -> None:
    long = Request(tuple(range(60)), PLAIN, Sampling(25, 0.0))
    short = Request((7, 8, 9), PLAIN, Sampling(20, 0.0))
    [expected_long], [expected_short] = (tiny.engine(1, LENGTH).generate([r]) for r in (long, short))

    def scene() -> None:
        engine = tiny.engine(3, LENGTH, chunk=6, fixed=fixed)
        neighbour = running(engine, long)
        # The broken row shares forwards with a longer one, so it is padded; others move between slots meanwhile.
        broken = engine.submit(Request(tuple(range(3, 33)), NOT_FINITE, Sampling(20)))
        other = engine.submit(short)
        for _ in range(4):
            engine.step()
        assert broken.running.rows[0].tokens or broken.running.ended
        if cancelled == "in prefill":
            broken.cancel()
        steps_until(engine, lambda: broken.running.ended)
        later = [engine.submit(short) for _ in range(3)]
        everyone = [neighbour, other, *later]
        steps_until(engine, lambda: all(s.running.ended for s in everyone))
        assert tuple(neighbour.running.history[60:]) == expected_long.ids
        for stream in (other, *later):
            assert tuple(stream.running.history[3:]) == expected_short.ids
        assert engine.runner.live == 0

    by_steps(scene)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Plan((), ()), "plan.rows: got none"),
        (lambda: Plan.of([]), "plan.weights"),
        (lambda: Plan(PLAIN.rows, (1.0, 2.0)), "plan.weights: .*1 numbers"),
        (lambda: replace(PLAIN, values=(1.0, 2.0)), "plan.values: .*1 numbers"),
        (lambda: replace(PLAIN, candidates=0), "candidates: got 0, allowed: 1 or more"),
        (lambda: Plan.guided((0.0,) * 4, [((1.0,) * 4, 1.0)], 1.0, -1), "candidates: got -1"),
    ],
)
def test_a_plan_that_no_engine_could_run_is_refused_when_it_is_made(make: Callable[[], Plan], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        make()


def test_a_guide_that_is_not_finite_and_never_asked_leaves_nothing_behind(tiny: Tiny) -> None:
    broken = Plan.guided((0.0,) * 4, [((1e30, 0, 0, 0), 1.0), ((0, 1.0, 0, 0), -1.0)], 1.0, 12)
    engine = tiny.engine(3, LENGTH, stop=(), kept=0)
    [first] = engine.generate([Request(tuple(range(60)), broken.at(Cadence(entropy=1e9)), Sampling(5, 0.0))])
    assert (first.finished, first.guided) == ("length", 0)
    long, short = Request(tuple(range(70)), PLAIN, Sampling(9, 0.0)), Request((7, 8), PLAIN, Sampling(9, 0.0))
    expected = [tiny.engine(1, LENGTH, stop=()).generate([r])[0].ids for r in (long, short, short)]
    assert [g.ids for g in engine.generate([long, short, short])] == expected
    for cadence in (Cadence(), Cadence(every=2), Cadence(speculate=3)):
        [refused] = engine.generate([Request((1, 2), broken.at(cadence), Sampling(5))])
        assert "not finite" in str(refused.error)
    assert [g.ids for g in engine.generate([long, short, short])] == expected


def test_event_loops_and_threads_share_an_engine(tiny: Tiny) -> None:
    """Two event loops, of which one ends long before the other, and a plain caller, each in a thread of its own."""
    engine = tiny.engine(4, LENGTH, stop=())
    asked = [Request((i, i + 1), PLAIN, Sampling(n, 0.0)) for i, n in enumerate((5, 80, 40))]
    expected = [tiny.engine(4, LENGTH, stop=(), kept=0).generate([r])[0].ids for r in asked]
    got: dict[int, tuple[int, ...]] = {}

    async def one(i: int, first: threading.Event, then: threading.Event) -> None:
        async with engine.submit(asked[i]) as stream:
            tokens = [await anext(stream)]
            first.set()
            while not then.is_set():
                await asyncio.sleep(0.001)
            got[i] = tuple(t.id for t in [*tokens, *[token async for token in stream]])

    def plain() -> None:
        got[2] = engine.generate([asked[2]])[0].ids

    a, b = threading.Event(), threading.Event()
    threads = [
        threading.Thread(target=lambda: asyncio.run(one(0, a, b)), daemon=True),
        threading.Thread(target=lambda: asyncio.run(one(1, b, a)), daemon=True),
        threading.Thread(target=plain, daemon=True),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [got.get(i) for i in range(3)] == expected
    assert engine.runner.live == 0


def test_a_forward_that_fails_ends_those_who_run_and_the_engine_goes_on(tiny: Tiny) -> None:
    engine = tiny.engine(2, LENGTH)
    request = Request((1, 2, 3), PLAIN, Sampling(12, 0.0))
    [expected] = engine.generate([request])
    layer = engine.runner.model.model.layers[1]

    async def scene() -> list[Generation | BaseException]:
        streams = [engine.submit(request) for _ in range(4)]
        left = iter(range(6))

        def fail(*_: object) -> None:
            if next(left, None) == 3:
                raise MemoryError("of this test")

        hook = layer.register_forward_pre_hook(fail)
        try:
            ended = await asyncio.gather(*(s.result() for s in streams), return_exceptions=True)
        finally:
            hook.remove()
        await at_rest(engine)
        return ended

    ended = asyncio.run(scene())
    assert all("the engine failed: MemoryError" in str(e) for e in ended[:2]), ended
    assert [e.ids for e in ended[2:] if isinstance(e, Generation)] == [expected.ids] * 2


PER_POSITION = 2 * 2 * 2 * 16 * 4  # keys and values, layers, KV heads, their size, bytes of a float32


def test_a_memory_budget_gives_fewer_rows_and_bounds_what_is_allocated(tiny: Tiny) -> None:
    budget = (3 * 128 + 100) * PER_POSITION + 5  # a row of 90 takes 128 positions
    engine = tiny.engine(24, LENGTH, memory=budget, kept=100, decode=decode)
    assert engine.runner.rows == 3
    assert budget - 5 == engine.runner.memory.total
    dice = np.random.default_rng(0)
    asked = [random_request(dice) for _ in range(25)]
    for request, got in zip(asked, engine.generate(asked), strict=True):
        assert (got.error is not None) == (len(request.plan.rows) > 3)
        if got.error is not None:
            assert "rows, allowed: at most 3 (0 MiB" in str(got.error)
    assert 0 < allocated(engine) <= engine.runner.memory.total
    [too_long] = engine.generate([Request((1,) * 60, PLAIN, Sampling(31))])
    assert "at most 90 together" in str(too_long.error)


def test_a_budget_is_kept_with_fixed_shapes_and_where_it_is_ample(tiny: Tiny) -> None:
    engine = tiny.engine(5, LENGTH, memory=10**9, fixed=True)
    assert engine.runner.rows == 5
    engine.generate([Request((1, 2), PLAIN, Sampling(3))])
    assert allocated(engine) <= engine.runner.memory.total


@pytest.mark.parametrize("short_by", [1, 128 * PER_POSITION, 10**9])
def test_a_budget_for_not_even_one_row_is_refused_with_what_it_takes(tiny: Tiny, short_by: int) -> None:
    needed = (128 + 100) * PER_POSITION
    with pytest.raises(FieldError, match=f"memory: .*at least {needed} bytes"):
        tiny.engine(24, LENGTH, memory=needed - short_by, kept=100)
    assert tiny.engine(24, LENGTH, memory=needed, kept=100).runner.rows == 1


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    place = tmp_path_factory.mktemp("roomy")
    return Tiny(make_tiny_model(place / "model", max_position_embeddings=1024), place)


LONG = tuple(int(t) for t in np.random.default_rng(8).integers(0, 256, 400))


def test_a_long_prompt_stalls_neither_streams_nor_short_requests(roomy: Tiny) -> None:
    def scene() -> None:
        engine = roomy.engine(6, 600, chunk=16, kept=0, stop=())
        stream = running(engine, Request((1, 2, 3), PLAIN, Sampling(500, 0.0)))
        engine.submit(Request(LONG, PLAIN, Sampling(5, 0.0)))
        long = engine.submit(Request(LONG[::-1], PLAIN, Sampling(5, 0.0)))
        for n in range(5):
            before = stream.running.generated
            engine.step()
            assert stream.running.generated == before + 1, n
        short = engine.submit(Request((4, 5, 6, 7), PLAIN, Sampling(5, 0.0)))
        before = stream.running.generated
        taken = steps_until(engine, lambda: short.running.generated > 0)
        assert taken <= 2
        assert long.running.generated == 0
        taken += steps_until(engine, lambda: long.running.generated > 0)
        assert 2 * 400 / 16 - 6 <= taken <= 2 * 400 / 16 + 6
        assert stream.running.generated == before + taken
        stream.cancel()
        steps_until(engine, lambda: engine.runner.live == 0)

    by_steps(scene)


def test_a_long_prompt_does_not_starve_while_short_ones_keep_coming(roomy: Tiny) -> None:
    def scene() -> None:
        engine = roomy.engine(8, 600, chunk=16, kept=0, stop=())
        stream = running(engine, Request((1, 2, 3), PLAIN, Sampling(500, 0.0)))
        long = engine.submit(Request(LONG, PLAIN, Sampling(3, 0.0)))
        dice = np.random.default_rng(0)
        shorts: list[Stream] = []
        steps = 0
        while long.running.generated == 0:
            shorts.append(engine.submit(Request(tuple(dice.integers(0, 256, 12).tolist()), PLAIN, Sampling(2, 0.0))))
            engine.step()
            steps += 1
            assert steps < 2 * 400 / 16 + 4  # half of the chunks are its own
        assert sum(s.running.ended for s in shorts) >= 10
        stream.cancel()
        steps_until(engine, lambda: engine.runner.live == 0)

    by_steps(scene)


def test_a_step_computes_no_more_of_a_prompt_than_a_chunk(roomy: Tiny) -> None:
    widths: list[int] = []

    def scene() -> None:
        engine = roomy.engine(8, 600, chunk=16, kept=0, stop=())
        stream = running(engine, Request((1, 2, 3), PLAIN, Sampling(200, 0.0)))
        plan = plan_for("mage-i-e", (0.5, 0.5), SETUP)
        many = [engine.submit(Request(LONG, plan)), engine.submit(Request(LONG[7:], PLAIN))]
        hook = engine.runner.model.model.register_forward_pre_hook(
            lambda module, args, inputs: widths.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        steps_until(engine, lambda: all(s.running.generated > 0 for s in many))
        hook.remove()
        for s in (stream, *many):
            s.cancel()
        assert engine.runner.live == 0

    by_steps(scene)
    assert max(widths) == 16


def test_cancelling_frees_the_rows_at_once(tiny: Tiny) -> None:
    def scene() -> None:
        engine = tiny.engine(4, LENGTH)
        plan = plan_for("mage-i-e", (0.5, 0.5), SETUP)
        first, second = (engine.submit(Request((1, 2), plan, Sampling(50))) for _ in range(2))
        engine.step()
        assert engine.runner.live == 4
        second.cancel()  # it waits
        assert second.running.ended
        first.cancel()
        assert (engine.runner.live, engine.step()) == (0, False)

    by_steps(scene)


def test_cancelling_while_a_step_runs_frees_the_rows_by_the_next(tiny: Tiny) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        inside.set()
        assert go_on.wait(20)

    def scene() -> None:
        engine = tiny.engine(2, LENGTH, stop=())
        stream, other = (running(engine, Request((i, 2), PLAIN, Sampling(50))) for i in (1, 2))
        hook = engine.runner.model.base_model.register_forward_pre_hook(hold)
        thread = threading.Thread(target=engine.step)
        thread.start()
        assert inside.wait(20)
        stream.cancel()  # doesn't wait for the step
        assert not stream.running.ended
        go_on.set()
        thread.join(20)
        hook.remove()
        before = other.running.generated
        assert engine.step()
        assert stream.running.ended
        assert (engine.runner.live, other.running.generated) == (1, before + 1)
        other.cancel()
        assert engine.runner.live == 0

    by_steps(scene)


def test_a_full_queue_is_busy_and_free_slots_are_no_queue(tiny: Tiny) -> None:
    def scene() -> None:
        engine = tiny.engine(3, LENGTH, waiting=2)
        request = Request((1, 2), PLAIN, Sampling(4))
        accepted = [engine.submit(request) for _ in range(5)]  # three have slots as soon as a step is taken
        for _ in range(2):
            with pytest.raises(Busy, match="2"):
                engine.submit(request)
            engine.step()
        assert engine.runner.live == 3
        accepted[4].cancel()
        accepted.append(engine.submit(request))
        steps_until(engine, lambda: all(s.running.ended for s in accepted))
        assert engine.runner.live == 0

    by_steps(scene)


def test_an_engine_without_a_queue_takes_what_fits_now(tiny: Tiny) -> None:
    def scene() -> None:
        engine = tiny.engine(4, LENGTH, waiting=0)
        plan = plan_for("mage-i-m", (0.5, 0.5), SETUP)
        stream = engine.submit(Request((1, 2), plan, Sampling(4)))
        with pytest.raises(Busy):
            engine.submit(Request((1, 2), plan, Sampling(4)))
        single = engine.submit(Request((1, 2), PLAIN, Sampling(4)))
        steps_until(engine, lambda: stream.running.ended and single.running.ended)

    by_steps(scene)
