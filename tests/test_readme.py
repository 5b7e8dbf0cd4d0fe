"""The README's examples do what they say, on a tiny study in the demo's place."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from adapters import make_adapter
from studies import trained_study

from mage_ray.cli import main
from mage_ray.search.recipe import own_recipe
from mage_ray.study import parse_study

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def demo(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder: a study in ``runs/demo`` with the demo's objectives, a recipe, a model ``base``, adapters."""
    objectives = {"positive": {"type": "positivity"}, "short": {"type": "brevity"}}
    folder = trained_study(tmp_path / "runs" / "demo", tiny_model_folder, objectives=objectives)
    own_recipe(folder.study, "mage-i-m").save(folder.recipe)
    for seed, name in enumerate("ab"):
        make_adapter(tiny_model_folder, tmp_path / name, seed=seed)
    (tmp_path / "base").symlink_to(tiny_model_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_library_examples_run(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = [block for block in blocks("python") if "openai" not in block]  # that one wants a server: deployments/
    assert len(code) == 4
    for short in (code[0], code[3]):
        assert len([line for line in short.splitlines() if line.strip() and not line.startswith("#")]) <= 15
    namespace: dict[str, object] = {}
    for block in code:  # each goes on where the one before it ends
        exec(block, namespace)
        assert capsys.readouterr().out.strip()
    assert len(namespace["requests"]) == 6  # type: ignore[arg-type]
    assert len(namespace["sequences"]) == 2  # type: ignore[arg-type]


def test_the_command_line_examples_run(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commands = [
        line for block in blocks("sh") for line in block.splitlines() if "mage-ray generate" in line or "export" in line
    ]
    assert len(commands) == 4
    for command in commands:
        assert main(shlex.split(command, comments=True)[1:]) == 0, command
    assert {p.name for p in demo.iterdir()} >= {"soup", "merged"}


def test_the_example_study_is_valid() -> None:
    [text] = blocks("yaml")
    study = parse_study(text)
    assert study.objective_names == ["helpful", "short", "ours"]
    assert yaml.safe_load(text)["name"] == "mine"


def test_every_file_that_it_links_is_there() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), target
