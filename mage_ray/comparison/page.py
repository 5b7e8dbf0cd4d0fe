"""The page of a comparison: where merged guidance leads and where it doesn't, what it costs, and the controls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mage_ray.analysis.sections import Table, print_tables, table_html
from mage_ray.comparison.results import COMPARED, Found, difference, lead
from mage_ray.comparison.variants import CHANCE, SHUFFLED
from mage_ray.evaluation.canvas import DARK, LIGHT, Theme
from mage_ray.evaluation.plots import draw_cost, draw_fronts
from mage_ray.evaluation.report import facts_html, figure, write_page
from mage_ray.evaluation.summary import Summary
from mage_ray.evaluation.tables import COLUMNS, UNDEFINED, differences_html, measures_html, number
from mage_ray.files import write_atomic
from mage_ray.folder import StudyFolder

if TYPE_CHECKING:
    from rich.console import Console

_LABELS = {column.measure: column.label for column in COLUMNS}
OURS = ("mage-i-m", "mage-e-m")
"""Whose lead is the question."""


def write_comparison_page(folder: StudyFolder, found: Found, content: Mapping[str, Any]) -> Path:
    """Write ``report/comparison.html`` and its pictures ``comparison-*.png``; the page's path.

    Nothing is written before all of it is made, and the page comes last. All text is escaped.
    """
    main = _only(found.summary, [arm.label for arm in found.arms if not arm.variant.name])
    drawings: dict[str, Callable[[Theme], bytes]] = {
        "fronts": partial(draw_fronts, main),
        "cost": partial(draw_cost, main),
    }
    pictures = {
        folder.report / f"comparison-{name}{dress}.png": draw(theme)
        for name, draw in drawings.items()
        for dress, theme in (("", LIGHT), ("-dark", DARK))
    }
    summary, spec = found.summary, found.study.compare
    rivals = [label for label in ("rewarded-soup", "reference") if label in content["methods"]]
    parts = [
        f'<p class="soft">{escape(_scope(found))}</p>',
        "<h2>The question</h2>",
        *(f"<p>{escape(line)}</p>" for line in verdicts(content)),
        "<h2>Fronts</h2>",
        figure("comparison-fronts", "Fronts of all methods", "Bars are intervals.", wide=len(summary.objectives) > 2),
        "<h2>Measures</h2>",
        f"<p>On {summary.prompts} test prompts, used once. Small: intervals of {summary.confidence:.0%}.</p>",
        _scrolled(measures_html(summary)),
    ]
    for rival in rivals:
        parts += [f"<h3>Against {escape(rival)}, on the same draws of prompts</h3>"]
        parts += [_scrolled(differences_html(summary, rival))]
    parts += ["<h2>What it costs</h2>", _scrolled(table_html(cost_table(content)))]
    parts += [figure("comparison-cost", "Hypervolume and inner product over KL", "", wide=True)]
    parts += [
        "<h2>Constants</h2>",
        f"<p>For each method that has constants of its own at most {spec.settings} settings were tried on "
        f"{spec.prompts} validation prompts, and the best by {escape(_LABELS[spec.measure])} was tested; of soups at "
        "the KL of a rival the one that comes nearest to that.</p>",
        _scrolled(table_html(_constants(content))),
    ]
    if content["training_length"] is not None:
        parts += ["<h2>Training length</h2>", *(f"<p>{escape(line)}</p>" for line in _length(content))]
        parts += [_scrolled(table_html(_length_table(content)))]
    parts += ["<h2>This run</h2>", f"<dl>{facts_html(found.facts)}</dl>"]
    for path, data in pictures.items():
        write_atomic(path, data)
    return write_page(folder.report, "comparison", f"{found.study.name}: comparison", "\n".join(parts))


def print_comparison(content: Mapping[str, Any], console: Console) -> None:
    """What a comparison has found, on a terminal."""
    methods = content["methods"]
    rows = tuple(
        (label, *(_interval(own["measures"][measure]) for measure in COMPARED), _plain(own["measures"]["kl"]["value"]))
        for label, own in methods.items()
    )
    columns = ("method", *(_LABELS[measure] for measure in COMPARED), "KL")
    print_tables([Table("The test", columns, rows), cost_table(content)], console)
    for line in [*verdicts(content), *_length(content)]:
        console.print(line, highlight=False, soft_wrap=True)


def verdicts(content: Mapping[str, Any]) -> list[str]:
    """For merged guidance, by measure, whom it leads by a paired interval without 0; then what the controls say."""
    methods = content["methods"]
    told = []
    rivals = [label for label, own in methods.items() if not own["variant"]]
    for label in [one for one in OURS if one in methods]:
        for measure in ("hypervolume", "inner_product"):
            found = lead(content, label, measure, [rival for rival in rivals if rival not in OURS])
            sides = [f"{side} {', '.join(found[side])}" for side in ("above", "level", "below") if found[side]]
            words = "; ".join(side.replace("level", "level with", 1) for side in sides)
            told.append(f"{label}, {_LABELS[measure]}: {words}.")
    for label, own in methods.items():
        if own["kl_goal"] is not None:
            last, test = own["tried"][-1], _plain(own["measures"]["kl"]["value"])
            rival = _plain(methods[label.partition("@kl-of-")[2]]["measures"]["kl"]["value"])
            told.append(
                f"{label}: KL {_plain(last['kl'])} in validation, wanted {_plain(own['kl_goal'])}; in the test {test}, "
                f"its rival's {rival}."
            )
    # A front of many points gains hypervolume by chance alone, which a single point of the reference has no share in;
    # one that is drawn anew at each point has more of it than methods whose points share their random numbers.
    for label in [one for one in methods if one.endswith(f"@{SHUFFLED}")]:
        for measure in ("hypervolume", "inner_product"):
            for plain in [one for one in CHANCE if one in methods]:
                gain = difference(content, label, plain, measure)
                better = gain["low"] is not None and gain["low"] > 0
                answer = "BETTER: something else than the rewards gains" if better else "no better, as it should be"
                if better and measure == "hypervolume" and plain == "reference" and CHANCE[0] in methods:
                    answer = "above a single point, as chance alone can be"
                told.append(f"Control: {label} minus {plain}, {_LABELS[measure]}: {_interval(gain)}, {answer}.")
    return told


def cost_table(content: Mapping[str, Any]) -> Table:
    """What was trained and is stored for each method, and what an answer takes."""
    rows = []
    for label, own in content["methods"].items():
        cost = own["cost"]
        rows.append(
            (
                label,
                _whole(cost["training_tokens"]),
                _whole(cost["models"]),
                _megabytes(cost["stored_bytes"]),
                _plain(cost["forwards_per_token"], 2),
                _plain(cost["tokens_per_second"], 1),
                _megabytes(cost["memory_bytes"]),
                UNDEFINED if own["win_rate"] is None else _interval(own["win_rate"], 2),
            )
        )
    columns = ("method", "trained on\ntokens", "models", "MB stored", "forwards\na token", "tokens/s", "MB memory")
    return Table("Costs", (*columns, "win rate"), tuple(rows))


def _constants(content: Mapping[str, Any]) -> Table:
    rows = []
    for label, own in content["methods"].items():
        chosen = ", ".join(f"{name} {_value(value)}" for name, value in own["constants"].items())
        if not own["tried"]:
            rows.append((label, "nothing to choose", UNDEFINED, UNDEFINED))
            continue
        scores = [one["score"]["value"] for one in own["tried"] if one["score"]["value"] is not None]
        between = f"{_plain(min(scores))} to {_plain(max(scores))}" if scores else UNDEFINED
        rows.append((label, chosen or "the study's own", str(len(own["tried"])), between))
    measure = _LABELS[content["measure"]]
    return Table("Constants", ("method", "chosen", "settings", f"{measure} in validation"), tuple(rows))


def _length(content: Mapping[str, Any]) -> list[str]:
    found = content["training_length"]
    if found is None:
        return []
    steps = found["pays_from"]
    if steps is None:
        return ["Training length: at none of them, with the longer ones, is Bone Soup above Rewarded Soup for certain."]
    return [f"Training length: from {steps} steps on Bone Soup is above Rewarded Soup in hypervolume."]


def _length_table(content: Mapping[str, Any]) -> Table:
    pair = "bone-soup minus rewarded-soup"
    rows = tuple((steps, _interval(own)) for steps, own in content["training_length"][pair].items())
    return Table("Training length", ("steps", f"{pair}, hypervolume"), rows)


def _scope(found: Found) -> str:
    study, summary = found.study, found.summary
    return (
        f"{len(summary.methods)} entries, {len(summary.objectives)} objectives ({', '.join(summary.objectives)}), "
        f"{len(study.evaluation_grid())} preferences, {summary.prompts} test prompts with {summary.seeds} seeds; "
        f"{study.prompts.train} prompts to train on and {study.compare.prompts} to choose constants by are others. "
        f"Intervals: {summary.confidence:.0%}, {summary.resamples} resamples of the prompts."
    )


def _only(summary: Summary, labels: Sequence[str]) -> Summary:
    return replace(summary, methods=tuple(one for one in summary.methods if one.method in labels))


def _scrolled(html: str) -> str:
    return f'<div class="scroll">{html}</div>'


def _interval(found: Mapping[str, Any], digits: int = 3) -> str:
    value, low, high = (_plain(found[part], digits) for part in ("value", "low", "high"))
    return value if low == UNDEFINED else f"{value} [{low}, {high}]"


def _plain(value: float | None, digits: int = 3) -> str:
    return UNDEFINED if value is None else number(value, digits)


def _whole(value: int | None) -> str:
    return UNDEFINED if value is None else f"{value:,}"


def _megabytes(value: float | None) -> str:
    return UNDEFINED if value is None else f"{value / 2**20:.1f}"


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
