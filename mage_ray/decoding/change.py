"""Another plan for a request that runs: keep the keys and values it has, or compute the new ones."""

from __future__ import annotations

from mage_ray.decoding.plan import Plan
from mage_ray.decoding.rows import Rows
from mage_ray.decoding.runner import LiveRow
from mage_ray.decoding.scheduler import Running, Scheduler


def change_plan(running: Running, plan: Plan, recompute: bool, scheduler: Scheduler, runner: Rows) -> None:
    """Give a request the rows of another plan. See ``Engine.change``."""
    if running.ended:
        return
    old, running.plan = running.rows, plan
    if not old:  # it waits, and will start with the new plan
        return
    running.proposals = []
    for held in old:
        runner.rewind(held, len(running.history) - 1)
    # A row that is in both plans, and was never an approximation, stays what it is.
    staying: list[LiveRow | None] = [next((o for o in old if o.exact and o.row == row), None) for row in plan.rows]
    spare = [held for held in old if held not in staying]
    if not recompute:
        for i, row in enumerate(plan.rows):
            near = [held for held in spare if held.row.home == row.home]
            if staying[i] is None and near:
                # The row that had the same part before, if it is to be had: base for base, guide for guide.
                taken = old[i] if i < len(old) and old[i] in near else near[0]
                spare.remove(taken)
                runner.adopt(taken, row)
                staying[i] = taken
    for held in spare:
        runner.end(held)
    running.rows = [have for have in staying if have is not None]
    missing = [row for have, row in zip(staying, plan.rows, strict=True) if have is None]
    if not runner.fits(missing):
        scheduler.requeue(running)
        return
    goal = tuple(running.history)
    source = running.rows[0] if running.rows else None
    running.rows = [
        have
        or (runner.start(row, goal) if recompute or source is None else runner.branch(source, row))
        for have, row in zip(staying, plan.rows, strict=True)
    ]  # fmt: skip
