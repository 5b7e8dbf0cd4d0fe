"""A node's copy of files in a storage: fetched and published file by file, each whole and of the right content.

A published file ``name`` is just that in the storage. Beside it lies an empty ``.sums/<name>/<n>-<sha256>-<size>``: one
listing tells what there is and whether a copy is up to date. A new file is sent before its sum. An update adds its sum,
sends the content and then takes the sums away that are older than the last. So whoever is killed and whenever, and
whoever else publishes meanwhile, the content is that of one of the sums, and where there is one sum it is that one's.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from mage_ray.errors import UserError
from mage_ray.files import locked
from mage_ray.storage.store import Store

_SUMS, _NOTES = ".sums", ".notes"
_LAST = ("adapter_model.safetensors", "mage_ray.json")
"""Of a folder's files those that are published and fetched last: where they are, the others are."""
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


@dataclass(frozen=True, order=True)
class Sum:
    """A content that a published file has, had, or was about to get; the newest have the highest number."""

    number: int
    sha256: str
    size: int

    @property
    def content(self) -> Content:
        return Content(self.sha256, self.size)

    def name(self, file: str) -> str:
        return f"{_SUMS}/{file}/{self.number}-{self.sha256}-{self.size}"


@dataclass(frozen=True)
class Note:
    """What a file of the copy was when it was last looked at, and what of it the storage last had, by what was seen."""

    content: Content
    mtime_ns: int
    there: Content | None


