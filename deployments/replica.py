"""Replica: the study it serves, the gang that decodes it, and the requests on their way."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import ray
from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from deployments import logs
from deployments.answering import Answering
from deployments.answers import Head
from deployments.decoder import Decoder, Unavailable
from deployments.errors import RETRY_AFTER, ApiError, api_error
from deployments.gang import NAMESPACE, leader_name
from deployments.guard import Keys, Shares, read_body
from deployments.logs import LOGGER
from deployments.metrics import Metrics
from deployments.options import Options
from deployments.protocol import Kind, parse_body, parse_patch, parse_request
from deployments.service import Service
from mage_ray.errors import UserError

_PATCH_SECONDS = 30.0


class _EventStream(StreamingResponse):
    """Server-sent events. ``ended`` is told 200, or 499 where the client was gone, be it before the first one."""

    def __init__(self, first: bytes, rest: AsyncIterator[bytes], ended: Callable[[int], Any]) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(self._all(first, rest), media_type="text/event-stream", headers=headers)
        self._status, self._ended = 499, ended

    async def _all(self, first: bytes, rest: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        yield first
        async for event in rest:
            yield event
        self._status = 200

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended(self._status)


class Replica:
    """What is behind the routes of one process. Used within one event loop."""

    def __init__(self, options: Options) -> None:
        logs.set_up()
        self._options = options
        self.metrics = Metrics()
        self._keys = Keys()
        self._shares = Shares(options.streams_per_key)
        self._service: Service | None = None
        self.decoder: Decoder | None = None
        self._content: Any = None
        self._revision = ""
        self._answering: set[Answering] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._created = int(time.time())

    async def reconfigure(self, config: Mapping[str, Any]) -> None:
        """Serve what ``config`` names: ``study`` and ``recipe``, the options' where it names none, and a ``revision``
        of one's own.

        Answers on their way go on with what they began with. What can't be served is logged, and the last one stays.
        """
        revision = str(config.get("revision", ""))
        try:
            service = await asyncio.to_thread(Service.configured, self._options, config)
            content = await asyncio.to_thread(service.content)
            if content != self._content:
                decoder = Decoder(service.parts(), self._options, self.metrics, self._change)
                try:
                    await decoder.start()
                except BaseException:
                    decoder.close()
                    raise
                if self.decoder is not None:
                    self._background(self._retire(self.decoder))
                self.decoder, self._content = decoder, content
        except UserError as error:
            if self._service is None:
                raise
            study = config.get("study") or self._options.study
            LOGGER.error("not reloaded", extra={"study": study, "revision": revision, "reason": str(error)})
            return
        self._service, self._revision = service, revision
        LOGGER.info(
            "serving",
            extra={
                "study": service.folder.place,
                "recipe": service.provenance(),
                "revision": revision,
                "topology": service.topology,
            },
        )

    async def _retire(self, decoder: Decoder) -> None:
        await decoder.drained()
        decoder.close()

    def check_health(self) -> None:
        """Raises where the gang can't be made whole again: Serve then replaces the replica."""
        if self.decoder is not None and self.decoder.broken is not None:
            raise self.decoder.broken

    def close(self) -> None:
        """End the gang's actors."""
        if self.decoder is not None:
            self.decoder.close()

    @property
    def ready(self) -> bool:
        """Whether requests are answered now."""
        return self.decoder is not None and self.decoder.ready

    def model(self, name: str | None = None) -> dict[str, Any]:
        """OpenAI's object of the served study. Raises ApiError 404 for another name."""
        own = self.served.study.name
        if name not in (None, own):
            raise ApiError.of(404, "model", str(name), own, param="model", code="model_not_found")
        return {"id": own, "object": "model", "created": self._created, "owned_by": "mage_ray"}

    def objectives(self) -> dict[str, Any]:
        """What can be asked for."""
        assert self.decoder is not None
        facts = self.decoder.facts
        return self.served.described(facts.length, facts.rows, self._revision)

    async def front(self) -> Mapping[str, Any]:
        """The study's evaluated front."""
        return await asyncio.to_thread(self.served.front)

    async def change(self, request: Request, id: str) -> Response:
        """PATCH: change a generation, of whichever replica."""
        self.owner(request)
        body = await self._body(request)
        try:
            self.served.check(parse_patch(body))  # before the id: whose it is decides nothing about that
        except UserError as error:
            raise api_error(error) from None
        status, answer = await self._change(id, body)
        gang = [*id.split("-"), ""][1]
        if status == 404 and self.decoder is not None and gang != self.decoder.name:
            status, answer = await _ask(gang, id, body) or (status, answer)
        return JSONResponse(answer, status)

    def _background(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def complete(self, request: Request, kind: Kind) -> Response:
        """POST: the answers to a request, whole or as events. Raises ApiError."""
        owner, began = self.owner(request), time.monotonic()
        try:
            asked = parse_request(kind, await self._body(request))
            share = len(asked.prompts) * asked.n
            self._shares.take(owner, share)
        except ApiError as error:
            self.metrics.error(error.type)
            raise
        assert self.decoder is not None
        head = Head(kind, f"gen-{self.decoder.name}-{uuid.uuid4().hex[:12]}", int(time.time()), asked.model)
        answering = Answering(asked, head, self.served, self.decoder, self.metrics)

        def end(status: int) -> None:
            try:
                answering.cancel()
            finally:
                self._shares.give_back(owner, share)
                self._answering.discard(answering)
            LOGGER.info(
                "answered",
                extra={
                    "request": request.headers.get("x-request-id", ""),
                    "generation": head.id,
                    "owner": owner,
                    "status": status,
                    "answers": len(answering.writing),
                    "prompt_tokens": answering.prompt_tokens,
                    "tokens": answering.tokens,
                    "seconds": round(time.monotonic() - began, 3),
                },
            )

        try:
            await answering.start()
            self._answering.add(answering)
            if not asked.stream:
                answer = JSONResponse(await answering.whole())
                end(200)
                return answer
            events = answering.events()
            # Before it has begun, the answer can still be an error.
            first = await anext(events)
        except Exception as error:
            refused = _error_of(error, chat=kind == "chat")
            self.metrics.error(refused.type)
            end(refused.status)
            raise refused from None
        except BaseException:  # the client is gone
            end(499)
            raise

        return _EventStream(first, events, end)

    async def _change(self, id: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Change a generation of this replica's; the status and body to answer with."""
        patch = parse_patch(body)
        found = next(((a, a.writing[id]) for a in self._answering if id in a.writing), None)
        try:
            if found is None or found[1].finished is not None:
                raise ApiError.of(404, "generation", id, "the id of one that runs", code="generation_not_found")
            answering, one = found
            setting = answering.service.changed(one.latest, patch)
            plan = answering.service.plan(setting)
            one.settings[plan] = setting  # before its first token can come
            if not await answering.decoder.change(id, plan, patch.recompute):
                raise ApiError.of(404, "generation", id, "the id of one that runs", code="generation_not_found")
            one.latest = setting
        except Exception as error:
            refused = _error_of(error)
            return refused.status, refused.body()
        mage = answering.service.mage(setting, [id], guided=one.guided, tokens=one.drawn)
        return 200, {"id": id, "object": "generation", "mage": mage.block()}

    @property
    def served(self) -> Service:
        """The study as it is served now."""
        assert self._service is not None
        return self._service

    def owner(self, request: Request) -> str:
        """Who calls. Raises ApiError 401."""
        try:
            return self._keys.owner(request.headers.get("authorization"))
        except ApiError as error:
            self.metrics.error(error.type)
            raise

    async def _body(self, request: Request) -> dict[str, Any]:
        limit = self._options.body_bytes
        return parse_body(await read_body(request, limit), request.headers.get("content-type"), limit)


async def _ask(gang: str, id: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
    """Have the owner of another gang change a generation; None where there is no such gang."""
    try:
        leader: Any = ray.get_actor(leader_name(gang), NAMESPACE)
        asked = leader.ask_owner.remote(id, body)
        return await asyncio.wait_for(asyncio.wrap_future(asked.future()), _PATCH_SECONDS)
    except (ValueError, TimeoutError, ray.exceptions.RayError):
        return None


def _error_of(error: Exception, chat: bool = False) -> ApiError:
    if isinstance(error, Unavailable):
        return ApiError.of(
            503, "server", str(error), "a request in a moment",
            code="unavailable", headers={"retry-after": str(RETRY_AFTER)},
        )  # fmt: skip
    refused = api_error(error, chat=chat)
    if refused.status >= 500 and not isinstance(error, ApiError | UserError):
        LOGGER.error("a request failed", exc_info=error)
    return refused
