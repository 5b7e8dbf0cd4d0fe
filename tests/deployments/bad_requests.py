"""Requests that must be refused, as data: malformed, out of range, or meant to do harm.

They are meant for a server of a study with the objectives ``positive`` and ``short``, whose model is named ``tiny`` and
whose vocabulary has fewer than a million tokens. A body is judged before the id that it is sent to. Those that are
``keyed`` need one that is configured with ``KEY`` alone; the others one without keys, or with ``GOOD`` in place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deployments.body import LIMIT

KEY = "key-of-the-tests"
GOOD = {"authorization": f"Bearer {KEY}"}

_JSON = {"content-type": "application/json"}
_CHAT, _TEXT = "/v1/chat/completions", "/v1/completions"
_RUNNING = "/v1/generations/gen-unknown-0"
_USER = {"role": "user", "content": "Hello"}
_HUGE = 10**400
_HALF = b'"half \\ud83d of a pair"'


@dataclass(frozen=True)
class BadRequest:
    """What is sent and what must come back. ``expects`` is the error's ``param``, or, without one, in its message.

    ``layer`` says who refuses it: the protocol, for which body and path are enough, or the server around it.
    """

    name: str
    path: str
    body: bytes
    expects: str
    status: int = 400
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(_JSON))
    layer: str = "protocol"
    keyed: bool = False

    def met(self, error: Mapping[str, Any]) -> bool:
        """Whether this error, the object of that name in an answer's body, is about what is wrong."""
        if self.expects == error["param"]:
            return True
        return (error["param"] is None or self.layer == "server") and self.expects in error["message"]

    def __str__(self) -> str:
        return self.name


def _chat(name: str, expects: str, status: int = 400, **fields: Any) -> BadRequest:
    body = {"model": "tiny", "messages": [_USER], "max_tokens": 2} | fields
    return BadRequest(name, _CHAT, json.dumps(body).encode(), expects, status)


def _messages(name: str, expects: str, *messages: Any) -> BadRequest:
    return _chat(name, expects, messages=list(messages))


def _text(name: str, expects: str, status: int = 400, **fields: Any) -> BadRequest:
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 2} | fields
    return BadRequest(name, _TEXT, json.dumps(body).encode(), expects, status)


def _patch(name: str, expects: str, **fields: Any) -> BadRequest:
    return BadRequest(name, _RUNNING, json.dumps(fields).encode(), expects, method="PATCH")


def _raw(name: str, body: bytes, expects: str, status: int = 400, **headers: str) -> BadRequest:
    return BadRequest(name, _CHAT, body, expects, status, headers=headers or dict(_JSON))


def _spliced(name: str, fields: bytes, expects: str) -> BadRequest:
    """A good chat request with text of ours among its fields, that Python wouldn't write."""
    return _raw(
        name, b'{"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], ' + fields + b"}", expects
    )


def _typed(name: str, content_type: str) -> BadRequest:
    good = json.dumps({"model": "tiny", "messages": [_USER], "max_tokens": 2}).encode()
    return _raw(name, good, "content-type", 415, **{"content-type": content_type})


def _address(name: str, method: str, path: str, status: int, expects: str, body: bytes = b"") -> BadRequest:
    return BadRequest(name, path, body, expects, status, method, dict(_JSON) if body else {}, layer="server")


def _key(name: str, **headers: str) -> BadRequest:
    return BadRequest(name, "/v1/models", b"", "authorization", 401, "GET", headers, layer="server", keyed=True)


def _schedule(name: str, expects: str, *changes: Any) -> BadRequest:
    return _chat(name, expects, preference_schedule=list(changes))


def _at(at: Any, **preference: Any) -> dict[str, Any]:
    return {"at": at, "preference": preference or {"positive": 1}}


