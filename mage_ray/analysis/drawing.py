"""The pictures of the analyses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mage_ray.analysis.connectivity import Connected
from mage_ray.analysis.merging import Compared
from mage_ray.analysis.sensitivity import Setting
from mage_ray.evaluation.canvas import Style, Theme, bar_lengths, canvas, draw_bars, no_math, png, styles
from mage_ray.evaluation.summary import Interval, Summary


def draw_connected(sets: Sequence[Connected], theme: Theme) -> bytes:
    """A panel for each pair of objectives: loss along the segment, of the merge and of the ensemble."""
    pairs = [(segment.first, segment.second) for segment in sets[0].segments]
    figure, panels = canvas(len(pairs), theme)
    series = dict(zip([_name(one) for one in sets], styles(len(sets), theme), strict=True))
    for place, (panel, (first, second)) in enumerate(zip(panels, pairs, strict=True)):
        for one, style in zip(sets, series.values(), strict=True):
            points = one.segments[place].points
            t = np.linspace(0, 1, len(points))
            merged, ensemble = ([getattr(p, kind) for p in points] for kind in ("merged", "ensemble"))
            panel.plot(t, [i.value for i in merged], style.marker, color=style.colour, markersize=4, linestyle="-")
            panel.fill_between(
                t, [i.low for i in merged], [i.high for i in merged], color=style.colour, alpha=0.12, lw=0
            )
            panel.plot(t, [i.value for i in ensemble], color=style.colour, linestyle=":")
        panel.set_xlabel(no_math(f"from {first} to {second}"))
        panel.set_ylabel("loss")
    return png(figure, series, theme)


def _name(one: Connected) -> str:
    return f"{one.set} ({one.initialisation} initialisation)"


def draw_compared(compared: Sequence[Compared], theme: Theme) -> bytes:
    """A panel for each kind of guide: root mean squares over the size of the deltas, on logarithmic axes."""
    figure, panels = canvas(len(compared), theme)
    colours = styles(3, theme)
    series = {
        "difference": Style(colours[0].colour, "o", "-"),
        "predicted": Style(colours[1].colour, "s", "--"),
        "guide": Style(colours[2].colour, "^", ":"),
    }
    for panel, one in zip(panels, compared, strict=True):
        sizes = np.array([apart.size for apart in one.scales])
        for name, style in series.items():
            _line(panel, sizes, [getattr(apart, name) for apart in one.scales], style)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xlabel(no_math(f"size of the deltas, {one.guide} ({one.set})"))
        panel.set_ylabel("root mean square")
    return png(figure, series, theme)


def draw_pairs(pairs: Mapping[str, tuple[str, str | None]], summary: Summary, theme: Theme) -> bytes:
    """Hypervolume and controllability: a group for each base, a series for each guide."""
    figure, panels = canvas(2, theme)
    bases = list(dict.fromkeys(base for base, _ in pairs.values()))
    guides = list(dict.fromkeys(guide for _, guide in pairs.values()))
    series = dict(zip([guide or "no guide" for guide in guides], styles(len(guides), theme), strict=True))
    for panel, measure in zip(panels, ("hypervolume", "controllability"), strict=True):
        for turn, (guide, style) in enumerate(zip(guides, series.values(), strict=True)):
            own = [label for label, pair in pairs.items() if pair[1] == guide]
            shift = (turn - (len(guides) - 1) / 2) * 0.13
            _line(
                panel, np.arange(len(bases)) + shift, [summary.method(x).measures[measure] for x in own], style, "none"
            )
        panel.set_xticks(range(len(bases)), [no_math(base) for base in bases])
        panel.set_ylabel(measure)
    return png(figure, series, theme)


def draw_sweeps(settings: Sequence[Setting], summary: Summary, theme: Theme) -> bytes:
    """Hypervolume over each constant's values, a panel for each; the base alone as a line."""
    constants = list(dict.fromkeys(setting.constant for setting in settings))
    figure, panels = canvas(len(constants), theme)
    [style] = styles(1, theme)
    alone = summary.method("bone-soup").measures["hypervolume"]
    for panel, constant in zip(panels, constants, strict=True):
        own = [setting for setting in settings if setting.constant == constant]
        panel.axhline(alone.value, color=theme.ink, linestyle=":", linewidth=1.2)
        panel.axhspan(alone.low, alone.high, color=theme.ink, alpha=0.07, lw=0)
        measured = [summary.method(setting.label).measures["hypervolume"] for setting in own]
        _line(panel, np.arange(len(own)), measured, style)
        panel.set_xticks(range(len(own)), [no_math(setting.value) for setting in own])
        panel.set_xlabel(no_math(constant))
        panel.set_ylabel("hypervolume")
    return png(figure, {}, theme)


def _line(panel: object, x: np.ndarray, intervals: Sequence[Interval], style: Style, line: str | None = None) -> None:
    y = np.array([interval.value for interval in intervals])
    bounds = np.array([[interval.low, interval.high] for interval in intervals])
    draw_bars(panel, x, y, style.colour, yerr=bar_lengths(y, bounds))  # type: ignore[arg-type]
    panel.plot(x, y, style.marker, color=style.colour, linestyle=line or style.line, markersize=5)  # type: ignore[attr-defined]
