"""What all pictures share: two dresses, panels, series told apart by colour, mark and line, and PNG bytes.

Drawn on matplotlib's object interface (Agg): no global state, so they can be made in any thread of any process.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

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
class Style:
    """How a series is drawn."""

    colour: str
    marker: str
    line: _Line


def styles(count: int, theme: Theme) -> list[Style]:
    """``count`` styles that can be told apart."""
    made = []
    for used in range(count):
        turn, place = divmod(used, len(theme.series))
        marker, line = _MARKERS[(place + turn) % len(_MARKERS)], _LINES[turn % len(_LINES)]
        made.append(Style(theme.series[place], marker, line))
    return made


def plain(theme: Theme) -> Style:
    """Of what has no axis to lie on: in ink."""
    return Style(theme.ink, "*", ":")


def draw_bars(panel: Axes, x: Any, y: Any, colour: str, xerr: Any = None, yerr: Any = None) -> None:
    """Thin bars of ``bar_lengths`` around points."""
    panel.errorbar(x, y, xerr=xerr, yerr=yerr, fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.45, zorder=1)


def bar_lengths(values: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """[2, points], never negative: an interval need not hold its value, and one that is not defined has no bar."""
    lengths = np.stack([values - bounds[:, 0], bounds[:, 1] - values])
    return np.maximum(np.nan_to_num(lengths, nan=0.0), 0.0)


def canvas(panels: int, theme: Theme) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, at most three side by side."""
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


def png(figure: Figure, series: Mapping[str, Style], theme: Theme) -> bytes:
    """The figure with a legend of its series below."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=style.colour,
            marker=style.marker,
            linestyle=style.line,
            markersize=9 if style.marker == "*" else 6,
            label=no_math(name),
        )
        for name, style in series.items()
    ]
    longest = max(map(len, series), default=0)
    per_row = max(1, int(figure.get_figwidth() / (0.6 + 0.085 * longest)))
    if handles:
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


def no_math(text: str) -> str:
    """A name may hold a dollar sign, which matplotlib would read as mathematics."""
    return text.replace("$", r"\$")
