"""The layout of a study's folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml

from mage_ray.errors import UserError
from mage_ray.files import cache_folder, write_atomic
from mage_ray.storage.copy import Copy
from mage_ray.storage.store import is_url
from mage_ray.study import FIXED, Study, load_study


class StudyFolder:
    """Where the parts of a study lie. Every job finds here what the jobs before it left.

    study.yaml, betas.json (where training chose some), rollouts/*.parquet and rollouts/normalisation.json,
    experts/<set>-<objective>/ (PEFT adapters), values/<set>-<objective>/ (adapters with value heads),
    baselines/<set>-<preference or objective>/ (adapters), rewards/<name>/ (sequence classifiers),
    evaluation/*.parquet, analysis/, search/, recipe.yaml, comparison/, report/index.html.
    """

    def __init__(self, place: Path | str, part: str = "", shared: Mapping[str, str] = MappingProxyType({})) -> None:
        """``place`` is a path, or the URL of a storage that all nodes reach, of which ``path`` is this node's copy.

        ``part``: it is a folder inside that one, and shares some of its parts, by their places there.
        """
        given = str(place).removeprefix("file://")
        self.place = given.rstrip("/") if is_url(given) else str(Path(given).absolute())
        self._copy = Copy(self.place, _copy_of(self.place)) if is_url(given) else None
        # The same for those who rather go on with what is here than wait; made once, since each connects anew.
        self._impatient = Copy(self.place, _copy_of(self.place), patience=0) if is_url(given) else None
        self._root = Path(self.place) if self._copy is None else self._copy.path
        self._part, self._shared = part, dict(shared)
        self.path = self._root / part
        self.study_file = self.path / "study.yaml"
        self.rollouts = self._own_or_shared("rollouts")
        self.normalisation = self.rollouts / "normalisation.json"
        self.experts = self.path / "experts"
        self.chosen = self.path / "betas.json"
        self.checkpoints = self.path / "checkpoints"
        self.values = self.path / "values"
        self.baselines = self.path / "baselines"
        self.rewards = self._own_or_shared("rewards")
        self.evaluation = self.path / "evaluation"
        self.analysis = self.path / "analysis"
        self.report = self.path / "report"
        self.search = self.path / "search"
        self.recipe = self.path / "recipe.yaml"
        self.comparison = self.path / "comparison"

    @property
    def results(self) -> list[Path]:
        """All but the checkpoints."""
        return [
            self.study_file,
            self.chosen,
            self.rollouts,
            self.experts,
            self.values,
            self.baselines,
            self.rewards,
            self.evaluation,
            self.analysis,
            self.report,
            self.search,
            self.recipe,
            self.comparison,
        ]

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

    def _own_or_shared(self, part: str) -> Path:
        return self.at(self._shared[part]) if part in self._shared else self.path / part

    def within(self, place: Path, *shared: Literal["rollouts", "rewards"]) -> StudyFolder:
        """The folder, in ``place`` inside this one, of a study that has these parts in common with this one's."""
        return StudyFolder(
            self.place, self.name_of(place), {part: self.name_of(getattr(self, part)) for part in shared}
        )

    def __reduce__(self) -> Any:
        """To another node it goes by its place: what is a copy here is another one there."""
        return StudyFolder, (self.place, self._part, self._shared)

    def name_of(self, place: Path) -> str:
        """What a file or folder is called on every node, for ``at``."""
        return place.relative_to(self._root).as_posix()

    def at(self, name: str) -> Path:
        """Where the file or folder of that name is on this node."""
        return self._root / name

    def shown(self, place: Path) -> str:
        """A file or folder as users know it: its path, or its URL."""
        return str(place) if self._copy is None else f"{self.place}/{self.name_of(place)}"

    def check(self, writing: bool = True) -> None:
        """Raises UserError, at once, for a storage that can't be reached or, if wanted, mustn't be written to."""
        if self._copy is not None:
            self._copy.store.check(writing)

    def fetch(self, *places: Path, patient: bool = True) -> None:
        """Have on this node what the storage has of these files and folders; not ``patient``: now, or raise.

        Nothing to do where the folder is a path, which all nodes reach; the same is true of ``publish``. Both raise
        UserError.
        """
        copy = self._copy if patient else self._impatient
        if copy is not None and places:
            copy.fetch(*map(self.name_of, places))

    def publish(self, *places: Path) -> None:
        """Have in the storage what was made on this node of these files and folders."""
        if self._copy is not None and places:
            self._copy.publish(*map(self.name_of, places))

    def remove(self, *places: Path) -> None:
        """Delete these files and folders, wherever they are."""
        if self._copy is not None and places:
            self._copy.remove(*map(self.name_of, places))
        for place in places:
            if place.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            else:
                place.unlink(missing_ok=True)

    def for_ray(self, place: Path) -> tuple[Any, str]:
        """A folder as Ray's libraries want the place of their own files: pyarrow's file system, and the path in it.

        No file system where it is a path.
        """
        if self._copy is None:
            return None, str(place)
        from mage_ray.storage.arrow import arrow_files

        files, root = arrow_files(self.place)
        return files, f"{root}/{self.name_of(place)}"

    @classmethod
    def open(cls, place: Path | str) -> StudyFolder:
        """The folder of a trained study, with what answering takes on this node. Raises UserError."""
        folder = cls(place)
        folder.check(writing=False)
        folder.fetch(*folder._answering)
        return folder

    @property
    def _answering(self) -> list[Path]:
        files = [self.study_file, self.chosen, self.normalisation, self.recipe]
        return [*files, self.experts, self.values, self.baselines]

    @classmethod
    def create(cls, path: Path | str, study: Study) -> StudyFolder:
        """The folder for ``study``, made if it isn't there; as ``claim``."""
        folder = cls(path)
        folder.check()
        folder.claim(study)
        return folder

    def claim(self, study: Study) -> None:
        """Make it the folder of ``study``.

        Raises UserError when it holds a study whose results this one can't share: only ``guidance``, ``evaluation``,
        ``strategies``, ``analysis``, ``search``, ``compare`` and ``cluster`` may differ from what it was made with, and
        ``values``, ``baselines`` and ``rewards`` may gain entries.
        """
        self.fetch(self.study_file)
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
            self.publish(self.study_file)


def _copy_of(url: str) -> Path:
    """Where a node has its copy of what is at ``url``."""
    name = f"{url.rpartition('/')[2]}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"
    return cache_folder() / "studies" / name
