"""Recipes: what a search hands over. One YAML with a method and its constants, and where they come from."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError

from mage_ray.decoding.methods import KNOWN
from mage_ray.errors import FieldError, UserError
from mage_ray.fields import Part, one_line
from mage_ray.files import write_atomic
from mage_ray.specs import GuidanceSpec
from mage_ray.storage.downloads import local_path
from mage_ray.study import Study


class Score(Part):
    """A measure and its interval; nulls where it isn't defined."""

    value: float | None
    low: float | None
    high: float | None


class Provenance(Part):
    """Where a recipe comes from. Scores are by measure, on unseen prompts with intervals of ``confidence``."""

    study: str
    digest: str
    """Of all of the study that its experts depend on."""
    prompts: str
    """What it was chosen on and checked on."""
    algorithm: str
    metrics: list[str]
    trials: int
    """That ended, this one's among them."""
    trial: str
    seed: int
    date: str
    versions: dict[str, str]
    confidence: float
    searched: dict[str, float | None]
    """On the search's own prompts, of which the best of many trials is taken: flattering."""
    unseen: dict[str, Score]
    """On prompts that the search never saw."""
    defaults: dict[str, Score]
    """Of the study's own constants there."""
    gain: dict[str, Score]
    """The difference, over the same resampled prompts."""


class Recipe(Part):
    """A method and its constants: they take the place of a study's ``guidance`` and of its temperature."""

    version: Literal[1] = 1
    method: str
    guidance: GuidanceSpec
    temperature: float = Field(gt=0, allow_inf_nan=False)
    top_p: float = Field(default=1.0, gt=0, le=1)
    provenance: Provenance | None = None

    def applied(self, study: Study) -> Study:
        """The study with these constants. Raises UserError where they don't fit it."""
        if self.method not in KNOWN:
            raise FieldError("recipe.method", self.method, f"one of {', '.join(KNOWN)}")
        if self.provenance is not None and self.provenance.digest != study.digest:
            theirs = self.provenance.study
            raise FieldError("recipe", f"one of study {theirs} ({self.provenance.digest})", f"one of {study.digest}")
        evaluation = study.evaluation.model_copy(update={"temperature": self.temperature, "top_p": self.top_p})
        fields = study.model_dump() | {"guidance": self.guidance.model_dump(), "evaluation": evaluation.model_dump()}
        try:
            return Study.model_validate(fields)
        except ValidationError as error:
            raise one_line(error, Study, "recipe") from None

    def text(self) -> str:
        """As YAML."""
        content = self.model_dump(mode="json", exclude_none=True)
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_atomic(path, self.text())


def own_recipe(study: Study, method: str) -> Recipe:
    """A study's own constants."""
    spec = study.evaluation
    return Recipe(method=method, guidance=study.guidance, temperature=spec.temperature, top_p=spec.top_p)


def load_recipe(path: Path | str) -> Recipe:
    """The recipe in a YAML file, which may be at a URL. Raises UserError, one line, when it is missing or wrong."""
    path = local_path(path)
    try:
        content = yaml.safe_load(path.read_text())
        return Recipe.model_validate(content)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise UserError(f"{path}: cannot be read as a recipe ({reason}), allowed: a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path.name}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise one_line(error, Recipe, path.name) from None
