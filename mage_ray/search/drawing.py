"""The pictures of a search."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mage_ray.evaluation.canvas import Style, Theme, canvas, no_math, png, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mage_ray.search.page import Setting, Weight

BARS = 10
"""Constants that are shown, at most."""
_LETTERS = 32
"""Of a constant's name."""
_NO_LINE: Any = "none"


def draw_history(settings: Sequence[Setting], best: Sequence[float], metric: str, label: str, theme: Theme) -> bytes:
    """A metric of each setting by when it began, and ``best``, the best so far; those that failed lie at the bottom."""
    figure, [panel] = canvas(1, theme)
    line = Style(theme.ink, "", "-")
    panel.plot([s.number for s in settings], best, color=line.colour, linewidth=1.2, drawstyle="steps-post", zorder=2)
    at_bottom = panel.get_xaxis_transform()
    for kind, style in _looks(theme).items():
        own = [setting for setting in settings if setting.kind == kind]
        numbers = [setting.number for setting in own]
        if kind == "failed":
            bottom = [0.0] * len(own)
            panel.plot(numbers, bottom, style.marker, color=style.colour, transform=at_bottom, clip_on=False, zorder=5)
        else:
            _dots(panel, numbers, [setting.scores[metric] for setting in own], style)
    panel.set_xlim(0.5, len(settings) + 0.5)
    panel.locator_params(axis="x", integer=True)
    panel.set_xlabel("settings, in the order in which they began")
    panel.set_ylabel(label)
    return png(figure, _legend(settings, theme) | {"best so far": line}, theme)


def draw_importance(weights: Mapping[str, Sequence[Weight]], theme: Theme) -> bytes:
    """A panel for each metric, by its label: a bar for each constant, the largest first, and what chance would give."""
    figure, panels = canvas(len(weights), theme)
    bars = min(BARS, max(map(len, weights.values())))
    figure.set_size_inches(figure.get_figwidth(), -(-len(panels) // 3) * (1.1 + 0.32 * bars))
    [style] = styles(1, theme)
    bar, chance = Style(style.colour, "s", _NO_LINE), Style(theme.ink, "|", _NO_LINE)
    for panel, (label, every) in zip(panels, weights.items(), strict=True):
        own, places = every[:BARS], range(bars, bars - min(BARS, len(every)), -1)
        panel.barh(places, [weight.share for weight in own], height=0.6, color=bar.colour)
        panel.plot([weight.chance for weight in own], places, "|", color=chance.colour, markersize=15, mew=1.6)
        panel.set_yticks(places, [no_math(_short(weight.constant)) for weight in own])
        panel.set_xlim(left=0)
        panel.set_ylim(0.4, bars + 0.6)
        panel.set_xlabel(f"importance for {label}")
    return png(figure, {"share of the sum": bar, "95 % of what chance gives": chance}, theme)


def draw_setting_fronts(
    settings: Sequence[Setting], objectives: Sequence[str], grid_MN: np.ndarray, theme: Theme
) -> bytes:
    """A panel for each pair of objectives: the points of every setting that was tried on all prompts.

    With two objectives a setting's points are joined in the order of the preferences, which are ``grid_MN``.
    """
    pairs = list(itertools.combinations(range(len(objectives)), 2))
    finished, looks = _finished(settings), _looks(theme)
    figure, panels = canvas(len(pairs), theme)
    for panel, (x, y) in zip(panels, pairs, strict=True):
        order = np.argsort(-grid_MN[:, x], kind="stable")
        for setting in finished:
            style, marked = looks[setting.kind], setting.kind in ("winner", "defaults")
            points_MN = np.array(setting.points)[order]
            panel.plot(
                points_MN[:, x],
                points_MN[:, y],
                marker=style.marker,
                color=style.colour,
                linestyle="-" if len(objectives) == 2 else "none",
                linewidth=1.8 if marked else 0.7,
                markersize=6 if marked else 3,
                zorder=2 + list(looks).index(setting.kind) / len(looks),
            )
        panel.set_xlabel(no_math(objectives[x]))
        panel.set_ylabel(no_math(objectives[y]))
    return png(figure, _legend(finished, theme), theme)


def draw_metrics(settings: Sequence[Setting], labels: Mapping[str, str], theme: Theme) -> bytes:
    """A panel for each pair of metrics: every setting that was tried on all prompts, those on the front told apart."""
    pairs = list(itertools.combinations(labels, 2))
    finished = _finished(settings)
    figure, panels = canvas(len(pairs), theme)
    for panel, (x, y) in zip(panels, pairs, strict=True):
        for kind, style in _looks(theme).items():
            own = [setting for setting in finished if setting.kind == kind]
            _dots(panel, [one.scores[x] for one in own], [one.scores[y] for one in own], style)
        panel.set_xlabel(labels[x])
        panel.set_ylabel(labels[y])
    return png(figure, _legend(finished, theme), theme)


def _finished(settings: Sequence[Setting]) -> list[Setting]:
    return [setting for setting in settings if setting.state == "finished"]


def _looks(theme: Theme) -> dict[str, Style]:
    """How a kind of setting is drawn, in all pictures; what stands out is drawn last."""
    winner, defaults, front = styles(3, theme)
    return {
        "failed": Style(theme.series[3], "X", _NO_LINE),
        "stopped": Style(_soft(theme, 0.35), "v", _NO_LINE),
        "finished": Style(_soft(theme, 0.5), "o", _NO_LINE),
        "front": Style(front.colour, front.marker, _NO_LINE),
        "defaults": Style(defaults.colour, defaults.marker, _NO_LINE),
        "winner": Style(winner.colour, winner.marker, _NO_LINE),
    }


def _legend(settings: Sequence[Setting], theme: Theme) -> dict[str, Style]:
    """Of the kinds that there are."""
    looks = _looks(theme)
    names = {
        "winner": "winner",
        "defaults": "defaults",
        "front": "on the front",
        "finished": "on all prompts",
        "stopped": "stopped early",
        "failed": "failed",
    }
    kinds = {setting.kind for setting in settings}
    return {label: looks[kind] for kind, label in names.items() if kind in kinds}


def _dots(panel: Axes, x: Sequence[float], y: Sequence[float], style: Style) -> None:
    panel.plot(x, y, style.marker, color=style.colour, markersize=6, zorder=3)


def _soft(theme: Theme, share: float) -> str:
    """Between the page and its ink."""
    from matplotlib.colors import to_hex, to_rgb

    red, green, blue = (
        (1 - share) * a + share * b for a, b in zip(to_rgb(theme.ground), to_rgb(theme.ink), strict=True)
    )
    return to_hex((red, green, blue))


def _short(text: str) -> str:
    """With its middle left out where it is long: names begin alike and end apart."""
    half = (_LETTERS - 1) // 2
    return text if len(text) <= _LETTERS else f"{text[:half]}…{text[-half:]}"
