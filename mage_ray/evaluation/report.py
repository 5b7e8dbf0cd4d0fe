"""A report that opens from disk: one page, its pictures, and the numbers as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Literal

import numpy as np

from mage_ray.evaluation.summary import MethodSummary, Summary
from mage_ray.evaluation.tables import BASELINE, COLUMNS, differences_html, measures_html, number, print_table
from mage_ray.files import write_atomic

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["print_table", "write_report"]

_PAGES = {
    "analyses": ("Analyses", "when merging and guiding work."),
    "search": ("Search", "which constants were tried, and what the best of them gain on unseen prompts."),
    "comparison": ("Comparison", "every method under the same conditions."),
}
"""What may lie beside a report; its links to them stand between the marks."""
_MARKS = ("<!-- pages -->", "<!-- /pages -->")
_SHOWN_PROMPTS = 4
_SHOWN_METHODS = 4
_SHOWN_PREFERENCES = 5


def write_report(
    folder: Path, *, title: str, summary: Summary, samples: pd.DataFrame, facts: Mapping[str, str]
) -> None:
    """Write ``index.html``, ``summary.json`` and the pictures (``front.png``, ``front-dark.png``, …) into ``folder``.

    ``samples`` is the table that ``summary`` was made from; a few of its completions are shown side by side.
    ``facts`` (model, machine, date, command, times) are shown as they are. Nothing is written before all of it
    is made; then each file is replaced whole and the page comes last. All text is escaped; the page loads nothing from
    outside its folder.
    """
    from mage_ray.evaluation.canvas import DARK, LIGHT
    from mage_ray.evaluation.plots import draw_control, draw_cost, draw_fronts

    whole = _linked(_page(title, summary, samples, facts), folder)
    content: dict[str, bytes | str] = {}
    for name, draw in (("front", draw_fronts), ("control", draw_control), ("cost", draw_cost)):
        content[f"{name}.png"] = draw(summary, LIGHT)
        content[f"{name}-dark.png"] = draw(summary, DARK)
    content |= {"summary.json": summary.to_json(), "index.html": whole}
    for name, data in content.items():
        write_atomic(folder / name, data)


def write_page(folder: Path, name: Literal["analyses", "search", "comparison"], title: str, body: str) -> Path:
    """Write ``<name>.html`` beside a report, which links to it, whichever of them is written first."""
    path = folder / f"{name}.html"
    write_atomic(path, page(title, f"<h1>{escape(title)}</h1>\n{body}"))
    index = folder / "index.html"
    if index.exists():
        text = index.read_text(encoding="utf-8")
        if (linked := _linked(text, folder)) != text:
            write_atomic(index, linked)
    return path


def _linked(index: str, folder: Path) -> str:
    """A report's page with links to those pages that are there now."""
    begin, end = _MARKS
    before, opened, rest = index.partition(begin)
    _, closed, after = rest.partition(end)
    links = "".join(
        f'<p><a href="{name}.html">{label}</a>: {about}</p>\n'
        for name, (label, about) in _PAGES.items()
        if (folder / f"{name}.html").exists()
    )
    return f"{before}{begin}\n{links}{end}{after}" if opened and closed else index


def _page(title: str, summary: Summary, samples: pd.DataFrame, facts: Mapping[str, str]) -> str:
    n = len(summary.objectives)
    reference_point = ", ".join(number(bound, 2) for bound in summary.reference_point)
    first, second = (escape(objective) for objective in summary.objectives[:2])
    filled = (
        f"Filled: all weight on {first}; hollow: all on {second}."
        if n == 2
        else "A point is filled as far as its preference leans to the objective on the horizontal axis."
    )
    columns = _columns(summary)
    body = _template("report.html").substitute(
        title=escape(title),
        scope=(
            f"{len(summary.methods)} methods, {n} objectives ({escape(', '.join(summary.objectives))}), "
            f"{summary.prompts} prompts with {summary.seeds} seeds at every point. "
            f"Intervals: {summary.confidence:.0%}, {summary.resamples} resamples of the prompts."
        ),
        fronts=figure(
            "front",
            "Fronts of all methods",
            f"{filled} Thin bars are {summary.confidence:.0%} intervals. A star is a method without a preference axis. "
            f"Hypervolume is measured from the reference point ({reference_point}).",
            wide=n > 2,
        ),
        measures=measures_html(summary),
        differences=_differences(summary),
        control=figure("control", "Achieved reward over preference weight", "Dotted: no preference axis.", wide=n > 2),
        cost=figure("cost", "Hypervolume and inner product over KL", "", wide=True),
        samples=_samples(summary, samples, columns),
        meanings="".join(f"<dt>{escape(column.label)}</dt><dd>{escape(column.meaning)}</dd>" for column in COLUMNS),
        facts=facts_html(facts),
    )
    return page(title, body)


def page(title: str, body: str) -> str:
    """A whole page around its body."""
    return _template("page.html").substitute(title=escape(title), body=body)


