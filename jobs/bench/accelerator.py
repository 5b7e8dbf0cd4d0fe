"""The table for a GPU: a model of Qwen3-8B's shape with random weights in bfloat16. Not yet run on one: README.md.

Imports nothing of mage_ray but merging, decoding, preference, errors and files. Every run ends with its tokens on the
CPU, so the device has finished when the clock is read.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from arms import make_arms
from naive import NaiveReference
from results import checks, throughput_ratios
from rivals import MergedModels
from setting import EXPERTS, PREFERENCES, TINY, Prompts, guided, random_experts, random_model, unguided, without_stops
from timing import joint_steps, time_rounds
from transformers import PreTrainedModel, Qwen3Config

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.runner import RowRunner
from mage_ray.merging.bank import AdapterBank

BATCHES = (1, 32)
RATIOS = {
    f"{mine}_vs_{other}_b{batch}": (f"{mine}_b{batch}", f"{other}_b{batch}")
    for mine, other in (("unguided", "generate"), ("guided", "unguided"), ("guided", "rival"))
    for batch in BATCHES
}


def shape(name: str) -> Qwen3Config:
    """Qwen3-8B's shape, or a tiny one of the same kind."""
    if name == TINY:
        return Qwen3Config(
            vocab_size=160,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=256,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    return Qwen3Config(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )


def measure(
    name: str, device: torch.device, rounds: int, prompt_tokens: int, new_tokens: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Arms at batch 1 and 32, and an unguided step against the time that reading the weights once takes.

    In bfloat16 ties are common and tokens are compared without being refused: ``checks`` tells how they compare.
    """
    say(f"read bandwidth of {device}")
    bandwidth = read_bandwidth(device)
    say("model")
    config = shape(name)
    reference = without_stops(random_model(config, device, torch.bfloat16))
    experts = random_experts(reference, EXPERTS)
    models = MergedModels(reference, experts)
    own = copy.deepcopy(reference)
    rows, length = max(BATCHES) * len(guided(PREFERENCES[0]).rows), prompt_tokens + new_tokens
    engine = Engine(RowRunner(own, AdapterBank(experts), rows=rows, length=length), stop=[])
    prompts = Prompts.random(config.vocab_size)
    only = ("generate", "unguided", "guided", "rival")
    arms = make_arms(engine, models, new_tokens, BATCHES, only)
    timings = time_rounds(arms, rounds, prompts, prompt_tokens, new_tokens, NaiveReference(models, exact=False), say)
    plain = unguided(PREFERENCES[0])
    asked = prompts.take(rounds + 1, prompt_tokens)
    steps = [joint_steps(engine, plain, [prompt], new_tokens)[0] for prompt in asked][1:]
    weights = weight_bytes(reference)
    floor = weights / bandwidth
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "model": {"shape": name, "dtype": "bfloat16", "weights": "random", "config": config.to_diff_dict()},
        "arms": [timing.as_json() for timing in timings],
        "ratios": throughput_ratios(timings, statistics.median, RATIOS),
        "ratios_of_minima": throughput_ratios(timings, min, RATIOS),
        "step": {
            "seconds_median": statistics.median(steps),
            "seconds_min": min(steps),
            "weight_bytes": weights,
            "read_bytes_per_s": bandwidth,
            "floor_seconds": floor,
            "floor_over_step": floor / statistics.median(steps),
        },
        "checks": checks(timings),
    }


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes that a step at batch 1 must read of the model: all but an input embedding that isn't the head, too."""
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    return total if embedding is head else total - embedding.numel() * embedding.element_size()


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second, the best of several sums over a tensor far larger than any cache (8 GiB; 256 MiB on a CPU)."""
    size = 2**33 if device.type == "cuda" else 2**28
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        float(data.sum())
        best = min(best, time.perf_counter() - start)
    del data
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return size / best
