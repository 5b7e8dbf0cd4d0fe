"""Answering: one HTTP request's answers on their way, from the gang's pieces to what its client is sent."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from deployments import answers
from deployments.answers import Choice, Head, TokenText
from deployments.decoder import Decoder, Live
from deployments.errors import RETRY_AFTER, ApiError, api_error
from deployments.metrics import Metrics
from deployments.protocol import Asked
from deployments.service import Service, Setting
from deployments.workers import Piece
from mage_ray.decoding.plan import Plan


@dataclass
class Writing:
    """One answer. ``settings`` tells the setting of each plan that it has had or may have."""

    index: int
    id: str
    live: Live
    setting: Setting
    latest: Setting
    """What was last asked for, which ``setting`` will be from the next token on."""
    settings: dict[Plan, Setting]
    plan: Plan
    """Which drew its last token, or will draw its first."""
    text: str = ""
    offset: int = 0
    drawn: int = 0
    """Tokens that it has taken up, of which its client is told; the gang may be further on."""
    guided: int = 0
    changes: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    finished: str | None = None
    tokens: list[TokenText] = field(default_factory=list)
    last: float | None = None


class Answering:
    """The answers to one request: ``n`` to each prompt. ``parts`` gives their pieces as they come."""

    def __init__(self, asked: Asked, head: Head, service: Service, decoder: Decoder, metrics: Metrics) -> None:
        self.asked, self.head, self.service, self.decoder = asked, head, service, decoder
        self._metrics = metrics
        self._queue: asyncio.Queue[Piece] = asyncio.Queue()
        self.writing: dict[str, Writing] = {}
        self.prompt_tokens = 0
        self._began = time.monotonic()

    async def start(self) -> None:
        """Submit all. Raises FieldError, Busy, Unavailable or ApiError, and then none runs."""
        with self.decoder.coming():
            await self._start()

    async def _start(self) -> None:
        requests, settings = await asyncio.to_thread(self.service.requests, self.asked)
        for request in requests:
            request.check_length(self.decoder.facts.length)  # before any of it is sent
        setting = next(iter(settings.values()))
        self.prompt_tokens = sum(len(request.prompt) for request in requests[:: self.asked.n])
        try:
            for index, request in enumerate(requests):
                id = f"{self.head.id}-{index}"
                live = await self.decoder.submit(id, request, self._queue)
                self.writing[id] = Writing(index, id, live, setting, setting, dict(settings), request.plan)
        except BaseException:
            # None of them is answered, so none counts.
            for one in self.writing.values():
                self.decoder.cancel(one.live)
            self.writing.clear()
            raise
        for request in requests:
            self._metrics.rows_per_request.add(len(request.plan.rows))

    def cancel(self) -> None:
        """End what hasn't ended."""
        for one in self.writing.values():
            if one.finished is None:
                one.finished = "cancelled"
                self._metrics.ended("cancelled")
            self.decoder.cancel(one.live)

    async def parts(self) -> AsyncIterator[tuple[Writing, Choice, bool]]:
        """What each answer has to add, and whether its setting has changed, until all have ended.

        Raises the ApiError of one that fails, and ApiError 503 where none has begun in time; the others are cancelled,
        as they are when it is left early.
        """
        left, patience = len(self.writing), self.service.options.queue_seconds
        begun = False
        try:
            while left:
                try:
                    piece = await asyncio.wait_for(self._queue.get(), None if begun else patience)
                except TimeoutError:
                    raise ApiError.of(
                        503, "queue", f"no free slot within {patience:g} s", "a request when fewer are waiting",
                        code="queue_timeout", headers={"retry-after": str(RETRY_AFTER)},
                    ) from None  # fmt: skip
                begun = True
                one = self.writing[piece.id]
                if piece.token.error is not None:
                    one.finished = "error"
                    self._metrics.ended("error")
                    raise api_error(piece.token.error, chat=self.asked.kind == "chat")
                choice, changed = self._added(one, piece)
                left -= choice.finished is not None
                yield one, choice, changed
        finally:
            self.cancel()

    def _added(self, one: Writing, piece: Piece) -> tuple[Choice, bool]:
        token, plan, changed = piece.token, piece.plan, False
        if plan is not None and plan != one.plan and plan in one.settings:
            one.plan, one.setting, changed = plan, one.settings[plan], True
            one.changes.append((one.drawn, self.service.named(one.setting.preference)))
        listed, offset = None, one.offset
        if token.id >= 0:
            self._timed(one, piece)
            one.drawn += 1
            one.guided += token.guided and bool(one.plan.values)
            if self.asked.logprobs:
                listed = [self._shown(token.id, token.logprob)]
                one.tokens += listed
                one.offset += len(listed[0].token)
        one.text += token.text
        if token.finished is not None:
            one.finished = token.finished
            self._metrics.ended(token.finished)
        return Choice(one.index, token.text, token.finished, listed, offset), changed

    def _timed(self, one: Writing, piece: Piece) -> None:
        now = time.monotonic()
        if one.last is None:
            self._metrics.first_token.add(now - self._began)
            self._metrics.queued.add(piece.queued or 0.0)
        else:
            self._metrics.inter_token.add(now - one.last)
        one.last = now

    def _shown(self, token: int, logprob: float) -> TokenText:
        text = str(self.service.chat.tokenizer.decode([token]))
        return TokenText(text, logprob, text.encode())

    def mage(self, of: Sequence[Writing]) -> answers.Mage:
        """The block of these answers; of several, the first's setting."""
        return self.service.mage(
            of[0].setting,
            [one.id for one in of],
            changes=[change for one in of for change in one.changes],
            guided=sum(one.guided for one in of),
            tokens=sum(one.drawn for one in of),
        )

    @property
    def tokens(self) -> int:
        """Taken up so far."""
        return sum(one.drawn for one in self.writing.values())

    async def whole(self) -> dict[str, Any]:
        """The answers as one object. Raises as ``parts``."""
        async for _ in self.parts():
            pass
        all_of_them = list(self.writing.values())
        choices = [
            Choice(one.index, one.text, one.finished, one.tokens if self.asked.logprobs else None)  # type: ignore[arg-type]
            for one in all_of_them
        ]
        return answers.completion(self.head, choices, self.usage, self.mage(all_of_them))

    @property
    def usage(self) -> dict[str, int]:
        """Tokens of all prompts and answers."""
        return answers.usage(self.prompt_tokens, self.tokens)

    async def events(self) -> AsyncIterator[bytes]:
        """The answers as server-sent events. Raises as ``parts`` before the first one; later on the error is sent."""
        first: set[str] = set()
        try:
            async for one, choice, changed in self.parts():
                begins = one.id not in first
                first.add(one.id)
                told = begins or changed or choice.finished is not None
                mage = self.mage([one]) if told else None
                if not (choice.text or choice.logprobs or told):
                    continue
                yield answers.sse(
                    answers.chunk(
                        self.head, choice, first=begins, include_usage=self.asked.include_usage, mage=mage
                    )
                )  # fmt: skip
        except ApiError as error:
            if not first:
                raise
            self._metrics.error(error.type)
            yield answers.sse(error.body())
            return
        if self.asked.include_usage:
            yield answers.sse(answers.usage_chunk(self.head, self.usage))
        yield answers.DONE
