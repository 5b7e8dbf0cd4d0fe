"""A gang and its owner, without HTTP: real workers that are killed, stopped and replaced under running requests."""

from __future__ import annotations

import asyncio
import shutil
import signal
import threading
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from adapters import make_adapter
from servers import PROMPT
from test_faults import has_store

from deployments.answering import Answering
from deployments.answers import Head
from deployments.decoder import Decoder, Live
from deployments.gang import Lost, _all
from deployments.metrics import Metrics
from deployments.options import Options
from deployments.protocol import Asked
from deployments.service import Service, Setting
from deployments.workers import Piece
from mage_ray.cluster import connected
from mage_ray.decoding import channel
from mage_ray.decoding.plan import Plan, Row
from mage_ray.decoding.request import Request, Sampling
from mage_ray.errors import FieldError, UserError
from mage_ray.folder import StudyFolder

pytestmark = pytest.mark.slow

HALF = {"positive": 0.5, "short": 0.5}


@dataclass
class Owner:
    """A gang's owner and what it serves."""

    service: Service
    decoder: Decoder
    metrics: Metrics

    @classmethod
    def of(cls, study: StudyFolder, **options: Any) -> Owner:
        given = Options(study=str(study.path), cpus=1, length=400, max_tokens=300, **options)
        service, metrics = Service(given, str(study.path)), Metrics()
        return cls(service, Decoder(service.parts(), given, metrics, _nobody), metrics)

    def answering(self, **fields: Any) -> Answering:
        """A request for 60 tokens, with these fields in place of the usual ones."""
        usual: dict[str, Any] = {"prompts": (PROMPT,), "max_tokens": 60, "seed": 5, "preference": HALF}
        asked = Asked(kind="chat", model="tiny", **usual | fields)
        head = Head("chat", f"gen-{self.decoder.name}-{uuid.uuid4().hex[:12]}", 0, "tiny")
        return Answering(asked, head, self.service, self.decoder, self.metrics)

    async def answer(self, **fields: Any) -> dict[str, Any]:
        answering = self.answering(**fields)
        await answering.start()
        return await answering.whole()

    async def text(self, **fields: Any) -> str:
        return str((await self.answer(**fields))["choices"][0]["message"]["content"])

    def figure(self, name: str) -> float:
        lines = self.metrics.text().decode().splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"mage_ray_{name} "))


async def _nobody(id: str, change: dict[str, Any]) -> None:
    raise AssertionError("no other replica is there")


async def until(done: Any, seconds: float = 60) -> None:
    async with asyncio.timeout(seconds):
        while not done():
            await asyncio.sleep(0.02)


