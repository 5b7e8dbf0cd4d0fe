"""The pages of docs/: the tutorial is followed word for word, on a tiny model, and links lead somewhere."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from clusters import free_port

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [*DOCS.glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "deployments").rglob("*.md"), *(ROOT / "jobs").rglob("*.md")]
TUTORIAL = (DOCS / "tutorial.md").read_text()


def headings(page: Path) -> set[str]:
    """As anchors."""
    lines = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line).strip().lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), target
        assert not anchor or anchor in headings(there), target


@pytest.mark.slow
def test_the_site_is_built_of_all_pages_and_modules(tmp_path: Path) -> None:
    make = ["make", "-n", "docs", f"SITE={tmp_path}", f"BIN={Path(sys.executable).parent}"]
    planned = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for line in planned.splitlines():
        if not re.search(r"bin/(mkdocs|pdoc) ", line):
            continue
        done = subprocess.run(shlex.split(line), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "Warn" not in done.stderr, done.stderr
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert built >= {f"{page.stem}/index.html" for page in DOCS.glob("*.md")}
    # A package that says what it has to offer shows that.
    packages = [path.parent for name in ("mage_ray", "deployments") for path in (ROOT / name).rglob("__init__.py")]
    modules = [
        path
        for package in packages
        if "__all__" not in (package / "__init__.py").read_text()
        for path in package.glob("*.py")
        if "__" not in path.name
    ]
    assert built >= {f"api/{path.relative_to(ROOT).with_suffix('.html').as_posix()}" for path in modules}
    assert "Generator" in (tmp_path / "api" / "mage_ray" / "generator.html").read_text()


@pytest.mark.slow
def test_the_tutorial_is_true(tiny_model_folder: Path, tmp_path: Path) -> None:
    for name, text in re.findall(r"`(\w+\.\w+)`:\n\n```\w+\n(.*?)```", TUTORIAL, re.DOTALL):
        (tmp_path / name).write_text(text)
    assert {path.name for path in tmp_path.iterdir()} == {"questions.py", "prompts.jsonl", "study.yaml"}
    study = yaml.safe_load((tmp_path / "study.yaml").read_text())
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study | {"model": str(tiny_model_folder)}))
    commands = [
        shlex.split(line)
        for block in re.findall(r"```sh\n(.*?)```", TUTORIAL, re.DOTALL)
        for line in block.splitlines()
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}

    *jobs, serve, ask = commands
    assert [job[1] for job in jobs] == ["train", "evaluate", "search", "generate", "export"]
    for command, *arguments in jobs:
        assert command == "mage-ray"
        done = subprocess.run(
            [sys.executable, "-m", "mage_ray", *arguments],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "runs/asking/report/index.html").exists() and (tmp_path / "runs/asking/recipe.yaml").exists()
    assert (tmp_path / "asking-mostly" / "adapter_model.safetensors").exists()

    assert serve[:3] == ["python", "-m", "deployments.local"] and ask[0] == "curl"
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, *serve[1:], "--port", str(port)],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert server.stdout is not None
        said = iter(server.stdout.readline, "")
        assert any("playground" in line for line in said)
        asked = subprocess.run([part.replace(":8000/", f":{port}/") for part in ask], capture_output=True, timeout=120)
        assert json.loads(asked.stdout)["mage"]["preference"] == {"asking": 0.8, "short": 0.2}
    finally:
        server.terminate()
        server.communicate(timeout=60)
