"""The arms: a name, a batch of plans, and a function from prompts to tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from rivals import MergedModels, generate, generate_guided
from setting import PREFERENCES, Prompt, guided, unguided

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Request, Sampling


@dataclass(frozen=True)
class Arm:
    """``run`` answers one prompt for each of ``plans`` with the new tokens of each, in order."""

    name: str
    plans: tuple[Plan, ...]
    run: Callable[[Sequence[Prompt]], list[list[int]]]

    @property
    def key(self) -> str:
        """``name_b<batch>``."""
        return f"{self.name}_b{len(self.plans)}"


def ours(name: str, engine: Engine, plans: Sequence[Plan], new_tokens: int) -> Arm:
    """All plans in one batch of the engine, greedily."""
    sampling = Sampling(new_tokens, temperature=0.0)

    def run(prompts: Sequence[Prompt]) -> list[list[int]]:
        requests = [Request(prompt, plan, sampling) for prompt, plan in zip(prompts, plans, strict=True)]
        return [list(generation.ids) for generation in engine.generate(requests)]

    return Arm(name, tuple(plans), run)


def make_arms(
    engine: Engine, models: MergedModels, new_tokens: int, batches: Sequence[int], only: Collection[str]
) -> list[Arm]:
    """The arms named in ``only``. What they need merged is merged here, not in a run.

    One-preference arms all serve ``PREFERENCES[0]``; the mixed ones all eight of them.
    """
    base, steered = unguided(PREFERENCES[0]), guided(PREFERENCES[0])
    mixed = [guided(preference) for preference in PREFERENCES]
    merged = {
        "generate": [base],
        "rival": [steered],
        "mixed8_rival": mixed,
    }
    for name in only:
        for plan in merged.get(name, []):
            for row in plan.rows:
                models.of(row)

    def plain(prompts: Sequence[Prompt]) -> list[list[int]]:
        return generate(models.of(base.rows[0]), prompts, new_tokens)

    def rival(prompts: Sequence[Prompt]) -> list[list[int]]:
        return generate_guided(models, steered, prompts, new_tokens)

    def one_by_one(prompts: Sequence[Prompt]) -> list[list[int]]:
        return [
            generate_guided(models, plan, [prompt], new_tokens)[0] for plan, prompt in zip(mixed, prompts, strict=True)
        ]

    arms = []
    for batch in batches:
        arms += [
            Arm("generate", (base,) * batch, plain),
            ours("unguided", engine, [base] * batch, new_tokens),
            ours("guided", engine, [steered] * batch, new_tokens),
            Arm("rival", (steered,) * batch, rival),
        ]
    arms += [
        ours("mixed8", engine, mixed, new_tokens),
        ours("equal8", engine, [steered] * len(mixed), new_tokens),
        Arm("mixed8_rival", tuple(mixed), one_by_one),
    ]
    return [arm for arm in arms if arm.name in only]
