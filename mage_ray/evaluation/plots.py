"""The pictures of a report, as PNG bytes in a light and a dark dress: fronts, control, and what the gain costs."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from mage_ray.evaluation.canvas import Style, Theme, bar_lengths, canvas, draw_bars, no_math, plain, png, styles
from mage_ray.evaluation.summary import MethodSummary, Summary

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_fronts(summary: Summary, theme: Theme) -> bytes:
    """Every pair of objectives in a panel of its own; a point is filled as far as its preference leans to the x axis.

    With two objectives the points of a method are joined in the order of the preference. Bars are the intervals.
    """
    pairs = list(itertools.combinations(range(len(summary.objectives)), 2))
    figure, panels = canvas(len(pairs), theme)
    for panel, (x, y) in zip(panels, pairs, strict=True):
        for method, style in zip(summary.methods, _series(summary, theme).values(), strict=True):
            _draw_front(panel, method, style, x, y, theme, joined=len(summary.objectives) == 2)
        panel.set_xlabel(no_math(summary.objectives[x]))
        panel.set_ylabel(no_math(summary.objectives[y]))
    return png(figure, _series(summary, theme), theme)


def draw_control(summary: Summary, theme: Theme) -> bytes:
    """One panel per objective: what was achieved in it over the weight that was asked for, joined through the means."""
    figure, panels = canvas(len(summary.objectives), theme)
    for i, (panel, objective) in enumerate(zip(panels, summary.objectives, strict=True)):
        for method, style in zip(summary.methods, _series(summary, theme).values(), strict=True):
            achieved = method.points[:, i]
            if len(achieved) == 1:
                panel.axhline(achieved[0], color=style.colour, linestyle=style.line, linewidth=1.2)
                continue
            weights, place = np.unique(np.round(method.preferences[:, i], 6), return_inverse=True)
            means = np.bincount(place, weights=achieved) / np.bincount(place)
            panel.plot(weights, means, color=style.colour, linestyle=style.line, linewidth=1.2)
            bars = bar_lengths(achieved, method.point_intervals[:, i])
            draw_bars(panel, method.preferences[:, i], achieved, style.colour, yerr=bars)
            panel.plot(method.preferences[:, i], achieved, style.marker, color=style.colour, markersize=4.5)
        panel.set_xlabel(no_math(f"weight of {objective} in the preference"))
        panel.set_ylabel(no_math(f"{objective} achieved"))
    return png(figure, _series(summary, theme), theme)


def draw_cost(summary: Summary, theme: Theme) -> bytes:
    """Hypervolume and inner product of each method over its KL from the reference model."""
    figure, panels = canvas(2, theme)
    for panel, measure in zip(panels, ("hypervolume", "inner_product"), strict=True):
        for method, style in zip(summary.methods, _series(summary, theme).values(), strict=True):
            x, y = method.measures["kl"], method.measures[measure]
            xerr, yerr = (bar_lengths(np.array([i.value]), np.array([[i.low, i.high]])) for i in (x, y))
            draw_bars(panel, x.value, y.value, style.colour, xerr=xerr, yerr=yerr)
            panel.plot(x.value, y.value, style.marker, color=style.colour, markersize=8)
        panel.set_xlabel("KL from the reference model, nats per token")
        panel.set_ylabel(measure.replace("_", " "))
    return png(figure, _series(summary, theme), theme)


def _draw_front(panel: Axes, method: MethodSummary, style: Style, x: int, y: int, theme: Theme, joined: bool) -> None:
    points, bounds = method.points, method.point_intervals
    xerr, yerr = (bar_lengths(points[:, i], bounds[:, i]) for i in (x, y))
    draw_bars(panel, points[:, x], points[:, y], style.colour, xerr=xerr, yerr=yerr)
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


def _series(summary: Summary, theme: Theme) -> dict[str, Style]:
    """A method without a preference axis is drawn in ink; the others take colours and shapes in their order."""
    with_axis = iter(styles(sum(len(method.points) > 1 for method in summary.methods), theme))
    return {one.method: plain(theme) if len(one.points) == 1 else next(with_axis) for one in summary.methods}


def _blend(ground: str, colour: str, share: float) -> tuple[float, float, float]:
    from matplotlib.colors import to_rgb

    red, green, blue = ((1 - share) * a + share * b for a, b in zip(to_rgb(ground), to_rgb(colour), strict=True))
    return red, green, blue
