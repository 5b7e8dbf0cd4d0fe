"""C files of this package, compiled for the processor at hand on first use and kept in the cache folder."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
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
        return ctypes.CDLL(str(_built(source)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = str(error).partition("\n")[0]
        _log.warning("decoding on this CPU is slower: %s could not be compiled (%s)", source.name, reason)
        return None


def _built(source: Path) -> Path:
    """The library's file. Processes that build it at once each put the same there."""
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc")
    if compiler is None:
        raise OSError("no C compiler on the PATH")
    parts = [source.read_bytes(), " ".join(_FLAGS).encode(), compiler.encode(), _processor()]
    path = cache_folder() / f"{source.stem}-{hashlib.sha256(b'|'.join(parts)).hexdigest()[:16]}.so"
    if not path.exists():
        try:
            with atomic_path(path) as partial:
                _compile(compiler, source, partial)
        except PermissionError:
            path = Path(tempfile.mkdtemp(prefix="mage_ray-")) / path.name
            _compile(compiler, source, path)
    return path


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
