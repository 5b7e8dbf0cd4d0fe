"""Requests: bytes to JSON, and JSON to one ``Asked``, whichever of OpenAI's two endpoints it came by.

Whatever a client sends, what comes out is that or an ApiError that names the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from deployments.body import parse_body
from deployments.errors import ApiError, api_error
from deployments.schema import ChatRequest, CompletionRequest, PatchRequest
from mage_ray.errors import FieldError
from mage_ray.preference import Preference, named_preference

__all__ = [
    "Asked", "ChatRequest", "CompletionRequest", "PatchRequest",
    "check_preferences", "check_served", "parse_body", "parse_patch", "parse_request",
]  # fmt: skip

Kind = Literal["chat", "completion"]
Prompt = list[dict[str, str]] | str | tuple[int, ...]
"""A conversation of (role, content) messages, bare text, or token ids."""


@dataclass(frozen=True)
class Asked:
    """What a client wants; None where the server's default holds.

    Each of ``prompts`` gets ``n`` answers. ``preference`` and those of the ``schedule``, which are (generated tokens,
    preference) pairs, are as they came: ``check_preferences`` makes sense of them.
    """

    kind: Kind
    model: str
    prompts: tuple[Prompt, ...]
    n: int = 1
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    logprobs: bool = False
    preference: Mapping[str, float] | None = None
    method: str | None = None
    strength: float | None = None
    candidates: int | None = None
    schedule: tuple[tuple[int, Mapping[str, float]], ...] = ()


def parse_request(kind: Kind, body: Mapping[str, Any]) -> Asked:
    """A body of ``/v1/chat/completions`` or ``/v1/completions``. Raises ApiError 400, which names the field."""
    try:
        if kind == "chat":
            chat = ChatRequest.model_validate(body)
            conversation = [message.plain() for message in chat.messages]
            return _asked(kind, chat, (conversation,), bool(chat.logprobs))
        completion = CompletionRequest.model_validate(body)
        return _asked(kind, completion, completion.prompt, completion.logprobs is not None)
    except ValidationError as error:
        raise api_error(error) from None


def parse_patch(body: Mapping[str, Any]) -> PatchRequest:
    """A body of ``PATCH /v1/generations/{id}``. Raises ApiError 400, which names the field."""
    try:
        return PatchRequest.model_validate(body)
    except ValidationError as error:
        raise api_error(error) from None


def check_served(asked: Asked | PatchRequest, model: str, methods: Sequence[str], vocabulary: int) -> None:
    """Raises ApiError 404 for another model, FieldError for a method or candidates that the served study hasn't."""
    if isinstance(asked, Asked) and asked.model != model:
        raise ApiError.of(404, "model", asked.model or "empty text", model, param="model", code="model_not_found")
    if asked.method is not None and asked.method not in methods:
        raise FieldError("method", asked.method, f"one of {', '.join(methods)}")
    if asked.candidates is not None and asked.candidates > vocabulary:
        raise FieldError("candidates", asked.candidates, f"1 to {vocabulary}, the size of the vocabulary")


def check_preferences(asked: Asked, objectives: Sequence[str]) -> tuple[Preference, tuple[tuple[int, Preference], ...]]:
    """The preference, equal weights where none is asked for, and the schedule, in the order of ``objectives``.

    Raises FieldError ``preference.<name>`` or ``preference_schedule.<i>.preference.<name>``.
    """
    weights = asked.preference if asked.preference is not None else dict.fromkeys(objectives, 1 / len(objectives))
    schedule = tuple(
        (at, named_preference(later, objectives, f"preference_schedule.{i}.preference"))
        for i, (at, later) in enumerate(asked.schedule)
    )
    return named_preference(weights, objectives), schedule


def _asked(kind: Kind, request: ChatRequest | CompletionRequest, prompts: tuple[Prompt, ...], logprobs: bool) -> Asked:
    return Asked(
        kind=kind,
        model=request.model,
        prompts=prompts,
        n=request.n or 1,
        max_tokens=request.max_tokens or request.max_completion_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        seed=request.seed,
        stop=request.stop,
        stream=bool(request.stream),
        include_usage=request.stream_options is not None and bool(request.stream_options.include_usage),
        logprobs=logprobs,
        preference=request.preference,
        method=request.method,
        strength=request.strength,
        candidates=request.candidates,
        schedule=tuple((change.at, change.preference) for change in request.preference_schedule or []),
    )
