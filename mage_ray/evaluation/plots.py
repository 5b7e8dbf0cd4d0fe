"""The pictures of a report, as PNG bytes in a light and a dark dress: fronts, control, and what the gain costs.

Drawn on matplotlib's object interface (Agg): no global state, so they can be made in any thread of any process.
"""

from __future__ import annotations

import io
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mage_ray.evaluation.summary import MethodSummary, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Theme:
    """Colours of page and ink; ``series`` are told apart by the colour-blind (after Okabe and Ito) on this ground."""

    ground: str
    ink: str
    faint: str
    series: tuple[str, ...]


LIGHT = Theme(
    ground="#ffffff",
    ink="#24292f",
    faint="#d5d9de",
    series=("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195"),
)
DARK = Theme(
    ground="#171a1f",
    ink="#d7dce2",
    faint="#3a4049",
    series=("#4da3e0", "#f0813a", "#2fbf95", "#dd9bc2", "#f0bd4a", "#8fd0f5", "#b08fd0"),
)
_Line = Literal["-", "--", "-.", ":"]
_LINES: tuple[_Line, ...] = ("-", "--", "-.")
_MARKERS = "osD^vPX"


@dataclass(frozen=True)
class _Style:
    colour: str
    marker: str
    line: _Line


def draw_fronts(summary: Summary, theme: Theme) -> bytes:
    """Every pair of objectives in a panel of its own; a point is filled as far as its preference leans to the x axis.

    With two objectives the points of a method are joined in the order of the preference. Bars are the intervals.
    """
    pairs = list(itertools.combinations(range(len(summary.objectives)), 2))
    figure, panels = _canvas(len(pairs), theme)
    for panel, (x, y) in zip(panels, pairs, strict=True):
        for method, style in zip(summary.methods, _styles(summary, theme), strict=True):
            _draw_front(panel, method, style, x, y, theme, joined=len(summary.objectives) == 2)
        panel.set_xlabel(_plain(summary.objectives[x]))
        panel.set_ylabel(_plain(summary.objectives[y]))
    return _png(figure, summary, theme)


def draw_control(summary: Summary, theme: Theme) -> bytes:
    """One panel per objective: what was achieved in it over the weight that was asked for, joined through the means."""
    figure, panels = _canvas(len(summary.objectives), theme)
    for i, (panel, objective) in enumerate(zip(panels, summary.objectives, strict=True)):
        for method, style in zip(summary.methods, _styles(summary, theme), strict=True):
            achieved = method.points[:, i]
            if len(achieved) == 1:
                panel.axhline(achieved[0], color=style.colour, linestyle=style.line, linewidth=1.2)
                continue
            weights, place = np.unique(np.round(method.preferences[:, i], 6), return_inverse=True)
            means = np.bincount(place, weights=achieved) / np.bincount(place)
            panel.plot(weights, means, color=style.colour, linestyle=style.line, linewidth=1.2)
            bars = _bar_lengths(achieved, method.point_intervals[:, i])
            _draw_bars(panel, method.preferences[:, i], achieved, style.colour, yerr=bars)
            panel.plot(method.preferences[:, i], achieved, style.marker, color=style.colour, markersize=4.5)
        panel.set_xlabel(_plain(f"weight of {objective} in the preference"))
        panel.set_ylabel(_plain(f"{objective} achieved"))
    return _png(figure, summary, theme)


def draw_cost(summary: Summary, theme: Theme) -> bytes:
    """Hypervolume and inner product of each method over its KL from the reference model."""
    figure, panels = _canvas(2, theme)
    for panel, measure in zip(panels, ("hypervolume", "inner_product"), strict=True):
        for method, style in zip(summary.methods, _styles(summary, theme), strict=True):
            x, y = method.measures["kl"], method.measures[measure]
            xerr, yerr = (_bar_lengths(np.array([i.value]), np.array([[i.low, i.high]])) for i in (x, y))
            _draw_bars(panel, x.value, y.value, style.colour, xerr=xerr, yerr=yerr)
            panel.plot(x.value, y.value, style.marker, color=style.colour, markersize=8)
        panel.set_xlabel("KL from the reference model, nats per token")
        panel.set_ylabel(measure.replace("_", " "))
    return _png(figure, summary, theme)


