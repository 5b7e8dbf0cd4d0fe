"""Copies of a storage: what one node publishes another one fetches, whole, whoever is killed and whatever fails."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from s3 import S3, s3_server

from mage_ray.errors import UserError
from mage_ray.storage import store
from mage_ray.storage.copy import Copy


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    with s3_server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(params=["memory", "s3"])
def url(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    server: S3 = request.getfixturevalue("s3")
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{uuid.uuid4().hex}"


def write(copy: Copy, name: str, text: str) -> None:
    path = copy.path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def read(copy: Copy) -> dict[str, str]:
    """All files of a copy but its own notes."""
    files = [path for path in copy.path.rglob("*") if path.is_file() and ".notes" not in path.parts]
    return {path.relative_to(copy.path).as_posix(): path.read_text() for path in files}


def test_what_one_publishes_another_fetches(url: str, tmp_path: Path) -> None:
    one, other = Copy(url, tmp_path / "one"), Copy(url, tmp_path / "other")
    one.store.check()
    other.fetch()
    assert read(other) == {}
    write(one, "study.yaml", "a: 1")
    write(one, "experts/bone-a/weights", "w" * 100)
    write(one, "experts/bone-a/mage_ray.json", "{}")
    write(one, "experts/.half.partial/weights", "no")
    one.publish()
    other.fetch("experts/bone-a")
    assert read(other) == {"experts/bone-a/weights": "w" * 100, "experts/bone-a/mage_ray.json": "{}"}
    other.fetch()
    assert read(other).pop("study.yaml") == "a: 1"
    # Anybody finds the files under their own names.
    files, root = one.store.files
    assert files.cat_file(f"{root}/study.yaml") == b"a: 1"
    # Back and forth, also to a content that it had before.
    for text, mine, theirs in (("a: 2", other, one), ("a: 3", one, other), ("a: 2", one, other)):
        write(mine, "study.yaml", text)
        mine.publish("study.yaml")
        theirs.fetch("study.yaml")
        assert read(theirs)["study.yaml"] == text
    # What is deleted there is deleted here; what is new here stays.
    write(other, "new", "mine")
    one.remove("experts")
    other.fetch()
    assert read(other) == {"study.yaml": "a: 2", "new": "mine"} and "experts/bone-a/weights" not in read(one)
    other.publish()
    one.fetch("new")
    assert read(one)["new"] == "mine"


def test_only_what_has_changed_is_sent_and_fetched(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    key = uuid.uuid4().hex
    one, other = Copy(f"s3://bucket/{key}", tmp_path / "one"), Copy(f"s3://bucket/{key}", tmp_path / "other")
    write(one, "a", "1")
    write(one, "b", "1")
    for _ in range(3):
        one.publish()
        other.fetch()
    os.utime(one.path / "a")  # touched, and the same
    write(one, "b", "2")
    one.publish()
    other.fetch()
    assert read(other) == {"a": "1", "b": "2"}
    assert s3.requests("GET", f"/{key}/a") == 1 and s3.requests("GET", f"/{key}/b") == 2
    assert s3.requests("PUT", f"/{key}/a") == 1 and s3.requests("PUT", f"/{key}/b") == 2


_FETCH = """
import sys
from pathlib import Path
from mage_ray.storage.copy import Copy
copy = Copy(sys.argv[1], Path(sys.argv[2]))
copy.fetch("weights")
assert (copy.path / "weights").stat().st_size == 3_000_000
"""


def test_a_node_fetches_once_for_all_its_processes(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    key = uuid.uuid4().hex
    one = Copy(f"s3://bucket/{key}", tmp_path / "one")
    one.path.mkdir()
    (one.path / "weights").write_bytes(os.urandom(3_000_000))
    one.publish()
    command = [sys.executable, "-c", _FETCH, f"s3://bucket/{key}", str(tmp_path / "node")]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    assert s3.requests("GET", f"/{key}/weights") == 1


class Failing:
    """A file system of which the requests that write fail from the ``after``-th on, like those of a killed process."""

    def __init__(self, files: Any, after: int) -> None:
        self._files, self.left = files, after

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._files, name)
        if name not in ("pipe_file", "put_file", "rm_file", "merge"):
            return own

        def limited(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return own(*arguments, **named)

        return limited


def test_killed_anywhere_a_file_is_the_old_one_or_the_new_one(url: str, tmp_path: Path) -> None:
    outcomes = []
    for after in range(8):
        at = f"{url}/{after}"
        one, other = Copy(at, tmp_path / f"one-{after}"), Copy(at, tmp_path / f"other-{after}")
        write(one, "file", "old")
        one.publish()
        other.fetch()
        write(one, "file", "the new one")
        write(one, "folder/weights", "w")
        write(one, "folder/mage_ray.json", "{}")
        files, root = one.store.files
        one.store.__dict__["files"] = (Failing(files, after), root)
        with suppress(KeyboardInterrupt):
            one.publish()
        for reader in (other, Copy(at, tmp_path / f"third-{after}")):
            reader.fetch()
            found = read(reader)
            outcomes.append(found["file"])
            assert found["file"] in ("old", "the new one")
            assert "folder/mage_ray.json" not in found or "folder/weights" in found
        # Whoever goes on, on that node or on another, goes on from there.
        one.store.__dict__["files"] = (files, root)
        if after % 2:
            one.fetch()
        one.publish()
        other.fetch()
        assert read(other) == read(one) and read(other).keys() == {"file", "folder/weights", "folder/mage_ray.json"}
    assert {"old", "the new one"} == {*outcomes}


def test_what_is_ahead_of_the_storage_stays(url: str, tmp_path: Path) -> None:
    """Two processes of one node: one appends and publishes now and then, the other one looks."""
    writer, reader = Copy(url, tmp_path / "node"), Copy(url, tmp_path / "node")
    elsewhere = Copy(url, tmp_path / "elsewhere")
    write(writer, "metrics", "1\n")
    writer.publish()
    reader.fetch()
    write(writer, "metrics", "1\n2\n")
    reader.fetch()
    assert read(reader) == {"metrics": "1\n2\n"}
    elsewhere.fetch()
    assert read(elsewhere) == {"metrics": "1\n"}
    elsewhere.publish()  # which is no news, before and after
    writer.publish()
    elsewhere.publish()
    elsewhere.fetch()
    assert read(elsewhere) == {"metrics": "1\n2\n"}


def test_what_is_published_while_another_process_lists_is_not_dropped(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader, writer = Copy(url, tmp_path / "node"), Copy(url, tmp_path / "node")
    listed = reader._published

    def late(names: Any) -> Any:
        there = listed(names)
        write(writer, "experts/new", "just published")
        writer.publish()
        return there

    monkeypatch.setattr(reader, "_published", late)
    reader.fetch()
    assert read(reader) == {"experts/new": "just published"}


@pytest.mark.parametrize("begun", ["", "at first"])
def test_two_nodes_that_publish_one_file_at_once_leave_one_of_both(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: str
) -> None:
    one, two = Copy(url, tmp_path / "one"), Copy(url, tmp_path / "two")
    if begun:
        write(one, "file", begun)
        one.publish()
        two.fetch()
    write(one, "file", "ones")
    write(two, "file", "twos, which is longer")
    sent = one.store.write

    def beside(name: str, data: bytes) -> None:
        sent(name, data)
        monkeypatch.setattr(one.store, "write", sent)
        two.publish()

    monkeypatch.setattr(one.store, "write", beside)
    one.publish()
    third = Copy(url, tmp_path / "third")
    third.fetch()
    assert read(third)["file"] in ("ones", "twos, which is longer")
    write(one, "file", "and then")
    one.publish()
    for copy in (two, third):
        copy.fetch()
        assert read(copy) == {"file": "and then"}


def test_what_the_storage_has_lost_is_sent_again(url: str, tmp_path: Path) -> None:
    one, other = Copy(url, tmp_path / "one"), Copy(url, tmp_path / "other")
    write(one, "rounds/expert", "weights")
    one.publish()
    files, root = one.store.files
    files.rm(root, recursive=True)
    one.publish()
    other.fetch()
    assert read(other) == {"rounds/expert": "weights"}
    # What is deleted leaves no folder that could be taken for a whole one.
    one.remove("rounds")
    other.fetch()
    assert not (other.path / "rounds").exists() and not (one.path / "rounds").exists()


def test_content_that_is_not_what_was_published_is_refused(url: str, tmp_path: Path) -> None:
    one, other = Copy(url, tmp_path / "one"), Copy(url, tmp_path / "other")
    write(one, "weights", "right")
    one.publish()
    files, root = one.store.files
    files.pipe_file(f"{root}/weights", b"wrong")
    with pytest.raises(UserError, match="weights: not the content that was published, allowed: publish it again"):
        other.fetch()
    assert read(other) == {}
    (one.path / "weights").write_text("right ")
    one.publish()
    other.fetch()
    assert read(other) == {"weights": "right "}


class Flaky:
    """A file system that fails a few times before each request that it does."""

    def __init__(self, files: Any, failures: int, error: Exception) -> None:
        self._files, self._failures, self._error, self.failed = files, failures, error, 0

    def __getattr__(self, name: str) -> Any:
        own = getattr(self._files, name)

        def flaky(*arguments: Any, **named: Any) -> Any:
            self.failed += 1
            if self.failed % (self._failures + 1):
                raise self._error
            return own(*arguments, **named)

        return flaky


def test_a_storage_that_fails_for_a_while_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_FIRST_WAIT", 0.001)
    url = f"memory://{uuid.uuid4().hex}"
    one, other = Copy(url, tmp_path / "one"), Copy(url, tmp_path / "other")
    write(one, "file", "text")
    for copy in (one, other):
        files, root = copy.store.files
        copy.store.__dict__["files"] = (Flaky(files, 3, OSError("no route to host")), root)
    one.publish()
    other.fetch()
    assert read(other) == {"file": "text"}
    # Not for ever, and not where no waiting helps.
    write(one, "file", "more")
    files, root = Copy(url, tmp_path).store.files
    monkeypatch.setenv("MAGE_RAY_STORAGE_PATIENCE", "0.05")
    one.store.__dict__["files"] = (Flaky(files, 10**9, OSError("no route to host")), root)
    with pytest.raises(UserError, match=f"^{url}: OSError: no route to host, allowed: a storage that can be reached"):
        one.publish()
    monkeypatch.setenv("MAGE_RAY_STORAGE_PATIENCE", "600")
    refused = Flaky(files, 10**9, PermissionError("Access Denied"))
    one.store.__dict__["files"] = (refused, root)
    with pytest.raises(UserError, match="PermissionError: Access Denied"):
        one.publish()
    assert refused.failed == 1


def test_a_large_file_that_was_cut_off_is_sent_from_there(
    s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(store, "_PART", 5 * 2**20)  # the least that S3 takes
    key = uuid.uuid4().hex
    one, other = Copy(f"s3://bucket/{key}", tmp_path / "one"), Copy(f"s3://bucket/{key}", tmp_path / "other")
    one.path.mkdir()
    (one.path / "weights").write_bytes(os.urandom(17 * 2**20))
    files, root = one.store.files
    one.store.__dict__["files"] = (Failing(files, 3), root)
    with pytest.raises(KeyboardInterrupt):  # after its sum and two of four parts
        one.publish()
    other.fetch()
    assert read(other) == {}
    one.store.__dict__["files"] = (files, root)
    one.publish()
    other.fetch()
    assert (other.path / "weights").read_bytes() == (one.path / "weights").read_bytes()
    parts = [s3.requests("PUT", f"/{i:05d}") for i in range(4)]
    assert parts == [1, 1, 1, 1]
    assert not one.store.find(".parts")


def test_a_bucket_that_is_not_there_is_named_at_once(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"^s3://no-such-bucket/x: .*allowed: a storage that can be reached"):
        Copy("s3://no-such-bucket/x", tmp_path).store.check()
    with pytest.raises(UserError, match=r"^gopher://x/y: ValueError: Protocol not known: gopher"):
        Copy("gopher://x/y", tmp_path).store.check()