def workers() -> tuple[psutil.Process, psutil.Process]:
    """The base's and the guide's."""
    found = [p for p in psutil.Process().children(recursive=True) if "ray::RowWorker" in " ".join(p.cmdline())]
    [base] = [process for process in found if has_store(process.pid)]
    [guide] = [process for process in found if process != base]
    return base, guide


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with connected(2), asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def own(study: StudyFolder, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A copy of the study that these tests may change."""
    place = tmp_path_factory.mktemp("gang") / "own"
    shutil.copytree(study.path, place)
    return StudyFolder(place)


@pytest.fixture(scope="module")
def split(loop: asyncio.Runner, own: StudyFolder) -> Iterator[Owner]:
    """A base and a guide in two processes."""

    async def start() -> Owner:
        owner = Owner.of(own, topology="split", patience=3, rows=24)
        await owner.decoder.start()
        return owner

    owner = loop.run(start())
    yield owner

    async def end() -> None:
        owner.decoder.close()

    loop.run(end())


def test_only_what_cannot_be_loaded_at_first_is_final(loop: asyncio.Runner) -> None:
    def fail(error: Exception) -> None:
        raise error

    task: Any = ray.remote(fail)

    async def main() -> None:
        for error in (channel.Lost("rank 1: gone"), UserError("a runner in another process failed: x"), KeyError("x")):
            with pytest.raises(Lost):
                await _all([task.remote(error)], 60)
        with pytest.raises(UserError, match="there is no expert"):
            await _all([task.remote(UserError("there is no expert"))], 60, final=True)

    loop.run(main())


def test_figures_are_those_of_what_was_read(loop: asyncio.Runner, split: Owner) -> None:
    async def main() -> None:
        later = ((6, {"short": 1.0}), (12, HALF))
        answering = split.answering(schedule=later, max_tokens=20)
        await answering.start()
        await until(lambda: not split.decoder.live)  # all of it is written, and none of it read
        parts = answering.parts()
        one, _, _ = await anext(parts)
        assert answering.tokens == answering.mage([one]).tokens == 1 and answering.mage([one]).guided == 1
        async for _ in parts:
            pass
        mage = answering.mage([one]).block()
        assert [change["at"] for change in mage["changes"]] == [6, 12]
        assert mage["guided_share"] == 1 and answering.tokens == 20

    loop.run(main())


def test_a_prompt_is_encoded_once_beside_the_event_loop(loop: asyncio.Runner, split: Owner) -> None:
    encode, threads = split.service.chat.encode_messages, []

    def noted(messages: Any) -> tuple[int, ...]:
        threads.append(threading.current_thread())
        return encode(messages)

    split.service.chat.encode_messages = noted  # type: ignore[assignment,method-assign]
    try:
        answer = loop.run(split.answer(n=5, max_tokens=2))
    finally:
        split.service.chat.encode_messages = encode  # type: ignore[method-assign]
    assert len(answer["choices"]) == 5 and len(threads) == 1
    assert threads[0] is not threading.main_thread()


def test_an_expert_that_is_away_for_a_moment_ends_no_answer(
    loop: asyncio.Runner, split: Owner, own: StudyFolder, tmp_path: Path
) -> None:
    """And one that is another by now is not taken for it."""
    expert = own.expert("soup", "short")

    async def main() -> None:
        want = await split.text(max_tokens=300)
        make_adapter(Path(own.study.model), tmp_path / "other", seed=77, scale=0.4)
        before = split.figure("rebuilds_total")
        running = asyncio.ensure_future(split.text(max_tokens=300))
        await until(lambda: split.decoder.live)
        expert.rename(tmp_path / "kept")
        shutil.copytree(tmp_path / "other", expert)
        workers()[1].kill()
        await until(lambda: split.figure("rebuilds_total") >= before + 2)
        assert split.decoder.broken is None and not running.done()
        shutil.rmtree(expert)
        await until(lambda: split.figure("rebuilds_total") >= before + 3)
        (tmp_path / "kept").rename(expert)
        assert await running == want

    loop.run(main())


def test_a_gang_of_which_nobody_answers_serves_all_who_call_meanwhile(loop: asyncio.Runner, split: Owner) -> None:
    """One that runs is changed meanwhile, which it is told. Too long a prompt is refused without a gang."""

    async def main() -> None:
        want = await split.text(max_tokens=40)
        answering = split.answering(max_tokens=300)
        await answering.start()
        parts = answering.parts()
        one, _, _ = await anext(parts)
        for process in workers():
            process.send_signal(signal.SIGSTOP)
        turned = split.service.plan(setting := Setting((0.0, 1.0), "mage-i-m"))
        one.settings[turned] = setting
        changing = asyncio.ensure_future(split.decoder.change(one.id, turned, True))
        rebuilds, calls, refused = split.figure("rebuilds_total"), [], []
        while split.figure("rebuilds_total") == rebuilds or not split.decoder.ready:
            calls.append(asyncio.ensure_future(split.text(max_tokens=40)))
            left = split.answering(max_tokens=300)  # its client doesn't wait
            with suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await left.start()
            left.cancel()
            assert split.decoder.facts.length == 400
            if not split.decoder.ready and not refused:
                async with asyncio.timeout(1):
                    with pytest.raises(FieldError, match="prompt: got ") as told:
                        await split.answering(prompts=("x" * 200,), max_tokens=300).start()
                refused.append(told.value)
            await asyncio.sleep(0.4)
        assert await changing
        async for _ in parts:
            pass
        assert [preference for _, preference in one.changes] == [{"positive": 0.0, "short": 1.0}]
        assert 0 < one.changes[0][0] < 300 and one.drawn == 300
        assert set(await asyncio.gather(*calls)) == {want} and refused

    loop.run(main())


def test_what_is_cancelled_while_a_gang_is_told_of_it_does_not_run_on(loop: asyncio.Runner, split: Owner) -> None:
    replay = split.decoder._replay

    async def main() -> None:
        answers = [split.answering(max_tokens=300, seed=seed) for seed in range(8)]
        for answering in answers:
            await answering.start()

        async def replay_and_cancel() -> None:
            telling = asyncio.ensure_future(replay())
            await asyncio.sleep(0)  # the first of them is on its way to the leader, the others are not
            for answering in answers:
                answering.cancel()
            await telling

        split.decoder._replay = replay_and_cancel  # type: ignore[method-assign]
        before = split.figure("rebuilds_total")
        workers()[1].kill()
        await until(lambda: split.figure("rebuilds_total") > before)
        await until(lambda: split.decoder.ready)
        tokens = split.figure("tokens_total")
        await split.text(max_tokens=200)
        await split.text(max_tokens=200)
        assert split.figure("tokens_total") - tokens < 400 + 100
        assert split.figure("running") == 0

    try:
        loop.run(main())
    finally:
        split.decoder._replay = replay  # type: ignore[method-assign]


def test_a_request_that_fails_the_engine_takes_none_that_waits_with_it(
    loop: asyncio.Runner, study: StudyFolder
) -> None:
    async def main() -> None:
        owner = Owner.of(study, rows=1)
        await owner.decoder.start()
        soup = owner.service.plan(Setting((0.5, 0.5), "bone-soup"))
        poison = replace(soup, rows=(Row(("no number",) * len(soup.rows[0].coefficients)),))  # type: ignore[arg-type]
        queue: asyncio.Queue[Piece] = asyncio.Queue()

        async def submit(id: str, plan: Plan) -> Live:
            return await owner.decoder.submit(id, Request((65, 66), plan, Sampling(200, seed=1)), queue)

        first = await submit("first", soup)  # holds the only row until all are there
        second, third = await submit("second", poison), await submit("third", soup)
        async with asyncio.timeout(120):
            last = {}
            while len(last) < 3:
                if (piece := await queue.get()).token.finished is not None:
                    last[piece.id] = piece.token
        owner.decoder.close()
        assert [last[live.id].finished for live in (first, second, third)] == ["length", "error", "length"]
        assert "the engine failed at this request" in str(last["second"].error)
        assert third.answer == first.answer

    loop.run(main())
