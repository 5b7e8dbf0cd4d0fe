"""The page of a search: what it gained, how it went, and which constants mattered."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from mage_ray.analysis.sections import Table, plain, table_html
from mage_ray.evaluation.canvas import DARK, LIGHT, Theme
from mage_ray.evaluation.plots import draw_fronts
from mage_ray.evaluation.report import facts_html, figure, write_page
from mage_ray.evaluation.summary import MEASURES, Summary, paired_difference
from mage_ray.evaluation.tables import COLUMNS, UNDEFINED, differences_html, measures_html, number
from mage_ray.files import write_atomic
from mage_ray.folder import StudyFolder
from mage_ray.search.drawing import BARS, draw_history, draw_importance, draw_metrics, draw_setting_fronts
from mage_ray.search.history import ENOUGH, Setting, Weight, best_so_far, constant, importance, read_settings
from mage_ray.search.recipe import Recipe, own_recipe
from mage_ray.search.space import Space
from mage_ray.search.spec import METRICS, RangeSpec

_LABELS = {column.measure: column.label for column in COLUMNS} | {"cost": "forwards per token"}
_DIGITS = {column.measure: column.digits for column in COLUMNS} | {"cost": 3}
_SEARCHED = (*METRICS, "kl", "length")
_UNSEEN = (
    "Both fronts on the unseen prompts; bars are intervals. A point is filled as far as its preference leans to the "
    "objective on the horizontal axis."
)


def write_search_page(
    space: Space,
    folder: StudyFolder,
    records: Sequence[Mapping[str, Any]],
    summary: Summary,
    recipe: Recipe,
    facts: Mapping[str, str],
) -> Path:
    """Write ``report/search.html``, its pictures ``search-*.png``, and ``search/history.json``; the page's path.

    ``records`` are all of the search, ``recipe`` is the winner, and ``summary`` has it (as ``recipe``) and the study's
    own method on unseen prompts. Nothing is written before all of it is made, and the page comes last. All text is
    escaped; the page loads nothing from outside its folder. Raises FieldError where no finished record is the recipe's.
    """
    study = space.study
    metrics: list[str] = list(dict.fromkeys(study.search.metrics))
    settings = read_settings(space, records, recipe)
    best = best_so_far(settings, metrics[0])
    weights = {metric: importance(space, settings, metric) for metric in metrics}
    pictures: dict[str, Callable[[Theme], bytes]] = {
        "unseen": partial(draw_fronts, summary),
        "history": partial(draw_history, settings, best, metrics[0], _aim(metrics[0])),
        "fronts": partial(draw_setting_fronts, settings, summary.objectives, np.array(study.search_grid())),
    }
    if told := {_LABELS[metric]: own for metric, own in weights.items() if own}:
        pictures["importance"] = partial(draw_importance, told)
    if len(metrics) > 1:
        pictures["metrics"] = partial(draw_metrics, settings, {name: _aim(name) for name in metrics})
    content: dict[Path, bytes | str] = {}
    for name, draw in pictures.items():
        for dress, theme in (("", LIGHT), ("-dark", DARK)):
            content[folder.report / f"search-{name}{dress}.png"] = draw(theme)
    numbers = {
        "facts": dict(facts),
        "metrics": metrics,
        "settings": [asdict(one) | {"best": so_far} for one, so_far in zip(settings, best, strict=True)],
        "importance": {metric: [asdict(weight) for weight in own] for metric, own in weights.items()},
        "unseen": json.loads(summary.to_json()),
        "gain": {name: asdict(paired_difference(summary, "recipe", study.search.method, name)) for name in MEASURES},
    }
    content[folder.search / "history.json"] = json.dumps(plain(numbers), indent=1) + "\n"
    body = "\n".join(
        [
            f'<p class="soft">{escape(_scope(space, settings, metrics))}</p>',
            _answer(space, settings, summary, recipe, metrics),
            _history(settings, metrics[0]),
            _importance(settings, weights),
            _fronts(settings, summary, metrics),
            f"<h2>All settings</h2>\n{_scrolled(table_html(_every(space, settings, metrics)))}",
            f"<h2>This search</h2>\n<dl>{facts_html(_spent(records) | dict(facts))}</dl>\n",
        ]
    )
    for path, data in content.items():
        write_atomic(path, data)
    return write_page(folder.report, "search", f"{study.name}: search", body)


def _scope(space: Space, settings: Sequence[Setting], metrics: Sequence[str]) -> str:
    spec, counts = space.study.search, Counter[str](setting.state for setting in settings)
    states = {"finished": f"on all {spec.prompts} prompts", "stopped": "stopped early", "failed": "failed"}
    told = ", ".join(f"{counts[state]} {name}" for state, name in states.items() if counts[state])
    return (
        f"{spec.algorithm} over {', '.join(space.dimensions)} for {' and '.join(map(_aim, metrics))}. "
        f"{len(settings)} settings, each at {len(space.study.search_grid())} preferences: {told}."
    )


def _answer(space: Space, settings: Sequence[Setting], summary: Summary, recipe: Recipe, metrics: Sequence[str]) -> str:
    own, first = space.study.search.method, _LABELS[metrics[0]]
    [winner] = [setting for setting in settings if setting.winner]
    if winner.own:
        verdicts = [f"The winner is the study’s own constants: no other setting had a better {first}."]
    else:
        verdicts = [_verdict(summary, own, metric) for metric in metrics]
    if len(metrics) > 1:
        count = sum(setting.front is not None for setting in settings)
        verdicts.append(
            f"No other setting beats the {count} on the front, whose recipes are in search/recipes/, in all metrics; "
            f"the winner has the best {first} of them."
        )
    return "\n".join(
        [
            "<h2>The answer</h2>",
            *(f"<p>{escape(verdict)}</p>" for verdict in verdicts),
            _scrolled(table_html(_constants(space, recipe, winner))),
            '<p class="soft">What is not listed stays as the study has it.</p>',
            f"<h3>On {summary.prompts} prompts that the search never saw</h3>",
            f"<p>“recipe” is the winner, “{escape(own)}” the study’s own constants, the defaults. Small figures are "
            f'intervals of {summary.confidence:.0%}. <span class="mark">●</span> marks the better one, '
            '<span class="mark">○</span> one whose interval overlaps it.</p>',
            _scrolled(measures_html(summary)),
            "<h3>The difference</h3>",
            "<p>The winner minus the defaults, both on the same draws of prompts, so that noise they share cancels. "
            "Bold with an arrow: the interval leaves out 0.</p>",
            _scrolled(differences_html(summary, own)),
            figure("search-unseen", "Fronts on unseen prompts", _UNSEEN, wide=len(summary.objectives) > 2),
            "<h3>On the search’s own prompts</h3>",
            f"<p>{escape(_flattery(space, settings))}</p>",
            _scrolled(table_html(_searched(settings))),
        ]
    )


def _verdict(summary: Summary, own: str, metric: str) -> str:
    """Whether the winner is better in a metric, on unseen prompts."""
    if metric not in MEASURES:
        return f"{_LABELS[metric].capitalize()}: not measured on unseen prompts; below as the search saw it."
    digits, gain = _DIGITS[metric], paired_difference(summary, "recipe", own, metric)
    ours, theirs = (number(summary.method(one).measures[metric].value, digits) for one in ("recipe", own))
    value, low, high = (number(part, digits, signed=True) for part in (gain.value, gain.low, gain.high))
    begin = f"{_LABELS[metric].capitalize()} on unseen prompts: {ours} with the winner, {theirs} with the defaults; "
    if math.isnan(gain.low):
        return f"{begin}a difference of {value} without an interval, so nothing tells it from chance."
    begin += f"a difference of {value} [{low}, {high}]. "
    if gain.low > 0:
        return f"{begin}The interval leaves out 0: the winner is better."
    if gain.high < 0:
        return f"{begin}The interval leaves out 0: the winner is worse, whatever it gained on the search’s own prompts."
    return f"{begin}The interval includes 0: these prompts cannot tell the winner from the defaults."


def _constants(space: Space, recipe: Recipe, winner: Setting) -> Table:
    """What the space names, in the study and in the winner."""
    study = space.study
    own = own_recipe(study, study.search.method)
    single = {name: [value] for name, value in space.single.items()}
    rows = []
    for name, allowed in (single | space.dimensions).items():
        if name.startswith("coefficients."):
            pair = (0.0, winner.config[name])
        else:
            pair = (constant(study, own, name), constant(study, recipe, name))
        rows.append((name, _range(allowed), *map(_text, pair)))
    return Table("Constants", ("constant", "searched", "default", "winner"), tuple(rows))


def _flattery(space: Space, settings: Sequence[Setting]) -> str:
    spec = space.study.search
    count = sum(setting.state == "finished" for setting in settings)
    told = (
        f"These numbers flatter the winner: it was chosen by them, as the best of {count} settings on {spec.prompts} "
        f"prompts and {len(space.study.search_grid())} preferences. What it gains is what it gains above. "
    )
    if space.defaults is None:
        return f"{told}The defaults lie outside the space and were not tried."
    state = next((setting.state for setting in settings if setting.own), "")
    told += "The defaults were not tried." if not state else "The defaults failed." if state == "failed" else ""
    stopped = "The defaults were stopped early: theirs are from fewer prompts, and not comparable."
    return told + stopped if state == "stopped" else told


def _searched(settings: Sequence[Setting]) -> Table:
    shown = {"winner": [one for one in settings if one.winner]}
    shown["defaults"] = [one for one in settings if one.own and one.scores and not one.winner]
    rows = tuple((label, *_scores(one, _SEARCHED)) for label, own in shown.items() for one in own)
    return Table("Searched", ("", *(_LABELS[name] for name in _SEARCHED), "prompts"), rows)


def _scores(setting: Setting, names: Sequence[str]) -> tuple[str, ...]:
    """Its scores and how many prompts they are from."""
    scores = [number(setting.scores.get(name, math.nan), _DIGITS[name]) for name in names]
    return (*scores, _text(setting.scores.get("prompts", UNDEFINED)))


def _history(settings: Sequence[Setting], metric: str) -> str:
    failures = "".join(
        f"<dt>setting {setting.number}</dt><dd>{escape(setting.reason)}</dd>"
        for setting in settings
        if setting.state == "failed"
    )
    caption = f"{_aim(metric).capitalize()} on the search’s own prompts, of which those stopped early had fewer."
    return (
        "<h2>History</h2>\n"
        + figure("search-history", "The metric of each setting and the best so far", escape(caption), wide=False)
        + (f"\n<h3>Failures</h3>\n<dl>{failures}</dl>" if failures else "")
    )


def _importance(settings: Sequence[Setting], weights: Mapping[str, Sequence[Weight]]) -> str:
    count = sum(setting.state == "finished" for setting in settings)
    head = "<h2>Which constants mattered</h2>\n"
    if count < ENOUGH:
        return f"{head}<p>Too few settings to tell: {count} on all prompts, and it takes {ENOUGH}.</p>"
    text = (
        f"By PED-ANOVA over the {count} settings on all prompts: how differently the best of them lie along a constant "
        "than all of them do. It says that a constant mattered within its range, not which way. A bar that ends short "
        "of its tick cannot be told from chance, and one that does not may, now and then, be chance too."
    )
    html = f"{head}<p>{text}</p>"
    if untold := [_LABELS[metric] for metric, own in weights.items() if not own]:
        html += f"\n<p>Nothing to tell for {', '.join(untold)}: it hardly differs, or is not defined.</p>"
    if constants := max(map(len, weights.values())):
        caption = "Tick: 95 % of the shares are below it when the metric is dealt out anew among the settings."
        caption += f" The {BARS} largest of {constants}; all are in search/history.json." if constants > BARS else ""
        html += "\n" + figure("search-importance", "Importance of the constants", caption, wide=True)
    return html


def _fronts(settings: Sequence[Setting], summary: Summary, metrics: Sequence[str]) -> str:
    two = len(summary.objectives) == 2
    caption = "Mean normalised rewards of every setting on all of the search’s prompts."
    caption += " A line joins a setting’s preferences in order." if two else ""
    html = f"<h2>Fronts</h2>\n{figure('search-fronts', 'Fronts of all settings', caption, wide=not two)}"
    if len(metrics) > 1:
        caption = "Each setting on all of the search’s prompts. On the front: no other beats it in all metrics."
        shown = figure("search-metrics", "Metrics of all settings", caption, wide=len(metrics) > 2)
        html += f"\n<h2>Metrics</h2>\n{shown}"
    return html


def _every(space: Space, settings: Sequence[Setting], metrics: Sequence[str]) -> Table:
    names = list(dict.fromkeys([*metrics, *METRICS]))
    rows = tuple(
        (
            str(setting.number),
            _state(setting),
            *(_text(setting.config.get(name, UNDEFINED)) for name in space.dimensions),
            *_scores(setting, names),
        )
        for setting in settings
    )
    return Table("Settings", ("", "state", *space.dimensions, *(_LABELS[name] for name in names), "prompts"), rows)


def _state(setting: Setting) -> str:
    state = {"finished": "on all prompts", "stopped": "stopped early", "failed": "failed"}[setting.state]
    roles = [role for role, there in (("winner", setting.winner), ("defaults", setting.own)) if there]
    roles += [] if setting.front is None else [f"recipes/{setting.front:02d}.yaml"]
    return f"{', '.join(roles)}: {state}" if roles else state


def _spent(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    scores = [record["scores"] for record in records if "scores" in record]
    tokens, seconds = (sum(one.get(name, 0) for one in scores) for name in ("tokens", "engine_seconds"))
    return {"trials": f"{tokens} tokens in {seconds:.0f} s of the engines’ time"}


def _scrolled(table: str) -> str:
    return f'<div class="scroll">{table}</div>'


def _aim(metric: str) -> str:
    return f"{_LABELS[metric]} ({'more' if METRICS[metric] == 'max' else 'less'} is better)"


def _range(allowed: RangeSpec | list[Any]) -> str:
    if isinstance(allowed, list):
        return ", ".join(map(_text, allowed))
    steps = "" if allowed.step is None else f", in steps of {_text(allowed.step)}"
    return f"{_text(allowed.low)} to {_text(allowed.high)}{', by its logarithm' if allowed.log else ''}{steps}"


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(own)}" for name, own in value.items())
    return f"{value:.4g}".replace("-", "−") if isinstance(value, float) else str(value)
