"""A search, whole: trials by Ray Tune on resident engines, the best setting checked on unseen prompts, the recipe."""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mage_ray import objectives
from mage_ray.cluster import Progress
from mage_ray.errors import FieldError, UserError
from mage_ray.files import write_atomic
from mage_ray.folder import StudyFolder
from mage_ray.generator import load_experts
from mage_ray.progress import shown
from mage_ray.search.recipe import Recipe, load_recipe
from mage_ray.search.spec import METRICS
from mage_ray.study import Study
from mage_ray.training.rollouts import load_normaliser, load_objectives, search_prompts

if TYPE_CHECKING:
    from rich.console import Console

    from mage_ray.search.space import Space

_BEGUN = "begun"
"""In search.json, what tells a search from one of the same settings that was forgotten."""
_WAITING: dict[str, float] = {"memory": 64 * 2**20}
"""What a trial takes: the engines have the CPUs, and a trial that asked for none at all would be refused."""
_SNAPSHOT_SECONDS = "1"
"""How often Tune writes down where it stands."""
_LOSSES = 3
"""How often trials whose processes died, again and again, are begun anew."""


def search_study(
    study: Study,
    folder: StudyFolder,
    console: Console | None = None,
    resume: bool = False,
    fresh: bool = False,
    facts: Mapping[str, str] = MappingProxyType({}),
) -> Recipe:
    """Search a trained study's space; write ``recipe.yaml``, which is returned, ``search/`` and a page of the report.

    With ``resume`` a search that was cut short goes on and repeats no trial that has ended; a finished one is only
    read. With ``fresh`` one that is there is forgotten first. Connected to Ray. Raises UserError: a space that can't be
    searched, a folder that has a search already (without ``resume``) or another one (with it), or a search of whose
    trials none ended well.
    """
    from mage_ray.search.engine import resident_engines
    from mage_ray.search.outcome import conclude
    from mage_ray.search.space import Space

    space = Space(study)
    search_prompts(study)
    load_normaliser(folder, study)
    load_experts(folder, study, space.engine_sets)
    for name, scorer in load_objectives(study, folder).items():
        objectives.probe(name, scorer)
    if fresh:
        discard(folder)
    _claim(space, folder, resume)
    # The recipe is written last; one that is there may be another search's.
    best = folder.search / "recipes" / "00.yaml"
    if best.exists() and folder.recipe.exists() and best.read_bytes() == folder.recipe.read_bytes():
        return load_recipe(folder.recipe)
    with resident_engines(space, folder) as engines:
        if not best.exists():
            run_trials(space, folder, engines, console)
        return conclude(space, folder, engines, facts, console)


def _claim(space: Space, folder: StudyFolder, resume: bool) -> None:
    """Write down what this search is, or see that the one that is there is the same. Raises FieldError."""
    study, place = space.study, folder.search / "search.json"
    ours = {
        "study": study.digest,
        "search": study.search.model_dump(mode="json", exclude={"workers", "concurrent", "log_to"}),
        "guidance": study.guidance.model_dump(mode="json"),
        "values": {
            name: study.values[name].model_dump(mode="json") for name in space.engine_sets if name in study.values
        },
        "dtype": study.dtype,
        "grid": [list(mu) for mu in study.search_grid()],
        "reference point": study.reference_point(),
        "evaluation": study.evaluation.model_dump(
            mode="json", include={"max_new_tokens", "temperature", "top_p", "seeds"}
        ),
    }
    if not place.exists():  # with resume, too: there is nothing to go on with
        folder.remove(folder.search / "tune")
        write_atomic(place, json.dumps({**ours, _BEGUN: uuid.uuid4().hex}, indent=1) + "\n")
        folder.publish(place)
        return
    if not resume:
        raise UserError(f"{folder.search}: holds a search already, allowed: --resume to go on with it, or --fresh")
    theirs = json.loads(place.read_text())
    for field, value in ours.items():
        if theirs.get(field) != value:
            raise FieldError(
                "--resume", f"a search of another {field}", f"the study that {folder.search} was begun with"
            )


def discard(folder: StudyFolder) -> None:
    """Forget a search, but for the samples, which are found again by their content."""
    parts = ("tune", "trials", "recipes", "search.json", "history.json")
    folder.remove(*(folder.search / part for part in parts), folder.report / "search.html")


