"""A gang's leader in this process, without Ray: what it tells of its requests, and what is left when it leaves."""

from __future__ import annotations

import asyncio

from tiny import make_tiny_tokenizer

from deployments.options import Options
from deployments.service import Service, Setting
from deployments.workers import Piece, RowWorker
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
        await worker.lead(0, "gloo", 5.0, 16, None)
        assert worker._runner.live == 0
        await worker.submit("alone", short)
        assert [piece.token.id for piece in await ended(worker, "alone")] == want
        assert worker._runner.live == 0  # none of the old ones has come back

    asyncio.run(main())
