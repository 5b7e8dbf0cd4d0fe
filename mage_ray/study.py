"""Study: the one YAML that describes a project, and the layout of its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mage_ray.decoding.plan import EXPLICIT, METHODS, Cadence
from mage_ray.errors import FieldError, UserError
from mage_ray.files import write_atomic
from mage_ray.merging.coefficients import check_mix, circulant_mix
from mage_ray.preference import Preference, check_preference, preference_grid

Positive = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_]*$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ObjectiveSpec(BaseModel):
    """One objective: its type (``mage_ray.objectives``), and that type's own options beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    type: str
    direction: Literal["maximise", "minimise"] | None = None

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class PromptSpec(_Part):
    source: str = "builtin"
    """``builtin``, a JSONL file, or a hub dataset such as ``Anthropic/hh-rlhf``."""
    split: str = "train"
    column: str | None = None
    train: Positive = 128
    evaluation: Positive = 32


class SamplingSpec(_Part):
    max_new_tokens: Positive = 64
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)


class RolloutSpec(SamplingSpec):
    samples_per_prompt: int = Field(default=8, ge=2)
    prompts_per_shard: Positive = 16
    batch_rows: Positive = 64
    workers: Positive = 1


class LoraSpec(_Part):
    rank: Positive = 16
    alpha: float = Field(default=32, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    rank_stabilised: bool = False
    targets: str | list[str] = "all-linear"


class BackboneSpec(_Part):
    """A set of experts, one per row of the mix B; neither field given means B = I, the experts of Rewarded Soups."""

    beta: float | None = None
    matrix: list[list[float]] | None = None

    def mix(self, n: int) -> np.ndarray:
        if self.matrix is not None:
            B = check_mix(self.matrix)
            if len(B) != n:
                raise FieldError("matrix", self.matrix, f"{n} rows, one for each objective")
            return B
        return np.eye(n) if self.beta is None else circulant_mix(n, self.beta)

    @model_validator(mode="after")
    def _one_of(self) -> BackboneSpec:
        if self.beta is not None and self.matrix is not None:
            raise ValueError("give beta or matrix, not both")
        return self


class TrainingSpec(_Part):
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


class ValuesSpec(_Part):
    """Explicit value models, one for each objective: LoRA and a head, trained on the rollout pool's rewards.

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


class GuidanceSpec(_Part):
    base: Name = "bone"
    """The backbones whose soup is the base model."""
    guide: Name = "soup"
    """The backbones that serve as implicit value models."""
    strength: float = Field(default=1.0, ge=0)
    candidates: Positive = 50
    """The guide re-ranks this many of the base's most likely tokens."""
    extrapolation: float | dict[str, float] = 0.5
    """alpha of the extrapolated soup, or one for each objective's corner."""
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


class EvaluationSpec(SamplingSpec):
    methods: list[str] = Field(default_factory=lambda: [m for m in METHODS if m not in EXPLICIT], min_length=1)
    grid: int | list[list[float]] | None = None
    """Points along an edge, the preferences themselves, or null for the grids of METHOD.md section 6."""
    seeds: list[int] = Field(default_factory=lambda: [0], min_length=1)
    reference_point: float | list[float] = -2.0
    """Of the hypervolume, in normalised rewards (the reference model: mean 0, standard deviation 1)."""
    resamples: Positive = 1000
    batch_rows: Positive = 96
    workers: Positive = 1

    @field_validator("methods")
    @classmethod
    def _known(cls, methods: list[str]) -> list[str]:
        for method in methods:
            if method not in METHODS:
                raise ValueError(f"{method!r} is not a method; allowed: {', '.join(METHODS)}")
        return methods


class Study(_Part):
    """Everything that a job needs to know, apart from where the study folder lies."""

    name: str = "study"
    seed: int = Field(default=0, ge=0)
    model: str = "smollm2-135m-instruct"
    """The embedded model's name, a local folder, or a hub id of a decoder-only model."""
    system: str | None = None
    """The system message of every conversation, in place of the chat template's own."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the weights while decoding."""
    objectives: dict[Name, ObjectiveSpec] = Field(min_length=2)
    prompts: PromptSpec = PromptSpec()
    rollouts: RolloutSpec = RolloutSpec()
    training: TrainingSpec = TrainingSpec()
    values: ValuesSpec | None = None
    """None for a study without explicit value models."""
    guidance: GuidanceSpec = GuidanceSpec()
    evaluation: EvaluationSpec = EvaluationSpec()

    @property
    def objective_names(self) -> list[str]:
        return list(self.objectives)

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        names = self.objective_names
        for backbone, spec in self.training.backbones.items():
            try:
                spec.mix(len(names))
            except FieldError as error:
                raise FieldError(f"training.backbones.{backbone}.{error.field}", error.value, error.allowed) from None
        if "values" in self.training.backbones:
            raise FieldError("training.backbones", "values", "another name: value models go by this one")
        for role in ("base", "guide"):
            value = getattr(self.guidance, role)
            if value not in self.training.backbones:
                raise FieldError(f"guidance.{role}", value, f"one of {', '.join(self.training.backbones)}")
        if isinstance(self.guidance.extrapolation, dict):
            for name in self.guidance.extrapolation:
                if name not in names:
                    raise FieldError(f"guidance.extrapolation.{name}", name, f"one of {', '.join(names)}")
        self.evaluation_grid()
        self.reference_point()
        return self

    def evaluation_grid(self) -> list[Preference]:
        grid = self.evaluation.grid
        if isinstance(grid, list):
            return [check_preference(p, self.objective_names, f"evaluation.grid.{i}") for i, p in enumerate(grid)]
        return preference_grid(len(self.objectives), grid)

    def reference_point(self) -> list[float]:
        point = self.evaluation.reference_point
        n = len(self.objectives)
        if isinstance(point, list) and len(point) != n:
            raise FieldError("evaluation.reference_point", point, f"a number, or {n} of them")
        return list(point) if isinstance(point, list) else [point] * n

    def extrapolation(self) -> list[float]:
        """alpha for each objective's corner."""
        alpha = self.guidance.extrapolation
        return [alpha.get(name, 0.0) if isinstance(alpha, dict) else alpha for name in self.objectives]


def parse_study(text: str, source: str = "study") -> Study:
    """A study from YAML text. Raises UserError, one line that names the field and what is allowed."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{source}: got {type(data).__name__}, allowed: a mapping with the fields of a study")
    try:
        return Study.model_validate(data)
    except ValidationError as error:
        raise _one_line(error, source) from None


def load_study(path: Path | str) -> Study:
    """The study in a YAML file. Raises UserError when it is missing or wrong."""
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{path}: cannot be read as a study ({reason}), allowed: a YAML file") from None
    return parse_study(text, path.name)


def _one_line(error: ValidationError, source: str) -> UserError:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or "study"
    rest = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    value = first["input"]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, FieldError):
        return FieldError(f"{source}: {cause.field}", cause.value, cause.allowed + rest)
    if first["type"] == "extra_forbidden":
        owner = _fields_at(first["loc"][:-1])
        return FieldError(f"{source}: {field}", value, f"fields here: {', '.join(owner)}{rest}")
    if first["type"] == "missing":
        value = "nothing"
    reason = first["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return FieldError(f"{source}: {field}", value, f"{reason}{rest}")


def _fields_at(location: tuple[int | str, ...]) -> list[str]:
    """The fields of the model at a place in the study, to name them in an error."""
    model: type[BaseModel] = Study
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            arguments = [annotation, *getattr(annotation, "__args__", ())]
            found = [a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)]
            model = found[0] if found else model
    return list(model.model_fields)


class StudyFolder:
    """Where the parts of a study lie. Every job finds here what the jobs before it left.

    study.yaml, rollouts/*.parquet and rollouts/normalisation.json, experts/<set>-<objective>/ (PEFT adapters),
    values/<objective>/ (adapters with value heads), evaluation/*.parquet, report/index.html.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        self.study_file = self.path / "study.yaml"
        self.rollouts = self.path / "rollouts"
        self.normalisation = self.rollouts / "normalisation.json"
        self.experts = self.path / "experts"
        self.checkpoints = self.path / "checkpoints"
        self.evaluation = self.path / "evaluation"
        self.report = self.path / "report"

    @property
    def study(self) -> Study:
        """The study that this folder was made for. Raises UserError when it is missing or corrupt."""
        return load_study(self.study_file)

    def value(self, objective: str) -> Path:
        """The value model of an objective."""
        return self.path / "values" / objective

    def expert(self, backbone: str, objective: str) -> Path:
        """The adapter of the row of ``backbone``'s mix that belongs to ``objective``."""
        return self.experts / f"{backbone}-{objective}"

    @classmethod
    def create(cls, path: Path | str, study: Study) -> StudyFolder:
        """The folder for ``study``, made if it isn't there.

        Raises UserError when the folder holds a study whose results this one can't share: only ``guidance`` and
        ``evaluation`` may differ from what the folder was made with.
        """
        folder = cls(path)
        if folder.study_file.exists():
            there = folder.study
            for field in ("seed", "model", "system", "objectives", "prompts", "rollouts", "training"):
                if getattr(there, field) != getattr(study, field):
                    raise UserError(
                        f"{folder.path}: its study differs in {field}, allowed: the study that the folder was made "
                        "with, or a new folder"
                    )
        text = yaml.safe_dump(study.model_dump(mode="json", exclude_none=True), sort_keys=False, allow_unicode=True)
        if not folder.study_file.exists() or folder.study_file.read_text() != text:
            write_atomic(folder.study_file, text)
        return folder
