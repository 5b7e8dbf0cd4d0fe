"""What the tests of real Ray Train jobs share: what a job has done so far, who kills it, and what it arrived at."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil

from mage_ray.folder import StudyFolder
from mage_ray.merging.adapter import HEAD_FILE, WEIGHTS_FILE

DRIVER = """
import sys, ray
from mage_ray.folder import StudyFolder
from {module} import {job}
ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False, configure_logging=False)
folder = StudyFolder(sys.argv[1])
{job}(folder.study, folder)
"""


@contextmanager
def driver_to_kill(job: Callable[..., None], folder: StudyFolder) -> Iterator[None]:
    """``job`` on a study in a process of its own, which kill -9 ends with the block, and all that it has started."""
    code = DRIVER.format(module=job.__module__, job=job.__name__)
    driver = subprocess.Popen([sys.executable, "-c", code, str(folder.path)], start_new_session=True)
    try:
        yield
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    """The tensors of an adapter, and of its value head where it has one."""
    from safetensors.numpy import load_file

    head = load_file(folder / HEAD_FILE) if (folder / HEAD_FILE).exists() else {}
    return load_file(folder / WEIGHTS_FILE) | {f"head.{name}": tensor for name, tensor in head.items()}


def assert_same(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> None:
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        # AdamW divides by the gradient's size: where a gradient is nearly 0, rounding turns into a visible step.
        assert np.abs(got[name] - tensor).mean() < 2e-4, name
        assert np.abs(got[name] - tensor).max() < 2e-2, name


def steps_made(path: Path) -> list[int]:
    """The steps in the order in which they were made, those made twice twice."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return []
    return [json.loads(line)["step"] for line in lines if line.endswith("}")]


def wait_for(condition: Callable[[], object], seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)


def checkpointed(run: Path) -> bool:
    """Whether Ray Train's controller has taken note of a checkpoint."""
    try:
        return bool(json.loads((run / "checkpoint_manager_snapshot.json").read_text())["checkpoint_results"])
    except (OSError, ValueError, KeyError):
        return False


def kill_a_worker(run: Path, killed: list[int]) -> None:
    """Kill -9 one of this process's own Ray Train workers once there is a checkpoint to go on from; note its id."""
    wait_for(lambda: checkpointed(run))
    children = psutil.Process().children(recursive=True)
    worker = [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())][-1]
    worker.kill()
    killed.append(worker.pid)