BODIES = [
    _raw("no body", b"", "body"),
    _raw("no JSON", b"model=tiny", "body"),
    _raw("half a JSON", b'{"model": "tiny", "messages": [', "body"),
    _raw("two JSONs", b"{} {}", "body"),
    _raw("a list", b"[]", "a JSON object"),
    _raw("null", b"null", "a JSON object"),
    _raw("a number", b"1", "a JSON object"),
    _raw("an empty object", b"{}", "model"),
    _raw("UTF-16", json.dumps({"model": "tiny"}).encode("utf-16"), "UTF-8"),
    _raw("Latin-1", '{"model": "tïny"}'.encode("latin-1"), "UTF-8"),
    _raw("overlong UTF-8", b'{"model": "\xc0\xaf"}', "UTF-8"),
    _raw("a byte order mark", b"\xef\xbb\xbf{}", "body"),
    _raw("zeros", bytes(1000), "body"),
    _raw("a comment", b'{"model": "tiny" /* ours */}', "body"),
    _raw("too long", b'{"model": "' + b"x" * LIMIT + b'"}', "body", 413),
    _raw("deep lists", b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "levels"),
    _raw("deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "levels"),
    _raw("deep, but not for a parser", b'{"metadata": ' + b"[" * 40 + b"]" * 40 + b"}", "levels"),
    _raw("many fields", json.dumps({f"field{i}": 1 for i in range(5000)}).encode(), "fields"),
    _raw("many objects", b'{"metadata": {"a": [' + b",".join([b"{}"] * 50_000) + b"]}}", "lists and objects"),
    _spliced("NaN", b'"temperature": NaN', "NaN"),
    _spliced("Infinity", b'"strength": Infinity', "Infinity"),
    _spliced("minus Infinity", b'"preference": {"positive": -Infinity}', "Infinity"),
    _spliced("a number beyond floats", b'"preference": {"positive": 1e999}', "preference.positive"),
    _spliced("a number of a million digits", b'"seed": ' + b"9" * 1_000_000, "64 bits"),
    _spliced("a field twice", b'"temperature": 0, "temperature": 2', "temperature more than once"),
    _spliced("an objective twice", b'"preference": {"positive": 1, "positive": 0}', "positive more than once"),
    _spliced("half a surrogate pair", b'"user": ' + _HALF, "user"),
    _spliced("half a surrogate pair as a key", b'"metadata": {' + _HALF + b": 1}", "metadata.half \\ud83d of a pair"),
    _spliced("half a surrogate pair in a message", b'"stop": [' + _HALF + b"]", "stop.0"),
    _typed("a form", "application/x-www-form-urlencoded"),
    _typed("plain text", "text/plain"),
    _typed("another kind of JSON", "application/merge-patch+json"),
    _typed("JSON in another encoding", "application/json; charset=utf-16"),
    _typed("two types", "application/json, text/html"),
]

TYPES = [
    _chat("no model", "model", model=None),
    _chat("a number as model", "model", model=1),
    _chat("another model", "model", 404, model="gpt-4o"),
    _chat("an empty model", "model", 404, model=""),
    _chat("a path as model", "model", 404, model="../../etc/passwd"),
    _chat("a field that isn't ours", "temprature", temprature=0.5),
    _chat("a field with a hostile name", "a\\nb\\x1b[31m", **{"a\nb\x1b[31m": 1}),
    _chat("a field without a name", '""', **{"": 1}),
    _chat("a field with a long name", "a" * 59 + "…", **{"a" * 10_000: 1}),
    _chat("a bool as n", "n", n=True),
    _chat("text as n", "n", n="1"),
    _chat("a fraction as n", "n", n=1.5),
    _chat("no answers", "n", n=0),
    _chat("a huge n", "n", n=1_000_000),
    _chat("a huger n", "n", n=_HUGE),
    _chat("no tokens", "max_tokens", max_tokens=0),
    _chat("fewer than no tokens", "max_tokens", max_tokens=-1),
    _chat("text as max_tokens", "max_tokens", max_tokens="2"),
    _chat("two limits", "max_completion_tokens", max_completion_tokens=3),
    _chat("a huge limit", "max_tokens", max_tokens=_HUGE),
    _chat("below zero", "temperature", temperature=-0.1),
    _chat("too hot", "temperature", temperature=2.1),
    _chat("text as temperature", "temperature", temperature="hot"),
    _chat("a bool as temperature", "temperature", temperature=False),
    _chat("no probability", "top_p", top_p=0),
    _chat("more than all probability", "top_p", top_p=1.01),
    _chat("a list as top_p", "top_p", top_p=[1]),
    _chat("a seed below zero", "seed", seed=-1),
    _chat("a fraction as seed", "seed", seed=0.5),
    _chat("a seed beyond 64 bits", "seed", seed=2**63),
    _chat("five stops", "stop", stop=["a", "b", "c", "d", "e"]),
    _chat("an empty stop", "stop", stop=[""]),
    _chat("a number as stop", "stop", stop=5),
    _chat("text as stream", "stream", stream="true"),
    _chat("stream options without a stream", "stream_options", stream_options={"include_usage": True}),
    _chat("an unknown stream option", "stream_options.fast", stream=True, stream_options={"fast": True}),
    _chat("a number as chat logprobs", "logprobs", logprobs=1),
    _chat("other tokens' logprobs", "top_logprobs", logprobs=True, top_logprobs=5),
    _chat("a tool", "tools", tools=[{"type": "function", "function": {"name": "rm"}}]),
    _chat("a required tool", "tool_choice", tool_choice="required"),
    _chat("a JSON schema", "response_format.type", response_format={"type": "json_object"}),
    _chat("a bias", "logit_bias", logit_bias={"50256": -100}),
    _chat("a penalty", "presence_penalty", presence_penalty=0.5),
    _chat("false as a penalty", "frequency_penalty", frequency_penalty=False),
    _chat("speech", "modalities", modalities=["text", "audio"]),
    _text("best of two", "best_of", best_of=2),
    _text("an echo", "echo", echo=True),
    _text("a suffix", "suffix", suffix="the end"),
    _text("true as completion logprobs", "logprobs", logprobs=True),
    _text("two logprobs a token", "logprobs", logprobs=2),
]

PROMPTS = [
    _chat("no messages", "messages", messages=[]),
    _chat("text as messages", "messages", messages="Hello"),
    _chat("a prompt for a chat", "prompt", prompt="Hello"),
    _messages("a message that is text", "messages.0", "Hello"),
    _messages("a message without a role", "messages.0.role", {"content": "Hello"}),
    _messages("a message without content", "messages.0.content", {"role": "user"}),
    _messages("null as content", "messages.0.content", {"role": "user", "content": None}),
    _messages("no parts", "messages.0.content", {"role": "user", "content": []}),
    _messages("an unknown role", "messages.0.role", {"role": "wizard", "content": "Hello"}),
    _messages("a tool's role", "messages.1.role", _USER, {"role": "tool", "content": "4"}),
    _messages("an answer last", "messages.1.role", _USER, {"role": "assistant", "content": "Hello"}),
    _messages("a field in a message", "messages.0.text", _USER | {"text": "Hello"}),
    _messages("an image", "messages.0.content.0.type", _USER | {"content": [{"type": "image_url", "text": ""}]}),
    _chat("messages without end", "messages", messages=[_USER] * 5000),
    _text("no prompt", "prompt", prompt=None),
    _text("an empty prompt", "prompt", prompt=""),
    _text("no prompts", "prompt", prompt=[]),
    _text("an empty prompt among others", "prompt.1", prompt=["Hello", ""]),
    _text("texts and tokens", "prompt.1", prompt=["Hello", 1]),
    _text("bools as tokens", "prompt.0", prompt=[True, False]),
    _text("tokens below zero", "prompt.0", prompt=[1, -1]),
    _text("fractions of tokens", "prompt.0", prompt=[[1.5]]),
    _text("tokens beyond 64 bits", "prompt.0", prompt=[_HUGE]),
    _text("prompts without end", "prompt", prompt=["a"] * 5000),
    _text("messages for a completion", "messages", messages=[_USER]),
]

STEERING = [
    _chat("text as preference", "preference", preference="positive"),
    _chat("a list as preference", "preference", preference=[0.5, 0.5]),
    _chat("no weights", "preference", preference={}),
    _chat("an unknown objective", "preference.funny", preference={"funny": 1}),
    _chat("an objective in other letters", "preference.Positive", preference={"Positive": 1}),
    _chat("a hostile objective", "preference.__class__", preference={"__class__": 1}),
    _chat("a weight below zero", "preference.short", preference={"positive": 1.5, "short": -0.5}),
    _chat("weights that sum to 2", "preference", preference={"positive": 1, "short": 1}),
    _chat("weights that sum to 0", "preference", preference={"positive": 0, "short": 0}),
    _chat("a bool as weight", "preference.positive", preference={"positive": True}),
    _chat("text as weight", "preference.positive", preference={"positive": "1"}),
    _chat("null as weight", "preference.positive", preference={"positive": None}),
    _chat("a huge weight", "preference.positive", preference={"positive": _HUGE}),
    _chat("an unknown method", "method", method="magic"),
    _chat("a list as method", "method", method=["mod"]),
    _chat("a strength below zero", "strength", strength=-1),
    _chat("a huge strength", "strength", strength=1e300),
    _chat("no candidates", "candidates", candidates=0),
    _chat("more candidates than tokens", "candidates", candidates=10_000_000),
    _chat("a fraction of a candidate", "candidates", candidates=2.5),
    _chat("a schedule that is an object", "preference_schedule", preference_schedule=_at(1)),
    _schedule("a schedule at token 0", "preference_schedule.0.at", _at(0)),
    _schedule("a schedule at a fraction", "preference_schedule.0.at", _at(1.5)),
    _schedule("a schedule that falls", "preference_schedule.1.at", _at(3), _at(2)),
    _schedule("a schedule that stands", "preference_schedule.1.at", _at(3), _at(3)),
    _schedule("a schedule without a preference", "preference_schedule.0.preference", {"at": 1}),
    _schedule("an unknown objective later", "preference_schedule.1.preference.funny", _at(1), _at(2, funny=1)),
    _schedule("a sum of 2 later", "preference_schedule.0.preference", _at(1, positive=1, short=1)),
    _schedule("a field in a schedule", "preference_schedule.0.method", _at(1) | {"method": "mod"}),
    _schedule("a schedule without end", "preference_schedule", *[_at(i + 1) for i in range(65)]),
    _patch("a change of nothing", "preference"),
    _patch("a change to an unknown objective", "preference.funny", preference={"funny": 1}),
    _patch("a change to a sum of 2", "preference", preference={"positive": 2}),
    _patch("a change to an unknown method", "method", preference={"positive": 1}, method="magic"),
    _patch("a change of the temperature", "temperature", preference={"positive": 1}, temperature=0),
    _patch("text as recompute", "recompute", preference={"positive": 1}, recompute="yes"),
]

_CHANGE = b'{"preference": {"positive": 1}}'

ADDRESSES = [
    _address("a generation that doesn't run", "PATCH", _RUNNING, 404, "gen-unknown", _CHANGE),
    _address("a generation with a long id", "PATCH", f"/v1/generations/{'a' * 2000}", 404, "aaaa", _CHANGE),
    _address("a generation with a hostile id", "PATCH", "/v1/generations/%00%0a%1b", 404, "got", _CHANGE),
    _address("posting to a generation", "POST", _RUNNING, 405, "POST", _CHANGE),
    _address("an unknown model", "GET", "/v1/models/gpt-4o", 404, "gpt-4o"),
    _address("an unknown address", "GET", "/v1/embeddings", 404, "/v1/embeddings"),
    _address("another version", "POST", "/v2/chat/completions", 404, "/v2/chat/completions", b"{}"),
    _address("getting a chat", "GET", _CHAT, 405, "GET"),
    _address("deleting a chat", "DELETE", _CHAT, 405, "DELETE"),
    _address("putting a completion", "PUT", _TEXT, 405, "PUT", b"{}"),
    _address("posting a model", "POST", "/v1/models", 405, "POST", b"{}"),
    _address("a file outside the playground", "GET", "/playground/%2e%2e/server.py", 404, "got"),
    _address("a file far outside", "GET", "/playground/..%2f..%2f..%2fetc%2fpasswd", 404, "got"),
]

KEYS = [
    _key("no key"),
    _key("an empty key", authorization="Bearer"),
    _key("another key", authorization="Bearer key-of-another"),
    _key("the key and more", authorization=f"Bearer {KEY}x"),
    _key("half the key", authorization=f"Bearer {KEY[:5]}"),
    _key("the key alone", authorization=KEY),
    _key("another scheme", authorization=f"Basic {KEY}"),
]

BAD_REQUESTS = [*BODIES, *TYPES, *PROMPTS, *STEERING, *ADDRESSES, *KEYS]
