"""The analyses as sections of a page: a picture in two dresses, tables, and the numbers as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from mage_ray.analysis import ANALYSES
from mage_ray.analysis.connectivity import Connected, Point
from mage_ray.analysis.drawing import draw_compared, draw_connected, draw_pairs, draw_sweeps
from mage_ray.analysis.merging import Compared
from mage_ray.analysis.sensitivity import Setting
from mage_ray.evaluation.canvas import DARK, LIGHT, Theme
from mage_ray.evaluation.report import facts_html, figure, write_page
from mage_ray.evaluation.summary import Interval, Summary, paired_difference
from mage_ray.evaluation.tables import number
from mage_ray.files import write_atomic
from mage_ray.folder import StudyFolder
from mage_ray.study import Study

if TYPE_CHECKING:
    from rich.console import Console

_MEASURES = ("hypervolume", "inner_product", "controllability", "kl", "length", "repetition")


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first of each its name."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Section:
    """One analysis for a reader; ``data`` is what its JSON holds."""

    name: str
    title: str
    text: str
    caption: str
    tables: tuple[Table, ...]
    draw: Callable[[Theme], bytes]
    data: Any


def write_section(study: Study, folder: StudyFolder, section: Section, facts: Mapping[str, str]) -> None:
    """Write the section, its numbers and pictures, and the page of all analyses that are there."""
    write_atomic(folder.report / f"{section.name}.png", section.draw(LIGHT))
    write_atomic(folder.report / f"{section.name}-dark.png", section.draw(DARK))
    data = {"facts": dict(facts), "result": plain(section.data)}
    write_atomic(folder.analysis / f"{section.name}.json", json.dumps(data, indent=1) + "\n")
    tables = "".join(
        f'<h3>{escape(table.title)}</h3><div class="scroll">{table_html(table)}</div>' for table in section.tables
    )
    html = (
        f'<h2 id="{section.name}">{escape(section.title)}</h2>\n<p>{escape(section.text)}</p>\n'
        f"{figure(section.name, section.title, escape(section.caption), wide=True)}\n{tables}\n"
        f'<dl class="soft">{facts_html(facts)}</dl>\n'
    )
    write_atomic(folder.analysis / f"{section.name}.html", html)
    there = [path for name in ANALYSES if (path := folder.analysis / f"{name}.html").exists()]
    body = "\n".join(path.read_text(encoding="utf-8") for path in there)
    write_page(folder.report, "analyses", f"{study.name}: analyses", body)


def print_tables(tables: Sequence[Table], console: Console) -> None:
    """The tables on a terminal."""
    from rich import box
    from rich.table import Table as Rich

    for table in tables:
        shown = Rich(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for place, column in enumerate(table.columns):
            shown.add_column(column, justify="left" if place == 0 else "right")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def connectivity_section(sets: Sequence[Connected]) -> Section:
    """Of ``mage_ray.analysis.connectivity``."""
    barriers = tuple(
        (
            f"{one.set} ({one.target}, {one.head}, {one.initialisation} initialisation)",
            f"{segment.first} – {segment.second}",
            _shown(segment.barrier, 4),
            _shown(segment.gap, 4),
            *(
                number(point.merged.value, 4)
                for point in (segment.points[0], _middle(segment.points), segment.points[-1])
            ),
        )
        for one in sets
        for segment in one.segments
    )
    simplex = tuple(
        (
            one.set,
            ", ".join(f"{x:.2f}" for x in point.lam),
            *(_shown(part, 4) for part in (point.merged, point.ensemble, point.chord)),
        )
        for one in sets
        for point in one.simplex
    )
    return Section(
        name="connectivity",
        title="Linear mode connectivity of value models",
        text=(
            "Half the mean squared error of merged value models against the same mix of the rewards, on answers to "
            "prompts held out, all prefixes alike. The barrier is how far the merge rises above the chord, the mix of "
            "the ends' own losses; the gap is the merge minus the ensemble, on average over the segment."
        ),
        caption="Solid: merged; dotted: the ensemble of the same value models. Bands are intervals.",
        tables=(
            Table(
                "Segments",
                (
                    "value models",
                    "between",
                    "barrier",
                    "gap to the ensemble",
                    "loss at the first",
                    "half way",
                    "at the second",
                ),
                barriers,
            ),
            Table("Random points of the simplex", ("set", "weights", "merged", "ensemble", "chord"), simplex),
        ),
        draw=lambda theme: draw_connected(sets, theme),
        data=sets,
    )


def merging_section(compared: Sequence[Compared], labels: Mapping[str, tuple[str, float]], summary: Summary) -> Section:
    """Of ``mage_ray.analysis.merging``."""
    scores = tuple(
        (
            f"{one.guide} ({one.set})",
            f"{apart.scale:g}",
            number(apart.size, 4),
            *(_shown(part, 4) for part in (apart.guide, apart.difference, apart.predicted)),
            number(apart.correlation, 3, signed=True),
        )
        for one in compared
        for apart in one.scales
    )
    fronts = []
    for label, (guide, scale) in labels.items():
        if guide.endswith("-merged"):
            other = next(o for o, own in labels.items() if own == (guide.replace("-merged", "-ensembled"), scale))
            row = [_shown(summary.method(one).measures["hypervolume"], 3) for one in (label, other)]
            both = (
                paired_difference(summary, label, other, measure)
                for measure in ("hypervolume", "controllability", "kl")
            )
            fronts.append((guide.removesuffix("-merged"), f"{scale:g}", *row, *(_shown(d, 3, True) for d in both)))
    return Section(
        name="merging",
        title="Merging versus ensembling",
        text=(
            "How far the merged guide's score is from the ensemble's, at the even preference, over the tokens of "
            "held-out answers, while the guide's deltas (and heads) are scaled; beside it the second-order prediction "
            "from the curvature at the reference. Scores are log-ratios in nats, or values in normalised rewards."
        ),
        caption="Root mean squares. Solid: the measured difference; dashed: its prediction; dotted: the guide itself.",
        tables=(
            Table(
                "Scores",
                ("guide", "scale", "size of the deltas", "ensemble's score", "difference", "predicted", "correlation"),
                scores,
            ),
            Table(
                "Fronts, merged minus ensembled",
                ("guide", "scale", "merged", "ensembled", "hypervolume", "controllability", "KL"),
                tuple(fronts),
            ),
        ),
        draw=lambda theme: draw_compared(compared, theme),
        data={"scores": list(compared), "fronts": json.loads(summary.to_json())},
    )


def compatibility_section(pairs: Mapping[str, tuple[str, str | None]], summary: Summary) -> Section:
    """Of ``mage_ray.analysis.compatibility``."""
    return Section(
        name="compatibility",
        title="Which guide goes with which base",
        text=(
            "Every base (the reference, Rewarded Soup, Bone Soup) with every guide: none, implicit and explicit value "
            "models, merged and ensembled. The last columns are paired differences to the same base without a guide."
        ),
        caption="Hypervolume and controllability with intervals.",
        tables=(_measures("Bases and guides", summary, {label: base for label, (base, _) in pairs.items()}),),
        draw=lambda theme: draw_pairs(pairs, summary, theme),
        data=json.loads(summary.to_json()),
    )


def sensitivity_section(study: Study, settings: Sequence[Setting], summary: Summary) -> Section:
    """Of ``mage_ray.analysis.sensitivity``."""
    labels = dict.fromkeys(["bone-soup", *(setting.label for setting in settings)], "bone-soup")
    return Section(
        name="sensitivity",
        title=f"Sensitivity of {study.analysis.method}",
        text=(
            "Each constant swept alone, the others as in the study. The last columns are paired differences to the "
            "study's base without a guide."
        ),
        caption="Hypervolume over each constant. Dotted: the base alone.",
        tables=(_measures("Settings", summary, labels),),
        draw=lambda theme: draw_sweeps(settings, summary, theme),
        data={
            "settings": [{"constant": s.constant, "value": s.value, "front": s.label} for s in settings],
            "fronts": json.loads(summary.to_json()),
        },
    )


def _measures(title: str, summary: Summary, against: Mapping[str, str]) -> Table:
    """Measures by label, and differences to another label's on the same resamples of the prompts."""
    rows = []
    for label, other in against.items():
        own = summary.method(label).measures
        shown = [_shown(own[measure], 3) for measure in _MEASURES]
        gained = [
            "" if other == label else _shown(paired_difference(summary, label, other, measure), 3, signed=True)
            for measure in ("hypervolume", "controllability")
        ]
        rows.append((label, *shown, *gained))
    columns = (
        "",
        *(measure.replace("_", " ") for measure in _MEASURES),
        "hypervolume gained",
        "controllability gained",
    )
    return Table(title, columns, tuple(rows))


def _middle(points: Sequence[Point]) -> Point:
    return points[len(points) // 2]


def _shown(interval: Interval, digits: int, signed: bool = False) -> str:
    value, low, high = (number(x, digits, signed) for x in (interval.value, interval.low, interval.high))
    return f"{value} [{low}, {high}]"


def table_html(table: Table) -> str:
    """The table, all text escaped."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
        for row in table.rows
    )
    return f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'


def plain(data: Any) -> Any:
    """What JSON can hold: dataclasses as objects, what is not defined as null."""
    if hasattr(data, "__dataclass_fields__"):
        return plain(asdict(data))
    if isinstance(data, Mapping):
        return {key: plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    return None if isinstance(data, float) and math.isnan(data) else data