def run_trials(space: Space, folder: StudyFolder, engines: Sequence[Any], console: Console | None = None) -> None:
    """The search's trials alone, those that are missing; their reports are kept (``trial.read_records``).

    ``engines`` as of ``resident_engines``, of the space's sets. Connected to Ray. Raises UserError where none ended
    well.
    """
    # Read by Ray when it is imported, or when a search begins.
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", _SNAPSHOT_SECONDS)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Else Tune takes Ctrl-C for the end of the search, and returns as if it were complete.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    from ray import tune

    from mage_ray.search import tuning
    from mage_ray.search.engine import rung_sizes
    from mage_ray.search.outcome import finished
    from mage_ray.search.saved import recount
    from mage_ray.search.trial import Trials, forget_failures, read_records

    spec = space.study.search
    place = folder.search / "tune"
    loggers = tuning.loggers(space.study, folder.search)
    trials = Trials(
        folder=folder,
        engines=tuple(engines),
        rungs=tuple(rung_sizes(spec.prompts, spec.rungs)),
        objectives=tuple(space.study.objectives),
        grid=tuple(space.study.search_grid()),
        reference_point=tuple(space.study.reference_point()),
    )

    def trial(config: dict[str, Any]) -> None:
        trials.run(config)

    trainable = tune.with_resources(trial, _WAITING)
    forget_failures(folder)
    # What Tune has saved lies on the node that it ran on, perhaps of a search that was forgotten elsewhere.
    claimed = folder.search / "search.json"
    begun = json.loads(claimed.read_text()).get(_BEGUN) if claimed.exists() else None
    saved_by = folder.search / ".saved-by"
    ours = (saved_by.read_text() if saved_by.exists() else None) == begun
    # A search that was given up has no reports left, and Tune takes it for an ended one.
    going_on = ours and read_records(folder) and tune.Tuner.can_restore(str(place)) and tuning.is_readable(space, place)

    def restored() -> tune.Tuner:
        recount(str(place))
        return tune.Tuner.restore(str(place), trainable, resume_errored=True)

    if going_on:
        tuner = restored()
    else:
        # Begun anew, a search proposes what it did, and finds the reports of the trials that have ended.
        folder.remove(place)
        if begun is not None:
            write_atomic(saved_by, begun)
        halving = spec.rungs > 1
        tune_config = tune.TuneConfig(
            metric=spec.metrics[0] if halving else None,
            mode=METRICS[spec.metrics[0]] if halving else None,
            search_alg=tuning.searcher(space),
            scheduler=tuning.scheduler(space.study),
            num_samples=spec.trials,
            max_concurrent_trials=spec.concurrent,
            reuse_actors=True,
        )
        run_config = tune.RunConfig(
            name=place.name,
            storage_path=str(place.parent),
            callbacks=loggers,
            stop=tuning.GivesUp(folder),
            failure_config=tune.FailureConfig(max_failures=1),
            verbose=0,
        )
        tuner = tune.Tuner(trainable, tune_config=tune_config, run_config=run_config)
    with shown(console, "search") as progress, _polled(folder, spec.trials, progress):
        for _ in range(_LOSSES):
            ended = tuner.fit()
            # Those that failed by themselves have said why.
            if not ended.num_errors or len(read_records(folder)) >= len(ended):
                break
            tuner = restored()
    records = read_records(folder)
    if not finished(records):
        reasons = [record["error"] for record in records if "error" in record]
        reason = reasons[0] if reasons else "Tune has started none"
        raise UserError(f"search: none of {len(records)} trials ended well: {reason}")


@contextmanager
def _polled(folder: StudyFolder, trials: int, progress: Progress | None) -> Iterator[None]:
    """Within it, ``progress`` is told how many settings have been tried, from a thread of its own."""
    from mage_ray.search.trial import read_records

    over = threading.Event()

    def poll() -> None:
        told = -1
        while progress is not None:
            with suppress(UserError):  # the trials will say it
                if (tried := min(len(read_records(folder, patient=False)), trials)) != told:
                    progress(tried, trials)
                    told = tried
            if over.wait(1):
                return

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
