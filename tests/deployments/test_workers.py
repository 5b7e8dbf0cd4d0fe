"""A gang's leader in this process, without Ray: what it tells of its requests, and what is left when it leaves."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from tiny import make_tiny_tokenizer

from deployments.options import Options
from deployments.service import Service, Setting
from deployments.workers import Failed, Piece, RowWorker
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Request, Sampling
from mage_ray.folder import StudyFolder

PROMPT = tuple(make_tiny_tokenizer()("how was it?")["input_ids"])


def service_of(study: StudyFolder, rows: int = 4) -> Service:
    return Service(Options(study=str(study.path), cpus=1, rows=rows, length=400), str(study.path))


async def leading(study: StudyFolder, rows: int = 4) -> RowWorker:
    """One that leads a gang of its own, with so many rows."""
    worker = RowWorker(service_of(study, rows).parts()[0])
    await worker.load()
    await worker.lead(0, "gloo", 5.0, 16, None)
    return worker


def soup(study: StudyFolder, positive: float = 0.5) -> Plan:
    """A plan of one row."""
    return service_of(study).plan(Setting((positive, 1 - positive), "bone-soup"))


async def ended(worker: RowWorker, id: str) -> list[Piece]:
    """A request's pieces up to its last."""
    pieces: list[Piece] = []
    async for batch in worker.events():
        pieces += [event for event in batch.events if isinstance(event, Piece) and event.id == id]
        if pieces and pieces[-1].token.finished is not None:
            break
    return pieces


def test_a_leader_that_leaves_has_stopped_and_can_lead_again(study: StudyFolder) -> None:
    short = Request(PROMPT, soup(study), Sampling(12, seed=3))

    async def main() -> None:
        worker = await leading(study)
        await worker.submit("alone", short)
        want = [piece.token.id for piece in await ended(worker, "alone")]
        for i in range(7):  # of which four run
            await worker.submit(f"old-{i}", Request(PROMPT, soup(study), Sampling(300, seed=i)))
        await anext(worker.events())
        await worker.leave(30)
        await asyncio.sleep(0.3)  # as long as the others take to leave and to meet again, or less
        assert worker._runner.live == 0  # none of those that waited has come in
        await worker.lead(0, "gloo", 5.0, 16, None)
        await worker.submit("alone", short)
        assert [piece.token.id for piece in await ended(worker, "alone")] == want
        assert worker._runner.live == 0

    asyncio.run(main())


def test_the_first_piece_tells_the_plan_and_later_ones_what_has_changed(study: StudyFolder) -> None:
    first, second = soup(study, 0.2), soup(study, 0.9)
    request = Request(PROMPT, first, Sampling(12, 0.0), schedule=((5, second),))

    async def main() -> None:
        worker = await leading(study)
        await worker.submit("whole", request)
        whole = await ended(worker, "whole")
        assert [piece.plan for piece in whole] == [first, *[None] * 4, second, *[None] * 6]
        # Taken up where its plan has changed already, of which nobody was told.
        answer = tuple(piece.token.id for piece in whole)
        for cut in (5, 8):
            await worker.submit("rest", replace(request, answer=answer[:cut]))
            rest = await ended(worker, "rest")
            assert [piece.token.id for piece in rest] == list(answer[cut:])
            assert [piece.plan for piece in rest] == [second, *[None] * (11 - cut)]

    asyncio.run(main())


def test_a_failure_names_those_that_held_rows(study: StudyFolder) -> None:
    async def main() -> None:
        worker = await leading(study, rows=2)
        run = worker._runner._run

        def fail(*_: object) -> None:
            worker._runner._run = run  # type: ignore[method-assign]
            raise MemoryError

        for i in range(4):
            await worker.submit(f"{i}", Request(PROMPT, soup(study), Sampling(300, seed=i)))
        await anext(worker.events())
        worker._runner._run = fail  # type: ignore[assignment,method-assign]
        failed: list[Failed] = []
        while not failed:
            failed = [event for event in (await anext(worker.events())).events if isinstance(event, Failed)]
        assert set(failed[0].ids) == {"0", "1"}  # the others wait
        await worker.leave(30)

    asyncio.run(main())