def facts_html(facts: Mapping[str, str]) -> str:
    """The entries of a list of facts."""
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())


def _template(name: str) -> Template:
    return Template(files("mage_ray.evaluation").joinpath(name).read_text(encoding="utf-8"))


def figure(name: str, alt: str, caption: str, wide: bool) -> str:
    """A picture in both dresses, ``<name>.png`` and ``<name>-dark.png``."""
    return (
        f'<figure{" class=wide" if wide else ""}><div class="scroll"><picture>'
        f'<source srcset="{name}-dark.png" media="(prefers-color-scheme: dark)">'
        f'<img src="{name}.png" alt="{escape(alt)}"></picture></div>'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _differences(summary: Summary) -> str:
    names = [one.method for one in summary.methods]
    if BASELINE not in names or len(names) < 2:
        return ""
    baseline = escape(BASELINE)
    return (
        f"<h2>Against {baseline}</h2>"
        f"<p>Each method minus {baseline}, both on the same draws of prompts, so that noise they share cancels. "
        "Bold with an arrow: the interval leaves out 0. Among this many cells some do so by chance.</p>"
        f'<div class="scroll">{differences_html(summary, BASELINE)}</div>'
    )


def _columns(summary: Summary) -> list[tuple[float, ...]]:
    """Preferences to show: along the axis for two objectives, else each objective's extreme and the most even."""
    preferences = max(summary.methods, key=lambda one: len(one.points)).preferences
    if len(preferences) < 2:
        return []
    n = preferences.shape[1]
    if n == 2:
        order = np.argsort(-preferences[:, 0], kind="stable")
        chosen = order[_evenly(len(order), _SHOWN_PREFERENCES)]
    else:
        even = int(np.abs(preferences - 1 / n).sum(axis=1).argmin())
        chosen = np.array([*preferences.argmax(axis=0), even])
    return list(dict.fromkeys(tuple(preferences[index].tolist()) for index in chosen))


def _shown_methods(summary: Summary) -> list[MethodSummary]:
    """The baselines and the methods of the largest hypervolume, in the order of the comparison."""

    def rank(one: MethodSummary) -> tuple[bool, float]:
        return not (len(one.points) == 1 or one.method == BASELINE), -one.measures["hypervolume"].value

    names = {one.method for one in sorted(summary.methods, key=rank)[:_SHOWN_METHODS]}
    return [one for one in summary.methods if one.method in names]


def _samples(summary: Summary, samples: pd.DataFrame, columns: list[tuple[float, ...]]) -> str:
    prompts = samples["prompt_id"].unique()
    seed = samples["seed"].iloc[0]
    methods = _shown_methods(summary)
    blocks = []
    for place, prompt in enumerate(prompts[_evenly(len(prompts), _SHOWN_PROMPTS)]):
        rows = samples[(samples["prompt_id"] == prompt) & (samples["seed"] == seed)]
        text = str(rows["prompt"].iloc[0])
        head = "".join(f'<th scope="col">{escape(_preference_label(summary, weights))}</th>' for weights in columns)
        body = "".join(
            f'<tr><th scope="row">{escape(one.method)}</th>{_completions(summary, one, rows, columns)}</tr>'
            for one in methods
        )
        blocks.append(
            f"<details{'' if place else ' open'}><summary>{escape(_first_words(text))}</summary>"
            f'<div class="prompt">{escape(text)}</div><div class="scroll"><table class="texts"><thead><tr>'
            f'<th scope="col">method</th>{head or "<th></th>"}</tr></thead>'
            f"<tbody>{body}</tbody></table></div></details>"
        )
    return "".join(blocks)


def _completions(summary: Summary, method: MethodSummary, rows: pd.DataFrame, columns: list[tuple[float, ...]]) -> str:
    own = rows[rows["method"] == method.method].sort_values("point")
    if len(own) == 1:
        return f'<td colspan="{max(1, len(columns))}">{_completion(summary, own.iloc[0])}</td>'
    cells = []
    for weights in columns:
        near = np.flatnonzero(np.abs(method.preferences - np.array(weights)).max(axis=1) < 1e-6)
        cells.append(f"<td>{_completion(summary, own.iloc[int(near[0])]) if len(near) else '–'}</td>")
    return "".join(cells)


def _completion(summary: Summary, row: pd.Series) -> str:
    scores = " · ".join(
        f"{escape(name)} {number(float(row[f'reward/{name}']), 2, signed=True)}" for name in summary.objectives
    )
    return f'<div class="text">{escape(str(row["completion"]))}</div><div class="scores">{scores}</div>'


def _preference_label(summary: Summary, weights: tuple[float, ...]) -> str:
    return " · ".join(f"{name} {weight:.2g}" for name, weight in zip(summary.objectives, weights, strict=True))


def _first_words(text: str, limit: int = 90) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"


def _evenly(count: int, wanted: int) -> np.ndarray:
    return np.unique(np.linspace(0, count - 1, min(count, wanted)).round().astype(int))
