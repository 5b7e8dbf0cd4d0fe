"""From timings to the results file and the table at the end."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from timing import Steps, Timing

from mage_ray.files import write_atomic

# Ratio -> (arm over which other arm), both as name_b<batch>; in tokens per second.
THROUGHPUT_RATIOS = {
    "unguided_vs_generate_b1": ("unguided_b1", "generate_b1"),
    "unguided_vs_generate_b8": ("unguided_b8", "generate_b8"),
    "guided_vs_generate_b1": ("guided_b1", "generate_b1"),
    "guided_vs_generate_b8": ("guided_b8", "generate_b8"),
    "guided_vs_unguided_b1": ("guided_b1", "unguided_b1"),
    "guided_vs_unguided_b8": ("guided_b8", "unguided_b8"),
    "guided_vs_rival_b1": ("guided_b1", "rival_b1"),
    "guided_vs_rival_b8": ("guided_b8", "rival_b8"),
    "mixed8_vs_rival": ("mixed8_b8", "mixed8_rival_b8"),
    "mixed8_vs_equal8": ("mixed8_b8", "equal8_b8"),
    "explicit_q_vs_unguided": ("explicit_q_b1", "unguided_b1"),
    "explicit_q_vs_unguided_k6": ("explicit_q_b1", "unguided_k6_b1"),
}

AT_LEAST = {
    "unguided_vs_generate_b1": 1.2,
    "unguided_vs_generate_b8": 1.3,
    "guided_vs_generate_b1": 1.0,
    "guided_vs_generate_b8": 1.0,
    "guided_vs_unguided_b1": 0.80,
    "guided_vs_unguided_b8": 0.60,
    "guided_vs_rival_b1": 3.0,
    "guided_vs_rival_b8": 2.8,
    "mixed8_vs_rival": 10.0,
    "mixed8_vs_equal8": 0.97,
    "explicit_q_vs_unguided": 0.75,
}
AT_MOST = {"new_preference_ttft": 1.05, "guided_memory": 1.25, "value_v20_vs_q": 3.0}


def throughput_ratios(
    timings: Sequence[Timing],
    statistic: Callable[[Sequence[float]], float],
    pairs: Mapping[str, tuple[str, str]] = THROUGHPUT_RATIOS,
) -> dict[str, float]:
    """Tokens per second over tokens per second, each from ``statistic`` of an arm's seconds; arms not run are left out.

    Both arms of a ratio make equally many tokens.
    """
    by_key = {timing.arm.key: statistic(timing.seconds) for timing in timings}
    return {
        name: by_key[other] / by_key[mine] for name, (mine, other) in pairs.items() if {mine, other} <= by_key.keys()
    }


def samples_result(passed: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """What goes under ``first_token``, and of steps: the seconds of each kind, and their samples."""
    return {
        kind: {"seconds_median": statistics.median(s), "seconds_min": min(s), "samples": len(s), "seconds": list(s)}
        for kind, s in passed.items()
    }


def steps_result(steps: Mapping[str, Steps]) -> dict[str, Any]:
    """What goes under ``value_steps``, and under ``split`` for a batch."""
    seconds = samples_result({kind: own.seconds for kind, own in steps.items()})
    return {**seconds, "checks": {kind: asdict(own.agreement) for kind, own in steps.items()}}


def memory_result(peaks: Mapping[str, Mapping[str, int | None]]) -> tuple[dict[str, Any], float]:
    """What goes under ``memory``, and guided over unguided: of the peak while serving, where the kernel tells it."""
    statistic = "process" if any(p["serving"] is None for p in peaks.values()) else "serving"
    guided, unguided = peaks["guided"][statistic], peaks["unguided"][statistic]
    assert guided is not None and unguided is not None
    return {"unit": "bytes", "statistic": statistic, **{kind: dict(p) for kind, p in peaks.items()}}, guided / unguided


def checks(timings: Sequence[Timing]) -> dict[str, dict[str, Any]]:
    """For each arm how its tokens compare with the naive reference's, over all runs."""
    return {t.arm.key: asdict(t.agreement) for t in timings if t.agreement is not None}


def bars(
    ratios: Mapping[str, float], at_least: Mapping[str, float] = AT_LEAST, at_most: Mapping[str, float] = AT_MOST
) -> dict[str, dict[str, Any]]:
    """For each ratio that was measured and has a bar: what it should reach, and whether it does."""
    least = {name: {"least": bar, "pass": ratios[name] >= bar} for name, bar in at_least.items() if name in ratios}
    most = {name: {"most": bar, "pass": ratios[name] <= bar} for name, bar in at_most.items() if name in ratios}
    return least | most


def machine(threads: int) -> dict[str, Any]:
    """What ran this: processor, cores, threads used, bytes of memory, versions, the load when asked."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}
    return {
        "cpu": _after("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_average": list(os.getloadavg()),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **versions,
    }


def now() -> str:
    """The time, ISO 8601, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit() -> str | None:
    """The commit of the code that runs, ``+`` where files differ from it; None outside a git checkout."""
    here = Path(__file__).resolve().parents[2]
    try:
        run = [
            subprocess.run(["git", *command], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--", "mage_ray", "jobs/bench"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return run[0] + ("+" if run[1] else "")


def write(path: Path, results: Mapping[str, Any]) -> None:
    """The results as JSON, whole or not at all."""
    write_atomic(path, json.dumps(results, indent=1) + "\n")


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on the console; plain columns where rich isn't installed. Numbers get three significant digits."""
    cells = [[_cell(value) for value in row] for row in rows]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        print(title)
        for line in [list(columns), *cells]:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
        return
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for line in cells:
        table.add_row(*line)
    Console().print(table)


def show_arms(arms: Sequence[Mapping[str, Any]]) -> None:
    """The arms of a results file as a table."""
    columns = ("arm", "batch", "tokens/s (median)", "tokens/s (best)", "seconds (median)", "rounds")
    keys = ("name", "batch", "tokens_per_s_median", "tokens_per_s_best", "seconds_median", "rounds")
    show("Decoding", columns, [[arm[key] for key in keys] for arm in arms])


def show_bars(results: Mapping[str, Any]) -> None:
    """The ratios of a results file against their bars, as a table."""
    rows = []
    for name, ratio in results["ratios"].items():
        bar = results["bars"].get(name)
        target = "" if bar is None else f"≥ {bar['least']}" if "least" in bar else f"≤ {bar['most']}"
        reached = "" if bar is None else "yes" if bar["pass"] else "NO"
        rows.append([name, ratio, results["ratios_of_minima"].get(name, ""), target, reached])
    show("Ratios", ("ratio", "of medians", "of minima", "bar", "reached"), rows)


def _cell(value: object) -> str:
    if isinstance(value, float) and abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def _after(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)
