"""Bodies: the bytes of a request to one JSON object that is safe to look at."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from deployments.errors import ApiError, dotted, kind, printable

LIMIT = 2**20
"""Bytes of a request's body, unless the server says otherwise."""
MAX_DEPTH, MAX_KEYS, MAX_PARTS = 32, 256, 2**14
"""How deep a body may nest, how many fields an object may have, and about how many lists and objects there may be."""
_HALVES = re.compile("[\ud800-\udfff]")


def parse_body(raw: bytes, content_type: str | None, limit: int = LIMIT) -> dict[str, Any]:
    """The JSON object in a request's body, in which all text can be written as UTF-8 and all numbers fit 64 bits.

    Raises ApiError: 415 unless it says to be JSON, 413 beyond ``limit`` bytes, 400 for anything else.
    """
    media, _, parameters = (content_type or "").lower().partition(";")
    charset = parameters.strip().replace('"', "")
    if media.strip() != "application/json" or charset not in ("", "charset=utf-8"):
        raise ApiError.of(415, "content-type", content_type or "nothing", "application/json in UTF-8")
    if len(raw) > limit:
        raise ApiError.of(413, "body", f"{len(raw)} bytes", f"at most {limit}")
    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_object)
    except UnicodeDecodeError:
        raise _bad_body("bytes that are not UTF-8", "JSON in UTF-8") from None
    except json.JSONDecodeError as error:
        raise _bad_body(f"no JSON ({error.msg}: line {error.lineno} column {error.colno})", "a JSON object") from None
    except RecursionError:
        raise _bad_body("lists and objects nested too deep", f"at most {MAX_DEPTH} levels") from None
    except ValueError:  # Python refuses to read integers of thousands of digits.
        raise _bad_body("a number that is too long", "numbers that fit 64 bits") from None
    if not isinstance(body, dict):
        raise _bad_body(kind(body), "a JSON object")
    _check_values(body)
    return body


def _bad_body(value: str, allowed: str) -> ApiError:
    return ApiError.of(400, "body", value, allowed)


def _no_constant(name: str) -> Any:
    raise _bad_body(name, "JSON, which has no NaN or Infinity")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different. Raises ApiError."""
    if len(pairs) > MAX_KEYS:
        raise _bad_body(f"an object of {len(pairs)} fields", f"at most {MAX_KEYS} fields")
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _bad_body(f"the field {printable(twice, 60)} more than once in an object", "each field once")
    return found


def _check_values(body: dict[str, Any]) -> None:
    """Raises ApiError for what JSON can say and nobody here can use, wherever it is. Doesn't recurse."""
    pending: list[tuple[Any, tuple[str, ...]]] = [(body, ())]
    while pending:
        values, path = pending.pop()
        if len(path) >= MAX_DEPTH:
            raise _bad_body("lists and objects nested too deep", f"at most {MAX_DEPTH} levels")
        if isinstance(values, dict):
            for key in values:
                _check(key, (*path, key))
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            # Lists of token ids are long, and most of them are this.
            if type(value) is int and 0 <= value < 2**63:
                continue
            if isinstance(value, dict | list):
                pending.append((value, (*path, str(key))))
                if len(pending) > MAX_PARTS:
                    raise _bad_body("too many lists and objects", f"about {MAX_PARTS} at most")
            else:
                _check(value, (*path, str(key)))


def _check(value: object, path: tuple[str, ...]) -> None:
    """Raises ApiError for text or a number that is beyond use."""
    if isinstance(value, str):
        good = not _HALVES.search(value)
        got, allowed = "half a surrogate pair", "text that can be written as UTF-8"
    else:
        whole = -(2**63) <= value < 2**63 if isinstance(value, int) else True
        good = whole and (not isinstance(value, float) or math.isfinite(value))
        got, allowed = "a number that is too large", "numbers that fit 64 bits"
    if not good:
        field = dotted(path)
        raise ApiError.of(400, field, got, allowed, param=field)
