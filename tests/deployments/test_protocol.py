"""The protocol: what good requests say, and that bad ones are refused by name, whatever they are."""

from __future__ import annotations

import json
import math
import string
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jsonschema
import pytest
from bad_requests import BAD_REQUESTS, BadRequest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from deployments.answers import sse
from deployments.body import MAX_DEPTH, parse_body
from deployments.errors import ApiError, api_error
from deployments.protocol import Asked, Kind, check_preferences, check_served, parse_patch, parse_request
from deployments.schema import ChatRequest, CompletionRequest, PatchRequest
from mage_ray.errors import FieldError

OBJECTIVES = ["positive", "short"]
METHODS = ["bone-soup", "mage-i-m"]
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}]}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "Hello"}
SECRET = "my-darkest-secret"


def refused(path: str, raw: bytes, content_type: str | None = "application/json") -> ApiError | None:
    """What the protocol answers to a request at this path; None when it is fine."""
    try:
        body = parse_body(raw, content_type)
        if path.startswith("/v1/generations/"):
            patch = parse_patch(body)
            check_served(patch, "tiny", METHODS, 300)
            check_preferences(Asked("chat", "tiny", (), preference=patch.preference), OBJECTIVES)
            return None
        asked = parse_request("chat" if path.endswith("/chat/completions") else "completion", body)
        check_served(asked, "tiny", METHODS, 300)
        check_preferences(asked, OBJECTIVES)
    except (ApiError, FieldError) as error:
        return api_error(error)
    return None


def check_error(error: ApiError) -> None:
    """It is fit to be sent: one line, that UTF-8 and HTTP can carry."""
    assert 400 <= error.status < 500
    assert set(error.body()["error"]) == {"message", "type", "param", "code"}
    assert error.message.isprintable() and len(error.message) < 1500
    assert ": got " in error.message and ", allowed: " in error.message
    sse(error.body())


# Good requests


def test_a_chat_says_all_that_it_asks() -> None:
    body = {
        "model": "tiny",
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": "two"}]},
            {"role": "assistant", "content": "Three", "refusal": None, "tool_calls": None, "annotations": []},
            {"role": "user", "content": "Grüße 🌍", "name": "ana"},
        ],
        "max_completion_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        "n": 2,
        "seed": 2**63 - 1,
        "stop": "\n",
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": True,
        "preference": {"positive": 0.25, "short": 0.75},
        "method": "mage-i-m",
        "strength": 2,
        "candidates": 10,
        "preference_schedule": [{"at": 1, "preference": {"short": 1}}, {"at": 5, "preference": {"positive": 1}}],
        "user": "somebody",
        "metadata": {"trial": "1"},
        "store": False,
    }
    asked = parse_request("chat", parse_body(json.dumps(body).encode(), "Application/JSON; charset=UTF-8"))
    assert asked == Asked(
        kind="chat",
        model="tiny",
        prompts=(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "One\ntwo"},
                {"role": "assistant", "content": "Three"},
                {"role": "user", "content": "Grüße 🌍"},
            ],
        ),
        n=2,
        max_tokens=7,
        temperature=0,
        top_p=0.5,
        seed=2**63 - 1,
        stop=("\n",),
        stream=True,
        include_usage=True,
        logprobs=True,
        preference={"positive": 0.25, "short": 0.75},
        method="mage-i-m",
        strength=2,
        candidates=10,
        schedule=((1, {"short": 1}), (5, {"positive": 1})),
    )
    check_served(asked, "tiny", METHODS, 300)
    assert check_preferences(asked, OBJECTIVES) == ((0.25, 0.75), ((1, (0, 1)), (5, (1, 0))))


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("Hello", ("Hello",)),
        (["Hello", "you"], ("Hello", "you")),
        ([5, 0, 7], ((5, 0, 7),)),
        ([[5, 0], [7]], ((5, 0), (7,))),
    ],
)
def test_prompts_come_in_four_forms(prompt: Any, prompts: Any) -> None:
    assert parse_request("completion", TEXT | {"prompt": prompt}).prompts == prompts


