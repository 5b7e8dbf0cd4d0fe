"""The search benchmark: ``python jobs/bench/search.py --out FILE.json``. See README.md beside this file."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command
from command import Results, say, whole

if TYPE_CHECKING:
    from searched import Runs, Searched

SIZES = {
    "seeds": (3, 1, "searches of each algorithm, and rounds"),
    "trials": (12, 5, "of each search"),
    "timed_trials": (5, 3, "of the searches one trial at a time"),
    "population": (4, 4, "settings of a generation"),
    "prompts": (8, 2, "that a setting is tried on"),
    "grid": (5, 3, "preferences along an edge that it is tried at"),
    "new_tokens": (32, 8, "of an answer, at most"),
    "unseen": (32, 4, "prompts that the winners are checked on"),
}
"""By option: its default, its default with --quick, and what it is."""
_LEAST = {"trials": 2, "timed_trials": 2, "population": 4, "grid": 2}

AT_LEAST = {"trials_vs_naive": 5.0}
AT_MOST = {"trial_overhead": 0.15}

HOW = {
    "trial_overhead": "one trial at a time: the share of the time from the first trial's end to the last one's in "
    "which no engine generated or scored",
    "trials_vs_naive": "seconds of a naive trial's process over the seconds of a trial of the searches by pymoo, from "
    "their first trial's end to their last one's; with_start: from the search's own beginning",
    "trials_vs_fresh_engine": "as trials_vs_naive, a process of our own engine for each trial in the naive one's place",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a run."""
    parser = argparse.ArgumentParser(description="Measures what searches find, and how fast they try settings.")
    parser.add_argument("--out", type=Path, required=True, help="the results, as JSON")
    parser.add_argument("--study", type=Path, default=Path("runs/demo"), help="a trained study (default: %(default)s)")
    parser.add_argument("--work", type=Path, help="what is kept for another run (default: beside the results)")
    parser.add_argument("--threads", type=whole(1), default=2, help="torch threads, and Ray's CPUs (default: 2)")
    parser.add_argument("--pymoo", choices=("nsga2", "cmaes", "de"), default="nsga2", help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="all code paths; the figures mean nothing")
    for name, (full, quick, what) in SIZES.items():
        text = f"{what} (default: {full}, {quick} with --quick)"
        parser.add_argument(f"--{name.replace('_', '-')}", type=whole(_LEAST.get(name, 1)), help=text)
    options = parser.parse_args(arguments)
    for name, (full, quick, _) in SIZES.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    options.work = options.work or options.out.with_name(f"{options.out.stem}-work")
    return options


def main(arguments: list[str] | None = None) -> int:
    """``command.run`` of this benchmark."""
    return command.run(parse(arguments), arguments, _benchmark, _show)


def _benchmark(options: argparse.Namespace) -> Results:
    from quality import DEFAULTS, quality
    from quality import HOW as QUALITY_HOW
    from results import bars, samples_result
    from searched import Runs, changed
    from trial_check import check_trials

    from mage_ray.cluster import connected
    from mage_ray.folder import StudyFolder
    from mage_ray.search.spec import SearchSpec

    trained = StudyFolder(options.study)
    own = {"space", "method", "max_norm"}
    sizes = {name: getattr(options, name) for name in ("trials", "population", "prompts", "grid")}
    study = changed(
        trained.study,
        prompts={"evaluation": options.unseen},
        evaluation={"max_new_tokens": options.new_tokens},
        search=SearchSpec(**sizes, metrics=["hypervolume"], algorithm=options.pymoo).model_dump(exclude=own),
    )
    runs = Runs(trained, study, options.work, options.threads)
    setting = _setting(options, runs)
    runs.claim(setting)
    with connected(options.threads):
        say("the naive trial and the engine against separately merged models")
        checks = runs.kept("checks", lambda _: check_trials(study, trained))
        searches: dict[tuple[str, int], Searched] = {}
        timed: dict[str, list[Any]] = {"one_at_a_time": [], "naive": [], "fresh_engine": []}
        for number in range(options.seeds):
            _round(runs, options, number, searches, timed)
        say("the winners and the defaults on unseen prompts")
        pairs = {"pymoo_vs_default": (options.pymoo, DEFAULTS), "optuna_vs_default": ("optuna", DEFAULTS)}
        pairs["pymoo_vs_random"] = (options.pymoo, "random")
        found = quality(runs, dict(sorted(searches.items())), pairs)
    resident = [searched for (algorithm, _), searched in searches.items() if algorithm == options.pymoo]
    seconds = {
        "resident": [searched.seconds_per_trial for searched in resident],
        "resident_with_start": [searched.seconds_with_start for searched in resident],
        "one_at_a_time": [searched.seconds_per_trial for searched in timed["one_at_a_time"]],
        **{kind: [trial["seconds"] for trial in timed[kind]] for kind in ("naive", "fresh_engine")},
    }
    overheads = {
        kind: [getattr(searched, kind) for searched in timed["one_at_a_time"]]
        for kind in ("overhead", "overhead_within", "overhead_with_first")
    }
    ratios = {name: bounds["value"] for name, bounds in found["intervals"].items() if bounds["value"] is not None}
    medians = _time_ratios(seconds, overheads["overhead"], statistics.median)
    return {
        "setting": setting,
        "how": QUALITY_HOW | HOW,
        **found,
        "seconds_per_trial": samples_result(seconds),
        "trials_per_hour": {kind: 3600 / statistics.median(own) for kind, own in seconds.items()},
        "tokens_per_trial": {
            "resident": [searched.tokens[-1] / len(searched.records) for searched in resident],
            **{kind: [trial["tokens"] for trial in timed[kind]] for kind in ("naive", "fresh_engine")},
        },
        "overheads": overheads,
        "fresh_trials": {kind: timed[kind] for kind in ("naive", "fresh_engine")},
        "ratios": ratios | medians,
        "ratios_of_minima": _time_ratios(seconds, overheads["overhead"], min),
        "bars": bars(medians, AT_LEAST, AT_MOST),
        "checks": checks,
    }