def _draw_front(panel: Axes, method: MethodSummary, style: _Style, x: int, y: int, theme: Theme, joined: bool) -> None:
    points, bounds = method.points, method.point_intervals
    xerr, yerr = (_bar_lengths(points[:, i], bounds[:, i]) for i in (x, y))
    _draw_bars(panel, points[:, x], points[:, y], style.colour, xerr=xerr, yerr=yerr)
    if len(points) == 1:
        panel.plot(points[:, x], points[:, y], style.marker, color=style.colour, markersize=13, zorder=4)
        return
    if joined:
        order = np.argsort(method.preferences[:, x], kind="stable")
        panel.plot(points[order, x], points[order, y], color=style.colour, linestyle=style.line, linewidth=1.2)
    fills = [_blend(theme.ground, style.colour, _lean(weights[x], weights[y])) for weights in method.preferences]
    panel.scatter(
        points[:, x],
        points[:, y],
        s=38,
        marker=style.marker,
        facecolors=fills,
        edgecolors=style.colour,
        linewidths=1.2,
        zorder=3,
    )


def _lean(towards: float, away: float) -> float:
    total = towards + away
    return towards / total if total > 0 else 0.5


def _draw_bars(panel: Axes, x: Any, y: Any, colour: str, xerr: Any = None, yerr: Any = None) -> None:
    panel.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.45, zorder=1)


def _bar_lengths(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """[2, points], never negative: an interval need not hold its value, and one that is not defined has no bar."""
    lengths = np.stack([values - bounds[:, 0], bounds[:, 1] - values])
    return np.maximum(np.nan_to_num(lengths, nan=0.0), 0.0)


def _styles(summary: Summary, theme: Theme) -> list[_Style]:
    """A method without a preference axis is drawn in ink; the others take colours and shapes in their order."""
    styles, used = [], 0
    for method in summary.methods:
        if len(method.points) == 1:
            styles.append(_Style(theme.ink, "*", ":"))
            continue
        turn, place = divmod(used, len(theme.series))
        marker, line = _MARKERS[(place + turn) % len(_MARKERS)], _LINES[turn % len(_LINES)]
        styles.append(_Style(theme.series[place], marker, line))
        used += 1
    return styles


def _canvas(panels: int, theme: Theme) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    columns = min(panels, 3)
    rows = -(-panels // columns)
    width, height = (7.2, 5.0) if panels == 1 else (4.4 * columns, 3.9 * rows)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    figure = Figure(figsize=(width, height), dpi=160, layout=layout, facecolor=theme.ground)
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(panels)]
    for panel in axes:
        panel.set_facecolor(theme.ground)
        panel.grid(color=theme.faint, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.tick_params(colors=theme.ink, labelsize=9, length=0)
        panel.xaxis.label.set_color(theme.ink)
        panel.yaxis.label.set_color(theme.ink)
        for side, spine in panel.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.faint)
    return figure, axes


def _png(figure: Figure, summary: Summary, theme: Theme) -> bytes:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=style.colour,
            marker=style.marker,
            linestyle=style.line,
            markersize=9 if style.marker == "*" else 6,
            label=_plain(method.method),
        )
        for method, style in zip(summary.methods, _styles(summary, theme), strict=True)
    ]
    longest = max(len(method.method) for method in summary.methods)
    per_row = max(1, int(figure.get_figwidth() / (0.6 + 0.085 * longest)))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(per_row, len(handles)),
        frameon=False,
        labelcolor=theme.ink,
        fontsize=9,
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor=theme.ground)
    return buffer.getvalue()


def _blend(ground: str, colour: str, share: float) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    red, green, blue = ((1 - share) * a + share * b for a, b in zip(to_rgb(ground), to_rgb(colour), strict=True))
    return red, green, blue


def _plain(text: str) -> str:
    """A name may hold a dollar sign, which matplotlib would read as mathematics."""
    return text.replace("$", r"\$")
