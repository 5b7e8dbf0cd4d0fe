"""What reward models learn from: preferred answers in pairs, or labelled texts. Read, checked and split by prompt."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mage_ray.errors import FieldError
from mage_ray.prompts import first_turn, make_prompt
from mage_ray.records import bad_text, read_records
from mage_ray.specs import RewardSpec

HUMAN, ASSISTANT = "\n\nHuman: ", "\n\nAssistant: "
_ROLES = {"user": HUMAN, "assistant": ASSISTANT}
_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")
_DIALOGUES = r"a dialogue (\n\nHuman: … \n\nAssistant: …, or a list of messages), or an answer beside a prompt"
_WINDOW = 16
"""Batches that are sorted by length together: more of them pad less, and mix less."""


@dataclass(frozen=True)
class Comparison:
    """Two dialogues that differ in how they were answered; ``group`` tells their prompt."""

    chosen: str
    rejected: str
    group: str

    @property
    def texts(self) -> tuple[str, ...]:
        return self.chosen, self.rejected

    @property
    def longer(self) -> float:
        """Whether the chosen dialogue's last answer is the longer one: 1 or 0; 0.5 for equals."""
        chosen, rejected = (len(text.rpartition(ASSISTANT.rstrip())[2]) for text in self.texts)
        return 0.5 * float(np.sign(chosen - rejected)) + 0.5


@dataclass(frozen=True)
class Labelled:
    """A text, and whether it is as wanted; ``group`` tells it from others, but not from its own copies."""

    text: str
    label: bool
    group: str

    @property
    def texts(self) -> tuple[str, ...]:
        return (self.text,)


Row = Comparison | Labelled


@dataclass(frozen=True)
class Parts:
    """Rows to train on, to calibrate by, and to measure on; a group is in one of them."""

    train: Sequence[Row]
    calibrate: Sequence[Row]
    measure: Sequence[Row]


def read_rows(name: str, spec: RewardSpec) -> list[Row]:
    """The rows that ``rewards.<name>`` names: Labelled where it has a ``label``, else Comparisons.

    Raises FieldError, one line: ``rewards.<name>.data``, or the row's place and what is allowed there. It never quotes
    a text.
    """
    field = f"rewards.{name}"
    records = read_records(spec.data, f"{field}.data", spec.split)
    rows: list[Row] = list(_pairs(records) if spec.label is None else _labelled(records, spec, field))
    if not rows:
        raise FieldError(f"{field}.data", spec.data, "data with at least one row")
    return rows


