"""What an objective is, and the one door through which its values enter the project."""

from __future__ import annotations

import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np

from mage_ray.errors import FieldError, UserError

Direction = Literal["maximise", "minimise"]


class Objective(Protocol):
    """A reward: prompts and completions in, one number for each pair out, in raw units.

    ``direction`` says which end of the raw range is better; ``low`` and ``high`` are the declared raw range and may be
    infinite. A call with N prompts and N completions returns a float64 array of shape [N].
    """

    @property
    def direction(self) -> Direction: ...

    @property
    def low(self) -> float: ...

    @property
    def high(self) -> float: ...

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray: ...


def score(name: str, objective: Objective, prompts: Sequence[str], completions: Sequence[str]) -> np.ndarray:
    """The objective's raw values for N pairs, checked: float64, shape [N], finite, within the declared range.

    Raises FieldError ``objectives.<name>`` (one line, never with text of a prompt or a completion) when the objective
    raises, or returns anything else. An objective's own UserError passes through.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions")
    if not prompts:
        return np.zeros(0)
    field = f"objectives.{name}"
    try:
        values = _as_float64(objective(prompts, completions))
    except UserError:
        raise
    except Exception as error:
        # "from None": the exception's own text may quote what it was given, and tracebacks are logged.
        raise FieldError(field, _describe(error, [*prompts, *completions]), "an objective that does not fail") from None
    if values.shape != (len(prompts),):
        raise FieldError(field, f"shape {list(values.shape)}", f"one value for each pair, shape [{len(prompts)}]")
    if not np.isfinite(values).all():
        place = int(np.flatnonzero(~np.isfinite(values))[0])
        raise FieldError(field, f"{values[place]} for pair {place}", "finite values")
    outside = (values < objective.low) | (values > objective.high)
    if outside.any():
        place = int(np.flatnonzero(outside)[0])
        allowed = f"values in its declared range [{objective.low:g}, {objective.high:g}]"
        raise FieldError(field, f"{values[place]:g} for pair {place}", allowed)
    return values


def probe(name: str, objective: Objective) -> None:
    """Score one harmless pair, so that a wrong setting or a missing package shows before hours of sampling.

    It loads what the objective needs. Raises what ``score`` raises.
    """
    score(name, objective, ["What is a good name for a cat?"], ["Marmalade is a good name for a cat."])


def check_direction(value: object, field: str) -> Direction:
    """``value`` as a direction. Raises FieldError."""
    for direction in get_args(Direction):
        if value == direction:
            return direction
    raise FieldError(field, value, " or ".join(get_args(Direction)))


def check_count(value: object, field: str) -> int:
    """``value`` as a whole number of at least 1. Raises FieldError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise FieldError(field, value, "a whole number, 1 or more")
    return value


def check_choice(value: object, field: str, choices: Sequence[str]) -> str:
    """``value`` as one of ``choices``. Raises FieldError."""
    if not isinstance(value, str) or value not in choices:
        raise FieldError(field, value, f"one of {', '.join(choices)}")
    return value


def describe_error(error: BaseException) -> str:
    """An exception as its type and the first line of its message."""
    message = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _as_float64(values: Any) -> np.ndarray:
    if hasattr(values, "detach"):  # A torch tensor: numpy refuses those that need gradients, are bfloat16 or on a GPU.
        values = values.detach().double().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def _describe(error: Exception, texts: Sequence[str]) -> str:
    """Where the exception came from and what it says, unless it quotes one of ``texts``."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    message = describe_error(error)
    if _quotes(message, texts):
        message = f"{type(error).__name__} (its message quotes a text and is left out)"
    return message + place


def _quotes(message: str, texts: Sequence[str], run: int = 12) -> bool:
    """Whether ``message`` holds a whole text, or ``run`` characters in a row of one."""
    windows = [message[i : i + run] for i in range(max(len(message) - run + 1, 0))]
    for text in texts:
        whole = text.strip()
        if whole and re.search(rf"(?<!\w){re.escape(whole)}(?!\w)", message):
            return True
        if any(window in text for window in windows):
            return True
    return False
