"""The parts of a study, each with its defaults and what is allowed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from mage_ray.decoding.methods import EXPLICIT, KNOWN, METHODS, PER_PREFERENCE, Baseline
from mage_ray.decoding.plan import Cadence
from mage_ray.errors import FieldError
from mage_ray.evaluation.strategies import STRATEGIES
from mage_ray.fields import Part
from mage_ray.merging.coefficient_map import MAX_DEGREE, CoefficientMap
from mage_ray.merging.coefficients import check_mix, circulant_mix

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]


class ObjectiveSpec(BaseModel):
    """One objective: its type (``mage_ray.objectives``), and that type's own options beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str
    direction: Literal["maximise", "minimise"] | None = None

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class PromptSpec(Part):
    source: str = "builtin"
    """``builtin``, a JSONL file, or a hub dataset such as ``Anthropic/hh-rlhf``."""
    split: str = "train"
    column: str | None = None
    train: Positive = 128
    evaluation: Positive = 32


class SamplingSpec(Part):
    max_new_tokens: Positive = 64
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)


class RolloutSpec(SamplingSpec):
    samples_per_prompt: int = Field(default=8, ge=2)
    prompts_per_shard: Positive = 16
    batch_rows: Positive = 64
    workers: Positive = 1


class LoraSpec(Part):
    rank: Positive = 16
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rank_stabilised: bool = False
    targets: str | list[str] = "all-linear"


class BackboneSpec(Part):
    """A set of experts, one per row of the mix B; no field given means B = I, the experts of Rewarded Soups.

    Of ``betas`` training takes the one that is best after a part of the steps (``training.early``).
    """

    beta: float | None = None
    matrix: list[list[float]] | None = None
    betas: list[float] | None = Field(default=None, min_length=2)

    @property
    def decided(self) -> bool:
        """Whether there is nothing left to choose."""
        return self.betas is None or self.beta is not None

    def mix(self, n: int) -> np.ndarray:
        if not self.decided:
            raise FieldError("betas", self.betas, "a set whose beta has been chosen (mage-ray train does it)")
        if self.matrix is not None:
            B = check_mix(self.matrix)
            if len(B) != n:
                raise FieldError("matrix", self.matrix, f"{n} rows, one for each objective")
            return B
        return np.eye(n) if self.beta is None else circulant_mix(n, self.beta)

    @model_validator(mode="after")
    def _one_of(self) -> BackboneSpec:
        if self.matrix is not None and (self.beta is not None or self.betas is not None):
            raise ValueError("give beta or matrix, not both")
        if self.betas is not None and self.beta is not None and self.beta not in self.betas:
            raise FieldError("beta", self.beta, f"one of betas ({', '.join(map(str, self.betas))})")
        return self


class TrainingSpec(Part):
    method: Literal["dpo", "grpo"] = "dpo"
    backbones: dict[Name, BackboneSpec] = Field(
        default_factory=lambda: {"bone": BackboneSpec(beta=0.7), "soup": BackboneSpec()}, min_length=1
    )
    lora: LoraSpec = LoraSpec()
    steps: Positive = 100
    rounds: Positive = 1
    """How often: the first round trains on the reference's pool, each further one on samples of the expert itself."""
    batch_size: Positive = 8
    """Pairs (DPO) or completions (GRPO) a step, over all workers."""
    learning_rate: float = Field(default=1e-4, gt=0)
    kl_strength: float = Field(default=0.1, ge=0)
    """DPO's and GRPO's own ``beta``: the price of leaving the reference."""
    pairs_per_prompt: Positive = 2
    generations_per_prompt: int = Field(default=4, ge=2)
    """GRPO's group size."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    workers: Positive = 1
    """Ray Train workers for each expert."""
    cpus_per_worker: Positive = 1
    gpus_per_worker: float = Field(default=0, ge=0)
    parallel_experts: Positive = 1
    """How many experts train at once, where the cluster has room."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    checkpoint_every: Positive = 25
    early: float = Field(default=0.2, gt=0, lt=1)
    """The share of the steps after which a set's beta is chosen among its ``betas``, by hypervolume."""


class ValuesSpec(Part):
    """A set of explicit value models, one for each objective: LoRA and a head, trained on the rollout pool's rewards.

    What isn't said here (workers, precision, ZeRO) is as in ``training``.
    """

    target: Literal["final", "td"] = "final"
    """What a prefix should be worth: the finished answer's reward (FUDGE), or TD(lambda)'s return (VAS)."""
    lam: float = Field(default=0.95, ge=0, le=1)
    """lambda of TD(lambda)."""
    head: Literal["scalar", "vocabulary"] = "vocabulary"
    rank: Positive = 32
    """Of the vocabulary head."""
    lora: LoraSpec = LoraSpec()
    steps: Positive = 100
    batch_size: Positive = 16
    """Answers a step, over all workers."""
    learning_rate: float = Field(default=3e-4, gt=0)
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """The share of the prompts whose answers only measure."""
    initialisation: Literal["common", "own"] = "common"
    """Whether all value models start from one LoRA and head, on which their merge rests, or each from its own."""


