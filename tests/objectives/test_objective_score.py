"""The door: whatever an objective does wrong becomes one line that names it, and no text of a prompt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mage_ray.errors import FieldError, UserError
from mage_ray.objectives import probe, score
from mage_ray.objectives.function import Function

PROMPTS = ["Tell me about the private matter of Zebulon Quill", "Hi"]
COMPLETIONS = ["Zebulon Quill keeps\nseventeen newts", "x"]


def objective(returns: Any = None, run: Callable[..., Any] | None = None, low: float = -1, high: float = 1) -> Function:
    return Function(run or (lambda prompts, completions: returns), "maximise", low, high)


def fail(error: Exception) -> Callable[..., Any]:
    def run(prompts: Sequence[str], completions: Sequence[str]) -> Any:
        raise error

    return run


@pytest.mark.parametrize(
    "returns",
    [
        [0.5, -1],
        np.array([0.5, -1], dtype=np.float32),
        torch.tensor([0.5, -1.0], dtype=torch.bfloat16).requires_grad_(),
    ],
    ids=["list", "numpy", "torch"],
)
def test_good_values_come_out_as_float64(returns: Any) -> None:
    values = score("fun", objective(returns), PROMPTS, COMPLETIONS)
    assert values.dtype == np.float64
    assert values.tolist() == [0.5, -1.0]


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (objective([0.0]), "shape [1]"),
        (objective([[0.0], [0.0]]), "shape [2, 1]"),
        (objective(0.0), "shape []"),
        (objective(None), "shape []"),
        (objective(["a", "b"]), "ValueError"),
        (objective([0.0, math.nan]), "nan for pair 1"),
        (objective([math.inf, 0.0], high=math.inf), "inf for pair 0"),
        (objective([0.0, 1.5]), "1.5 for pair 1"),
        (objective([-1.01, 0.0]), "[-1, 1]"),
        (
            objective(run=fail(RuntimeError("out of paper\nand ink"))),
            "RuntimeError: out of paper (test_objective_score.py",
        ),
        (objective(run=fail(KeyError())), "KeyError (test_objective_score.py"),
        (objective(run=lambda: None), "TypeError"),
    ],
)
def test_each_fault_is_one_line_that_names_the_objective(broken: Function, words: str) -> None:
    with pytest.raises(FieldError) as caught:
        score("fun", broken, PROMPTS, COMPLETIONS)
    assert caught.value.field == "objectives.fun"
    assert str(caught.value).startswith("objectives.fun: got ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "message",
    [
        f"bad prompt {PROMPTS[0]!r}",
        f"cannot read {COMPLETIONS!r}",
        "stopped at 'matter of Zebulon' ...",
        "bad prompt 'Hi'",
        "x",
    ],
)
def test_an_exception_that_quotes_a_text_is_left_out(message: str) -> None:
    with pytest.raises(FieldError) as caught:
        score("fun", objective(run=fail(ValueError(message))), PROMPTS, COMPLETIONS)
    line = str(caught.value)
    assert "ValueError" in line
    assert not any(word in line for word in ("Zebulon", "newts", "Hi", f": {message}"))
    assert caught.value.__suppress_context__


def test_an_objectives_own_user_error_passes_through() -> None:
    with pytest.raises(UserError, match=r"^install the thing$"):
        score("fun", objective(run=fail(UserError("install the thing"))), PROMPTS, COMPLETIONS)


def test_nothing_to_score_calls_nothing() -> None:
    assert score("fun", objective(run=fail(RuntimeError())), [], []).shape == (0,)


def test_unequal_numbers_are_the_callers_mistake() -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 completions"):
        score("fun", objective([0.0]), PROMPTS, COMPLETIONS[:1])


def test_probe_finds_a_fault_before_there_is_anything_to_score() -> None:
    probe("fun", objective([0.0]))
    with pytest.raises(FieldError, match=r"objectives\.fun: got 2 for pair 0"):
        probe("fun", objective([2.0]))
