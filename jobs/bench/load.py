"""Load over HTTP: many streams at once over one client, each read and timed as a user's program would read it.

Seconds of wall time throughout.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import aiohttp
import numpy as np
from setting import BenchError

_PATIENCE = 1800
"""Seconds for one answer: at most that many, since a rival answers one request after another."""


@dataclass(frozen=True)
class Answer:
    """What came of one request: its text, its number of tokens as the server counts them, and when it came.

    ``first`` is the time from the question to the first piece of text, ``gaps`` are those between the pieces.
    """

    text: str
    tokens: int
    first: float
    gaps: tuple[float, ...]


def ask(url: str, questions: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """The answers to all questions, asked at once, each a body of ``/v1/completions`` that asks for a stream and usage.

    Raises BenchError for an answer that is refused, breaks off or has no text.
    """
    return asyncio.run(_ask(url, questions))


async def _ask(url: str, questions: Sequence[Mapping[str, Any]]) -> list[Answer]:
    patience = aiohttp.ClientTimeout(total=_PATIENCE)
    try:
        async with aiohttp.ClientSession(timeout=patience, connector=aiohttp.TCPConnector(limit=0)) as client:
            return list(await asyncio.gather(*(_answer(client, url, question) for question in questions)))
    except (aiohttp.ClientError, TimeoutError) as error:
        raise BenchError(f"{url}: {type(error).__name__} {error}".strip()) from None


async def _answer(client: aiohttp.ClientSession, url: str, question: Mapping[str, Any]) -> Answer:
    began = time.perf_counter()
    pieces: list[str] = []
    stamps: list[float] = []
    tokens = 0
    async with client.post(f"{url}/v1/completions", json=question) as response:
        if response.status != 200:
            raise BenchError(f"{url}: {response.status} {_reason(await response.text())}")
        async for event in _events(url, response):
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            if piece := "".join(choice["text"] for choice in event.get("choices", ())):
                stamps.append(time.perf_counter())
                pieces.append(piece)
    if not stamps:
        raise BenchError(f"{url}: an answer without text")
    return Answer("".join(pieces), tokens, stamps[0] - began, tuple(b - a for a, b in pairwise(stamps)))


async def _events(url: str, response: aiohttp.ClientResponse) -> AsyncIterator[Mapping[str, Any]]:
    """The JSON of each server-sent event, up to ``[DONE]``. Raises BenchError for an error, or an end without that."""
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line.decode().removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event = json.loads(data)
        if "error" in event:
            raise BenchError(f"{url}: {_reason(data)}")
        yield event
    raise BenchError(f"{url}: the stream broke off")


def _reason(body: str) -> str:
    """The message in the JSON of an error; the beginning of anything else."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return " ".join(body.split())[:200]


@dataclass(frozen=True)
class Burst:
    """All answers to questions that were asked at once, and how long they took together."""

    answers: Sequence[Answer]
    seconds: float

    @classmethod
    def of(cls, url: str, questions: Sequence[Mapping[str, Any]]) -> Burst:
        """``ask``, timed."""
        began = time.perf_counter()
        return cls(ask(url, questions), time.perf_counter() - began)


def latency_result(bursts: Sequence[Burst]) -> dict[str, Any]:
    """What goes under ``latency`` for one number of streams: percentiles over all streams of all bursts."""
    answers = [answer for burst in bursts for answer in burst.answers]
    rates = [sum(answer.tokens for answer in burst.answers) / burst.seconds for burst in bursts]
    return {
        "streams": len(bursts[0].answers),
        "rounds": len(bursts),
        "first_token": _percentiles([answer.first for answer in answers]),
        "between_tokens": _percentiles([gap for answer in answers for gap in answer.gaps]),
        "tokens_per_s_median": statistics.median(rates),
    }


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    p50, p95 = np.percentile(seconds, [50, 95]) if seconds else (np.nan, np.nan)
    return {"seconds_p50": float(p50), "seconds_p95": float(p95), "samples": len(seconds)}
