"""What the search's page shows is valid, and runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from mage_ray.search.space import Space
from mage_ray.study import parse_study

PAGE = (Path(__file__).parent.parent.parent / "docs/search.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_its_studies_are_valid() -> None:
    search, early = map(yaml.safe_load, blocks("yaml"))
    objectives = {"helpful": {"type": "positivity"}, "short": {"type": "brevity"}}
    backbones = {"bone": {"beta": 0.7}, "wide": {"beta": 0.6}, "soup": {}}
    study = parse_study(yaml.safe_dump({"objectives": objectives, "training": {"backbones": backbones}, **search}))
    space = Space(study)
    named = {name.partition(".")[0] for name in space.dimensions}
    assert named == set(search["search"]["space"])
    assert not parse_study(yaml.safe_dump({"objectives": objectives, **early})).training.backbones["bone"].decided


@pytest.mark.slow
def test_the_searcher_runs_in_anybodys_tuner(tmp_path: Path) -> None:
    [code] = blocks("python")
    start = "import ray\nray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines() if re.match(r"\d+ +\d", line)]
    assert len(rows) == 16
    for _, x, depth, loss, size in rows:
        assert float(x) * int(depth) <= 12 + 1e-6
        assert float(loss) == pytest.approx((float(x) - 1) ** 2 + 1 / int(depth), abs=1e-4)
        assert float(size) == pytest.approx(int(depth) * (1 + float(x)), abs=1e-4)
    assert any(float(x) == 1 and depth == "2" for _, x, depth, _, _ in rows)
