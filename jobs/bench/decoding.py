"""The decoding benchmark: ``python jobs/bench/decoding.py --out FILE.json``. See README.md beside this file."""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

DEFAULT_MODEL = "smollm2-135m-instruct"
DEFAULT_SHAPE = "qwen3-8b"
ARMS = ("generate", "unguided", "guided", "rival", "mixed8", "equal8", "mixed8_rival")
_EXTRA = ("ttft", "memory", "llama_server")
_FIRST_TOKEN_SAMPLES = 20


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options of a run."""
    parser = argparse.ArgumentParser(description="Measures how fast mage_ray decodes, beside what people use today.")
    parser.add_argument("--out", type=Path, required=True, help="the results, as JSON")
    parser.add_argument("--model", help=f"a model, its folder, or tiny (default: {DEFAULT_MODEL}; {DEFAULT_SHAPE}'s "
                        "shape with --device)")  # fmt: skip
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 5; 3 with --growth)")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="some arms alone; a wrong name lists them all")
    parser.add_argument("--growth", action="store_true", help="the cost over batch, experts and context instead")
    parser.add_argument("--device", help="the table for a GPU instead, on this device (cuda)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument(
        "--save-experts", type=Path, metavar="FOLDER", help="write the experts as PEFT adapters and stop"
    )
    parser.add_argument("--llama-gguf", type=Path, help="the model as float32 GGUF, for llama-server")
    parser.add_argument("--llama-lora", type=Path, nargs="+", default=[], help="the experts as GGUF, in their order")
    options = parser.parse_args(arguments)
    if options.growth and options.device:
        parser.error("--growth and --device are separate runs")
    if (options.growth or options.device) and options.only:
        parser.error("--only picks arms of the plain benchmark")
    for name in ("rounds", "threads", "prompt_tokens"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    if options.new_tokens < 2:
        parser.error("--new-tokens must be 2 or more")
    known = (*ARMS, *_EXTRA)
    if unknown := set(options.only or ()) - set(known):
        parser.error(f"--only {' '.join(sorted(unknown))}: choose from {' '.join(known)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the results, show them. 1 when a check fails: then nothing is written."""
    options = parse(arguments)
    # For the processes that this one starts, too.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch
    from results import commit, machine, now, show, show_arms, show_bars, write
    from setting import BenchError

    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {
        "date": now(),
        "commit": commit(),
        "machine": machine(options.threads),
        "command": sys.argv if arguments is None else arguments,
    }
    try:
        if options.save_experts:
            return _save_experts(options)
        if options.device:
            results |= _on_device(options)
        elif options.growth:
            results |= _growth(options)
        else:
            results |= _benchmark(options)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write(options.out, results)
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
    print(f"results: {options.out}")
    return 0


def _benchmark(options: argparse.Namespace) -> dict[str, Any]:
    import llama
    from arms import make_arms
    from memory import peaks
    from naive import TOLERANCE, NaiveReference
    from results import bars, checks, first_token_result, memory_result, throughput_ratios
    from rivals import MergedModels
    from setting import EXPERTS, PREFERENCES, Prompts, guided, load, random_experts
    from timing import first_tokens, time_rounds

    from mage_ray.decoding.engine import Engine
    from mage_ray.decoding.runner import RowRunner
    from mage_ray.merging.bank import AdapterBank

    name = options.model or DEFAULT_MODEL
    rounds, prompt_tokens, new_tokens = options.rounds or 5, options.prompt_tokens, options.new_tokens
    only = set(options.only or (*ARMS, *_EXTRA))
    results: dict[str, Any] = {"setting": _setting(name, rounds, options)}
    extra: dict[str, float] = {}
    # First, while this process is small.
    if "memory" in only:
        _say("peak memory, in processes of their own")
        measured = {k: peaks(name, k, new_tokens, prompt_tokens, options.threads) for k in ("unguided", "guided")}
        results["memory"], extra["guided_memory"] = memory_result(measured)

    _say(f"loading {name}")
    reference = load(name)
    experts = random_experts(reference, EXPERTS)
    models = MergedModels(reference, experts)
    rows, length = 8 * len(guided(PREFERENCES[0]).rows), prompt_tokens + new_tokens
    engine = Engine(RowRunner(copy.deepcopy(reference), AdapterBank(experts), rows=rows, length=length), stop=[])
    prompts = Prompts.of(name)
    _say("merging what the rivals run on")
    arms = make_arms(engine, models, new_tokens, (1, 8), only)
    naive = NaiveReference(models)
    timings = time_rounds(arms, rounds, prompts, prompt_tokens, new_tokens, naive, _say) if arms else []

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
            server_timings = time_rounds(theirs, rounds, prompts, prompt_tokens, new_tokens, loose, _say)
        results["llama_server"] = {"arms": [t.as_json() for t in server_timings], "checks": checks(server_timings)}
    else:
        results["llama_server_reason"] = reason
        if "llama_server" in only:
            _say(f"llama-server left out: {reason}")

    if "ttft" in only:
        _say("time to the first token")
        latency = first_token_result(first_tokens(engine, prompts, prompt_tokens, _FIRST_TOKEN_SAMPLES))
        results["first_token"] = latency
        extra["new_preference_ttft"] = latency["new"]["seconds_median"] / latency["seen"]["seconds_median"]

    ratios = throughput_ratios(timings, statistics.median) | extra
    return results | {
        "arms": [timing.as_json() for timing in timings],
        "ratios": ratios,
        "ratios_of_minima": throughput_ratios(timings, min),
        "bars": bars(ratios),
        "checks": {"tolerance_nats": TOLERANCE, "arms": checks(timings)},
    }


def _growth(options: argparse.Namespace) -> dict[str, Any]:
    from growth import curves, plot
    from setting import Prompts, load

    name, rounds = options.model or DEFAULT_MODEL, options.rounds or 3
    measured, notes = curves(load(name), Prompts.of(name), rounds, options.prompt_tokens, options.new_tokens, _say)
    for note in notes:
        _say(note)
    picture = options.out.with_suffix(".png")
    plot(measured, picture)
    _say(f"picture: {picture}")
    return {"setting": _setting(name, rounds, options), "growth": measured, "notes": notes}


def _on_device(options: argparse.Namespace) -> dict[str, Any]:
    import torch
    from accelerator import measure
    from setting import BenchError

    name, rounds = options.model or DEFAULT_SHAPE, options.rounds or 5
    if name not in (DEFAULT_SHAPE, "tiny"):
        raise BenchError(f"--model {name}: with --device one of {DEFAULT_SHAPE}, tiny")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchError(f"--device {options.device}: this torch sees no GPU")
    measured = measure(name, device, rounds, options.prompt_tokens, options.new_tokens, _say)
    return {"setting": _setting(name, rounds, options), **measured}


def _save_experts(options: argparse.Namespace) -> int:
    from setting import EXPERTS, load, random_experts

    from mage_ray.merging.adapter import save_adapter

    for expert in random_experts(load(options.model or DEFAULT_MODEL), EXPERTS):
        save_adapter(expert, options.save_experts / expert.name)
    print(f"experts: {options.save_experts}")
    return 0


def _setting(name: str, rounds: int, options: argparse.Namespace) -> dict[str, Any]:
    from setting import BETA, CANDIDATES, EXPERTS, PREFERENCES, RANK, RELATIVE_DELTA, STRENGTH

    return {
        "model": name,
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
        "preferences": PREFERENCES,
        "rounds": rounds,
    }


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
