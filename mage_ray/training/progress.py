"""How far each expert's training is, read from the metrics that the runs write, and shown on a console."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

_EVERY = 0.5
"""Seconds between two looks at the metrics."""
_EVERY_LINE = 15.0
"""Seconds between two lines where the console is no terminal."""


def read_metrics(path: Path) -> dict[int, dict[str, Any]]:
    """A run's metrics by step; of a step that was made again after a restart, the later ones."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    metrics = {}
    for line in lines:
        try:
            entry = json.loads(line)
            metrics[int(entry["step"])] = entry
        except (ValueError, KeyError, TypeError):
            continue  # The last line, half written.
    return metrics


@dataclass(frozen=True)
class Standing:
    """Where a run is: its last step, what that measured, and the seconds until its end at the recent pace."""

    step: int
    steps: int
    metrics: Mapping[str, Any]
    seconds_left: float | None

    @classmethod
    def of(cls, path: Path, steps: int) -> Standing:
        metrics = read_metrics(path)
        if not metrics:
            return cls(0, steps, {}, None)
        step = max(metrics)
        recent = [metrics[s]["seconds"] for s in sorted(metrics)[-8:]]
        return cls(step, steps, metrics[step], (steps - step) * sum(recent) / len(recent))

    def __str__(self) -> str:
        shown = {
            "loss": "loss",
            "rewards/margins": "margin",
            "rewards/accuracies": "accuracy",
            "margin": "margin",
            "accuracy": "accuracy",
            "reward": "reward",
            "kl": "KL",
        }
        parts = [f"{word} {self.metrics[key]:.3f}" for key, word in shown.items() if key in self.metrics]
        return "  ".join(parts)


@contextmanager
def shown(
    console: Console | None, runs: Mapping[str, tuple[Path, int]], refresh: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """While inside, show on ``console`` the progress of ``runs``: name to (metrics file, steps). None shows nothing.

    ``refresh`` brings the files up to date.
    """
    if console is None or not runs:
        yield
        return
    ended = Event()
    watcher = Thread(target=_bars if console.is_terminal else _lines, args=(console, runs, refresh, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _bars(console: Console, runs: Mapping[str, tuple[Path, int]], refresh: Callable[[], None], ended: Event) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}"),
        TextColumn("{task.fields[measured]}"),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {name: progress.add_task(name, total=steps, left="", measured="") for name, (_, steps) in runs.items()}
        last = False
        while not last:
            last = ended.wait(_EVERY)
            refresh()
            for name, (path, steps) in runs.items():
                now = Standing.of(path, steps)
                progress.update(tasks[name], completed=now.step, left=_left(now), measured=str(now))


def _lines(console: Console, runs: Mapping[str, tuple[Path, int]], refresh: Callable[[], None], ended: Event) -> None:
    printed: dict[str, tuple[int, float]] = {}
    last = False
    while not last:
        last = ended.wait(_EVERY)
        refresh()
        for name, (path, steps) in runs.items():
            now, clock = Standing.of(path, steps), time.monotonic()
            before, when = printed.get(name, (0, -_EVERY_LINE))
            if now.step > before and (now.step == steps or last or clock - when >= _EVERY_LINE):
                printed[name] = (now.step, clock)
                console.print(f"{name}: step {now.step}/{steps}  {now}  {_left(now)}".rstrip(), highlight=False)


def _left(standing: Standing) -> str:
    if standing.seconds_left is None:
        return "starting"
    if standing.step == standing.steps:
        return "done"
    seconds = round(standing.seconds_left)
    return f"{seconds // 60}:{seconds % 60:02d} left"
