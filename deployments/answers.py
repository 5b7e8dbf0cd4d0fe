"""Answers: completion objects and chunks as OpenAI's clients read them, and our block ``mage`` beside.

Plain data in, plain data out; texts and figures come from whoever decodes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mage_ray.decoding.plan import Plan
    from mage_ray.decoding.request import FinishReason

DONE = b"data: [DONE]\n\n"
"""The end of a stream without errors."""

_FINISHED = {"stop": "stop", "length": "length", "vetoed": "content_filter"}
_OBJECTS = {
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
    ("completion", False): "text_completion",
    ("completion", True): "text_completion",
}
_LEAST = -9999.0
"""Stands for a log-probability that JSON has no number for, as it does at OpenAI."""


@dataclass(frozen=True)
class TokenText:
    """One drawn token: its text on its own, its log-probability, and the bytes of which the text is made."""

    token: str
    logprob: float
    raw: bytes


@dataclass(frozen=True)
class Choice:
    """One answer, or a chunk of one. ``finished`` is the engine's reason; None while more is to come.

    ``logprobs`` are its tokens, None where they weren't asked for. ``offset`` is where they begin, in characters of all
    the answer's tokens.
    """

    index: int
    text: str
    finished: FinishReason | None = None
    logprobs: Sequence[TokenText] | None = None
    offset: int = 0


@dataclass(frozen=True)
class Head:
    """What all objects of one answer begin with. ``created``: seconds since 1970."""

    kind: Literal["chat", "completion"]
    id: str
    created: int
    model: str

    def fields(self, chunk: bool) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": _OBJECTS[self.kind, chunk],
            "created": self.created,
            "model": self.model,
        }


@dataclass(frozen=True)
class Mage:
    """How an answer was, or is being, steered. ``rows`` are ``plan_rows``; ``generations`` has an id for each choice.

    ``changes`` are the (generated tokens, preference) at which another preference took over. ``guided`` of the
    ``tokens`` so far were drawn with the guide.
    """

    preference: Mapping[str, float]
    method: str
    strength: float
    candidates: int
    topology: Literal["fused", "split"]
    generations: Sequence[str]
    rows: Sequence[Mapping[str, Any]]
    changes: Sequence[tuple[int, Mapping[str, float]]] = ()
    guided: int = 0
    tokens: int = 0

    def block(self) -> dict[str, Any]:
        """The answer's field ``mage``."""
        return {
            "preference": dict(self.preference),
            "method": self.method,
            "strength": self.strength,
            "candidates": self.candidates,
            "topology": self.topology,
            "generations": list(self.generations),
            "rows": [dict(row) for row in self.rows],
            "guided_tokens": self.guided,
            "guided_share": self.guided / self.tokens if self.tokens else 0.0,
            "changes": [{"at": at, "preference": dict(preference)} for at, preference in self.changes],
        }


def plan_rows(plan: Plan, experts: Sequence[str], guides: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The plan's rows with the names of the bank's ``experts``, those with a coefficient of 0 left out.

    ``guides`` are those of the bank that rows away from home have, where that is another model's.
    """
    away = experts if guides is None else guides
    return [
        {
            "weight": weight,
            "coefficients": {
                name: c for name, c in zip(away if row.home else experts, row.coefficients, strict=True) if c != 0
            },
            "head": row.head,
            "home": row.home,
        }
        for row, weight in zip(plan.rows, plan.weights, strict=True)
    ]


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Numbers of tokens; of several prompts and choices, their sums."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def completion(head: Head, choices: Sequence[Choice], usage: Mapping[str, int], mage: Mage) -> dict[str, Any]:
    """An answer that isn't streamed; each choice has ended. Raises KeyError for one that was cancelled or failed."""
    listed = []
    for choice in choices:
        said = {"message": {"role": "assistant", "content": choice.text}}
        listed.append(_choice(head, choice, said if head.kind == "chat" else {"text": choice.text}))
    return {**head.fields(chunk=False), "choices": listed, "usage": dict(usage), "mage": mage.block()}


def chunk(
    head: Head, choice: Choice, *, first: bool = False, include_usage: bool = False, mage: Mage | None = None
) -> dict[str, Any]:
    """An event of a stream: what one choice has to add; ``first`` of its chunks says who speaks.

    Raises KeyError for a choice that was cancelled or failed: that ends with an error instead.
    """
    if head.kind == "chat":
        delta = {"role": "assistant"} if first else {}
        silent = choice.finished is not None and not choice.text
        said: dict[str, Any] = {"delta": delta if silent else {**delta, "content": choice.text}}
    else:
        said = {"text": choice.text}
    event = {**head.fields(chunk=True), "choices": [_choice(head, choice, said)]}
    if include_usage:
        event["usage"] = None
    return event if mage is None else {**event, "mage": mage.block()}


def usage_chunk(head: Head, usage: Mapping[str, int]) -> dict[str, Any]:
    """The event with the stream's usage, after the last choice has ended."""
    return {**head.fields(chunk=True), "choices": [], "usage": dict(usage)}


def sse(event: Mapping[str, Any]) -> bytes:
    """A server-sent event. An error's body ends a stream, in place of ``DONE``."""
    return b"data: " + json.dumps(event, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n\n"


def _choice(head: Head, choice: Choice, said: Mapping[str, Any]) -> dict[str, Any]:
    logprobs = None
    if choice.logprobs is not None:
        logprobs = _chat_logprobs(choice) if head.kind == "chat" else _text_logprobs(choice)
    finish = None if choice.finished is None else _FINISHED[choice.finished]
    return {"index": choice.index, **said, "logprobs": logprobs, "finish_reason": finish}


def _chat_logprobs(choice: Choice) -> dict[str, Any]:
    content = [
        {"token": t.token, "logprob": _finite(t.logprob), "bytes": list(t.raw), "top_logprobs": []}
        for t in choice.logprobs or ()
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(choice: Choice) -> dict[str, Any]:
    tokens = choice.logprobs or ()
    offsets = list(accumulate((len(t.token) for t in tokens), initial=choice.offset))[:-1]
    return {
        "tokens": [t.token for t in tokens],
        "token_logprobs": [_finite(t.logprob) for t in tokens],
        "text_offset": offsets,
        "top_logprobs": None,
    }


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST) if math.isfinite(logprob) else _LEAST
