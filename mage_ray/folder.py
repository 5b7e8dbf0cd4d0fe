"""The layout of a study's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

from mage_ray.errors import UserError
from mage_ray.files import write_atomic
from mage_ray.study import FIXED, Study, load_study


class StudyFolder:
    """Where the parts of a study lie. Every job finds here what the jobs before it left.

    study.yaml, betas.json (where training chose some), rollouts/*.parquet and rollouts/normalisation.json,
    experts/<set>-<objective>/ (PEFT adapters), values/<set>-<objective>/ (adapters with value heads),
    baselines/<set>-<preference or objective>/ (adapters), rewards/<name>/ (sequence classifiers),
    evaluation/*.parquet, analysis/, search/, recipe.yaml, comparison/, report/index.html.
    """

    def __init__(self, path: Path | str, shared: Mapping[str, Path] = MappingProxyType({})) -> None:
        self.path = Path(path).absolute()
        self._shared = dict(shared)
        self.study_file = self.path / "study.yaml"
        self.rollouts = self._shared.get("rollouts", self.path / "rollouts")
        self.normalisation = self.rollouts / "normalisation.json"
        self.experts = self.path / "experts"
        self.chosen = self.path / "betas.json"
        self.checkpoints = self.path / "checkpoints"
        self.values = self.path / "values"
        self.baselines = self.path / "baselines"
        self.rewards = self._shared.get("rewards", self.path / "rewards")
        self.evaluation = self.path / "evaluation"
        self.analysis = self.path / "analysis"
        self.report = self.path / "report"
        self.search = self.path / "search"
        self.recipe = self.path / "recipe.yaml"
        self.comparison = self.path / "comparison"

    @property
    def study(self) -> Study:
        """The study that this folder was made for, with what training has chosen since.

        Raises UserError when it is missing or corrupt.
        """
        return load_study(self.study_file).with_betas({name: made["beta"] for name, made in self.choices().items()})

    def choices(self) -> dict[str, dict[str, Any]]:
        """Of backbone sets whose beta was chosen among several: ``beta``, and what it was chosen by."""
        try:
            return dict(json.loads(self.chosen.read_text()))
        except FileNotFoundError:
            return {}
        except ValueError:
            raise UserError(f"{self.chosen}: corrupt; delete it, and the next training chooses again") from None

    def value(self, set: str, objective: str) -> Path:
        """The value model of an objective in a set of value models."""
        return self.values / f"{set}-{objective}"

    def baseline(self, set: str, member: str) -> Path:
        """One of a set of baselines, by its preference's label or its objective (``Study.members``)."""
        return self.baselines / f"{set}-{member}"

    def expert(self, backbone: str, objective: str) -> Path:
        """The adapter of the row of ``backbone``'s mix that belongs to ``objective``."""
        return self.experts / f"{backbone}-{objective}"

    def within(self, place: Path, *shared: Literal["rollouts", "rewards"]) -> StudyFolder:
        """The folder, in ``place`` inside this one, of a study that has these parts in common with this one's."""
        return StudyFolder(place, {part: getattr(self, part) for part in shared})

    def name_of(self, place: Path) -> str:
        """A file's or folder's name here, the same on every node."""
        return place.relative_to(self.path).as_posix()

    @classmethod
    def create(cls, path: Path | str, study: Study) -> StudyFolder:
        """The folder for ``study``, made if it isn't there; as ``claim``."""
        folder = cls(path)
        folder.claim(study)
        return folder

    def claim(self, study: Study) -> None:
        """Make it the folder of ``study``.

        Raises UserError when the folder holds a study whose results this one can't share: only ``guidance``,
        ``evaluation``, ``strategies``, ``analysis``, ``search`` and ``compare`` may differ from what it was made with,
        and ``values``, ``baselines`` and ``rewards`` may gain entries.
        """
        if self.study_file.exists():
            there = load_study(self.study_file)
            for field in FIXED:
                if getattr(there, field) != getattr(study, field):
                    raise UserError(
                        f"{self.path}: its study differs in {field}, allowed: the study that the folder was made "
                        "with, or a new folder"
                    )
        # With its nulls: where a default is something else, they say something.
        text = yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        if not self.study_file.exists() or self.study_file.read_text() != text:
            write_atomic(self.study_file, text)
