"""What the benchmarks' command lines share: options, and a run from its date to its results file.

Imports torch only once the number of its threads is set.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEFAULT_MODEL = "smollm2-135m-instruct"

Results = dict[str, Any]


def whole(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least so much."""

    def number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more")
        return value

    return number


def parser(description: str) -> argparse.ArgumentParser:
    """With the options that all have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--out", type=Path, required=True, help="the results, as JSON")
    made.add_argument("--model", default=DEFAULT_MODEL, help=f"a model, its folder, or tiny (default: {DEFAULT_MODEL})")
    made.add_argument("--rounds", type=whole(1), default=5, help="timed rounds (default: 5)")
    made.add_argument("--threads", type=whole(1), default=2, help="torch threads (default: 2)")
    return made


def run(
    options: argparse.Namespace,
    arguments: list[str] | None,
    measure: Callable[[argparse.Namespace], Results | None],
    show: Callable[[Results], None],
) -> int:
    """Measure, write the results behind what ran them, show them. 1 when a check fails: then nothing is written.

    ``arguments`` as given to ``main``. A ``measure`` that gives None has done something else, and there are no results.
    """
    # For the processes that this one starts, too.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch
    from results import commit, machine, now, write
    from setting import BenchError

    from mage_ray.errors import UserError

    torch.set_num_threads(options.threads)
    results: Results = {
        "date": now(),
        "commit": commit(),
        "machine": machine(options.threads),
        "command": sys.argv if arguments is None else arguments,
    }
    try:
        measured = measure(options)
    except (BenchError, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if measured is None:
        return 0
    results |= measured
    write(options.out, results)
    show(results)
    print(f"results: {options.out}")
    return 0


def say(line: str) -> None:
    """How far a run has come."""
    print(line, flush=True)