class BaselineSpec(Part):
    """What only a baseline needs, trained on the rollout pool. What isn't said here is as in ``training``.

    ``morlhf`` and ``modpo`` are a policy for each preference of a grid, ``arm`` an autoregressive reward model for each
    objective (GenARM's).
    """

    kind: Baseline
    grid: int | list[list[float]] | None = None
    """Of the preferences, as in ``evaluation``; None for the one there."""
    steps: Positive | None = None
    learning_rate: float | None = Field(default=None, gt=0)
    kl_strength: float | None = Field(default=None, gt=0)
    """Of a reward model: GenARM's ``beta_r``."""

    @model_validator(mode="after")
    def _grid_of_policies(self) -> BaselineSpec:
        if self.grid is not None and self.kind not in PER_PREFERENCE:
            raise FieldError("grid", self.grid, f"nothing for {self.kind}, which has one model for each objective")
        return self


class RewardSpec(Part):
    """A reward model: LoRA and a head on a language model, trained on preferred answers or on labelled texts.

    What isn't said here (workers, precision, ZeRO) is as in ``training``.
    """

    data: str
    """A file that ends in .jsonl, .jsonl.gz, .csv or .csv.gz, or a hub dataset. Its columns: ``chosen`` and
    ``rejected``, whole dialogues or answers beside a ``prompt``; or, with ``label``, a text and its label."""
    split: str = "train"
    """Of a hub dataset."""
    label: str | None = None
    """The column of the labels, two values, where the data are labelled texts."""
    text: str = "text"
    """The column of the texts."""
    positive: str | None = None
    """The label of the wanted texts; true or 1 unless given."""
    model: str | None = None
    """What it is trained from; the study's model unless given."""
    layers: Positive | None = None
    """The lowest of its layers alone, which makes training and scoring cheaper; None for all."""
    lora: LoraSpec = LoraSpec()
    steps: Positive = 200
    batch_size: Positive = 16
    """Pairs or texts a step, over all workers."""
    learning_rate: float = Field(default=3e-4, gt=0)
    max_length: int = Field(default=512, ge=8)
    """In tokens; longer dialogues lose their beginning."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    """The share of the prompts that only calibrate and measure."""

    @property
    def template(self) -> Literal["hh", "completion"]:
        """How the objective shows it a prompt and a completion."""
        return "hh" if self.label is None else "completion"


class MapSpec(Part):
    """A map from preferences to coefficients by its control points (``merging.coefficient_map``)."""

    degree: int = Field(default=2, ge=1, le=MAX_DEGREE)
    control: list[list[float]]
    """One list of coefficients for each point of the grid that has ``degree + 1`` points on an edge, in its order."""

    def map(self, n: int, field: str) -> CoefficientMap:
        """For n objectives. Raises FieldError naming ``field``."""
        try:
            made = CoefficientMap(self.degree, tuple(map(tuple, self.control)))
        except FieldError as error:
            raise FieldError(f"{field}.{error.field}", error.value, error.allowed) from None
        if len(made.control[0]) != n:
            raise FieldError(f"{field}.control", f"points of {len(made.control[0])}", f"points of {n} coefficients")
        return made


class GuidanceSpec(Part):
    base: Name = "bone"
    """The backbones whose soup is the base model."""
    guide: Name = "soup"
    """The backbones that serve as implicit value models."""
    values: Name | None = None
    """The explicit value models; the first set of ``values`` unless given."""
    head: Literal["scalar", "vocabulary"] | None = None
    """Which of their heads guides; the one that they were trained with unless given. A vocabulary head has both."""
    baselines: list[Name] | None = None
    """The sets of ``baselines`` that methods draw on, the first of each kind; None for all. Each that is there slows
    every row down a little: they share one bank."""
    strength: NotNegative | dict[str, NotNegative] = 1.0
    """One for all, or one for each objective, of which a preference gets the mean that it weighs."""
    value_strength: NotNegative | dict[str, NotNegative] = 8.0
    """Of explicit guides, whose scores are in standard deviations of reward. The default: docs/values.md."""
    candidates: Positive = 50
    """The guide re-ranks this many of the base's most likely tokens."""
    extrapolation: float | dict[str, float] = 0.5
    """alpha of the extrapolated soup, or one for each objective's corner."""
    base_extrapolation: float | dict[str, float] = 0.0
    """As ``extrapolation``, of the base of every other method that has one."""
    base_map: MapSpec | None = None
    """The coefficients of the base's backbones, where they aren't the formula's."""
    guide_map: MapSpec | None = None
    """Those of the guide's."""
    every: Positive = 1
    """The guide runs at the first of every that many tokens."""
    entropy: float = Field(default=0.0, ge=0)
    """The guide runs where the base's entropy is at least that, in nats."""
    speculate: int = Field(default=0, ge=0)
    """The base proposes that many tokens, which the guide checks in one forward."""

    @property
    def cadence(self) -> Cadence:
        return Cadence(self.every, self.entropy, self.speculate)

    @model_validator(mode="after")
    def _one_cadence(self) -> GuidanceSpec:
        _ = self.cadence
        return self