class Copy:
    """The copy, in the folder ``path``, of what lies at ``url``; all processes of a node share it.

    Names are of files, or of folders with all that is in them, relative to both; without any, all is meant. Methods
    raise UserError where the storage fails for longer than ``patience`` seconds (the storage's own unless given).
    """

    def __init__(self, url: str, path: Path, patience: float | None = None) -> None:
        self.store, self.path = Store(url, patience), path

    def fetch(self, *names: str) -> None:
        """Bring these up to date.

        What was deleted in the storage is deleted here. What has changed here alone, or was made here, and is not
        published yet is left alone. Raises UserError, too, for content that isn't what was published.
        """
        known = [file for file in self._noted(names) if (note := self._look(file)) and note.there == note.content]
        there = self._published(names)
        for file in _in_order(there):
            with locked(self._lock(file)):
                self._fetch(file, there[file])
        for file in known:
            if file not in there:
                with locked(self._lock(file)):
                    note = self._look(file)
                    if note is None or note.there == note.content:
                        self._drop(file)

    def publish(self, *names: str) -> None:
        """Send what is new or has changed here of these, and what the storage has lost."""
        there: dict[str, set[Sum]] | None = None
        for file in _in_order(self._local(names)):
            with locked(self._lock(file)):
                there = self._published(names) if there is None else there
                note, sums = self._look(file), there.get(file, set())
                if note is None or {one.content for one in sums} == {note.content}:
                    continue
                # An older one than the storage's, which nobody here has changed, is not news.
                if not sums or note.there != note.content:
                    self._publish(file, sums)

    def remove(self, *names: str) -> None:
        """Delete these, here and there."""
        for file, sums in self._published(names).items():
            for one in sums:
                self.store.delete(one.name(file))
            self.store.delete(file)
        for file in {*self._local(names), *self._noted(names)}:
            self._drop(file)

    def _fetch(self, file: str, sums: Collection[Sum]) -> None:
        for _ in range(_TRIES):
            if not sums:
                return
            note, newest = self._look(file), max(sums).content
            if note is not None:
                if note.there != note.content and note.there == newest:
                    return  # this node is ahead
                if note.content == newest:
                    if len(sums) == 1:  # else it may not have been sent
                        self._write_down(file, note.content, note.mtime_ns, newest)
                    return
            if self._download(file, sums):
                return
            sums = self._published((file,)).get(file, set())
        url = f"{self.store.url}/{file}"
        raise UserError(f"{url}: not the content that was published, allowed: publish it again, or remove it")

    def _download(self, file: str, sums: Collection[Sum]) -> bool:
        """Whether the copy now has what the storage has: a content of these sums, or nothing, where only a sum is."""
        here = self.path / file
        here.parent.mkdir(parents=True, exist_ok=True)
        partial = here.with_name(f".{here.name}.{uuid.uuid4().hex}.partial")
        try:
            self.store.get(file, partial)
            got = Content.of(partial)
            if got not in {one.content for one in sums}:
                return False
            mtime_ns = partial.stat().st_mtime_ns
            os.replace(partial, here)
            self._write_down(file, got, mtime_ns, got)
        except FileNotFoundError:
            _remove_empty(here.parent, self.path)
        finally:
            partial.unlink(missing_ok=True)
        return True

    def _publish(self, file: str, sums: Collection[Sum]) -> None:
        here = self.path / file
        try:
            stat = here.stat()
            data = here.read_bytes() if stat.st_size <= _SMALL else None
            content = Content.of(here) if data is None else Content(hashlib.sha256(data).hexdigest(), len(data))
        except FileNotFoundError:  # deleted meanwhile
            return
        own = Sum(max((one.number for one in sums), default=0) + 1, content.sha256, content.size)
        if sums:
            self.store.write(own.name(file), b"")
        if data is None:
            self.store.send(here, file)
        else:
            self.store.write(file, data)
        if not sums:
            self.store.write(own.name(file), b"")
        for one in sums:
            if one.number < own.number - 1:  # the one before may be another node's that is just being sent
                self.store.delete(one.name(file))
        self._write_down(file, content, stat.st_mtime_ns, content)

    def _published(self, names: Iterable[str]) -> dict[str, set[Sum]]:
        """The files there, each with its sums."""
        there: dict[str, set[Sum]] = {}
        for name in _listed_as(names):
            for path in self.store.find(f"{_SUMS}/{name}".rstrip("/")):
                file, _, sum = path.removeprefix(f"{_SUMS}/").rpartition("/")
                parts = sum.split("-")
                if len(parts) == 3 and parts[0].isdigit() and parts[2].isdigit() and _is_among(file, names):
                    there.setdefault(file, set()).add(Sum(int(parts[0]), parts[1], int(parts[2])))
        return there

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

    def _look(self, file: str) -> Note | None:
        """What a file is here now; None where it isn't there. Only one that has changed is read."""
        here = self.path / file
        try:
            stat = here.stat()
            kept = self._read(file)
            if kept is not None and (kept.mtime_ns, kept.content.size) == (stat.st_mtime_ns, stat.st_size):
                return kept
            return Note(Content.of(here), stat.st_mtime_ns, None if kept is None else kept.there)
        except FileNotFoundError:
            return None

    def _read(self, file: str) -> Note | None:
        try:
            kept = json.loads(self._note(file).read_text())
            there = kept["there"]
            return Note(Content(**kept["content"]), kept["mtime_ns"], None if there is None else Content(**there))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def _write_down(self, file: str, content: Content, mtime_ns: int, there: Content | None) -> None:
        note = Note(content, mtime_ns, there)
        if self._read(file) == note:
            return
        # Not for ever: where a note is lost the file is read, and that is all.
        path = self._note(file)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        partial.write_text(json.dumps(asdict(note)))
        os.replace(partial, path)

    def _drop(self, file: str) -> None:
        (self.path / file).unlink(missing_ok=True)
        self._note(file).unlink(missing_ok=True)
        _remove_empty((self.path / file).parent, self.path)

    def _note(self, file: str) -> Path:
        return self.path / _NOTES / f"{file}.json"

    def _lock(self, file: str) -> Path:
        return self.path / _NOTES / f"{file}.lock"


def _listed_as(names: Iterable[str]) -> list[str]:
    """What to list for these names: of several in one folder, the folder."""
    parents: dict[str, list[str]] = {}
    for name in names or [""]:
        parents.setdefault(name.rpartition("/")[0], []).append(name)
    return [name for parent, own in parents.items() for name in (own if len(own) < 3 or not parent else [parent])]


def _is_among(file: str, names: Iterable[str]) -> bool:
    return not names or any(file == name or not name or file.startswith(f"{name}/") for name in names)


def _in_order(files: Iterable[str]) -> list[str]:
    """Such that of each folder the files that say that it is whole come last."""

    def place(file: str) -> tuple[int, str]:
        name = PurePosixPath(file).name
        return (_LAST.index(name) + 1 if name in _LAST else 0), file

    return sorted(files, key=place)


def _remove_empty(folder: Path, top: Path) -> None:
    """A folder with nothing in it, and those around it that have nothing else, up to ``top``."""
    with suppress(OSError):
        while folder != top:
            folder.rmdir()
            folder = folder.parent
