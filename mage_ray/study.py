"""Study: the one YAML that describes a project, and the layout of its folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from mage_ray.comparison.spec import CompareSpec
from mage_ray.decoding.methods import PER_PREFERENCE
from mage_ray.errors import FieldError, UserError
from mage_ray.fields import Part, one_line
from mage_ray.preference import Preference, check_preference, preference_grid, preference_label
from mage_ray.search.spec import SearchSpec
from mage_ray.specs import (
    AnalysisSpec,
    BaselineSpec,
    ClusterSpec,
    EvaluationSpec,
    GuidanceSpec,
    Name,
    ObjectiveSpec,
    PromptSpec,
    RewardSpec,
    RolloutSpec,
    StrategySpec,
    TrainingSpec,
    ValuesSpec,
)

FIXED = ("seed", "model", "system", "objectives", "prompts", "rollouts", "training")
"""The fields that a study's folder is made for."""


class Study(Part):
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
    values: dict[Name, ValuesSpec] = Field(default_factory=dict)
    """Sets of explicit value models by their names; none for a study without."""
    baselines: dict[Name, BaselineSpec] = Field(default_factory=dict)
    """Sets of policies and reward models that only baselines need, by their names; none for a study without."""
    rewards: dict[Name, RewardSpec] = Field(default_factory=dict)
    """Reward models to train, by their names, which objectives of type ``reward`` refer to."""
    guidance: GuidanceSpec = GuidanceSpec()
    evaluation: EvaluationSpec = EvaluationSpec()
    strategies: StrategySpec = StrategySpec()
    analysis: AnalysisSpec = AnalysisSpec()
    search: SearchSpec = SearchSpec()
    compare: CompareSpec = CompareSpec()
    cluster: ClusterSpec = ClusterSpec()

    @property
    def digest(self) -> str:
        """Of all that its experts depend on (``FIXED``)."""
        fixed = self.model_dump(mode="json", include=set(FIXED))
        return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def objective_names(self) -> list[str]:
        return list(self.objectives)

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        names = self.objective_names
        for backbone, spec in self.training.backbones.items():
            for one in [spec] if spec.decided else [spec.model_copy(update={"beta": b}) for b in spec.betas or ()]:
                try:
                    one.mix(len(names))
                except FieldError as error:
                    field = f"training.backbones.{backbone}.{error.field}"
                    raise FieldError(field, error.value, error.allowed) from None
        for name in self.values:
            if name in self.training.backbones:
                raise FieldError("values", name, "a name that no set of training.backbones has")
        for name in self.baselines:
            if name in self.training.backbones or name in self.values:
                raise FieldError("baselines", name, "a name that no set of training.backbones or of values has")
            self.baseline_grid(name)
        for i, name in enumerate(self.guidance.baselines or ()):
            if name not in self.baselines:
                allowed = f"one of {', '.join(self.baselines) or 'none: there are none'}"
                raise FieldError(f"guidance.baselines.{i}", name, allowed)
        for name, objective in self.objectives.items():
            own = objective.options.get("model") or name
            if objective.type == "reward" and own not in list(self.rewards):
                known = ", ".join(self.rewards) or "none: there are none"
                raise FieldError(f"objectives.{name}.model", own, f"a name in rewards: {known}")
        self._check_guide()
        for role in ("base", "guide"):
            value = getattr(self.guidance, role)
            if value not in self.training.backbones:
                raise FieldError(f"guidance.{role}", value, f"one of {', '.join(self.training.backbones)}")
        for field in ("strength", "value_strength", "extrapolation", "base_extrapolation"):
            value = getattr(self.guidance, field)
            for name in value if isinstance(value, dict) else ():
                if name not in names:
                    raise FieldError(f"guidance.{field}.{name}", name, f"one of {', '.join(names)}")
        for field in ("base_map", "guide_map"):
            if (given := getattr(self.guidance, field)) is not None:
                given.map(len(names), f"guidance.{field}")
        self.evaluation_grid()
        self._grid("analysis.grid", self.analysis.grid)
        self.search_grid()
        self.validation_grid()
        self.reference_point()
        return self

    def _check_guide(self) -> None:
        chosen, head = self.guidance.values, self.guidance.head
        if chosen is not None and chosen not in self.values:
            raise FieldError("guidance.values", chosen, f"one of {', '.join(self.values) or 'none: there are none'}")
        spec = self.value_spec
        if head == "vocabulary" and spec is not None and spec.head != head:
            raise FieldError("guidance.head", head, f"scalar, the only head of values.{self.value_set}")

    @property
    def value_set(self) -> str | None:
        """The name of the value models that guide; None where the study has none."""
        return self.guidance.values or next(iter(self.values), None)

    @property
    def value_spec(self) -> ValuesSpec | None:
        """How these are trained."""
        return None if self.value_set is None else self.values[self.value_set]

    @property
    def reward_models(self) -> list[str]:
        """Those of ``rewards`` that its objectives are scored by."""
        own = [(spec, name) for name, spec in self.objectives.items() if spec.type == "reward"]
        return list(dict.fromkeys(str(spec.options.get("model") or name) for spec, name in own))

    def evaluation_grid(self) -> list[Preference]:
        return self._grid("evaluation.grid", self.evaluation.grid)

    def baseline_grid(self, name: str) -> list[Preference]:
        """The preferences that a set of baselines has a policy for, each once."""
        spec = self.baselines[name]
        grid = self.evaluation_grid() if spec.grid is None else self._grid(f"baselines.{name}.grid", spec.grid)
        return list({preference_label(preference): preference for preference in grid}.values())

    def members(self, set: str) -> list[str]:
        """What the experts of a set are told apart by: the objectives, or the preferences of a baseline's policies."""
        if set in self.baselines and self.baselines[set].kind in PER_PREFERENCE:
            return [preference_label(preference) for preference in self.baseline_grid(set)]
        return self.objective_names

    def with_betas(self, betas: Mapping[str, float]) -> Study:
        """The same with the beta of these backbone sets decided."""
        sets = {
            name: spec.model_copy(update={"beta": betas[name]}) if name in betas else spec
            for name, spec in self.training.backbones.items()
        }
        return self.model_copy(update={"training": self.training.model_copy(update={"backbones": sets})})

    def search_grid(self) -> list[Preference]:
        """The preferences that a setting is tried at."""
        return self.evaluation_grid() if self.search.grid is None else self._grid("search.grid", self.search.grid)

    def validation_grid(self) -> list[Preference]:
        """The preferences at which a comparison tries settings."""
        return self.evaluation_grid() if self.compare.grid is None else self._grid("compare.grid", self.compare.grid)

    def _grid(self, field: str, grid: int | list[list[float]] | None) -> list[Preference]:
        if isinstance(grid, list):
            return [check_preference(p, self.objective_names, f"{field}.{i}") for i, p in enumerate(grid)]
        return preference_grid(len(self.objectives), grid, field)

    def reference_point(self) -> list[float]:
        point = self.evaluation.reference_point
        n = len(self.objectives)
        if isinstance(point, list) and len(point) != n:
            raise FieldError("evaluation.reference_point", point, f"a number, or {n} of them")
        return list(point) if isinstance(point, list) else [point] * n

    def by_objective(self, value: float | Mapping[str, float]) -> tuple[float, ...]:
        """A constant of ``guidance`` that may be one number or one for each objective; 0 for those left out."""
        return tuple(value.get(name, 0.0) if isinstance(value, Mapping) else value for name in self.objectives)


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
        raise one_line(error, Study, source) from None


def load_study(path: Path | str) -> Study:
    """The study in a YAML file. Raises UserError when it is missing or wrong."""
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{path}: cannot be read as a study ({reason}), allowed: a YAML file") from None
    return parse_study(text, path.name)
