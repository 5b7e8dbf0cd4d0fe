"""A step whose guide runs in a process of its own, beside steps of either process's rows alone. One thread each."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from naive import NaiveReference
from results import steps_result
from rivals import MergedModels
from setting import (
    CANDIDATES,
    EXPERTS,
    PREFERENCES,
    RELATIVE_DELTA,
    BenchError,
    Prompt,
    Prompts,
    guided,
    load,
    random_experts,
)
from timing import Steps, joint_steps, time_steps

from mage_ray.decoding.channel import RankChannel
from mage_ray.decoding.engine import Engine
from mage_ray.decoding.gang import Gang
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.remote import RemoteRunner, serve
from mage_ray.decoding.runner import RowRunner
from mage_ray.merging.bank import AdapterBank

BATCHES = (1, 8)
_PATIENCE = timedelta(seconds=300)
"""For the other process to load its model, or to answer."""


def plans() -> dict[str, Plan]:
    """MAGE-I-M with its guide elsewhere, its base alone, and its two other rows alone: guide against reference."""
    steered = guided(PREFERENCES[0])
    base, guide, reference = steered.rows
    return {
        "base": Plan.of([(base, 1.0)]),
        "guide": Plan.of([(guide, 2.0), (reference, -1.0)], CANDIDATES),
        "split": steered.placed(lambda i: min(i, 1)),
    }


@dataclass(frozen=True)
class Share:
    """What either process runs: a model by its name, experts of this strength, and room for so many rows."""

    model: str
    rows: int
    length: int
    relative: float = RELATIVE_DELTA

    def runner(self) -> RowRunner:
        """A fresh one."""
        model = load(self.model)
        experts = random_experts(model, EXPERTS, self.relative)
        return RowRunner(model, AdapterBank(experts), rows=self.rows, length=self.length)


@contextmanager
def gang(own: Share, other: Share) -> Iterator[Gang]:
    """A runner here and one in a spawned process, a gloo group between them; one thread each while the context lasts.

    Raises BenchError when the other process doesn't come up, Lost when it doesn't answer.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mage_ray-") as folder:
        store = f"file://{Path(folder) / 'store'}"
        process = multiprocessing.get_context("spawn").Process(target=_guide, args=(store, other), daemon=True)
        process.start()
        try:
            dist.init_process_group("gloo", init_method=store, rank=0, world_size=2, timeout=_PATIENCE)
            runners = Gang(own.runner(), [RemoteRunner(RankChannel(1, patience=_PATIENCE))])
            yield runners
            runners.close()
            process.join(10)
        except dist.DistError as error:
            raise BenchError(f"split: {' '.join(str(error).split())[:200]}") from None
        finally:
            process.kill()
            process.join()
            if dist.is_initialized():
                dist.destroy_process_group()
            torch.set_num_threads(before)


def _guide(store: str, share: Share) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=store, rank=1, world_size=2)
    serve(share.runner(), RankChannel(0))


def same_tokens(engine: Engine, naive: NaiveReference, asked: Sequence[Prompt], new_tokens: int) -> bool:
    """Whether split and fused rows give the same tokens; where not, both are right and a tie decided.

    Raises BenchError when either's tokens differ from ``naive``'s.
    """
    made = []
    for kind, plan in (("fused", guided(PREFERENCES[0])), ("split", plans()["split"])):
        made.append(joint_steps(engine, plan, asked, new_tokens)[1])
        naive.check(kind, [plan] * len(asked), asked, made[-1], new_tokens)
    return made[0] == made[1]


def split_over_longer(steps: Mapping[str, Steps], statistic: Callable[[Sequence[float]], float]) -> float:
    """The time of a split step over that of the longer one of its two processes' own."""
    seconds = {kind: statistic(own.seconds) for kind, own in steps.items()}
    return seconds["split"] / max(seconds["base"], seconds["guide"])


def measure_split(
    model: str, rounds: int, prompts: Prompts, prompt_tokens: int, new_tokens: int, say: Callable[[str], None]
) -> tuple[dict[str, Any], dict[int, dict[str, Steps]]]:
    """What goes under ``split``, and the steps by their batch. Raises BenchError when tokens are wrong."""
    reference = load(model)
    naive = NaiveReference(MergedModels(reference, random_experts(reference, EXPERTS)))
    share = Share(model, max(BATCHES) * len(guided(PREFERENCES[0]).rows), prompt_tokens + new_tokens)
    result: dict[str, Any] = {"threads": 1, "processes": 2}
    steps = {}
    with gang(share, share) as runners:
        engine = Engine(runners, stop=[])
        for batch in BATCHES:
            same = same_tokens(engine, naive, prompts.take(batch, prompt_tokens), new_tokens)
            steps[batch] = time_steps(engine, plans(), batch, rounds, prompts, prompt_tokens, new_tokens, naive)
            result[f"b{batch}"] = {"tokens_as_fused": same, **steps_result(steps[batch])}
            ratio = split_over_longer(steps[batch], statistics.median)
            say(f"split steps, batch {batch}: {ratio:.3f} of the longer one")
    return result, steps
