"""A node's copy of files in a storage: fetched and published file by file, each whole and of the right content.

A published file ``name`` is just that in the storage. Beside it lies an empty ``.sums/<name>/<n>-<sha256>-<size>``: one
listing tells what there is, of which content, and whether a copy is up to date. An update adds its sum, writes the
content and then takes the older sums away, so whoever is killed and whenever, the content is that of one of the sums.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from mage_ray.errors import UserError
from mage_ray.files import locked, write_atomic
from mage_ray.storage.store import Store

_SUMS, _NOTES = ".sums", ".notes"
_LAST = "mage_ray.json"
"""Of a folder's files the one that is published and fetched last: where it is, the others are."""
_SMALL = 2**20
"""Bytes. Up to here what is sent is what was read for its sum, even of a file that grows meanwhile."""
_TRIES = 5
"""How often a file that is overwritten while it is read is read again."""


@dataclass(frozen=True)
class Content:
    """What tells a file's content from all others."""

    sha256: str
    size: int

    @classmethod
    def of(cls, path: Path) -> Content:
        with open(path, "rb") as file:
            return cls(hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size)


@dataclass(frozen=True)
class _Note:
    """What a file of the copy was when it was last looked at, and whether the storage has the same."""

    content: Content
    mtime_ns: int
    synced: bool


class Copy:
    """The copy, in the folder ``path``, of what lies at ``url``; all processes of a node share it.

    Names are of files, or of folders with all that is in them, relative to both; without any, all is meant. Methods
    raise UserError where the storage fails for too long.
    """

    def __init__(self, url: str, path: Path) -> None:
        self.store, self.path = Store(url), path

    def fetch(self, *names: str) -> None:
        """Bring these up to date.

        What was deleted in the storage is deleted here; what was only made here and not published yet is left alone.
        Raises UserError, too, for content that isn't what was published.
        """
        there = self._published(names)
        for file in _in_order(there):
            with locked(self._lock(file)):
                self._fetch(file, there[file])
        for file in self._noted(names):
            with locked(self._lock(file)):
                note = self._look(file)
                if file not in there and note is not None and note.synced:
                    self._drop(file)

    def publish(self, *names: str) -> None:
        """Send what is new or has changed of these."""
        new = [file for file in self._local(names) if self._is_new(file)]
        there = self._published(names) if new else {}
        for file in _in_order(new):
            with locked(self._lock(file)):
                if self._is_new(file):
                    self._publish(file, there.get(file, {}))

    def remove(self, *names: str) -> None:
        """Delete these, here and there."""
        for file, sums in self._published(names).items():
            self._forget(file, sums)
            self.store.delete(file)
        for file in {*self._local(names), *self._noted(names)}:
            self._drop(file)

    def _fetch(self, file: str, sums: Mapping[int, Content]) -> None:
        for _ in range(_TRIES):
            if not sums:
                return
            note = self._look(file)
            if note is not None and note.content == sums[max(sums)]:
                self._write_down(file, note.content)
                return
            if self._download(file, sums):
                return
            sums = self._published((file,)).get(file, {})
        url = f"{self.store.url}/{file}"
        raise UserError(f"{url}: not the content that was published, allowed: publish it again, or delete it")

    def _download(self, file: str, sums: Mapping[int, Content]) -> bool:
        """Whether the copy now has what the storage has: a content of these sums, or nothing, where only a sum came."""
        here = self.path / file
        here.parent.mkdir(parents=True, exist_ok=True)
        partial = here.with_name(f".{here.name}.{uuid.uuid4().hex}.partial")
        try:
            self.store.get(file, partial)
            got = Content.of(partial)
            if got not in sums.values():
                return False
            os.replace(partial, here)
            self._write_down(file, got)
        except FileNotFoundError:
            pass
        finally:
            partial.unlink(missing_ok=True)
        return True

    def _publish(self, file: str, sums: Mapping[int, Content]) -> None:
        here = self.path / file
        data = here.read_bytes() if here.stat().st_size <= _SMALL else None
        content = Content.of(here) if data is None else Content(hashlib.sha256(data).hexdigest(), len(data))
        self.store.write(_sum(file, max(sums, default=0) + 1, content), b"")
        if data is None:
            self.store.send(here, file)
        else:
            self.store.write(file, data)
        self._forget(file, sums)
        self._write_down(file, content)

    def _published(self, names: Iterable[str]) -> dict[str, dict[int, Content]]:
        """The files there; of each its sums by their numbers, the highest of which is the newest."""
        there: dict[str, dict[int, Content]] = {}
        for name in names or [""]:
            for path in self.store.find(f"{_SUMS}/{name}".rstrip("/")):
                file, _, sum = path.removeprefix(f"{_SUMS}/").rpartition("/")
                parts = sum.split("-")
                if len(parts) == 3 and parts[0].isdigit() and parts[2].isdigit():
                    there.setdefault(file, {})[int(parts[0])] = Content(parts[1], int(parts[2]))
        return there

    def _forget(self, file: str, sums: Mapping[int, Content]) -> None:
        for number, content in sums.items():
            self.store.delete(_sum(file, number, content))

    def _local(self, names: Iterable[str]) -> Iterator[str]:
        """The files here; those whose own or whose folder's name begins with a dot are none."""
        for name in names or [""]:
            place = self.path / name
            for path in [place] if place.is_file() else sorted(place.rglob("*")):
                parts = path.relative_to(self.path).parts
                if path.is_file() and not any(part.startswith(".") for part in parts):
                    yield "/".join(parts)

    def _noted(self, names: Iterable[str]) -> list[str]:
        """Those of which there are notes."""
        root = self.path / _NOTES
        found: list[Path] = []
        for name in names or [""]:
            own = root / f"{name}.json"
            found += [own] if name and own.is_file() else (root / name).rglob("*.json")
        return [path.relative_to(root).as_posix().removesuffix(".json") for path in found]

    def _is_new(self, file: str) -> bool:
        note = self._look(file)
        return note is not None and not note.synced

    def _look(self, file: str) -> _Note | None:
        """What a file is here now; None where it isn't there. Only one that has changed is read."""
        here = self.path / file
        try:
            stat = here.stat()
        except FileNotFoundError:
            return None
        try:
            kept = json.loads(self._note(file).read_text())
        except FileNotFoundError:
            return _Note(Content.of(here), stat.st_mtime_ns, False)
        note = _Note(Content(**kept["content"]), kept["mtime_ns"], kept["synced"])
        if (note.mtime_ns, note.content.size) == (stat.st_mtime_ns, stat.st_size):
            return note
        now = Content.of(here)
        return _Note(now, stat.st_mtime_ns, note.synced and now == note.content)

    def _write_down(self, file: str, content: Content) -> None:
        """That it is here as it is there."""
        note = _Note(content, (self.path / file).stat().st_mtime_ns, True)
        write_atomic(self._note(file), json.dumps(asdict(note)))

    def _drop(self, file: str) -> None:
        (self.path / file).unlink(missing_ok=True)
        self._note(file).unlink(missing_ok=True)

    def _note(self, file: str) -> Path:
        return self.path / _NOTES / f"{file}.json"

    def _lock(self, file: str) -> Path:
        return self.path / _NOTES / f"{file}.lock"


def _sum(file: str, number: int, content: Content) -> str:
    return f"{_SUMS}/{file}/{number}-{content.sha256}-{content.size}"


def _in_order(files: Iterable[str]) -> list[str]:
    """Such that of each folder the file that says that it is whole comes last."""
    return sorted(files, key=lambda file: (PurePosixPath(file).name == _LAST, file))
