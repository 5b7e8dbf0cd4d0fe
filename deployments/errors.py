"""Errors as OpenAI's clients know them: a status, and one line that names the field, what it got and what is allowed.

Neither prompts nor other texts of a request are quoted: an error says of what kind they are.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from mage_ray.errors import FieldError, UserError

RETRY_AFTER = 1
"""Seconds after which a request that found no room may be tried again."""

# Which field of a request stands for what the engine and the methods call otherwise.
_WIRE_NAMES = {"max_new_tokens": "max_tokens", "plan": "method", "plan.rows": "method", "value_strength": "strength"}
_NAMES = frozenset({"service_tier", "reasoning_effort", "verbosity", "tool_choice", "function_call"})
"""The fields whose texts may be quoted: choices from a list, not somebody's words."""
_WORDS = frozenset({"messages", "prompt"})

# pydantic's reasons, in this project's words.
_ALLOWED = {
    "missing": "a value, which is required",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "an object",
    "model_type": "an object",
    "greater_than_equal": "{ge:g} or more",
    "greater_than": "more than {gt:g}",
    "less_than_equal": "{le:g} or less",
    "literal_error": "{expected}",
    "too_short": "{min_length} or more",
    "too_long": "at most {max_length}",
}


class ApiError(Exception):
    """A request that is refused or has failed: what the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # All of them, so that the error stays whole where it is pickled on its way between actors.
        super().__init__(status, message, param, code, dict(headers or {}))
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @classmethod
    def of(
        cls,
        status: int,
        field: str,
        value: str,
        allowed: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> ApiError:
        """The error ``<field>: got <value>, allowed: <allowed>``, on one line whatever these are.

        ``param`` is None where what is wrong is no field of the body, but the body itself, its address or its headers.
        """
        line = f"{printable(field, 200)}: got {printable(value)}, allowed: {printable(allowed, 1000)}"
        return cls(status, line, None if param is None else printable(param, 200), code, headers)

    @property
    def type(self) -> str:
        """OpenAI's name for errors of this status."""
        special = {401: "authentication_error", 429: "rate_limit_error"}
        return special.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        """What is sent, as an answer's body or as the last event of a stream."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def __str__(self) -> str:
        return self.message


def api_error(error: Exception, *, chat: bool = False) -> ApiError:
    """Any error as one to answer with. ``chat``: the prompt that it may speak of came as ``messages``.

    What isn't the client's doing (a UserError that names no field, or no UserError at all) is a status 500.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValidationError):
        return _invalid(error)
    if isinstance(error, FieldError):
        return _refused(error, chat)
    # The engine's module loads torch; but where it isn't loaded, there is no Busy either.
    engine = sys.modules.get("mage_ray.decoding.engine")
    if engine is not None and isinstance(error, engine.Busy):
        return ApiError(429, printable(str(error), 400), code="busy", headers={"retry-after": str(RETRY_AFTER)})
    if isinstance(error, UserError):
        return ApiError.of(500, "server", str(error), "a request that succeeds; the server's log says more")
    return ApiError.of(500, "server", f"{type(error).__name__}", "a request that succeeds; the server's log says more")


def kind(value: object) -> str:
    """What a JSON value is, without what it says."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, str):
        return "text" if value else "empty text"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    return "an object" if value else "an empty object"


def printable(text: str, limit: int = 120) -> str:
    """The text on one line that any terminal and log can take, shortened to ``limit`` characters."""
    # Shortened first: escapes are longer, and the text may be a megabyte.
    short = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in short)


def dotted(parts: Sequence[str]) -> str:
    """A dotted path, whose parts may be keys that a client made up."""
    return ".".join(printable(part, 60) or '""' for part in parts)


def _invalid(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False)[0]
    path = [str(part) for part in first["loc"]]
    reason, context = first["type"], first.get("ctx", {})
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    cause = context.get("error")
    if isinstance(cause, FieldError):
        field = dotted([*path, cause.field])
        return ApiError.of(400, field, str(cause.value), cause.allowed + more, param=field)
    field = dotted(path)
    if reason == "extra_forbidden":
        allowed = f"the fields of {error.title} in /openapi.json"
        return ApiError.of(400, field, "an unknown field", allowed + more, param=field, code="unknown_field")
    value = "nothing" if reason == "missing" else _shown(first["input"], path[0] if path else "")
    allowed = _ALLOWED[reason].format(**context) if reason in _ALLOWED else first["msg"].removeprefix("Value error, ")
    return ApiError.of(400, field, value, allowed + more, param=field)


def _refused(error: FieldError, chat: bool) -> ApiError:
    """A field that this project refused itself; a value that is text is its own description of what it got."""
    field = "messages" if chat and error.field == "prompt" else _WIRE_NAMES.get(error.field, error.field)
    value = error.value if isinstance(error.value, str) else _shown(error.value, field)
    field = dotted(field.split("."))
    return ApiError.of(400, field, value, error.allowed, param=field)


def _shown(value: object, top: str) -> str:
    """A value of a field, or of what is in it."""
    if isinstance(value, int | float) and not isinstance(value, bool) and top not in _WORDS:
        return repr(value)
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and top in _NAMES else kind(value)
