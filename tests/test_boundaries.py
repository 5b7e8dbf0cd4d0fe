"""What may know what (see the README's map), and that the command line starts at once."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEAVY = {"ray", "peft", "trl", "deepspeed", "pydantic"}


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after ``code``."""
    command = f"{code}\nimport sys\nprint('LOADED', *sorted({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    return set(next(line for line in done.stdout.splitlines() if line.startswith("LOADED")).split()[1:])


@pytest.mark.parametrize("package", ["merging", "decoding"])
def test_the_core_is_free_of_frameworks(package: str) -> None:
    code = f"""
import importlib, pkgutil, mage_ray.{package} as package
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    importlib.import_module(module.name)
"""
    loaded = loaded_by(code)
    assert "torch" in loaded
    assert not loaded & HEAVY


def test_help_answers_within_a_second_and_loads_nothing_heavy() -> None:
    assert not loaded_by("import mage_ray.cli") & (HEAVY | {"torch", "transformers", "numpy", "matplotlib"})
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "mage_ray", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    assert b"generate" in done.stdout
    assert min(times) < 1
