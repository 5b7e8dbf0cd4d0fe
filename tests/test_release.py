"""What `pip install mage-ray` brings: the wheel, and that it works without the project's folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("mage_ray", "deployments")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the project, which is left as it was."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md"):
        shutil.copyfile(ROOT / name, source / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(place),
        str(source),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [made] = place.glob("mage_ray-*.whl")
    return made


def test_the_wheel_has_every_file_of_the_packages_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as content:
        inside = {name for name in content.namelist() if ".dist-info/" not in name}
    files = (path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file())
    assert inside == {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


def test_it_works_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    with ZipFile(wheel) as content:
        content.extractall(tmp_path / "installed")
    code = (
        "import mage_ray, sys; from pathlib import Path; from mage_ray.study import load_study; "
        "from mage_ray.prompts import load_prompts; place = Path(mage_ray.__file__).parent; "
        "print(place, load_study(place / 'data/demo.yaml').name, len(load_prompts('builtin', seed=0)))"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}
    for command in ([sys.executable, "-c", code], [sys.executable, "-m", "mage_ray", "--help"]):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if "-c" in command:
            assert done.stdout.split() == [str(tmp_path / "installed" / "mage_ray"), "demo", "260"]
        else:
            assert "Controllable multi-objective generation" in done.stdout
