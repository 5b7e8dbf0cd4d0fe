"""Requests to a storage at a URL, any that fsspec knows (``s3://``, ``gs://`` …), made again while it fails."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import time
import uuid
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from mage_ray.errors import UserError

Result = TypeVar("Result")

_log = logging.getLogger("mage_ray")

_PARTS = ".parts"
_PART = 64 * 2**20
"""Bytes. Files of more than two such parts are sent in parts, where the storage can put them together."""
_PATIENCE = 600.0
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 15.0
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oss", "memory"}
"""Protocols of storages that have no folders to be made."""
_HOPELESS = (PermissionError, ImportError, TypeError, ValueError, KeyError)
_HOPELESS_NAMES = {"NoCredentialsError", "PartialCredentialsError", "NoRegionError", "InvalidRegionError"}
"""Errors that no patience helps; botocore's by their names."""
_LOCAL_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EMFILE}


def is_url(place: Path | str) -> bool:
    """Whether ``place`` names a storage rather than a path of this machine."""
    return "://" in str(place)


def patience() -> float:
    """Seconds for which a storage that fails is tried again: ``MAGE_RAY_STORAGE_PATIENCE``, else ten minutes."""
    return float(os.environ.get("MAGE_RAY_STORAGE_PATIENCE") or _PATIENCE)


class Store:
    """What lies at ``url``, by names relative to it.

    All methods raise UserError for a request that isn't allowed, and for one that has failed for ``patience`` seconds.
    """

    def __init__(self, url: str, patience: float | None = None) -> None:
        self.url, self.patience = url.rstrip("/"), patience

    def check(self, writing: bool = True) -> None:
        """Raises UserError, at once, for a storage that can't be reached or, if wanted, mustn't be written to."""
        files, root = self.files
        name = f"{root}/.{uuid.uuid4().hex}.written-to-see-whether-it-can-be"
        try:
            if writing:
                self._with_folders(name, lambda: files.pipe_file(name, b""))
                files.rm_file(name)
            else:
                with contextlib.suppress(FileNotFoundError):
                    files.info(root)
        except Exception as error:
            raise self._fails(error) from None

    def find(self, name: str) -> list[str]:
        """All files in a folder, in any depth, and one of that very name; none where there is neither."""
        files, root = self.files
        top = f"{root}/{name}".rstrip("/")
        try:
            return [path.removeprefix(f"{root}/") for path in self.patiently(lambda: list(files.find(top)))]
        except FileNotFoundError:
            return []

    def marks(self) -> dict[str, str]:
        """Of each file at the URL, or of the one that it names (whose name is then empty), what changes with it."""
        files, root = self.files
        try:
            found = self.patiently(lambda: files.find(root, detail=True))
        except FileNotFoundError:
            return {}
        known = ("size", "ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "created")
        return {
            path.removeprefix(root).removeprefix("/"): repr([info.get(key) for key in known])
            for path, info in found.items()
        }

    def get(self, name: str, here: Path) -> None:
        """Raises FileNotFoundError where it isn't there."""
        files, root = self.files
        self.patiently(lambda: files.get_file(f"{root}/{name}".rstrip("/"), str(here)))

    def write(self, name: str, data: bytes) -> None:
        files, root = self.files
        path = f"{root}/{name}"
        self.patiently(lambda: self._with_folders(path, lambda: files.pipe_file(path, data)))

    def send(self, here: Path, name: str) -> None:
        """A file of any size; what has been sent of a large one is not sent again after a failure or a kill."""
        files, root = self.files
        path = f"{root}/{name}"
        # It may be deleted while it waits to be sent; then it is that file which isn't there.
        if here.stat().st_size > 2 * _PART and hasattr(files, "merge"):
            self._send_in_parts(here, path)
        else:
            self.patiently(lambda: self._with_folders(path, lambda: files.put_file(str(here), path), here))

    def delete(self, name: str) -> None:
        """No error where it isn't there."""
        files, root = self.files
        with contextlib.suppress(FileNotFoundError):
            self.patiently(lambda: files.rm_file(f"{root}/{name}"))

    @cached_property
    def files(self) -> tuple[Any, str]:
        """fsspec's file system, and the path in it."""
        import fsspec

        try:
            files, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True)
        except (ImportError, ValueError, TypeError) as error:
            raise self._fails(error) from None
        return files, root.rstrip("/")

    def _send_in_parts(self, here: Path, path: str) -> None:
        files, root = self.files
        with open(here, "rb") as file:
            place = f"{_PARTS}/{hashlib.file_digest(file, 'sha256').hexdigest()}"
            parts = [f"{place}/{i:05d}" for i in range(-(-here.stat().st_size // _PART))]
            sent = {*self.find(place)}
            for i, part in enumerate(parts):
                if part not in sent:
                    file.seek(i * _PART)
                    self.write(part, file.read(_PART))
        self.patiently(lambda: files.merge(path, [f"{root}/{part}" for part in parts]))
        for part in parts:
            self.delete(part)

    def _with_folders(self, path: str, call: Callable[[], Any], here: Path | None = None) -> None:
        """Call it; where the folder of ``path`` is missing (and not the file ``here``), make that first."""
        files, _ = self.files
        try:
            call()
        except FileNotFoundError:
            if here is not None and not here.exists():
                raise
            if self.url.partition("://")[0] in _OBJECT_STORES:
                raise PermissionError(f"there is no {path.partition('/')[0]}") from None
            files.makedirs(path.rpartition("/")[0], exist_ok=True)
            call()

    def patiently(self, call: Callable[[], Result]) -> Result:
        """What ``call`` returns, tried again while the storage fails. FileNotFoundError comes through."""
        late = time.monotonic() + (patience() if self.patience is None else self.patience)
        wait = _FIRST_WAIT
        while True:
            try:
                return call()
            except FileNotFoundError:
                raise
            except Exception as error:
                if isinstance(error, OSError) and error.errno in _LOCAL_FAULTS:
                    raise  # of this node's disk, not of the storage
                if _is_hopeless(error) or time.monotonic() + wait > late:
                    raise self._fails(error) from None
                _log.warning("%s fails, trying again in %.3g s: %s", self.url, wait, _reason(error))
            time.sleep(wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    def _fails(self, error: Exception) -> UserError:
        return UserError(f"{self.url}: {_reason(error)}, allowed: a storage that can be reached, read and written")


def _is_hopeless(error: Exception) -> bool:
    # s3fs tells what a server calls malformed (a bucket's name, a token) as an invalid argument.
    invalid = isinstance(error, OSError) and error.errno == errno.EINVAL
    return isinstance(error, _HOPELESS) or type(error).__name__ in _HOPELESS_NAMES or invalid


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
