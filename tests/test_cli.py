"""The command line on a tiny trained study: what it prints, and how it refuses bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from adapters import make_adapter
from safetensors.torch import load_file, save_file
from studies import REWARDS, trained_study
from tiny import make_tiny_model
from transformers import AutoModelForCausalLM

from mage_ray.cli import main
from mage_ray.decoding.request import Sampling
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator

ARGUMENTS = ["--preference", "even=0.7,short=0.3", "--max-new-tokens", "10", "--seed", "3"]


@pytest.fixture(scope="module")
def trained(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    return trained_study(tmp_path_factory.mktemp("cli") / "study", tiny_model_folder)


@pytest.fixture
def own(trained: StudyFolder, tmp_path: Path) -> StudyFolder:
    """A copy to damage."""
    shutil.copytree(trained.path, tmp_path / "study")
    return StudyFolder(tmp_path / "study")


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run, expect exit status 2 and one line on stderr, and return it."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("mage-ray: ")
    assert "\n" not in error
    return error


def test_generate_streams_what_the_library_gives(trained: StudyFolder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "say something", "--study", str(trained.path), *ARGUMENTS, "--strength", "1.5"]) == 0
    printed = capsys.readouterr().out
    generator = Generator.open(trained.path)
    [expected] = generator.generate(
        ["say something"], {"even": 0.7, "short": 0.3}, strength=1.5, sampling=Sampling(10, 0.7, seed=3)
    )
    assert printed == expected.text + "\n"
    assert len(expected.ids) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preference", "even=1.2,short=-0.2"], "preference.short: got -0.2"),
        (["--preference", "even=nan,short=1"], "preference.even: got nan"),
        (["--preference", "even=0.5,short=0.4"], "a sum of 0.9"),
        (["--preference", "kind=1"], "objectives of this study: even, short"),
        ([*ARGUMENTS, "--method", "magic"], "method: got magic, allowed: one of reference"),
        ([*ARGUMENTS, "--strength", "-1"], "strength: got -1"),
        ([*ARGUMENTS, "--candidates", "0"], "candidates: got 0"),
        ([*ARGUMENTS, "--temperature", "nan"], "temperature: got nan"),
        ([*ARGUMENTS, "--max-new-tokens", "100000"], "at most"),
    ],
)
def test_generate_refuses(
    arguments: list[str], message: str, trained: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(["generate", "hello", "--study", str(trained.path), *arguments], capsys)


def origin(folder: StudyFolder, **content: str) -> None:
    (folder.expert("bone", "short") / "mage_ray.json").write_text(json.dumps(content))


def poison(folder: StudyFolder) -> None:
    path = folder.expert("soup", "short") / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[:] = float("nan")
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.study_file.unlink(), "study.yaml: cannot be read"),
        (lambda f: f.study_file.write_text("model: ["), "not YAML"),
        (lambda f: shutil.rmtree(f.expert("bone", "even")), "there is no expert"),
        (lambda f: (f.expert("bone", "short") / "adapter_model.safetensors").write_bytes(b"junk"), "corrupt"),
        (lambda f: (f.expert("bone", "short") / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda f: origin(f, base_model="0123456789abcdef"), "another base model"),
        (lambda f: origin(f, tokenizer="0123456789abcdef"), "another tokenizer"),
        (poison, "NaN or infinity"),
    ],
)
def test_a_damaged_study_is_refused(
    damage: Callable[[StudyFolder], Any], message: str, own: StudyFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(own)
    assert message in refused(["generate", "hello", "--study", str(own.path), *ARGUMENTS], capsys)


def test_an_expert_of_a_wider_model_is_refused(
    own: StudyFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(own.expert("bone", "even"))
    make_adapter(make_tiny_model(tmp_path / "wide", hidden_size=64), own.expert("bone", "even"))
    error = refused(["generate", "hello", "--study", str(own.path), *ARGUMENTS], capsys)
    assert "adapter bone-even" in error
    assert "as in this base model" in error


def test_export_with_and_without_a_study_agree(
    trained: StudyFolder, tiny_model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experts = [f"--expert={trained.expert('bone', name)}" for name in ("even", "short")]
    assert main(["export", *experts, "--coefficients=1.75,-0.75", "--out", str(tmp_path / "a")]) == 0
    study = ["--study", str(trained.path), "--preference", "even=1"]
    assert main(["export", *study, "--out", str(tmp_path / "b")]) == 0
    assert main(["export", *study, "--out", str(tmp_path / "full"), "--full"]) == 0
    a, b = (load_file(tmp_path / name / "adapter_model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all((a[key] - b[key]).abs().max() < 1e-6 for key in a)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "full").config.vocab_size == 260
    assert "isn't there yet" in refused(
        ["export", *experts, "--coefficients=1,1", "--out", str(tmp_path / "a")], capsys
    )
    for numbers, message in (
        ("1", "2 numbers"),
        ("1,x", "numbers with commas"),
        ("0,0", "not all 0"),
        ("nan,1", "finite"),
    ):
        error = refused(["export", *experts, f"--coefficients={numbers}", "--out", str(tmp_path / "c")], capsys)
        assert message in error
    many_rows = ["export", *study, "--method", "mage-i-m", "--out", str(tmp_path / "c")]
    assert "a method of one row" in refused(many_rows, capsys)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("full", [[], ["--full"]])
def test_a_full_disk_ends_an_export_in_one_line_and_leaves_nothing(
    full: list[str], trained: StudyFolder, tmp_path: Path
) -> None:
    """A limit on file size stands for the full disk: the kernel refuses to write on."""
    command = [sys.executable, "-c", LIMITED, "export", "--study", str(trained.path), "--preference", "even=1"]
    done = subprocess.run([*command, "--out", str(tmp_path / "out"), *full], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("mage-ray: ")
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
from mage_ray.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "objectives.even: got RuntimeError"),
        ("too_few", "objectives.even"),
        ("nan_at_last", "objectives.even"),
    ],
)
def test_an_objective_that_misbehaves_ends_evaluation_in_one_line(
    function: str, message: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "rewards.py").write_text(REWARDS)
    spec = {"type": "function", "path": f"rewards:{function}", "direction": "maximise", "low": 0, "high": 1}
    folder = trained_study(
        tmp_path / "study", tiny_model_folder, objectives={"even": spec, "short": {"type": "brevity"}}
    )
    done = subprocess.run(
        [sys.executable, "-m", "mage_ray", "evaluate", "--study", str(folder.path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 2, done.stderr
    error = done.stderr.strip().splitlines()[-1]
    assert message in error
    assert "Traceback" not in done.stderr
    assert not folder.report.exists()
    assert not list(folder.evaluation.glob("*")) if folder.evaluation.exists() else True
