"""The fields of each kind of request, as pydantic checks them and /openapi.json describes them.

Strict: a bool is no number, and "1" is none either. What is neither here nor neutral is refused, never ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import models_json_schema

from deployments.errors import kind
from mage_ray.errors import FieldError

MAX_N, MAX_PROMPTS, MAX_MESSAGES, MAX_PARTS, MAX_STOPS, MAX_CHANGES = 8, 64, 1024, 256, 4, 64


class Neutral:
    """Marks a field of OpenAI's that we don't have: null and these values change nothing, and are all that it takes."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def check(self, value: Any) -> None:
        """Raises ValueError for a value that would change the answer."""
        # JSON's false is no 0, as it is in Python.
        same = (v == value and isinstance(v, bool) == isinstance(value, bool) for v in self.values)
        if value is not None and not any(same):
            raise ValueError(" or ".join(["null", *map(json.dumps, self.values)]))

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        return handler.generate_schema(Annotated[Any, PlainValidator(self.check)])

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"enum": [None, *self.values], "description": "Accepted where it changes nothing."}


Absent = Annotated[None, Neutral()]
Off = Annotated[None, Neutral(False)]
Zero = Annotated[None, Neutral(0)]
NoList = Annotated[None, Neutral([])]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Part):
    type: Literal["text"]
    text: str


def _parts(content: Any) -> Any:
    if not isinstance(content, str | list):
        raise ValueError("text, or a list of text parts")
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


_PARTS = {"type": "array", "items": TextPart.model_json_schema(), "minItems": 1, "maxItems": MAX_PARTS}


class Message(_Part):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        Field(min_length=1, max_length=MAX_PARTS),
        FailFast(),  # A body has room for half a million wrong parts, and one error is all that is told.
        BeforeValidator(_parts),
        WithJsonSchema({"anyOf": [{"type": "string"}, _PARTS]}),
    ]
    name: str | None = None
    """Accepted and ignored: few chat templates know of it."""
    # An answer's message, sent back as it was read by a client.
    refusal: Absent = None
    annotations: NoList = None
    audio: Absent = None
    function_call: Absent = None
    tool_calls: NoList = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates know it, whose name for developers is system."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "\n".join(part.text for part in self.content)}


