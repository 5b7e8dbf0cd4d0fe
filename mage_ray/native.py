"""C files of this package, compiled for the processor at hand on first use and kept in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from mage_ray.files import atomic_path, cache_folder

_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")

_log = logging.getLogger("mage_ray")


@cache
def library(source: Path) -> ctypes.CDLL | None:
    """The library made from one C file; None, and a warning, where it can't be made."""
    try:
        compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
        if compiler is None:
            raise OSError("no C compiler on the PATH")
        if (kept := _kept(compiler, source)) is not None:
            return ctypes.CDLL(str(kept))
        with tempfile.TemporaryDirectory(prefix="mage_ray-") as scratch:
            target = Path(scratch) / f"{source.stem}.so"
            _compile(compiler, source, target)
            return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error).partition("\n")[0]
        _log.warning("decoding on this CPU is slower: %s could not be compiled (%s)", source.name, reason)
        return None


def _kept(compiler: str, source: Path) -> Path | None:
    """The library's file in the cache folder, made if need be; None where there is no place that is ours alone.

    Processes that make it at once each put the same there.
    """
    parts = [source.read_bytes(), " ".join(_FLAGS).encode(), compiler.encode(), _processor()]
    folder = cache_folder() / "native"
    path = folder / f"{source.stem}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(folder):
            return None
        if not (path.exists() and _is_ours(path)):
            with atomic_path(path) as partial:
                _compile(compiler, source, partial)
                partial.chmod(0o700)
        return path
    except PermissionError:
        return None


def _is_ours(path: Path) -> bool:
    """Whether nobody else can have written there: it is code that will run."""
    status = path.stat()
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _compile(compiler: str, source: Path, target: Path) -> None:
    command = [compiler, *_FLAGS, "-o", str(target), str(source), "-lm"]
    made = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if made.returncode:
        raise OSError(f"{compiler}: {made.stderr.strip()}")


def _processor() -> bytes:
    """What tells processors apart for which the compiler makes other code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor().encode()
    kept = dict.fromkeys(line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part")))
    return "\n".join(kept).encode()