def _round(
    runs: Runs,
    options: argparse.Namespace,
    number: int,
    searches: dict[tuple[str, int], Searched],
    timed: dict[str, list[Any]],
) -> None:
    """Everything once, by the round's own seed; each round starts with another part."""
    from trial_check import tried

    def search(algorithm: str) -> None:
        name = f"{algorithm}-{number}"
        searches[algorithm, number] = runs.search(name, algorithm=algorithm, seed=number)

    def one_at_a_time() -> None:
        how = {"seed": number, "trials": options.timed_trials, "concurrent": 1}
        timed["one_at_a_time"].append(runs.search(f"one-at-a-time-{number}", **how))

    def fresh(kind: str, process: str) -> None:
        timed[kind].append(runs.trial(f"{kind}-{number}", process, tried(runs.study, number)))

    parts: list[tuple[str, Callable[[], None]]] = [
        *[(f"search by {a}", lambda a=a: search(a)) for a in (options.pymoo, "optuna", "random")],
        ("trials one at a time", one_at_a_time),
        ("naive trial", lambda: fresh("naive", "naive")),
        ("trial of a fresh engine", lambda: fresh("fresh_engine", "engine")),
    ]
    first = number % len(parts)
    for what, run in [*parts[first:], *parts[:first]]:
        say(f"round {number + 1} of {options.seeds}: {what}")
        run()


def _time_ratios(
    seconds: Mapping[str, Sequence[float]], overheads: Sequence[float], statistic: Callable[[Sequence[float]], float]
) -> dict[str, float]:
    """Each from ``statistic`` of its arms' seconds of a trial."""
    by_arm = {arm: statistic(own) for arm, own in seconds.items()}
    return {
        "trial_overhead": statistic(overheads),
        "trials_vs_naive": by_arm["naive"] / by_arm["resident"],
        "trials_vs_naive_with_start": by_arm["naive"] / by_arm["resident_with_start"],
        "trials_vs_fresh_engine": by_arm["fresh_engine"] / by_arm["resident"],
    }


def _setting(options: argparse.Namespace, runs: Runs) -> Results:
    study = runs.study
    return {
        "study": study.name,
        "digest": study.digest,
        "model": study.model,
        "pymoo": options.pymoo,
        **{name: getattr(options, name) for name in SIZES},
        "threads": options.threads,
        "temperature": study.evaluation.temperature,
        "search": study.search.model_dump(mode="json", exclude_none=True),
        "guidance": study.guidance.model_dump(mode="json", exclude_none=True),
    }


def _show(results: Results) -> None:
    from results import show, show_bars

    rows = []
    for one in results["searches"]:
        unseen = one["unseen_hypervolume"]
        numbers = [one["trials"], one["tokens"], one["trials_within_budget"], one["searched_hypervolume"]]
        rows.append([one["algorithm"], one["seed"], *numbers, unseen["value"], unseen["low"], unseen["high"]])
    columns = ("search", "seed", "trials", "tokens", "within budget", "searched", "unseen", "low", "high")
    show("Hypervolume of the settings found", columns, rows)
    show("Trials", ("arm", "per hour"), [*results["trials_per_hour"].items()])
    show_bars(results)


if __name__ == "__main__":
    sys.exit(main())
