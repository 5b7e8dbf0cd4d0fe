"""Answers: OpenAI's own types and client read what we write, streamed or not."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from deployments import answers
from deployments.answers import Choice, Head, Mage, TokenText, chunk, completion, plan_rows, sse, usage, usage_chunk
from deployments.errors import ApiError
from deployments.protocol import Kind
from mage_ray.decoding.plan import Plan, Row
from mage_ray.decoding.request import FinishReason

MAGE = Mage(
    preference={"positive": 0.25, "short": 0.75},
    method="mage-i-m",
    strength=1.0,
    candidates=50,
    topology="fused",
    generations=("gen-1-0", "gen-1-1"),
    rows=plan_rows(
        Plan((Row((0.5, 0.0)), Row((0.0, -1.5), "vocabulary", home=1)), (1.0, 2.0), 50), ["bone-positive", "bone-short"]
    ),
)
TOKENS = (TokenText("Gr", -0.5, b"Gr"), TokenText("�", -1.5, b"\xc3"), TokenText("", -math.inf, b"\xbc"))


def head(kind: Kind) -> Head:
    return Head(kind, "gen-1", 1_700_000_000, "tiny")


def test_the_block_says_how_an_answer_was_steered() -> None:
    block = replace(MAGE, guided=3, tokens=4, changes=((2, {"short": 1.0}),)).block()
    assert block["rows"] == [
        {"weight": 1.0, "coefficients": {"bone-positive": 0.5}, "head": None, "home": 0},
        {"weight": 2.0, "coefficients": {"bone-short": -1.5}, "head": "vocabulary", "home": 1},
    ]
    assert (block["guided_tokens"], block["guided_share"]) == (3, 0.75)
    assert block["changes"] == [{"at": 2, "preference": {"short": 1.0}}]
    assert MAGE.block()["guided_share"] == 0


@pytest.mark.parametrize(("finished", "reason"), [("stop", "stop"), ("length", "length"), ("vetoed", "content_filter")])
def test_an_answer_is_openais(finished: FinishReason, reason: str) -> None:
    choices = [Choice(0, "Grü", finished, TOKENS), Choice(1, "", finished, ())]
    chat = completion(head("chat"), choices, usage(5, 3), MAGE)
    read = ChatCompletion.model_validate(chat)
    assert [c.message.content for c in read.choices] == ["Grü", ""]
    assert [c.finish_reason for c in read.choices] == [reason] * 2
    assert read.usage is not None and read.usage.total_tokens == 8
    content = read.choices[0].logprobs
    assert content is not None and content.content is not None
    assert b"".join(bytes(t.bytes or []) for t in content.content) == "Grü".encode()
    assert [t.logprob for t in content.content] == [-0.5, -1.5, -9999.0]
    text = completion(head("completion"), choices, usage(5, 3), MAGE)
    plain = Completion.model_validate(text)
    assert plain.choices[0].text == "Grü" and plain.choices[0].finish_reason == reason
    assert plain.choices[0].logprobs is not None and plain.choices[0].logprobs.text_offset == [0, 2, 3]
    assert chat["mage"] == text["mage"] == MAGE.block()
    for answer in (chat, text):
        json.dumps(answer, allow_nan=False)


def test_an_answer_that_failed_is_none() -> None:
    with pytest.raises(KeyError):
        completion(head("chat"), [Choice(0, "", "cancelled")], usage(1, 0), MAGE)


def chunks(kind: Kind) -> Iterator[dict[str, Any]]:
    """A stream of two choices with all that a chunk may have."""
    for i in range(2):
        yield chunk(head(kind), Choice(i, "Gr", logprobs=TOKENS[:1]), first=True, include_usage=True, mage=MAGE)
    yield chunk(head(kind), Choice(0, "ü\n\u2028data: 🌍", logprobs=TOKENS[1:], offset=2), include_usage=True)
    for i in range(2):
        yield chunk(head(kind), Choice(i, "", "stop", ()), include_usage=True, mage=replace(MAGE, guided=1, tokens=2))
    yield usage_chunk(head(kind), usage(5, 3))


def test_chunks_are_openais() -> None:
    read = [ChatCompletionChunk.model_validate(event) for event in chunks("chat")]
    assert [e.choices[0].delta.role for e in read[:-1]] == ["assistant", "assistant", None, None, None]
    assert [e.choices[0].finish_reason for e in read[:-1]] == [None, None, None, "stop", "stop"]
    assert read[3].choices[0].delta.content is None
    assert read[-1].choices == [] and read[-1].usage is not None and read[-1].usage.total_tokens == 8
    # Their type of completions wants a reason in every chunk, which their own server doesn't give.
    for event in chunks("completion"):
        for choice in event["choices"]:
            choice["finish_reason"] = choice["finish_reason"] or "stop"
        Completion.model_validate(event)


async def _read(events: bytes, kind: Kind) -> list[Any]:
    """What OpenAI's client makes of these bytes, from a server that knows nothing but them."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n" + events)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0) as client:
            if kind == "chat":
                chat = await client.chat.completions.create(
                    model="tiny", messages=[{"role": "user", "content": "Hello"}], stream=True
                )
                return [event async for event in chat]
            text = await client.completions.create(model="tiny", prompt="Hello", stream=True)
            return [event async for event in text]


@pytest.mark.parametrize("kind", ["chat", "completion"])
def test_openais_client_reads_our_stream(kind: Kind) -> None:
    events = list(chunks(kind))
    read = asyncio.run(_read(b"".join(map(sse, events)) + answers.DONE, kind))
    assert [event.model_dump(exclude_unset=True) for event in read] == events
    assert read[0].mage["generations"] == ["gen-1-0", "gen-1-1"]


def test_openais_client_raises_the_error_that_ends_a_stream() -> None:
    error = ApiError.of(500, "server", "no gang", "one")
    first = next(chunks("chat"))
    with pytest.raises(openai.APIError, match="server: got no gang, allowed: one"):
        asyncio.run(_read(sse(first) + sse(error.body()), "chat"))


def test_an_event_is_one_line_of_ascii() -> None:
    assert sse({"a": "é\n\u2028"}) == b'data: {"a":"\\u00e9\\n\\u2028"}\n\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        sse({"a": math.nan})
