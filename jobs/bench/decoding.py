"""The decoding benchmark: ``python jobs/bench/decoding.py --out FILE.json``. See README.md beside this file."""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import command
from command import Results, say, whole

DEFAULT_SHAPE = "qwen3-8b"
ARMS = ("generate", "unguided", "guided", "rival", "mixed8", "equal8", "mixed8_rival")
VALUE_ARMS = ("unguided_k6", "explicit_q", "value_v20")
_EXTRA = ("value_steps", "ttft", "memory", "llama_server")
_FIRST_TOKEN_SAMPLES = 20


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a run."""
    parser = command.parser("Measures how fast mage_ray decodes, beside what people use today.")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="some arms alone; a wrong name lists them all")
    parser.add_argument(
        "--growth",
        action="store_true",
        help="the cost over batch, experts and context instead (--rounds: 3 by default)",
    )
    parser.add_argument(
        "--device", help=f"the table for a GPU instead, on this device (cuda; --model: {DEFAULT_SHAPE} by default)"
    )
    parser.add_argument("--prompt-tokens", type=whole(1), default=32)
    parser.add_argument("--new-tokens", type=whole(2), default=64)
    parser.add_argument(
        "--save-experts", type=Path, metavar="FOLDER", help="write the experts as PEFT adapters and stop"
    )
    parser.add_argument("--llama-gguf", type=Path, help="the model as float32 GGUF, for llama-server")
    parser.add_argument("--llama-lora", type=Path, nargs="+", default=[], help="the experts as GGUF, in their order")
    parser.set_defaults(model=None, rounds=None)
    options = parser.parse_args(arguments)
    options.model = options.model or (DEFAULT_SHAPE if options.device else command.DEFAULT_MODEL)
    options.rounds = options.rounds or (3 if options.growth else 5)
    if options.growth and options.device:
        parser.error("--growth and --device are separate runs")
    if (options.growth or options.device) and options.only:
        parser.error("--only picks arms of the plain benchmark")
    known = (*ARMS, *VALUE_ARMS, *_EXTRA)
    if unknown := set(options.only or ()) - set(known):
        parser.error(f"--only {' '.join(sorted(unknown))}: choose from {' '.join(known)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """``command.run`` of this benchmark."""
    options = parse(arguments)
    if options.save_experts:
        return command.run(options, arguments, _save_experts, _show)
    measure = _on_device if options.device else _growth if options.growth else _benchmark
    return command.run(options, arguments, measure, _show)


def _benchmark(options: argparse.Namespace) -> Results:
    import llama
    from arms import make_arms
    from memory import peaks
    from naive import TOLERANCE, NaiveReference
    from results import bars, checks, memory_result, samples_result, steps_result, throughput_ratios
    from rivals import MergedModels
    from setting import EXPERTS, PREFERENCES, Prompts, guided, load, random_experts
    from timing import first_tokens, time_rounds
    from value_arms import make_value_arms, random_values, v_over_q, value_engine, value_steps

    from mage_ray.decoding.engine import Engine
    from mage_ray.decoding.runner import RowRunner
    from mage_ray.merging.bank import AdapterBank

    name, rounds = options.model, options.rounds
    prompt_tokens, new_tokens = options.prompt_tokens, options.new_tokens
    only = set(options.only or (*ARMS, *VALUE_ARMS, *_EXTRA))
    results: Results = {"setting": _setting(options)}
    extra: dict[str, float] = {}
    extra_minima: dict[str, float] = {}
    # First, while this process is small.
    if "memory" in only:
        say("peak memory, in processes of their own")
        measured = {k: peaks(name, k, new_tokens, prompt_tokens, options.threads) for k in ("unguided", "guided")}
        results["memory"], extra["guided_memory"] = memory_result(measured)

    say(f"loading {name}")
    reference = load(name)
    experts = random_experts(reference, EXPERTS)
    valued = bool(only & {*VALUE_ARMS, "value_steps"})
    everyone = [*experts, *(random_values(reference, EXPERTS) if valued else [])]
    models = MergedModels(reference, everyone)
    rows, length = 8 * len(guided(PREFERENCES[0]).rows), prompt_tokens + new_tokens
    engine = Engine(RowRunner(copy.deepcopy(reference), AdapterBank(experts), rows=rows, length=length), stop=[])
    prompts = Prompts.of(name)
    say("merging what the rivals run on")
    arms = make_arms(engine, models, new_tokens, (1, 8), only)
    if valued:
        # Of its own: the other arms' bank, and its cost, stay those of a study without value models.
        with_values = value_engine(reference, everyone, 8, length)
        arms += make_value_arms(with_values, new_tokens, (1, 8), only)
    naive = NaiveReference(models)
    timings = time_rounds(arms, rounds, prompts, prompt_tokens, new_tokens, naive, say) if arms else []

    reason = (
        llama.why_not(options.llama_gguf, options.llama_lora, EXPERTS) if "llama_server" in only else "not asked for"
    )
    results["llama_server"] = None
    if reason is None:
        with ExitStack() as stack:
            slots = 8
            started = llama.server(options.llama_gguf, options.llama_lora, options.threads, slots, length)
            theirs = llama.make_llama_arms(stack.enter_context(started), new_tokens)
            loose = NaiveReference(models, exact=False)
            server_timings = time_rounds(theirs, rounds, prompts, prompt_tokens, new_tokens, loose, say)
        results["llama_server"] = {"arms": [t.as_json() for t in server_timings], "checks": checks(server_timings)}
    else:
        results["llama_server_reason"] = reason
        if "llama_server" in only:
            say(f"llama-server left out: {reason}")

    if "value_steps" in only:
        say("steps guided by value models")
        steps = value_steps(with_values, prompts, naive, rounds, prompt_tokens, new_tokens)
        results["value_steps"] = steps_result(steps)
        extra["value_v20_vs_q"] = v_over_q(steps, statistics.median)
        extra_minima["value_v20_vs_q"] = v_over_q(steps, min)

    if "ttft" in only:
        say("time to the first token")
        latency = samples_result(first_tokens(engine, prompts, prompt_tokens, _FIRST_TOKEN_SAMPLES))
        results["first_token"] = latency
        extra["new_preference_ttft"] = latency["new"]["seconds_median"] / latency["seen"]["seconds_median"]

    ratios = throughput_ratios(timings, statistics.median) | extra
    return results | {
        "arms": [timing.as_json() for timing in timings],
        "ratios": ratios,
        "ratios_of_minima": throughput_ratios(timings, min) | extra_minima,
        "bars": bars(ratios),
        "checks": {"tolerance_nats": TOLERANCE, "arms": checks(timings)},
    }


def _growth(options: argparse.Namespace) -> Results:
    from growth import curves, plot
    from setting import Prompts, load

    how = (options.rounds, options.prompt_tokens, options.new_tokens)
    measured, notes = curves(load(options.model), Prompts.of(options.model), *how, say)
    for note in notes:
        say(note)
    picture = options.out.with_suffix(".png")
    plot(measured, picture)
    say(f"picture: {picture}")
    return {"setting": _setting(options), "growth": measured, "notes": notes}


def _on_device(options: argparse.Namespace) -> Results:
    import torch
    from accelerator import measure
    from setting import BenchError

    if options.model not in (DEFAULT_SHAPE, "tiny"):
        raise BenchError(f"--model {options.model}: with --device one of {DEFAULT_SHAPE}, tiny")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchError(f"--device {options.device}: this torch sees no GPU")
    measured = measure(options.model, device, options.rounds, options.prompt_tokens, options.new_tokens, say)
    return {"setting": _setting(options), **measured}


def _save_experts(options: argparse.Namespace) -> None:
    from setting import EXPERTS, load, random_experts

    from mage_ray.merging.adapter import save_adapter

    for expert in random_experts(load(options.model), EXPERTS):
        save_adapter(expert, options.save_experts / expert.name)
    print(f"experts: {options.save_experts}")


def _show(results: Results) -> None:
    from results import show, show_arms, show_bars

    if results.get("arms"):
        show_arms(results["arms"])
    if "bars" in results:
        show_bars(results)
    if "step" in results:
        show("Ratios", ("ratio", "of medians"), [*results["ratios"].items()])
        show("One unguided step, batch 1", ("", ""), [*results["step"].items()])
    for name, points in results.get("growth", {}).items():
        if points:
            show(f"Growth over {name}", list(points[0]), [list(point.values()) for point in points])


def _setting(options: argparse.Namespace) -> dict[str, Any]:
    from setting import (
        BETA,
        CANDIDATES,
        EXPERTS,
        HEAD_RANK,
        LOOKED_AT,
        PREFERENCES,
        RANK,
        RELATIVE_DELTA,
        SPREAD,
        STRENGTH,
    )

    return {
        "model": options.model,
        "dtype": "bfloat16" if options.device else "float32",
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "greedy": True,
        "stops": "ignored",
        "experts": EXPERTS,
        "rank": RANK,
        "relative_delta": RELATIVE_DELTA,
        "beta": BETA,
        "strength": STRENGTH,
        "candidates": CANDIDATES,
        "value_head_rank": HEAD_RANK,
        "value_spread": SPREAD,
        "looked_at": LOOKED_AT,
        "preferences": PREFERENCES,
        "rounds": options.rounds,
    }


if __name__ == "__main__":
    sys.exit(main())
