"""A run: one round of one expert, or one value or reward model, and what the trainers have in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mage_ray.folder import StudyFolder
from mage_ray.specs import LoraSpec, RewardSpec, TrainingSpec, ValuesSpec
from mage_ray.study import Study
from mage_ray.training.pairs import Pair, Sample
from mage_ray.training.reward_data import Row

if TYPE_CHECKING:
    import torch

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Run:
    """One round of one expert, or another model, whole: a worker needs nothing but the model and the objectives."""

    name: str
    study: Study
    home: StudyFolder
    weights: Mapping[str, float]
    """The expert's row of the mix, by the objectives' names."""
    pairs: Sequence[Pair] = ()
    """DPO: the pairs of all steps, in the order of their use."""
    reference: Mapping[Any, float] = field(default_factory=dict)
    """DPO: the reference's log-probability of each sample in ``pairs``."""
    prompts: Sequence[str] = ()
    """GRPO: the prompts of all steps, in the order of their use."""
    normalisation: str = ""
    """GRPO: the JSON of the objectives' Normaliser."""
    start: str | None = None
    """The adapter to start from, for a further round, by its name in ``home``."""
    examples: Sequence[Example] = ()
    """Value models: the answers of all steps, in the order of their use."""
    until: int | None = None
    """After so many steps it pauses; None: after all."""
    values: ValuesSpec | None = None
    """Value models: how they are trained."""
    rows: Sequence[Row] = ()
    """Reward models: what they learn from in all steps, in the order of its use."""
    reward: RewardSpec | None = None
    """Reward models: how they are trained."""
    apart: str = ""
    """Where among the checkpoints its own are, if others of its name are not to be gone on from."""

    @property
    def title(self) -> str:
        """What it is called in errors."""
        kind = "value model" if self.values is not None else "reward model" if self.reward is not None else "expert"
        return f"{kind} {self.name}"

    @property
    def checkpoints(self) -> Path:
        """What its own folder is in."""
        return self.home.checkpoints / self.apart

    @property
    def folder(self) -> Path:
        return self.checkpoints / self.name

    @property
    def metrics(self) -> Path:
        """What its steps have measured, a line of JSON for each."""
        return self.folder / METRICS

    @property
    def needs(self) -> list[Path]:
        """What a worker reads of ``home``."""
        start = [] if self.start is None else [self.home.at(self.start)]
        return start + ([self.home.rewards] if self.prompts else [])

    @property
    def answer_tokens(self) -> int | None:
        """Tokens of the answers that its steps learn from; None where it samples them as it goes."""
        if self.prompts:
            return None
        answers = [sample for pair in self.pairs for sample in (pair.chosen, pair.rejected)]
        answers += [example.sample for example in self.examples]
        return sum(len(sample.ids) for sample in answers)

    @property
    def end(self) -> int:
        """The step after which it stops this time."""
        return self.spec.steps if self.until is None else self.until

    @property
    def spec(self) -> TrainingSpec:
        """How it is trained: the study's ``training``, with what a value or reward model's own part of it says."""
        part = self.values or self.reward
        if part is None:
            return self.study.training
        own = {name: getattr(part, name) for name in ("lora", "steps", "batch_size", "learning_rate")}
        return self.study.training.model_copy(update=own | {"rounds": 1})


@dataclass(frozen=True)
class Example:
    """An answer to a prompt, by its tokens, and its normalised reward."""

    sample: Sample
    reward: float


def lora_config(lora: LoraSpec, task: str = "CAUSAL_LM") -> Any:
    """PEFT's configuration."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT takes any number
        lora_dropout=lora.dropout,
        use_rslora=lora.rank_stabilised,
        target_modules=lora.targets,
        task_type=task,
    )


def learning_rate_factor(step: int, steps: int) -> float:
    """Of the peak, before step ``step`` (from 0): a linear rise over a tenth of the steps, then a cosine to a tenth."""
    rise = max(1, steps // 10)
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


class Continued:
    """Mixed into a trainer that takes up a run after ``done`` of ``steps`` steps: its schedule goes on from there."""

    done: int
    steps: int
    lr_scheduler: Any
    optimizer: Any

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        from torch.optim.lr_scheduler import LambdaLR

        if self.lr_scheduler is None:
            done, steps = self.done, self.steps
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, lambda k: learning_rate_factor(done + k, steps))
            self._created_lr_scheduler = True
        return self.lr_scheduler