def test_what_is_left_out_or_null_is_the_servers_default() -> None:
    for kind, least, schema in (("chat", CHAT, ChatRequest), ("completion", TEXT, CompletionRequest)):
        plain = parse_request(kind, least)  # type: ignore[arg-type]
        assert plain == Asked(kind=kind, model="tiny", prompts=plain.prompts)  # type: ignore[arg-type]
        nulls = {name: None for name, field in schema.model_fields.items() if not field.is_required()}  # type: ignore[attr-defined]
        assert len(nulls) > 20
        assert parse_request(kind, least | nulls) == plain  # type: ignore[arg-type]
    assert check_preferences(plain, OBJECTIVES) == ((0.5, 0.5), ())


@pytest.mark.parametrize("logprobs", [0, 1])
def test_a_completion_has_logprobs_from_zero_on(logprobs: int) -> None:
    assert parse_request("completion", TEXT | {"logprobs": logprobs}).logprobs


NEUTRAL = {
    "tools": [], "functions": [], "tool_choice": "auto", "function_call": "none", "parallel_tool_calls": True,
    "response_format": {"type": "text"}, "logit_bias": {}, "presence_penalty": 0, "frequency_penalty": 0.0,
    "modalities": ["text"], "top_logprobs": 0, "reasoning_effort": "none", "service_tier": "auto",
}  # fmt: skip


def test_fields_that_we_do_not_have_are_accepted_where_they_change_nothing() -> None:
    assert parse_request("chat", CHAT | NEUTRAL) == parse_request("chat", CHAT)
    neutral = {"best_of": 1, "echo": False, "suffix": "", "presence_penalty": 0}
    assert parse_request("completion", TEXT | neutral) == parse_request("completion", TEXT)


def test_a_change() -> None:
    patch = parse_patch({"preference": {"positive": 1}, "strength": 3, "recompute": False})
    assert (patch.preference, patch.method, patch.strength, patch.recompute) == ({"positive": 1}, None, 3, False)
    assert parse_patch({"preference": {}}).recompute


@pytest.mark.parametrize(
    ("model", "good"),
    [
        (ChatRequest, CHAT | NEUTRAL | {"stop": ["a"], "preference_schedule": [{"at": 1, "preference": {"a": 1}}]}),
        (CompletionRequest, TEXT | {"prompt": [[1, 2], [3]], "stop": "a", "preference": {"a": 0.5}}),
        (PatchRequest, {"preference": {"a": 1}, "recompute": False}),
    ],
)
def test_the_schema_for_openapi_takes_what_we_take(model: type[BaseModel], good: dict[str, Any]) -> None:
    schema = model.model_json_schema()
    jsonschema.validate(good, schema)
    with pytest.raises(jsonschema.ValidationError, match="temprature"):
        jsonschema.validate(good | {"temprature": 1}, schema)
    assert "sum to 1" in json.dumps(schema["properties"]["preference"])


# Bad requests


@pytest.mark.parametrize("bad", [bad for bad in BAD_REQUESTS if bad.layer == "protocol"], ids=str)
def test_a_bad_request_is_refused_by_name(bad: BadRequest) -> None:
    error = refused(bad.path, bad.body, bad.headers.get("content-type"))
    assert error is not None
    check_error(error)
    assert error.status == bad.status
    assert bad.met(error.body()["error"]), error.message
    assert error.type == "invalid_request_error"


