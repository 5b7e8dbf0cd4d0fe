"""A store as pyarrow's file system, which is how Ray Train wants the place of its checkpoints."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mage_ray.storage.store import Store

if TYPE_CHECKING:
    from pyarrow.fs import PyFileSystem


def arrow_files(url: str) -> tuple[PyFileSystem, str]:
    """pyarrow's file system for ``url``, and the path in it. Raises UserError where there is none."""
    from pyarrow.fs import FSSpecHandler, PyFileSystem

    return PyFileSystem(FSSpecHandler(PatientFiles(url))), Store(url).files[1]


class PatientFiles:
    """What pyarrow asks of an fsspec file system, by full paths, each request as patient as a ``Store``'s.

    A file is read, and written, whole: while it is open, a local one stands for it.
    """

    protocol = "patient"

    def __init__(self, url: str) -> None:
        self._store = Store(url)

    def __reduce__(self) -> Any:
        return PatientFiles, (self._store.url,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PatientFiles) and other._store.url == self._store.url

    def __hash__(self) -> int:
        return hash(self._store.url)

    def info(self, path: str) -> dict[str, Any]:
        found: dict[str, Any] = self._ask(lambda files: files.info(path))
        return found

    # fsspec's own take any error for a no.
    def exists(self, path: str) -> bool:
        return self._type(path) is not None

    def isdir(self, path: str) -> bool:
        return self._type(path) == "directory"

    def isfile(self, path: str) -> bool:
        return self._type(path) == "file"

    def find(self, path: str, **how: Any) -> Any:
        return self._ask(lambda files: files.find(path, **how))

    def listdir(self, path: str, **how: Any) -> Any:
        return self._ask(lambda files: files.listdir(path, **how))

    def mkdir(self, path: str, create_parents: bool = True) -> None:
        self._ask(lambda files: files.makedirs(path, exist_ok=True))

    def rm(self, path: str, recursive: bool = False) -> None:
        self._ask(lambda files: files.rm(path, recursive=recursive))

    def mv(self, path: str, to: str, recursive: bool = False) -> None:
        self._ask(lambda files: files.mv(path, to, recursive=recursive))

    def copy(self, path: str, to: str) -> None:
        self._ask(lambda files: files.copy(path, to))

    def open(self, path: str, mode: str = "rb") -> IO[bytes]:
        """Raises ValueError for other modes than rb and wb."""
        if mode not in ("rb", "wb"):
            raise ValueError(f"mode: got {mode!r}, allowed: 'rb' or 'wb'")
        handle, name = tempfile.mkstemp(prefix="mage_ray-")
        if mode == "wb":
            return _Sent(handle, lambda: self._send(Path(name), path))
        try:
            self._ask(lambda files: files.get_file(path, name))
            return open(name, "rb")  # which stays open when its name is gone
        finally:
            os.close(handle)
            os.unlink(name)

    def _send(self, here: Path, path: str) -> None:
        try:
            self._store.send(here, path.removeprefix(f"{self._store.files[1]}/"))
        finally:
            here.unlink()

    def _type(self, path: str) -> str | None:
        try:
            return str(self.info(path)["type"])
        except FileNotFoundError:
            return None

    def _ask(self, call: Callable[[Any], Any]) -> Any:
        return self._store.patiently(lambda: call(self._store.files[0]))


class _Sent(io.FileIO):
    """A file that is sent when it is closed."""

    def __init__(self, handle: int, send: Callable[[], None]) -> None:
        super().__init__(handle, "wb")
        self._to_send: Callable[[], None] | None = send

    def close(self) -> None:
        super().close()
        send, self._to_send = self._to_send, None
        if send is not None:
            send()
