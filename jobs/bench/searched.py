"""What is searched: folders that share a trained study's experts, searches in them, and what their records tell."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from setting import BenchError
from trial_process import fresh_trial

from mage_ray.errors import UserError
from mage_ray.fields import one_line
from mage_ray.files import write_atomic
from mage_ray.folder import StudyFolder
from mage_ray.search.recipe import Recipe
from mage_ray.search.trial import read_records
from mage_ray.study import Study

if TYPE_CHECKING:
    from mage_ray.evaluation.summary import Summary

_SHARED = ("experts", "rollouts", "values")


def changed(study: Study, **parts: Mapping[str, Any]) -> Study:
    """The study with some fields of some of its parts in place of its own. Raises UserError where they don't fit it."""
    fields = study.model_dump()
    try:
        return Study.model_validate(fields | {name: {**fields[name], **own} for name, own in parts.items()})
    except ValidationError as error:
        raise one_line(error, Study, "the search benchmark") from None


def sharing(place: Path, study: Study, trained: StudyFolder) -> StudyFolder:
    """A folder for ``study``, which links to the experts, the pool and the value models of a trained one."""
    folder = StudyFolder.create(place, study)
    for part in _SHARED:
        if (trained.path / part).is_dir() and not (folder.path / part).exists():
            (folder.path / part).symlink_to(trained.path / part, target_is_directory=True)
    return folder


@dataclass(frozen=True)
class Searched:
    """A finished search: when it began (Ray was there), in seconds since the epoch, and its records as they ended."""

    began: float
    records: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, began: float, records: Sequence[Mapping[str, Any]]) -> Searched:
        """Raises BenchError for a trial that failed."""
        for record in records:
            if "error" in record:
                raise BenchError(f"trial {record['trial']} failed: {record['error']}")
        return cls(began, sorted(records, key=lambda record: record["ended"]))

    @property
    def tokens(self) -> list[int]:
        """How many had been generated when each trial ended."""
        total, spent = 0, []
        for record in self.records:
            total += record["scores"]["tokens"]
            spent.append(total)
        return spent

    def best(self, tokens: int) -> Mapping[str, Any]:
        """The best setting by hypervolume of those that were known once so many tokens had been generated.

        Raises BenchError where that is none.
        """
        known = [record for record, spent in zip(self.records, self.tokens, strict=True) if spent <= tokens]
        if not known:
            raise BenchError(f"no trial had ended by {tokens} tokens, allowed: searches of more trials")
        return max(known, key=lambda record: record["scores"]["hypervolume"])

    @property
    def seconds_per_trial(self) -> float:
        """From the end of the first trial, which waits for the engines to load, to that of the last one."""
        return (self.records[-1]["ended"] - self.records[0]["ended"]) / (len(self.records) - 1)

    @property
    def seconds_with_start(self) -> float:
        """As ``seconds_per_trial``, from the search's own beginning: the start of engines and Tune is shared by all."""
        return (self.records[-1]["ended"] - self.began) / len(self.records)

    @property
    def overhead(self) -> float:
        """The share of the trials' time in which no engine worked, for trials one at a time; the first is left out.

        A trial's time is from the end of the one before it to its own, so what Tune does between two is in it.
        """
        whole = self.records[-1]["ended"] - self.records[0]["ended"]
        return 1 - sum(record["scores"]["engine_seconds"] for record in self.records[1:]) / whole

    @property
    def overhead_within(self) -> float:
        """The same share of the time between the trials' own beginnings and ends."""
        whole = sum(record["ended"] - record["began"] for record in self.records[1:])
        return 1 - sum(record["scores"]["engine_seconds"] for record in self.records[1:]) / whole

    @property
    def overhead_with_first(self) -> float:
        """The share from the first trial's beginning to the last one's end: the wait for the engines is in it."""
        whole = self.records[-1]["ended"] - min(record["began"] for record in self.records)
        return 1 - sum(record["scores"]["engine_seconds"] for record in self.records) / whole


@dataclass(frozen=True)
class Runs:
    """What a benchmark runs, each in a folder of its own below ``work``.

    What has finished there is read and not run again; what was cut short is begun anew. Ray must be connected.
    """

    trained: StudyFolder
    study: Study
    work: Path
    threads: int

    def claim(self, setting: Mapping[str, Any]) -> None:
        """See that what lies there, if anything, is of the same setting. Raises UserError."""
        path = self.work / "setting.json"
        ours = json.loads(json.dumps(setting))
        if not path.exists():
            write_atomic(path, json.dumps(ours, indent=1) + "\n")
        theirs = json.loads(path.read_text())
        for name in ours:
            if theirs.get(name) != ours[name]:
                raise UserError(f"--work {self.work}: was begun with {name} {theirs.get(name)}, allowed: {ours[name]}")

    def kept(self, name: str, make: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        """What ``make`` gave for a folder called so, now or in an earlier run of the benchmark."""
        place = self.work / name
        done = place / "done.json"
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir(parents=True)
            write_atomic(done, json.dumps(make(place), indent=1) + "\n")
        found: dict[str, Any] = json.loads(done.read_text())
        return found

    def search(self, name: str, **search: Any) -> Searched:
        """A whole search, but for the check of its winner. ``search``: fields of the study's section."""
        found = self.kept(name, lambda place: {"began": self._search(place, search)})
        return Searched.of(found["began"], read_records(StudyFolder(self.work / name)))

    def _search(self, place: Path, search: Mapping[str, Any]) -> float:
        from mage_ray.search import run
        from mage_ray.search.engine import resident_engines
        from mage_ray.search.space import Space

        study = changed(self.study, search=search)
        folder = sharing(place, study, self.trained)
        space = Space(study)
        began = time.time()
        with resident_engines(space, folder) as engines:
            run.run_trials(space, folder, engines)
        Searched.of(began, read_records(folder))
        return began

    def trial(self, name: str, kind: str, recipe: Recipe) -> dict[str, Any]:
        """``fresh_trial`` of a recipe."""

        def run(place: Path) -> dict[str, Any]:
            folder = sharing(place, self.study, self.trained)
            recipe.save(folder.recipe)
            return fresh_trial(kind, folder.path, folder.recipe, self.threads)

        return self.kept(name, run)

    def unseen(self, recipes: Mapping[str, Recipe]) -> Summary:
        """Recipes by their labels on the evaluation's prompts and grid."""
        from mage_ray.evaluation.evaluate import evaluate_cells, method_cells
        from mage_ray.evaluation.summary import summary_of

        study = self.study
        folder = sharing(self.work / "unseen", study, self.trained)
        cells = [
            cell
            for label, recipe in recipes.items()
            for cell in method_cells(recipe.applied(study), folder, {label: recipe.method})
        ]
        samples = evaluate_cells(study, folder, cells)
        return summary_of(study, samples)