def split(rows: Sequence[Row], held_out: float, seed: int) -> Parts:
    """Whole groups to each part: ``held_out`` of them to calibrate and measure, half each; at least one to each part.

    Which ones is chosen by the seed and their content. Raises ValueError for fewer than three groups.
    """
    groups = sorted({row.group for row in rows}, key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    if len(groups) < 3:
        raise ValueError(f"{len(groups)} groups")
    count = min(max(2, round(held_out * len(groups))), len(groups) - 1)
    calibrate, measure = set(groups[: count // 2]), set(groups[count // 2 : count])
    return Parts(
        [row for row in rows if row.group not in calibrate | measure],
        [row for row in rows if row.group in calibrate],
        [row for row in rows if row.group in measure],
    )


def length_order(lengths: Sequence[int], batch_size: int, steps: int, seed: int) -> list[int]:
    """Which examples a run takes, ``batch_size`` for each of its steps, like lengths together: little is padding then.

    Each epoch is shuffled anew and cut into windows; within one, batches are cut from the examples in order of length;
    then the epoch's batches are shuffled. What doesn't fill a batch sits out that epoch. A pure function of its
    arguments, so that a resumed run finds its place by counting. Raises ValueError for less than one batch.
    """
    if len(lengths) < batch_size:
        raise ValueError(f"{len(lengths)} examples, {batch_size} in a batch")
    dice = np.random.default_rng([seed, 7])
    size = np.asarray(lengths)
    batches: list[np.ndarray] = []
    while len(batches) < steps:
        whole = dice.permutation(len(size))[: len(size) // batch_size * batch_size]
        windows = [whole[at : at + _WINDOW * batch_size] for at in range(0, len(whole), _WINDOW * batch_size)]
        ordered = np.concatenate([window[np.argsort(size[window], kind="stable")] for window in windows])
        batches += list(dice.permutation(ordered.reshape(-1, batch_size)))
    return [int(place) for batch in batches[:steps] for place in batch]


def _pairs(records: Iterable[tuple[str, Any]]) -> Iterable[Comparison]:
    for place, record in records:
        _check_columns(place, record, ("chosen", "rejected"))
        head = None if record.get("prompt") is None else _head(f"{place}, prompt", record["prompt"])
        chosen, rejected = (_dialogue(f"{place}, {side}", record[side], head) for side in ("chosen", "rejected"))
        if chosen == rejected:
            raise FieldError(place, "chosen and rejected that are the same", "two that differ")
        yield Comparison(chosen, rejected, make_prompt(first_turn(chosen) or "").id)


def _labelled(records: Iterable[tuple[str, Any]], spec: RewardSpec, field: str) -> Iterable[Labelled]:
    assert spec.label is not None
    counts = {True: 0, False: 0}
    others: set[str] = set()
    for place, record in records:
        _check_columns(place, record, (spec.text, spec.label))
        text = record[spec.text]
        if (wrong := bad_text(text)) is not None:
            raise FieldError(f"{place}, {spec.text}", wrong, "a text that isn't empty")
        label = _label(f"{place}, {spec.label}", record[spec.label], spec.positive, others, field)
        counts[label] += 1
        yield Labelled(text, label, make_prompt(text).id)
    for label, count in counts.items():
        if not count:
            raise FieldError(f"{field}.data", f"{sum(counts.values())} rows, none {label}", "rows of both labels")


def _check_columns(place: str, record: Any, needed: Sequence[str]) -> None:
    if not isinstance(record, Mapping):
        raise FieldError(place, f"a {type(record).__name__}", "a record with named columns")
    if any(name not in record for name in needed):
        columns = ", ".join(map(str, record)) or "none"
        raise FieldError(place, f"the columns {columns}", f"the columns {' and '.join(needed)}")


def _label(place: str, value: Any, positive: str | None, others: set[str], field: str) -> bool:
    """A label as true or false; ``others`` gathers the values that aren't ``positive``, of which there may be one."""
    if value is None or value != value:
        raise FieldError(place, "no label", "a label on every row")
    word = str(value).strip().casefold()
    if positive is not None:
        if word == positive.strip().casefold():
            return True
        others.add(word)
        if len(others) > 1:
            raise FieldError(place, "a third value", f"two values, {positive} and one other")
        return False
    if word not in _TRUE + _FALSE:
        allowed = f"true or false, 1 or 0, or two values of which {field}.positive names the wanted one"
        raise FieldError(place, "another value", allowed)
    return word in _TRUE


def _dialogue(place: str, value: Any, head: str | None) -> str:
    """A whole dialogue in HH-RLHF's style from one, from chat messages, or from an answer with the ``head`` before."""
    text: Any = _messages(value) if isinstance(value, list) else value
    if (wrong := bad_text(text)) is not None:
        raise FieldError(place, wrong, _DIALOGUES)
    text = text.strip()
    if not text.startswith("Human:"):
        if head is None:
            raise FieldError(place, "an answer alone", _DIALOGUES)
        return head + text
    if ASSISTANT.strip() not in text:
        raise FieldError(place, "a dialogue without an answer", _DIALOGUES)
    return "\n\n" + text


def _head(place: str, value: Any) -> str:
    """What stands before an answer: a prompt, or a dialogue up to there."""
    text: Any = _messages(value) if isinstance(value, list) else value
    if (wrong := bad_text(text)) is not None:
        raise FieldError(place, wrong, "a prompt that isn't empty")
    text = text.strip()
    if not text.startswith("Human:"):
        return HUMAN + text + ASSISTANT
    return "\n\n" + text.removesuffix(ASSISTANT.strip()).rstrip() + ASSISTANT


def _messages(messages: list[Any]) -> str | None:
    """Chat messages as a dialogue in HH-RLHF's style, a system message left out; None where they are none."""
    parts = []
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("content"), str):
            return None
        if message.get("role") in _ROLES:
            parts.append(_ROLES[message["role"]] + message["content"].strip())
    return "".join(parts)
