"""Prompts: the first turns that the models are asked to answer, from our own list, a file, or a hub dataset.

The list in ``data/prompts.jsonl`` was written for this project and has its license, Apache-2.0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from mage_ray.errors import FieldError
from mage_ray.records import JSONL, parse_jsonl, read_records

COLUMNS = ("prompt", "messages", "chosen")
"""Where a record's prompt is looked for, in this order, when the column isn't named."""


@dataclass(frozen=True)
class Prompt:
    """A first turn. ``id`` is a hash of its words: texts that differ only in case or white space share it."""

    id: str
    text: str


def make_prompt(text: str) -> Prompt:
    """The prompt of a text, without the white space around it."""
    words = " ".join(text.casefold().split())
    return Prompt(hashlib.sha256(words.encode()).hexdigest()[:16], text.strip())


def load_prompts(
    source: str, limit: int | None = None, *, split: str = "train", column: str | None = None, seed: int = 0
) -> list[Prompt]:
    """The prompts of ``source``, each once, in its order.

    ``source`` is ``builtin`` (our list), a path to a ``.jsonl`` or ``.jsonl.gz`` file, or the id of a hub dataset, of
    which ``split`` is read. A record's prompt is in ``column``, or else in the first of ``COLUMNS`` that it has: a
    text, a dialogue in the style of HH-RLHF (``\\n\\nHuman: ... \\n\\nAssistant: ...``) or a list of chat messages; of
    a dialogue, the first human turn is taken.

    With ``limit``, at most that many are kept; which ones depends on the seed and on each prompt alone, so that the
    order of the source doesn't matter and a smaller limit gives a subset.

    Raises FieldError ``prompts.<option>``, and ``<file>, line <n>`` for a record that holds no prompt. Errors never
    quote a prompt.
    """
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise FieldError("prompts.limit", limit, "a whole number, 1 or more")
    if source == "builtin":
        lines = (resources.files("mage_ray") / "data" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
        records = parse_jsonl(lines, "builtin")
    else:
        records = read_records(source, "prompts.source", split, JSONL, also="builtin, ")
    texts = _texts(records, column)
    prompts = list({prompt.id: prompt for prompt in reversed([make_prompt(text) for text in texts])}.values())[::-1]
    if not prompts:
        raise FieldError("prompts.source", source, "a source with at least one prompt")
    if limit is None:
        return prompts
    kept = {prompt.id for prompt in _shuffled(prompts, seed)[:limit]}
    return [prompt for prompt in prompts if prompt.id in kept]


def split_prompts(
    prompts: Sequence[Prompt], train: int, evaluation: int, seed: int = 0, search: int = 0
) -> tuple[list[Prompt], list[Prompt], list[Prompt]]:
    """``train`` prompts to train on, ``evaluation`` others to evaluate on and ``search`` others to choose constants by.

    Chosen by the seed and their content; the order of ``prompts`` doesn't matter. The first two are taken from opposite
    ends of one shuffled list: a prompt that was trained on under one pair of sizes is not evaluated on under another,
    as long as the larger training set and the larger evaluation set fit side by side. Those of the search lie beside
    the evaluation's.

    Raises FieldError ``prompts.train``, ``prompts.evaluation`` or ``search.prompts``: less than 1 (0 for a search), or
    more than there are prompts.
    """
    for name, size, least in (("train", train, 1), ("evaluation", evaluation, 1), ("search", search, 0)):
        if isinstance(size, bool) or not isinstance(size, int) or size < least:
            field = "search.prompts" if name == "search" else f"prompts.{name}"
            raise FieldError(field, size, f"a whole number, {least} or more")
    shuffled = _shuffled({prompt.id: prompt for prompt in prompts}.values(), seed)
    if train + evaluation > len(shuffled):
        allowed = f"train + evaluation up to {len(shuffled)}, the number of different prompts in the source"
        raise FieldError("prompts.train", f"{train} (and evaluation {evaluation})", allowed)
    if train + evaluation + search > len(shuffled):
        allowed = f"up to {len(shuffled) - train - evaluation}, what training and evaluation leave of the source"
        raise FieldError("search.prompts", search, allowed)
    return shuffled[::-1][:train], shuffled[:evaluation], shuffled[evaluation : evaluation + search]


def _shuffled(prompts: Iterable[Prompt], seed: int) -> list[Prompt]:
    return sorted(prompts, key=lambda prompt: hashlib.sha256(f"{seed}:{prompt.id}".encode()).digest())


def _texts(records: Iterable[tuple[str, Any]], column: str | None) -> Iterator[str]:
    for place, record in records:
        if not isinstance(record, dict):
            raise FieldError(place, f"a {type(record).__name__}", "a JSON object")
        names = [column] if column is not None else COLUMNS
        found = next((name for name in names if name in record), None)
        if found is None:
            columns = ", ".join(map(str, record)) or "none"
            raise FieldError(place, f"the columns {columns}", f"a column {' or '.join(names)}")
        text = first_turn(record[found])
        if text is None or not text.strip():
            allowed = "a text, a dialogue that begins with a human turn, or a list of messages with a user turn"
            raise FieldError(f"{place}, {found}", "no prompt" if text is None else "an empty prompt", allowed)
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise FieldError(f"{place}, {found}", "half a surrogate pair", "text that can be written as UTF-8")
        yield text


def first_turn(value: Any) -> str | None:
    """The first human turn of a text, an HH-style dialogue or a list of messages; None where there is none."""
    if isinstance(value, list):
        for message in value:
            if isinstance(message, dict) and message.get("role") == "user":
                content = message.get("content")
                return content if isinstance(content, str) else None
        return None
    if not isinstance(value, str):
        return None
    text = value.strip()
    if not text.startswith("Human:"):
        return text
    text = text.removeprefix("Human:")
    for marker in ("\n\nHuman:", "\n\nAssistant:"):
        text = text.partition(marker)[0]
    return text