def _ids(value: Any) -> bool:
    """Whether it is a list of one or more token ids. A bool is no number."""
    return isinstance(value, list) and len(value) > 0 and all(type(i) is int and i >= 0 for i in value)


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    allowed = "text, token ids, or a list of texts or of lists of token ids, none of them empty"
    if isinstance(value, str) and value:
        return (value,)
    if _ids(value):
        return (tuple(value),)
    if not isinstance(value, list) or not value:
        raise ValueError(allowed)
    if len(value) > MAX_PROMPTS:
        raise ValueError(f"at most {MAX_PROMPTS} prompts")
    for i, item in enumerate(value):
        if not ((isinstance(item, str) and item) or _ids(item)):
            raise FieldError(str(i), kind(item), allowed)
    return tuple(item if isinstance(item, str) else tuple(item) for item in value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else [] if value is None else value
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ValueError(f"text, or up to {MAX_STOPS} texts, none of them empty")
    return tuple(stops)


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_TEXT = {"type": "string", "minLength": 1}
_PROMPTS = {"type": "array", "items": {"anyOf": [_TEXT, _IDS]}, "minItems": 1, "maxItems": MAX_PROMPTS}
_PROMPT = {"anyOf": [_TEXT, _IDS, _PROMPTS]}
_STOP = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": MAX_STOPS}, {"type": "null"}]}

Count = Annotated[int, Field(ge=1)]
Weights = Annotated[
    dict[str, Annotated[float, Field(ge=0)]],
    Field(description="Weight for each objective, which sum to 1; those left out weigh 0."),
]
Strength = Annotated[float, Field(ge=0, le=100, description="Of the guide; 0 leaves the base alone.")]
Candidates = Annotated[int, Field(ge=1, description="How many of the base's most likely tokens the guide re-ranks.")]
Method = Annotated[str, Field(description="How experts are merged and guide: see /v1/objectives.")]


class Change(_Part):
    at: Annotated[int, Field(ge=1, description="After so many generated tokens.")]
    preference: Weights


class StreamOptions(_Part):
    include_usage: bool | None = None
    include_obfuscation: Off = None


class TextFormat(_Part):
    type: Literal["text"]


class _Steered(_Part):
    """What a request of ours has beside OpenAI's fields."""

    method: Method | None = None
    strength: Strength | None = None
    candidates: Candidates | None = None


class _Request(_Steered):
    model: str
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    seed: Annotated[int, Field(ge=0)] | None = None
    stop: Annotated[tuple[str, ...], PlainValidator(_stops), WithJsonSchema(_STOP)] = ()
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    preference: Weights | None = Field(None, description="The trade-off; equal weights where it is left out.")
    preference_schedule: Annotated[list[Change], Field(max_length=MAX_CHANGES)] | None = Field(
        None, description="Trade-offs that take over later in the answer, in rising order."
    )
    # Accepted and ignored.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: Literal["auto", "default"] | None = None
    # OpenAI's, but none of ours.
    presence_penalty: Zero = None
    frequency_penalty: Zero = None
    logit_bias: Annotated[None, Neutral({})] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        one, other = self.max_tokens, self.max_completion_tokens
        if one is not None and other is not None and one != other:
            raise FieldError("max_completion_tokens", str(other), f"{one}, as max_tokens, or one of the two alone")
        if self.stream_options is not None and not self.stream:
            raise FieldError("stream_options", "an object", "null where stream isn't true")
        changes = self.preference_schedule or []
        for i in range(1, len(changes)):
            if changes[i].at <= changes[i - 1].at:
                allowed = f"more than {changes[i - 1].at}, where the one before it takes over"
                raise FieldError(f"preference_schedule.{i}.at", str(changes[i].at), allowed)
        return self


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), FailFast()]
    logprobs: bool | None = None
    top_logprobs: Zero = None
    response_format: TextFormat | None = None
    modalities: Annotated[None, Neutral(["text"])] = None
    tools: NoList = None
    functions: NoList = None
    tool_choice: Annotated[None, Neutral("none", "auto")] = None
    function_call: Annotated[None, Neutral("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    audio: Absent = None
    prediction: Absent = None
    web_search_options: Absent = None
    reasoning_effort: Annotated[None, Neutral("none")] = None
    verbosity: Annotated[None, Neutral("medium")] = None

    @model_validator(mode="after")
    def _ends_with_the_user(self) -> Self:
        if (role := self.messages[-1].role) != "user":
            raise FieldError(f"messages.{len(self.messages) - 1}.role", role, "user, in the last message")
        return self


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: Annotated[tuple[Any, ...], PlainValidator(_prompts), WithJsonSchema(_PROMPT)]
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None
    best_of: Annotated[None, Neutral(1)] = None
    echo: Off = None
    suffix: Annotated[None, Neutral("")] = None


class PatchRequest(_Steered):
    """PATCH /v1/generations/{id}."""

    preference: Weights
    recompute: bool = Field(True, description="As if all tokens so far were a new prompt: exact, but not at once.")


_REQUESTS: tuple[type[BaseModel], ...] = (ChatRequest, CompletionRequest, PatchRequest)


def documented(request: type[BaseModel]) -> dict[str, Any]:
    """What FastAPI is told of a body that it leaves to us."""
    schema = {"$ref": f"#/components/schemas/{request.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def components() -> dict[str, Any]:
    """The schemas of all requests, by their names, for ``components`` of an OpenAPI document."""
    asked = [(request, "validation") for request in _REQUESTS]
    _, schemas = models_json_schema(asked, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    return dict(schemas["$defs"])
