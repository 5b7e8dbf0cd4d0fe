"""Progress on the console: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from mage_ray.cluster import Progress

if TYPE_CHECKING:
    from rich.console import Console

_EVERY = 5.0
"""Seconds between lines where there is no terminal."""


@contextmanager
def shown(console: Console | None, label: str) -> Iterator[Progress | None]:
    """Within it, what the given function is told is shown on ``console`` under ``label``. None shows nothing."""
    if console is None:
        yield None
        return
    if not console.is_terminal:
        yield _lines(console, label)
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console) as bars:
        bar = bars.add_task(label, total=None)
        yield lambda done, total: bars.update(bar, completed=done, total=total)


def _lines(console: Console, label: str) -> Progress:
    start = time.monotonic()
    printed = -_EVERY

    def line(done: int, total: int) -> None:
        nonlocal printed
        passed = time.monotonic() - start
        if done == total or passed - printed >= _EVERY:
            printed = passed
            console.print(f"{label}: {done}/{total} after {passed:.0f} s", highlight=False)

    return line
