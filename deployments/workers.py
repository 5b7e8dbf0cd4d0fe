"""The actors of a gang: one class, placed as often as the gang has members. The first leads, the others follow.

A worker holds a model, a bank and rows. The leader has the engine, whose bases are its own rows; the followers run
guides for it. What they say to each other at every step goes over a process group of their own, not through Ray.
"""

from __future__ import annotations

import asyncio
import gc
import os
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from deployments.network import interface_of, listen
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Request, Token
from mage_ray.decoding.stream import Stream

if TYPE_CHECKING:
    from mage_ray.decoding.engine import Engine
    from mage_ray.decoding.gang import Gang


MEETING_SECONDS = 60.0
"""For all members of a group to come together, once they are loaded."""


@dataclass(frozen=True)
class Part:
    """What a worker loads and how much it may take.

    ``sets`` are those of the study's backbones and value models, each with what ``set_digests`` said of it when the
    gang was made: a worker that is replaced later on must hold what the others do.
    """

    study: str
    sets: Mapping[str, list[list[str]]]
    rows: int
    length: int
    memory: int | None
    threads: int


@dataclass(frozen=True)
class WorkerFacts:
    """What its gang must know of a worker."""

    address: str
    device: str
    vocabulary: int
    rows: int
    length: int

    @property
    def positions(self) -> int:
        """Of keys and values."""
        return self.rows * self.length


@dataclass(frozen=True)
class Piece:
    """A token of a request.

    With the first one since the request was handed over, perhaps in its middle, the plan that drew it and how long it
    queued; later on the plan where that has changed.
    """

    id: str
    token: Token
    plan: Plan | None = None
    queued: float | None = None


@dataclass(frozen=True)
class Failed:
    """The engine can't go on. ``ids`` are the requests that held rows: one of them may be the cause."""

    reason: str
    ids: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """Somebody wants a request of this gang changed, and waits for the answer under this number."""

    id: str
    change: dict[str, Any]
    number: int


Event = Piece | Failed | Asked


@dataclass(frozen=True)
class Batch:
    """What has happened since the last one, and how things stand: requests, rows, tokens that they hold in each worker
    (by its rank), and, since the engine began, seconds waited for guides and steps taken."""

    events: tuple[Event, ...]
    running: int
    waiting: int
    rows: int
    tokens: Mapping[int, int]
    waited: float
    steps: int


