"""Records of a data set, one by one, each with the place to name in an error: JSON lines, CSV, or a hub dataset."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mage_ray.errors import FieldError
from mage_ray.storage.downloads import local_path

JSONL = (".jsonl", ".jsonl.gz")
CSV = (".csv", ".csv.gz")


def read_records(
    source: str, field: str, split: str = "train", kinds: tuple[str, ...] = JSONL + CSV, also: str = ""
) -> Iterator[tuple[str, Any]]:
    """Each record of ``source`` and where it is: ``<file>, line <n>`` or ``<dataset>, row <n>``.

    ``source`` is a file, or its URL, whose name ends in one of ``kinds``, or the id of a hub dataset, of which
    ``split`` is read. A record of a CSV file is a mapping from its header's names to texts; any other is what it is.
    Raises FieldError ``field`` (``also``: what else it might have been), or the place of a record that can't be read;
    errors never quote one.
    """
    if source.endswith(kinds):
        path = local_path(source)
        lines = _read_lines(path, field)
        return parse_jsonl(lines, path.name) if source.endswith(JSONL) else _parse_csv(lines, path.name)
    allowed = f"{also}a file that ends in {' or '.join(kinds)}, or a hub dataset such as Anthropic/hh-rlhf"
    return _read_hub(source, field, split, allowed)


def parse_jsonl(lines: Iterable[str], source: str) -> Iterator[tuple[str, Any]]:
    """The records of JSON lines. Raises FieldError for a line that is none."""
    for number, line in enumerate(lines, start=1):
        place = f"{source}, line {number}"
        if not line.strip():
            raise FieldError(place, "an empty line", "a JSON object on every line")
        try:
            yield place, json.loads(line)
        except ValueError as error:
            reason = getattr(error, "msg", "a number that is too long")
            raise FieldError(place, f"no JSON ({reason})", "a JSON object on every line") from None


def bad_text(value: Any) -> str | None:
    """What is wrong with a value that should be a text with something in it; None where nothing is."""
    if not isinstance(value, str):
        return "no text"
    if not value.strip():
        return "an empty text"
    if any("\ud800" <= char <= "\udfff" for char in value):
        return "half a surrogate pair"
    return None


def _read_lines(path: Path, field: str) -> list[str]:
    try:
        data = path.read_bytes()
        # Not str.splitlines(): it also splits at characters that JSON allows inside a string.
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig").split("\n")
    except FileNotFoundError:
        raise FieldError(field, str(path), "a file that exists") from None
    except UnicodeDecodeError:
        raise FieldError(field, str(path), "a file in UTF-8") from None
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise FieldError(field, str(path), f"a file that can be read ({reason})") from None
    return lines[:-1] if lines[-1] == "" else lines


def _parse_csv(lines: Iterable[str], source: str) -> Iterator[tuple[str, dict[str, str]]]:
    rows = csv.reader((f"{line}\n" for line in lines), strict=True)
    header: list[str] | None = None
    while True:
        place = f"{source}, line {rows.line_num + 1}"  # where it begins: a field may hold line breaks
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise FieldError(place, f"no CSV ({error})", "comma-separated fields, quoted where needed") from None
        if row is None:
            return
        if header is None:
            header = [name.strip() for name in row]
            if len(set(header)) < len(header) or "" in header:
                raise FieldError(place, "names that are empty or the same", "a name for each column, each once")
            continue
        if len(row) != len(header):
            raise FieldError(place, f"{len(row)} fields", f"{len(header)}, as many as the first line names")
        yield place, dict(zip(header, row, strict=True))


def _read_hub(source: str, field: str, split: str, allowed: str) -> Iterator[tuple[str, Any]]:
    if source.count("/") > 1 or source.startswith((".", "/", "~")) or not source:
        raise FieldError(field, source, allowed)
    import datasets

    try:
        rows = datasets.load_dataset(source, split=split)
    except Exception as error:  # The hub's errors are of many kinds: no such dataset, no network, no such split.
        first_line = str(error).strip().split("\n")[0]
        raise FieldError(field, source, f"{allowed} ({type(error).__name__}: {first_line})") from None
    for number, row in enumerate(rows, start=1):
        yield f"{source}, row {number}", row
