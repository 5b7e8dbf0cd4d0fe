from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mage_ray.files import atomic_path, locked, write_atomic


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f"
    write_atomic(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_the_place_of_another_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_path(tmp_path / "d") as partial:
            partial.mkdir()
            (partial / text).write_text(text)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["two"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_is_full_raises_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on file size stands for the full disk: the kernel refuses to write on."""
    code = f"""
import resource
from pathlib import Path
from mage_ray.files import write_atomic
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomic(Path({str(tmp_path / "big")!r}), b"x" * 5000)
except OSError as error:
    print("refused", error.errno)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("refused")
    assert list(tmp_path.iterdir()) == []
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000


def test_a_lock_ends_with_its_holder(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from mage_ray.files import locked
with locked(Path({str(tmp_path / "lock")!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    os.kill(holder.pid, 9)
    holder.wait()
    start = time.monotonic()
    with locked(tmp_path / "lock"):
        assert time.monotonic() - start < 5
