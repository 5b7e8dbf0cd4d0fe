"""The engine from an event loop: streams beside each other, cancelled, changed, failing alone, leaving nothing."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from engines import Tiny, guided, ids

from mage_ray.decoding.engine import Busy, Engine
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Request, Sampling
from mage_ray.errors import FieldError, UserError

PROMPT = ids("tell me more")


@pytest.fixture(scope="module")
def tiny(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tiny_model_folder, tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def engine(tiny: Tiny) -> Engine:
    return tiny.engine(stop=())


def asked(seed: int, new: int = 12) -> Request:
    return Request(PROMPT, guided(), Sampling(new, seed=seed))


def test_streams_beside_each_other_give_what_generate_gives(engine: Engine) -> None:
    async def main() -> list[tuple[int, ...]]:
        first = engine.submit(asked(0))
        tokens = [await anext(first)]
        others = [engine.submit(asked(seed)) for seed in range(1, 5)]  # they join while the first one runs
        tokens += [token async for token in first]
        rest = await asyncio.gather(*(stream.result() for stream in others))
        assert tokens[-1].finished == "length"
        return [tuple(t.id for t in tokens), *(g.ids for g in rest)]

    threads = threading.active_count()
    expected = [g.ids for g in engine.generate([asked(seed) for seed in range(5)])]
    assert asyncio.run(main()) == expected
    assert asyncio.run(main()) == expected  # another event loop, the same engine
    assert threading.active_count() == threads
    assert engine.runner.live == 0


def test_a_cancelled_stream_ends_with_its_reason_and_frees_its_rows(engine: Engine) -> None:
    async def main() -> None:
        stays, leaves = engine.submit(asked(1, 30)), engine.submit(asked(2, 150))
        await anext(leaves)
        leaves.cancel()
        reasons = [token.finished async for token in leaves]
        assert reasons[-1] == "cancelled"
        assert all(reason is None for reason in reasons[:-1])
        assert len(reasons) < 20
        await anext(stays)
        assert engine.runner.live == 3
        assert (await stays.result()).finished == "length"

    asyncio.run(main())
    assert engine.runner.live == 0


def test_leaving_by_the_context_or_by_a_cancelled_task_frees_the_rows(engine: Engine) -> None:
    async def main() -> None:
        async with engine.submit(asked(1, 150)) as stream:
            await anext(stream)
        task = asyncio.create_task(engine.submit(asked(2, 150)).result())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await engine.submit(asked(3, 2)).result()).finished == "length"
        assert engine.runner.live == 0

    asyncio.run(main())


def test_a_stream_whose_preference_changes_goes_on_with_the_other_plan(engine: Engine) -> None:
    soup = Plan.of([((0.0, 0.0, 0.5, 0.5), 1.0)])

    async def main() -> None:
        stream = engine.submit(Request(PROMPT, guided(), Sampling(60, 0.0)))
        tokens = [await anext(stream) for _ in range(3)]
        stream.change(soup)
        tokens += [token async for token in stream]
        answer = [t.id for t in tokens]
        # Some tokens were on their way when the change was asked for: from one of the next few on, it is the soup's.
        tails = engine.generate([Request((*PROMPT, *answer[:n]), soup, Sampling(60 - n, 0.0)) for n in range(3, 12)])
        assert any(tuple(answer[n:]) == tail.ids for n, tail in zip(range(3, 12), tails, strict=True))
        with pytest.raises(FieldError, match="4 numbers"):
            stream.change(Plan.of([((1.0,), 1.0)]))

    asyncio.run(main())


def test_what_fails_fails_alone(engine: Engine) -> None:
    async def main() -> None:
        fine = engine.submit(asked(1))
        broken = engine.submit(Request(PROMPT, Plan.of([((1e38, 0, 0, 0), 1.0)]), Sampling(5)))
        with pytest.raises(FieldError, match="prompt"):
            engine.submit(Request((), guided()))
        with pytest.raises(FieldError, match="not finite"):
            await broken.result()
        assert (await fine.result()).finished == "length"
        # Whoever comes into the broken one's slot next finds nothing of it there.
        again = await asyncio.gather(*(engine.submit(asked(1)).result() for _ in range(6)))
        assert {g.ids for g in again} == {engine.generate([asked(1)])[0].ids}

    asyncio.run(main())
    assert engine.runner.live == 0


def test_a_full_queue_says_so(tiny: Tiny) -> None:
    engine = tiny.engine(rows=3, stop=(), waiting=1)

    async def main() -> None:
        running = engine.submit(asked(1, 40))
        await anext(running)
        waiting = engine.submit(asked(2, 2))
        with pytest.raises(Busy, match="queue: got 2 waiting requests, allowed: at most 1"):
            engine.submit(asked(3, 2))
        await running.result()
        await waiting.result()
        assert (await engine.submit(asked(3, 2)).result()).finished == "length"

    asyncio.run(main())


def test_a_failing_forward_tells_every_request_that_runs_and_the_engine_goes_on(tiny: Tiny) -> None:
    engine = tiny.engine(stop=())
    run = engine.runner._run

    def fail(*_: object) -> None:
        raise MemoryError

    async def main() -> None:
        streams = [engine.submit(asked(seed, 50)) for seed in range(2)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        engine.runner._run = fail  # type: ignore[assignment,method-assign]
        for stream in streams:
            with pytest.raises(UserError, match="the engine failed: MemoryError"):
                await stream.result()
        engine.runner._run = run  # type: ignore[method-assign]
        assert (await engine.submit(asked(3, 2)).result()).finished == "length"

    asyncio.run(main())
    assert engine.runner.live == 0


def test_a_closed_engine_leaves_its_runner_to_another(tiny: Tiny) -> None:
    engine = tiny.engine(rows=6, stop=())
    [want] = engine.generate([asked(5)])

    async def main() -> None:
        streams = [engine.submit(asked(seed, 150)) for seed in range(4)]  # of three rows each: two run and two wait
        await anext(streams[0])
        assert await asyncio.to_thread(engine.close, 30)
        steps = engine.steps
        assert engine.runner.live == 0
        another = Engine(engine.runner, ())
        assert (await another.submit(asked(5)).result()).ids == want.ids
        assert {(await stream.result()).finished for stream in streams} == {"cancelled"}
        assert engine.steps <= steps + 1

    asyncio.run(main())
    assert engine.runner.live == 0


def test_a_step_that_hangs_keeps_an_engine_from_closing(tiny: Tiny) -> None:
    began, goes_on = threading.Event(), threading.Event()

    def decode(tokens: object) -> str:
        began.set()
        assert goes_on.wait(30)
        return ""

    engine = tiny.engine(stop=(), decode=decode)

    async def main() -> None:
        stream = engine.submit(asked(1))
        assert await asyncio.to_thread(began.wait, 30)
        assert not await asyncio.to_thread(engine.close, 0.05)
        goes_on.set()
        assert await asyncio.to_thread(engine.close, 30)
        assert (await stream.result()).finished in ("cancelled", "length")

    asyncio.run(main())
    assert engine.runner.live == 0


def test_a_thread_may_generate_while_streams_run(engine: Engine) -> None:
    expected = [g.ids for g in engine.generate([asked(seed) for seed in range(4)])]

    async def main() -> None:
        streams = [engine.submit(asked(seed)) for seed in range(2)]
        offline = await asyncio.to_thread(engine.generate, [asked(2), asked(3)])
        online = [(await stream.result()).ids for stream in streams]
        assert online + [g.ids for g in offline] == expected

    asyncio.run(main())
    assert engine.runner.live == 0