class RowWorker:
    """Made by Ray (``ray.remote(RowWorker)``); its methods are called from the gang's owner."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._streams: dict[str, Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: threading.Thread | None = None
        self._outbox: asyncio.Queue[Event | None] | None = None
        self._engine: Engine | None = None
        self._gang: Gang | None = None
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = 0

    async def load(self) -> WorkerFacts:
        """Load the model and the experts, once. Raises UserError, as loading a study does, or for other experts."""
        if not hasattr(self, "_runner"):
            await asyncio.to_thread(self._load, self._part)
        return self._facts()

    async def ping(self) -> None:
        """Answers."""

    def _load(self, part: Part) -> None:
        import torch

        from mage_ray.errors import UserError
        from mage_ray.folder import StudyFolder
        from mage_ray.generator import load_experts, load_rows, set_digests

        torch.set_num_threads(part.threads)
        folder = StudyFolder(part.study)
        # A worker that is replaced while the storage fails finds what the one before it has fetched.
        if not self._is_here(folder, part):
            folder = StudyFolder.open(part.study)
        study = folder.study
        device = "cuda" if torch.cuda.is_available() else "cpu"
        experts = load_experts(folder, study, list(part.sets))
        for name, digests in part.sets.items():
            if set_digests(folder, study, name) != digests:
                allowed = "those that its gang began with; a reload serves the new ones"
                raise UserError(f"{folder.place}: got other experts {name}, allowed: {allowed}")
        self._runner, self._chat = load_rows(study, experts, part.rows, part.length, memory=part.memory, device=device)

    @staticmethod
    def _is_here(folder: Any, part: Part) -> bool:
        """Whether this node has the experts already."""
        from mage_ray.errors import UserError
        from mage_ray.generator import set_digests

        try:
            study = folder.study
            return all(set_digests(folder, study, name) == digests for name, digests in part.sets.items())
        except UserError:
            return False

    def _facts(self) -> WorkerFacts:
        import ray

        runner = self._runner
        return WorkerFacts(
            ray.util.get_node_ip_address(),
            runner.model.device.type,
            runner.model.config.get_text_config().vocab_size,
            runner.rows,
            runner.length,
        )

    async def open(self, address: str, size: int) -> int:
        """Make the store at which a group of that many meets, on this address alone; its port."""
        self._store, port = listen(address, size)
        return port

    async def join(self, address: str, port: int, rank: int, size: int, backend: str) -> None:
        """Be a rank of the group that meets at that store."""
        await asyncio.to_thread(self._join, address, port, rank, size, backend)

    async def leave(self, seconds: float) -> None:
        """Leave the group that it is in, if it is in one, and end all rows. The leader goes first.

        One whose last step doesn't end exits.
        """
        engine, self._engine, self._gang = self._engine, None, None  # from here on nothing is submitted to it
        await asyncio.to_thread(self._leave, engine, seconds)
        for task in self._tasks:
            task.cancel()
        self._streams = {}

    def _leave(self, engine: Engine | None, seconds: float) -> None:
        import torch.distributed as dist

        ended = engine is None or engine.close(seconds)
        if self._server is not None:
            self._server.join(seconds)
            ended = not self._server.is_alive()
            self._server = None
        if not ended:
            os._exit(1)  # it waits for one that is gone, and knows nothing of it
        if dist.is_initialized():
            dist.destroy_process_group()
        gc.collect()  # what still holds on to the group keeps its connections open, and the others waiting
        self._runner.clear()

    def _join(self, address: str, port: int, rank: int, size: int, backend: str) -> None:
        import torch.distributed as dist

        if size == 1:
            return
        os.environ["GLOO_SOCKET_IFNAME"] = interface_of(address)
        meeting = timedelta(seconds=MEETING_SECONDS)
        store = self._store if rank == 0 else dist.TCPStore(address, port, size, False, meeting)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=meeting)

    async def follow(self, backend: str) -> None:
        """Run rows for the group's leader, until it is gone."""
        from mage_ray.decoding.channel import Lost, RankChannel
        from mage_ray.decoding.remote import serve

        channel = RankChannel(0, self._runner.model.device if backend == "nccl" else None)

        def run() -> None:
            with suppress(Lost):  # the group's owner sees to it
                serve(self._runner, channel)

        self._server = threading.Thread(target=run, name="mage-ray-follow", daemon=True)
        self._server.start()

    async def lead(self, others: int, backend: str, seconds: float, queue: int, chunk: int | None) -> None:
        """A fresh engine over this worker's rows and those of the group's other ranks."""
        engine = await asyncio.to_thread(self._lead, others, backend, seconds, queue, chunk)
        if self._outbox is not None:
            self._outbox.put_nowait(None)  # whoever reads the last engine's events has read them all
        # Both at once: what is submitted to an engine goes out where its events are read.
        self._engine, self._outbox = engine, asyncio.Queue()

    def _lead(self, others: int, backend: str, seconds: float, queue: int, chunk: int | None) -> Engine:
        from mage_ray.decoding.channel import RankChannel
        from mage_ray.decoding.engine import Engine
        from mage_ray.decoding.gang import Gang
        from mage_ray.decoding.remote import RemoteRunner
        from mage_ray.decoding.rows import Rows

        rows: Rows = self._runner
        if others:
            device = self._runner.model.device if backend == "nccl" else None
            patience = timedelta(seconds=seconds)
            remotes = [RemoteRunner(RankChannel(1 + i, device, patience)) for i in range(others)]
            rows = self._gang = Gang(self._runner, remotes)
        return Engine(rows, self._chat.stop, self._chat.decode, chunk=chunk, waiting=queue)

    async def submit(self, id: str, request: Request, always: bool = False) -> None:
        """Start a request, if it isn't there; its tokens come out of ``events``.

        Raises FieldError, Busy, or EngineFailed where there is no engine at the moment.
        """
        engine = self._present()
        if id in self._streams:
            return
        stream = engine.submit(request, always=always)
        self._streams[id] = stream
        task = asyncio.get_running_loop().create_task(self._pass_on(id, stream))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _present(self) -> Engine:
        """The engine. Raises EngineFailed while there is none."""
        from mage_ray.decoding.engine import EngineFailed

        if self._engine is None:
            raise EngineFailed("the engine is being replaced")
        return self._engine

    async def _pass_on(self, id: str, stream: Stream) -> None:
        from mage_ray.decoding.engine import EngineFailed
        from mage_ray.errors import UserError

        outbox = self._outbox
        assert outbox is not None
        plan: Plan | None = None
        try:
            async for token in stream:
                queued = stream.running.queued if plan is None else None
                changed = token.plan if token.plan not in (None, plan) else None
                plan = changed or plan
                outbox.put_nowait(Piece(id, replace(token, plan=None), changed, queued))
        except EngineFailed as error:
            ended = tuple(other for other, one in self._streams.items() if one.running.ended)
            outbox.put_nowait(Failed(str(error), ended))
        except UserError as error:
            outbox.put_nowait(Piece(id, Token.end("error", error=error)))
        finally:
            if self._streams.get(id) is stream:
                del self._streams[id]

    async def cancel(self, ids: Sequence[str]) -> None:
        """End requests; those that have ended are no matter."""
        for id in ids:
            if (stream := self._streams.get(id)) is not None:
                stream.cancel()

    async def change(self, id: str, plan: Plan, recompute: bool) -> bool:
        """Give a request another plan from its next token on; whether it still runs. Raises as ``submit``."""
        self._present()
        stream = self._streams.get(id)
        if stream is not None:
            stream.change(plan, recompute)
        return stream is not None

    async def ask_owner(self, id: str, change: dict[str, Any]) -> Any:
        """For another replica than the one that owns the gang: have that one change a request; what it answers."""
        assert self._outbox is not None
        self._numbers += 1
        number, answer = self._numbers, asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._outbox.put_nowait(Asked(id, change, number))
        try:
            return await answer
        finally:
            del self._waiting[number]

    async def answer(self, number: int, answer: Any) -> None:
        """What the owner says to one that asked."""
        if (waiting := self._waiting.get(number)) is not None and not waiting.done():
            waiting.set_result(answer)

    async def events(self) -> AsyncIterator[Batch]:
        """All that happens from here on until there is a new engine, as much at a time as there is."""
        outbox = self._outbox
        assert outbox is not None
        while (event := await outbox.get()) is not None:
            events = [event]
            # The tokens of one step come one by one, within one turn of the loop or two.
            await asyncio.sleep(0)
            while not outbox.empty() and (more := outbox.get_nowait()) is not None:
                events.append(more)
            if (engine := self._engine) is None:
                return
            load = engine.load
            waited = 0.0 if self._gang is None else self._gang.waited
            yield Batch(tuple(events), load.running, load.waiting, load.rows, load.tokens, waited, engine.steps)
