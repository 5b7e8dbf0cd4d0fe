"""The serving benchmark: ``python jobs/bench/serving.py --out FILE.json``. See README.md beside this file."""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import command
from command import Results, say, whole

if TYPE_CHECKING:
    from setting import Prompts
    from timing import Steps, Timing

PARTS = ("split", "http", "rival", "latency")
STREAMS = (1, 4, 16, 64)
RATIOS = {"http_vs_engine": ("http_b16", "engine_b16"), "http_vs_rival": ("http_b16", "rival_b16")}
AT_LEAST = {"http_vs_engine": 0.90, "http_vs_rival": 3.0}
AT_MOST = {"split_step_b1": 1.15, "split_step_b8": 1.15}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a run."""
    parser = command.parser("Measures how fast mage_ray serves, beside its own engine and a rival.")
    parser.add_argument("--url", help="a server that runs already, with the study of --save-study (default: start one)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--prompt-tokens", type=whole(1), default=32)
    parser.add_argument("--new-tokens", type=whole(4), default=48)
    parser.add_argument("--save-study", type=Path, metavar="FOLDER", help="write the study that is served and stop")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """``command.run`` of this benchmark."""
    options = parse(arguments)
    return command.run(options, arguments, _save_study if options.save_study else _benchmark, _show)


def _save_study(options: argparse.Namespace) -> None:
    from served import make_study

    print(f"study: {make_study(options.save_study, options.model).path}")


def _benchmark(options: argparse.Namespace) -> Results:
    from naive import TOLERANCE
    from results import bars, checks, throughput_ratios
    from setting import Prompts
    from split import measure_split, split_over_longer

    prompts = Prompts.of(options.model)
    split: dict[str, Any] | None = None
    steps: dict[int, dict[str, Steps]] = {}
    # First, while nothing else runs.
    if "split" in options.only:
        say("split steps")
        measured = (options.model, options.rounds, prompts, options.prompt_tokens, options.new_tokens, say)
        split, steps = measure_split(*measured)
    timings, latency = _served(options, prompts) if set(options.only) - {"split"} else ([], [])

    def ratios(statistic: Callable[[Sequence[float]], float]) -> dict[str, float]:
        of_steps = {f"split_step_b{batch}": split_over_longer(own, statistic) for batch, own in steps.items()}
        return throughput_ratios(timings, statistic, RATIOS) | of_steps

    medians = ratios(statistics.median)
    return {
        "setting": _setting(options),
        "split": split,
        "arms": [timing.as_json() for timing in timings],
        "latency": latency,
        "ratios": medians,
        "ratios_of_minima": ratios(min),
        "bars": bars(medians, AT_LEAST, AT_MOST),
        "checks": {"tolerance_nats": TOLERANCE, "arms": checks(timings)},
    }


def _served(options: argparse.Namespace, prompts: Prompts) -> tuple[list[Timing], list[dict[str, Any]]]:
    """The timings of ``http``, ``engine`` and ``rival``, and what goes under ``latency``, as far as asked for."""
    import http_rival
    from served import MIXED, make_study, server
    from text_arms import EngineTexts, in_process, mixed_plans, over_http
    from timing import time_rounds

    from mage_ray.generator import Generator

    new_tokens, length = options.new_tokens, options.prompt_tokens + options.new_tokens
    timings: list[Timing] = []
    latency: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mage_ray-") as scratch, ExitStack() as stack:
        say("the study that is served")
        folder = make_study(Path(scratch), options.model)
        generator = Generator.open(folder.path, rows=3 * len(MIXED), length=length)
        plans, judge = mixed_plans(generator), EngineTexts.of(generator, folder)
        how = (options.rounds, prompts, options.prompt_tokens, new_tokens)
        url = options.url
        if url is None and {"http", "latency"} & set(options.only):
            say("the server")
            url = stack.enter_context(server(folder.path, 3 * max(STREAMS), length, options.threads))
        if "http" in options.only:
            arms = [over_http("http", url, plans, new_tokens), in_process(generator, plans, new_tokens)]
            timings += time_rounds(arms, *how, judge, say)
        if "latency" in options.only:
            latency = _latency(url, *how)
        stack.close()
        # Last, when the server is gone: the rival's weights take most of the memory.
        if "rival" in options.only:
            say("the rival")
            url = stack.enter_context(http_rival.serving(folder.path, options.threads))
            timings += time_rounds([over_http("rival", url, plans, new_tokens)], *how, judge, say)
    return timings, latency


def _latency(url: str, rounds: int, prompts: Prompts, prompt_tokens: int, new_tokens: int) -> list[dict[str, Any]]:
    """Bursts of each number of streams, in turn, the first untimed; preferences go round."""
    from load import Burst, latency_result
    from served import MIXED, questions

    bursts: dict[int, list[Burst]] = {streams: [] for streams in STREAMS}
    for number in range(rounds + 1):
        for streams, own in bursts.items():
            preferences = [MIXED[i % len(MIXED)] for i in range(streams)]
            asked = questions(prompts.take(streams, prompt_tokens), preferences, new_tokens)
            burst = Burst.of(url, asked)
            if number > 0:
                own.append(burst)
        say("untimed bursts" if number == 0 else f"bursts {number} of {rounds}")
    return [latency_result(own) for own in bursts.values()]


def _show(results: Results) -> None:
    from results import show_arms, show_bars

    if results["arms"]:
        show_arms(results["arms"])
    if results["latency"]:
        _show_latency(results["latency"])
    show_bars(results)


def _show_latency(latency: list[dict[str, Any]]) -> None:
    from results import show

    columns = ("streams", "first token p50, s", "p95", "between tokens p50, s", "p95", "tokens/s")
    rows = [
        [
            entry["streams"],
            *[entry[kind][f"seconds_{p}"] for kind in ("first_token", "between_tokens") for p in ("p50", "p95")],
            entry["tokens_per_s_median"],
        ]
        for entry in latency
    ]
    show("Over HTTP", columns, rows)


def _setting(options: argparse.Namespace) -> dict[str, Any]:
    from served import METHOD, MIXED, OBJECTIVES
    from setting import BETA, CANDIDATES, EXPERTS, PREFERENCES, RANK, RELATIVE_DELTA, STRENGTH

    return {
        "model": options.model,
        "dtype": "float32",
        "server": options.url or "started",
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "greedy": True,
        "stops": "none in the served model; ignored in split steps",
        "method": METHOD,
        "objectives": OBJECTIVES,
        "preferences": MIXED,
        "streams": STREAMS,
        "rank": RANK,
        "relative_delta": RELATIVE_DELTA,
        "beta": BETA,
        "strength": STRENGTH,
        "candidates": CANDIDATES,
        "split_experts": EXPERTS,
        "split_preference": PREFERENCES[0],
        "rounds": options.rounds,
    }


if __name__ == "__main__":
    sys.exit(main())
