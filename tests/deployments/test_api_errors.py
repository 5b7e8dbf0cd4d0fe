"""Errors: which status and name each gets, and that they survive their way."""

from __future__ import annotations

import pickle

import pytest

from deployments.errors import ApiError, api_error
from mage_ray.decoding.engine import Busy
from mage_ray.decoding.request import Sampling
from mage_ray.errors import FieldError, UserError


@pytest.mark.parametrize(
    ("error", "status", "type", "param", "message"),
    [
        (FieldError("strength", -1, "0 or more"), 400, "invalid_request_error", "strength", "strength: got -1, "),
        (FieldError("stop", ("a", "b"), "none"), 400, "invalid_request_error", "stop", "stop: got a list of 2, "),
        (FieldError("plan", "9 rows", "at most 4"), 400, "invalid_request_error", "method", "method: got 9 rows, "),
        (Busy("queue: got 9, allowed: at most 8"), 429, "rate_limit_error", None, "queue: got 9, allowed: at most 8"),
        (UserError("the engine failed: OSError"), 500, "server_error", None, "server: got the engine failed: OSError"),
        (RuntimeError("/root/secrets"), 500, "server_error", None, "server: got RuntimeError, "),
        (ApiError.of(401, "authorization", "no key", "a key"), 401, "authentication_error", None, "authorization: "),
    ],
    ids=repr,
)
def test_every_error_has_a_status(error: Exception, status: int, type: str, param: str | None, message: str) -> None:
    seen = api_error(error)
    assert (seen.status, seen.type, seen.param) == (status, type, param)
    assert seen.message.startswith(message) and "secrets" not in seen.message
    assert ("retry-after" in seen.headers) == (status == 429)


def test_the_engines_names_become_the_clients() -> None:
    too_long = FieldError("prompt", "90 tokens and 64 new ones", "at most 128 together")
    assert api_error(too_long, chat=True).param == "messages"
    assert api_error(too_long).param == "prompt"
    with pytest.raises(FieldError) as wrong:
        Sampling(max_new_tokens=0)
    assert str(api_error(wrong.value)) == "max_tokens: got 0, allowed: 1 or more"


def test_an_error_survives_the_way_between_actors() -> None:
    error = ApiError(429, "queue: got 9, allowed: 8", code="busy", headers={"retry-after": "1"})
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.status, copy.headers, copy.body()) == (429, {"retry-after": "1"}, error.body())