class StrategySpec(Part):
    """Constants of the evaluation's methods that search on top of a plan (``mage_ray.evaluation.strategies``)."""

    method: str = "mage-i-m"
    """Whose base draws the candidates and whose guide ranks them."""
    strength: NotNegative = 0.0
    """At which the guide takes part in drawing; at 0 it only ranks."""
    n: Positive = 8
    """Samples of best-of-n."""
    width: Positive = 2
    """Beams that go on."""
    expansions: Positive = 4
    """Continuations of each."""
    chunk: Positive = 8
    """Tokens of a continuation."""

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in KNOWN:
            raise ValueError(f"one of {', '.join(KNOWN)}")
        return method


class EvaluationSpec(SamplingSpec):
    methods: list[str] = Field(default_factory=lambda: [m for m in METHODS if m not in EXPLICIT], min_length=1)
    grid: int | list[list[float]] | None = None
    """Points along an edge, the preferences themselves, or null for the grids of docs/method.md."""
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    reference_point: float | list[float] = -2.0
    """Of the hypervolume, in normalised rewards (the reference model: mean 0, standard deviation 1)."""
    resamples: Positive = 1000
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Of all intervals."""
    batch_rows: Positive = 96
    workers: Positive = 1

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, seeds: list[int]) -> list[int]:
        if len({*seeds}) < len(seeds):
            raise ValueError("each seed once")
        return seeds

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: list[str]) -> list[str]:
        allowed = [*KNOWN, *STRATEGIES]
        for method in methods:
            if method not in allowed:
                raise ValueError(f"{method!r} is not a method; allowed: {', '.join(allowed)}")
        return methods


class ClusterSpec(Part):
    """Which of a cluster's nodes do a study's work: those that have all of these."""

    accelerator: str | None = None
    """A type of GPU by Ray's name for it: H100, A100-40G …"""
    labels: dict[str, str] = Field(default_factory=dict)
    """What their nodes were started with (``ray start --labels``)."""

    @property
    def selector(self) -> dict[str, str]:
        """The same as Ray's label selector."""
        own = {} if self.accelerator is None else {"ray.io/accelerator-type": self.accelerator}
        return own | self.labels


class AnalysisSpec(Part):
    """What ``mage-ray analyse`` sweeps. Seeds and lengths are those of ``evaluation``."""

    grid: int | list[list[float]] | None = None
    """Of its fronts, as in ``evaluation``; None for the one there."""
    prompts: Positive | None = None
    """How many of the evaluation's prompts its fronts are measured on; None for all."""

    confidence: float = Field(default=0.9, gt=0, lt=1)
    """Of all intervals."""
    answers: Positive = 128
    """How many held-out answers of the pool value models are measured on."""
    segment: int = Field(default=11, ge=3)
    """Points along the segment between two value models."""
    simplex: Positive = 8
    """Random points of the simplex of all value models."""
    scales: list[Annotated[float, Field(gt=0)]] = Field(default=[0.25, 0.5, 1.0, 1.5, 2.0], min_length=1)
    """Factors of the experts' deltas at which the scores of merged and ensembled guides are compared."""
    front_scales: list[Annotated[float, Field(gt=0)]] = Field(default=[0.5, 1.0, 2.0], min_length=1)
    """Those at which their fronts are, which takes far longer."""
    method: Literal["mage-i-m", "mage-i-e", "mage-e-m", "mage-e-e"] = "mage-e-m"
    """Whose constants are swept, by the lists below and over what the study has trained."""
    strengths: list[Annotated[float, Field(ge=0)]] = Field(default=[0.5, 1.0, 2.0, 4.0, 8.0])
    candidates: list[Positive] = Field(default=[5, 20, 50])