def test_the_table_names_each_request_once() -> None:
    assert len({(bad.name, bad.path) for bad in BAD_REQUESTS}) == len(BAD_REQUESTS) > 45


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": SECRET, "content": SECRET}]},
        {"messages": [{"role": "user", "content": {"a": SECRET}}]},
        {"messages": [{"role": "user", "content": [{"type": SECRET, "text": SECRET}]}]},
        {"messages": SECRET},
        {"message": SECRET},
        {"stop": [SECRET, 1]},
        {"n": SECRET},
        {"metadata": SECRET},
        {"user": [SECRET]},
        {"tools": [{"type": SECRET}]},
    ],
    ids=str,
)
def test_an_error_never_quotes_what_somebody_wrote(body: dict[str, Any]) -> None:
    error = refused("/v1/chat/completions", json.dumps(CHAT | body).encode())
    assert error is not None and SECRET not in json.dumps(error.body())
    suffix = refused("/v1/completions", json.dumps(TEXT | {"suffix": SECRET}).encode())
    assert suffix is not None and SECRET not in json.dumps(suffix.body())


def test_a_body_may_nest_just_so_deep() -> None:
    def nested(levels: int) -> bytes:
        return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"

    parse_body(nested(MAX_DEPTH), "application/json")
    with pytest.raises(ApiError, match="levels"):
        parse_body(nested(MAX_DEPTH + 1), "application/json")


def test_no_content_type_is_not_json() -> None:
    with pytest.raises(ApiError) as refusal:
        parse_body(b"{}", None)
    assert refusal.value.status == 415


@settings(max_examples=300, deadline=None)
@given(raw=st.binary() | st.text(alphabet='{}[]",:\\u0d8eE+-.naulrtsfI \x00é').map(str.encode))
def test_any_bytes_are_an_object_or_refused(raw: bytes) -> None:
    try:
        assert isinstance(parse_body(raw, "application/json", limit=200), dict)
    except ApiError as error:
        check_error(error)


def _near(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    """Values that a request may well have, and any others of JSON."""
    texts = st.text(max_size=5) | st.text(alphabet=string.ascii_letters + "\ud83d\n", max_size=5)
    scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.just(10**30) | texts
    anything = st.recursive(
        scalars | st.sampled_from(values),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts | st.sampled_from(NAMES), inner, max_size=3),
        max_leaves=8,
    )
    return st.sampled_from(values) | anything


FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *PatchRequest.model_fields})
NAMES = [*FIELDS, "role", "content", "type", "text", "at", "positive", "short", "include_usage"]
VALUES = [
    "tiny", "user", 0, 1, 0.5, 2, -1, 100, math.nan, [], {}, [1, 2], ["a"], [[1], "a"], CHAT["messages"],
    {"positive": 1}, {"positive": 0.5, "short": 0.5}, {"type": "text"}, {"include_usage": True},
    [{"at": 1, "preference": {"short": 1}}, {"at": 2, "preference": {"positive": 1}}], *METHODS,
]  # fmt: skip


@settings(max_examples=600, deadline=None)
@given(
    path=st.sampled_from(["/v1/chat/completions", "/v1/completions", "/v1/generations/gen-1-0"]),
    base=st.sampled_from([{}, CHAT, TEXT, {"preference": {"positive": 1}}]),
    changes=st.dictionaries(st.sampled_from(NAMES), _near(VALUES), max_size=4),
)
def test_any_json_is_understood_or_refused(path: str, base: dict[str, Any], changes: dict[str, Any]) -> None:
    error = refused(path, json.dumps(base | changes).encode())
    if error is not None:
        check_error(error)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["chat", "completion"]), data=st.data())
def test_any_object_is_a_request_or_refused_even_if_no_json_says_so(kind: Kind, data: st.DataObject) -> None:
    body = (CHAT if kind == "chat" else TEXT) | data.draw(st.dictionaries(st.sampled_from(FIELDS), _near(VALUES)))
    try:
        asked = parse_request(kind, body)
    except ApiError as error:
        check_error(error)
    else:
        assert asked.n <= 8 and len(asked.stop) <= 4 and asked.prompts


def test_the_protocol_needs_neither_ray_nor_torch() -> None:
    code = "import deployments.protocol, deployments.answers, sys; print(*{'ray', 'torch', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
