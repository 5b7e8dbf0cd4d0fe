"""Methods against measures, for a page and for a terminal, from one description of the columns."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from mage_ray.evaluation.summary import Interval, Summary, paired_difference

if TYPE_CHECKING:
    from rich.console import Console

BASELINE = "rewarded-soup"


@dataclass(frozen=True)
class Column:
    """How a measure is shown. ``ranked``: more is better and the best may be marked."""

    measure: str
    label: str
    digits: int
    ranked: bool
    meaning: str


# Sparsity and spacing are not ranked, since a front that has collapsed has the least of both; KL, length and repetition
# are prices, and the reference model pays least by doing nothing.
GROUPS: dict[str, tuple[Column, ...]] = {
    "The front": (
        Column(
            "hypervolume",
            "hypervolume",
            3,
            True,
            "The volume between the reference point and the front. One number for how far out and how wide it is.",
        ),
        Column(
            "inner_product",
            "inner product",
            3,
            True,
            "Mean over the preferences of weight times achieved reward: did users get what they asked for?",
        ),
        Column(
            "controllability",
            "controllability",
            3,
            True,
            "Of all pairs of preferences and all objectives, the share in which more weight gave more reward. "
            "0.5 is chance; a tie counts as wrong.",
        ),
    ),
    "Its shape": (
        Column("front_length", "front points", 0, True, "How many points no other point of the method beats."),
        Column(
            "sparsity",
            "sparsity",
            4,
            False,
            "Mean squared gap between neighbours on the front. Small is dense, or collapsed: read it beside the "
            "hypervolume. Not ranked.",
        ),
        Column(
            "spacing",
            "spacing",
            3,
            False,
            "How unevenly the front is spaced; 0 is even, and always so for two points. Not ranked.",
        ),
    ),
    "Its price": (
        Column(
            "kl",
            "KL",
            3,
            False,
            "Mean log-ratio to the reference model, in nats per sampled token: how far the method has drifted. "
            "Compare methods at equal KL.",
        ),
        Column("length", "length", 1, False, "Mean number of tokens in a completion."),
        Column(
            "repetition",
            "repetition",
            3,
            False,
            "Share of word 4-grams that repeat an earlier one of the same completion.",
        ),
        Column(
            "distinct",
            "distinct-2",
            3,
            False,
            "Of all word pairs in the answers at a preference, the share that are different: low where everybody gets "
            "the same answer. It falls as answers grow longer.",
        ),
    ),
}
COLUMNS = tuple(column for columns in GROUPS.values() for column in columns)
UNDEFINED = "–"
BEST, CLOSE = "●", "○"


def marks(summary: Summary, column: Column) -> dict[str, str]:
    """``BEST`` for the methods with the highest value, ``CLOSE`` where the interval overlaps the best's, else ""."""
    intervals = {one.method: one.measures[column.measure] for one in summary.methods}
    defined = [interval for interval in intervals.values() if not math.isnan(interval.value)]
    if not column.ranked or len(defined) < 2:
        return dict.fromkeys(intervals, "")
    top = max(interval.value for interval in defined)
    # Two methods may share the top with different intervals: the widest claim on it decides what is close.
    floor = min(interval.low for interval in defined if interval.value == top)
    return {
        method: BEST if interval.value == top else CLOSE if interval.high >= floor else ""
        for method, interval in intervals.items()
    }


def number(value: float, digits: int, signed: bool = False) -> str:
    """A number with a true minus sign; a dash where it is not defined."""
    if math.isnan(value):
        return UNDEFINED
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("-", "−")


def measures_html(summary: Summary) -> str:
    """The table of all measures, best ones marked."""
    top = "".join(
        f'<th colspan="{len(columns)}" scope="colgroup">{escape(group)}</th>' for group, columns in GROUPS.items()
    )
    labels = "".join(f'<th scope="col">{escape(column.label)}</th>' for column in COLUMNS)
    marked = {column.measure: marks(summary, column) for column in COLUMNS}
    rows = []
    for one in summary.methods:
        cells = [
            _cell(one.measures[column.measure], column.digits, marked[column.measure][one.method]) for column in COLUMNS
        ]
        rows.append(f'<tr><th scope="row">{escape(one.method)}</th><td>{len(one.points)}</td>{"".join(cells)}</tr>')
    return (
        f'<table class="numbers"><thead><tr><th></th><th></th>{top}</tr>'
        f'<tr><th scope="col">method</th><th scope="col">points</th>{labels}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def differences_html(summary: Summary, baseline: str) -> str:
    """Every other method minus ``baseline`` on the same resampled prompts; bold where the interval leaves out 0."""
    labels = "".join(f'<th scope="col">{escape(column.label)}</th>' for column in COLUMNS)
    rows = []
    for one in summary.methods:
        if one.method == baseline:
            continue
        cells = []
        for column in COLUMNS:
            difference = paired_difference(summary, one.method, baseline, column.measure)
            apart = "↑" if difference.low > 0 else "↓" if difference.high < 0 else ""
            cells.append(_cell(difference, column.digits, apart, signed=True))
        rows.append(f'<tr><th scope="row">{escape(one.method)}</th>{"".join(cells)}</tr>')
    return (
        f'<table class="numbers"><thead><tr><th scope="col">method</th>{labels}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def print_table(summary: Summary, console: Console | None = None) -> None:
    """The table of all measures on a terminal of 100 columns: one block of three measures after the other."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    styles = {BEST: "bold green", CLOSE: "green", "": ""}
    for group, columns in GROUPS.items():
        table = Table(title=group, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("method", no_wrap=True, overflow="ellipsis", max_width=28)
        for column in columns:
            table.add_column(column.label, justify="right")
        marked = [marks(summary, column) for column in columns]
        for one in summary.methods:
            cells = [
                Text(
                    f"{_line(one.measures[column.measure], column.digits)} {mark[one.method] or ' '}",
                    styles[mark[one.method]],
                )
                for column, mark in zip(columns, marked, strict=True)
            ]
            table.add_row(Text(one.method), *cells)
        console.print(table)
    scope = f"[low, high]: {summary.confidence:.0%} intervals over {summary.prompts} prompts"
    console.print(Text(f"{BEST} best  {CLOSE} its interval overlaps the best one's  {scope}"))


def _line(interval: Interval, digits: int) -> str:
    if math.isnan(interval.value):
        return UNDEFINED
    return f"{number(interval.value, digits)} [{number(interval.low, digits)}, {number(interval.high, digits)}]"


def _cell(interval: Interval, digits: int, mark: str, signed: bool = False) -> str:
    if math.isnan(interval.value):
        return f"<td>{UNDEFINED}</td>"
    low, high = (number(bound, digits, signed) for bound in (interval.low, interval.high))
    kind = {BEST: ' class="best"', CLOSE: ' class="close"', "": ""}.get(mark, ' class="apart"')
    sign = f'<span class="mark">{mark}</span> ' if mark else ""
    return f"<td{kind}>{sign}{number(interval.value, digits, signed)}<small>{low} … {high}</small></td>"
