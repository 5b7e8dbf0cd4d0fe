"""What every request passes: an API key where keys are asked for, limits of size and number, headers for browsers."""

from __future__ import annotations

import hmac
import os
from collections import Counter
from hashlib import sha256
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse

from deployments.errors import RETRY_AFTER, ApiError

KEYS = "MAGE_RAY_API_KEYS"
"""The environment variable with the keys that are accepted, commas between; without it there are none to ask for."""

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
}


class Keys:
    """The accepted API keys, as digests of equal length, which are compared in constant time."""

    def __init__(self, keys: str | None = None) -> None:
        listed = (os.environ.get(KEYS, "") if keys is None else keys).split(",")
        self._digests = [sha256(key.strip().encode()).digest() for key in listed if key.strip()]

    def owner(self, authorization: str | None) -> str:
        """Who calls: the beginning of the key's digest, or "anonymous" where no keys are asked for.

        Raises ApiError 401.
        """
        if not self._digests:
            return "anonymous"
        scheme, _, key = (authorization or "").partition(" ")
        given = sha256(key.strip().encode()).digest()
        # All are compared, so that the time doesn't tell which one was near.
        known = [hmac.compare_digest(given, digest) for digest in self._digests]
        if scheme.lower() != "bearer" or not any(known):
            got = "no key" if not authorization else "a key that is not known"
            raise ApiError.of(
                401, "authorization", got, "Bearer and a key of this server",
                code="invalid_api_key", headers={"www-authenticate": "Bearer"},
            )  # fmt: skip
        return given.hex()[:12]


class Shares:
    """How many answers each caller has on their way."""

    def __init__(self, most: int | None) -> None:
        self._most = most
        self._running: Counter[str] = Counter()

    def take(self, owner: str, answers: int) -> None:
        """These answers are on their way now. Raises ApiError 429 where they would be too many."""
        if self._most is not None and self._running[owner] + answers > self._most:
            got = f"{self._running[owner]} on their way and {answers} more"
            raise ApiError.of(
                429, "answers", got, f"at most {self._most} at once for each key",
                code="too_many_answers", headers={"retry-after": str(RETRY_AFTER)},
            )  # fmt: skip
        self._running[owner] += answers

    def give_back(self, owner: str, answers: int) -> None:
        """They have ended."""
        self._running[owner] -= answers
        if not self._running[owner]:
            del self._running[owner]


async def read_body(request: Request, limit: int) -> bytes:
    """The body. Raises ApiError 413 once it is known to be longer than ``limit`` bytes."""
    declared = request.headers.get("content-length", "")
    body = b""
    if declared.isdigit() and int(declared) > limit:
        raise _too_long(limit)
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise _too_long(limit)
    return body


def _too_long(limit: int) -> ApiError:
    return ApiError.of(413, "body", "more than that", f"at most {limit} bytes")


def error_response(error: ApiError) -> JSONResponse:
    """The error as an answer."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


class Headers:
    """ASGI middleware: the headers above on every answer. Serve's proxy adds ``x-request-id``."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        await self._app(scope, receive, with_headers)
