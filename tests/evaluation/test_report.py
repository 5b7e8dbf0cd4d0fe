"""The report as a reader gets it: files on disk, a page that stands alone, and a table that fits the terminal."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evaluation_samples import GRID_2, GRID_3, front, make_samples
from rich.console import Console

from mage_ray.evaluation.report import print_table, write_report
from mage_ray.evaluation.summary import Summary, summarise
from mage_ray.evaluation.tables import BEST, CLOSE, COLUMNS, marks

HOSTILE = '<script>alert("x")</script> & https://evil.example/a.png $title {x} '
VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """Collects text, tags and addresses, and checks that every tag that opens is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.words = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def case(n: int, text: str = "all is well") -> tuple[Summary, pd.DataFrame]:
    grid = GRID_2 if n == 2 else GRID_3
    means = {
        "reference": np.zeros((1, n)),
        "rewarded-soup": front(0.8, grid),
        "bone-soup": front(1.0, grid),
        "MAGE-I-M <$>": front(1.05, grid),
    }
    samples = make_samples(means, grid, text=text)
    objectives = [f"o{i}" for i in range(n)]
    return summarise(samples, objectives, [-1.0] * n, resamples=100), samples


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 3])
def test_a_report_stands_alone_and_escapes_all_text(n: int, tmp_path: Path) -> None:
    summary, samples = case(n, HOSTILE)
    folder = tmp_path / "deep" / "report"
    write_report(folder, title=HOSTILE, summary=summary, samples=samples, facts={"model <b>": HOSTILE})
    pictures = {f"{name}{dress}.png" for name in ("front", "control", "cost") for dress in ("", "-dark")}
    assert {path.name for path in folder.iterdir()} == pictures | {"index.html", "summary.json"}
    for picture in pictures:
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert (folder / "summary.json").read_text() == summary.to_json()

    text = (folder / "index.html").read_text()
    page = Page(text)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert set(page.addresses) == pictures  # nothing is loaded but the pictures beside the page
    assert not re.search(r"@import|url\(", text)
    assert page.words.count(HOSTILE.strip()) > 10  # shown as it is: title, facts, prompts, completions
    for method in summary.methods:
        assert method.method in page.words
    for column in COLUMNS:
        assert column.label in page.words
    assert "Against rewarded-soup" in page.words


@pytest.mark.slow
def test_a_report_replaces_the_old_one_and_survives_a_failure(tmp_path: Path) -> None:
    summary, samples = case(2)
    write_report(tmp_path, title="first", summary=summary, samples=samples, facts={})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other, _ = case(3)
    with pytest.raises(KeyError):  # the samples are of another comparison
        write_report(tmp_path, title="second", summary=other, samples=samples, facts={})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    write_report(tmp_path, title="third", summary=summary, samples=samples, facts={})
    assert set(before) == {path.name for path in tmp_path.iterdir()}
    assert "<h1>third</h1>" in (tmp_path / "index.html").read_text()


@pytest.mark.slow
def test_one_point_and_one_prompt_still_make_a_report(tmp_path: Path) -> None:
    samples = make_samples({"only": np.zeros((1, 2))}, GRID_2, prompts=1, seeds=1)
    samples["preference"] = [[0.5, 0.5]]
    summary = summarise(samples, ["o0", "o1"], [-1, -1], resamples=10)
    write_report(tmp_path, title="tiny", summary=summary, samples=samples, facts={})
    words = Page((tmp_path / "index.html").read_text()).words
    assert "Against" not in words
    assert "nan" not in words


@pytest.mark.slow
def test_the_side_by_side_shows_each_method_at_its_own_preference(tmp_path: Path) -> None:
    summary, samples = case(2)
    samples["completion"] = [
        f"<{method}|{point}|{prompt}|{seed}>"
        for method, point, prompt, seed in samples[["method", "point", "prompt_id", "seed"]].itertuples(index=False)
    ]
    write_report(tmp_path, title="t", summary=summary, samples=samples, facts={})
    shown = re.findall(r"<([^<>]+)\|(\d+)\|(p\d+)\|(\d+)>", Page((tmp_path / "index.html").read_text()).words)
    of_bone = [(int(point), seed) for method, point, prompt, seed in shown if (method, prompt) == ("bone-soup", "p0")]
    assert of_bone == [(0, "0"), (2, "0"), (5, "0"), (8, "0"), (10, "0")]
    assert [point for method, point, prompt, _ in shown if (method, prompt) == ("reference", "p0")] == ["0"]


def test_marks_name_the_best_and_what_overlaps_it() -> None:
    summary, _ = case(2)
    column = COLUMNS[0]
    marked = marks(summary, column)
    best, close, far = (
        summary.method(name).measures["hypervolume"] for name in ("MAGE-I-M <$>", "bone-soup", "reference")
    )
    assert close.high > best.low > far.high  # the case is what it is meant to be
    assert marked["MAGE-I-M <$>"] == BEST
    assert marked["bone-soup"] == CLOSE
    assert marked["reference"] == ""
    sparsity = next(column for column in COLUMNS if column.measure == "sparsity")
    assert set(marks(summary, sparsity).values()) == {""}


def test_the_printed_table_fits_a_hundred_columns() -> None:
    summary, _ = case(2)
    out = io.StringIO()
    print_table(summary, Console(file=out, width=100, color_system=None))
    lines = out.getvalue().splitlines()
    assert max(len(line) for line in lines) <= 100
    value = summary.method("bone-soup").measures["hypervolume"]
    expected = f"{value.value:.3f} [{value.low:.3f}, {value.high:.3f}] {CLOSE}"
    assert any(line.strip().startswith("bone-soup") and expected in line for line in lines)
    assert "…" not in out.getvalue()
