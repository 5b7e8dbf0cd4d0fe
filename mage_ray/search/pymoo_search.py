"""A Ray Tune searcher over pymoo: NSGA-II for several metrics, CMA-ES or differential evolution for one."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from ray.tune.result import DEFAULT_METRIC
from ray.tune.search import Searcher
from ray.tune.utils.util import flatten_dict, unflatten_dict, unflattened_lookup

from mage_ray.errors import FieldError, UserError
from mage_ray.files import write_atomic
from mage_ray.search.axes import Axis, axes_of, filled, plain
from mage_ray.search.generations import ALGORITHMS, Generations
from mage_ray.search.saved import agree

logger = logging.getLogger(__name__)

_FORMAT = "mage_ray.PymooSearch/1"


@dataclass
class _Member:
    """One of a generation: ``violation`` is 0 unless it may not run; ``values`` are the metrics' in the user's sign."""

    shares: list[float]
    violation: float
    trial: str | None = None
    done: bool = False
    values: list[float] | None = None


class PymooSearch(Searcher):
    """Searches a space of Tune's by pymoo: NSGA-II for several metrics, CMA-ES or differential evolution for one.

    Every parameter is searched as a share of [0, 1], the quantile of what Tune itself would draw from its domain, and
    options as equal parts of it; for NSGA-II these are variables of pymoo's kind ``Choice`` instead. NSGA-II over
    ranges without steps is pymoo's standard one; else it proposes no setting twice within a population. CMA-ES begins
    at the best of a Latin hypercube. A search ends when its algorithm does: CMA-ES when it has converged, NSGA-II when
    it finds no new setting, differential evolution never.

    Trials run one generation at a time: ``suggest`` gives its members in order, then None until all have reported.
    What breaks a constraint never runs. A trial that fails, or lacks a finite number for a metric, counts as worse than
    all that did not; one that a scheduler stops counts with its last result. Several metrics are given here and left
    out of ``TuneConfig``; a scheduler has its own then.

    A saved search is a log, in JSON; restoring replays it, so that what follows is what would have followed. Members
    whose trials were under way wait for these, by their ids (so a Tuner must not be restored with
    ``resume_unfinished=False``). A search without a space takes the saved one, as far as JSON can hold it. After a
    restore that was refused it proposes nothing but raises the refusal again, as Tune would begin anew.

    Raises ``FieldError`` for what cannot be searched or was saved by another search, ``UserError`` for other files.
    """

    CKPT_FILE_TMPL = "searcher-state-{}.json"

    def __init__(
        self,
        space: Mapping[str, Any] | None = None,
        metric: str | Sequence[str] | None = None,
        mode: str | Sequence[str] | None = None,
        *,
        algorithm: str = "nsga2",
        population: int = 20,
        seed: int = 0,
        constraints: Sequence[Callable[[dict[str, Any]], float]] = (),
        points_to_evaluate: Sequence[dict[str, Any]] = (),
        tries: int = 10_000,
    ) -> None:
        super().__init__()
        if algorithm not in ALGORITHMS:
            raise FieldError("algorithm", algorithm, ", ".join(ALGORITHMS))
        for name, number, least in (("population", population, 4), ("seed", seed, 0), ("tries", tries, 1)):
            if type(number) is not int or not least <= number < 2**32:
                raise FieldError(name, number, f"a whole number from {least} to {2**32 - 1}")
        if len(points_to_evaluate) > population:
            raise FieldError("points_to_evaluate", len(points_to_evaluate), f"at most the population, {population}")
        self._algorithm, self._population, self._seed, self._tries = algorithm, population, seed, tries
        self._constraints, self._points = list(constraints), list(points_to_evaluate)
        self._space: dict[str, Any] | None = None
        self._axes: dict[str, Axis] = {}
        self._given: dict[tuple[float, ...], dict[str, Any]] = {}
        self._log: list[list[Any]] = []
        self._pymoo: Generations | None = None
        self._refusal: UserError | None = None
        self._at_most: float = math.inf
        self._use_metrics(metric, mode)
        if space is not None:
            self._use_space(dict(space))

    def __getstate__(self) -> dict[str, Any]:
        # cma's generators cannot be copied; the log brings them back.
        return {**self.__dict__, "_pymoo": None}

    def set_max_concurrency(self, max_concurrent: int) -> bool:
        # So Tune's limiter leaves it to the search. Else, full once it is restored, it would let no refusal through.
        self._at_most = max_concurrent
        return True

    def set_search_properties(self, metric: Any, mode: Any, config: dict[str, Any], **spec: Any) -> bool:
        for name, here, there in (("metric", self._metric, metric), ("mode", self._mode, mode)):
            if here and there and here != there:
                raise FieldError(f"{name} of TuneConfig", there, f"none, or {here} as given to PymooSearch")
        self._use_metrics(self._metric or metric, self._mode or mode)
        if self._space is not None:
            return False
        self._use_space(config)
        return True

    def _use_metrics(self, metric: str | Sequence[str] | None, mode: str | Sequence[str] | None) -> None:
        metrics, modes = ([given] if isinstance(given, str) else list(given or ()) for given in (metric, mode))
        modes = modes * len(metrics) if metrics and isinstance(mode, str) else modes
        if not set(modes) <= {"min", "max"} or (metrics and modes and len(metrics) != len(modes)):
            raise FieldError("mode", mode, "min or max; of several metrics one for each, or one for all")
        if len(metrics) > 1 and self._algorithm != "nsga2":
            raise FieldError("algorithm", self._algorithm, f"nsga2 for several metrics, {metrics}")
        # Tune reads both, a single one as text.
        self._metric: Any = metrics if len(metrics) > 1 else next(iter(metrics), None)
        self._mode: Any = modes if len(modes) > 1 else next(iter(modes), None)

    def _use_space(self, space: dict[str, Any], axes: dict[str, Axis] | None = None) -> None:
        axes = axes or axes_of(space)
        if self._algorithm == "cmaes" and len(axes) == 1:
            raise FieldError("algorithm", "cmaes", "de or nsga2 for a single parameter")
        self._space, self._axes, self._given = space, axes, {}
        for point in self._points:
            values: dict[str, Any] = {}
            shares = []
            for name, axis in axes.items():
                try:
                    values[name] = unflattened_lookup(name, point)
                    shares.append(axis.share(values[name]))
                except (KeyError, ValueError):
                    raise FieldError(f"points_to_evaluate: {name}", values.get(name, "nothing"), axis.range) from None
            self._given[tuple(shares)] = values
            if self._violation(shares):
                raise FieldError("points_to_evaluate", point, "settings that satisfy every constraint")

    def _config(self, shares: Sequence[float]) -> dict[str, Any]:
        axes = zip(self._axes.items(), shares, strict=True)
        values = self._given.get(tuple(shares)) or {name: axis.value(share) for (name, axis), share in axes}
        return filled(self._space or {}, values)

    def _violation(self, shares: Sequence[float]) -> float:
        config = self._config(shares) if self._constraints else {}
        numbers = [float(constraint(config)) for constraint in self._constraints]
        return sum(min(number, 1e30) if number > 0 else 1e30 for number in numbers if not number <= 0)

    def _begin(self) -> Generations:
        """The algorithm, brought to where the log ends."""
        if self._pymoo is not None:
            return self._pymoo
        if self._space is None:
            raise FieldError("space", None, "a space given to PymooSearch, or the param_space of a Tuner")
        if isinstance(self._mode, str) and self._metric is None:
            self._metric = DEFAULT_METRIC
        if self._metric is None or self._mode is None:
            raise FieldError("metric and mode", f"{self._metric} and {self._mode}", "both, here or in TuneConfig")
        self._metrics: list[str] = [self._metric] if isinstance(self._metric, str) else self._metric
        self._signs = [-1 if mode == "max" else 1 for mode in np.atleast_1d(self._mode)]
        self._members: list[_Member] = []
        self._trials: dict[str, _Member] = {}
        self._results: dict[str, tuple[list[float], list[float]]] = {}
        self._misses = 0
        pymoo = Generations(self._algorithm, self._axes, self._signs, self._population, self._seed)
        for what, trial_id, detail in self._log:
            if what == "ask":
                member = self._propose(pymoo)
                if not isinstance(member, _Member) or not np.allclose(member.shares, detail, rtol=0, atol=1e-6):
                    raise UserError("the saved search proposed other settings: by other constraints, or another pymoo")
            self._note(what, trial_id, detail)
        self._pymoo = pymoo
        return pymoo

    def _free(self) -> _Member | None:
        return next((member for member in self._members if member.trial is None and not member.violation), None)

    def _propose(self, pymoo: Generations) -> _Member | str | None:
        """The next member to run; None while its generation is out, ``FINISHED`` when the algorithm has ended."""
        while (free := self._free()) is None:
            if not all(member.done or member.violation for member in self._members):
                return None
            if self._members:
                # A trial that failed counts as one that breaks a constraint by 1.
                violations = [member.violation or float(member.values is None) for member in self._members]
                pymoo.tell([member.values for member in self._members], violations)
            asked = pymoo.ask(list(self._given))
            self._trials, self._members = {}, [_Member(shares, self._violation(shares)) for shares in asked]
            if not asked:
                return Searcher.FINISHED
            for member in self._members:
                self._misses = self._misses + 1 if member.violation else 0
                if self._misses >= self._tries:
                    if self._results:  # what satisfies them has run out
                        return Searcher.FINISHED
                    raise FieldError("constraints", f"{self._misses} proposals in a row that break them", "wider ones")
        return free

    def _note(self, what: str, trial_id: str, detail: Any) -> None:
        """An entry of the log: "ask" (the next member goes out), "tell" (what it gave) or "lost" (so is its trial)."""
        if what == "ask":
            free = self._free()
            assert free is not None
            free.trial, self._trials[trial_id] = trial_id, free
            return
        member = self._trials[trial_id]
        self._results.pop(trial_id, None)
        if what == "lost":
            self._trials.pop(trial_id).trial = None
        else:
            member.done, member.values = True, detail
            if detail is not None:
                self._results[trial_id] = (member.shares, detail)

    def _add(self, what: str, trial_id: str, detail: Any = None) -> None:
        self._note(what, trial_id, detail)
        self._log.append([what, trial_id, detail])

    def suggest(self, trial_id: str) -> Any:
        if self._refusal is not None:
            raise self._refusal
        pymoo = self._begin()
        if trial_id not in self._trials:
            if len(self.waiting()) >= self._at_most:
                return None
            member = self._propose(pymoo)
            if not isinstance(member, _Member):
                return member
            self._add("ask", trial_id, member.shares)
        return self._config(self._trials[trial_id].shares)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._begin()
        if trial_id not in self._trials:
            logger.warning("trial %s is none of those that are out: its result is left aside", trial_id)
            return
        flat, values = flatten_dict(result or {}), []
        with suppress(KeyError, TypeError, ValueError):
            values = [float(flat[metric]) for metric in self._metrics]
        usable = values and all(map(math.isfinite, values)) and not error
        self._add("tell", trial_id, values if usable else None)

    def waiting(self) -> list[str]:
        """The trials that are out and have not reported."""
        return [name for name, member in self._trials.items() if not member.done] if self._log and self._begin() else []

    def reopen(self, trial_id: str) -> None:
        """Wait for a trial no longer: its setting goes out again, as another trial."""
        if trial_id in self.waiting():
            self._add("lost", trial_id)

    def front(self) -> list[tuple[dict[str, Any], dict[str, float]]]:
        """Settings that have run and whose values no others' dominate, with these; of a single metric the best."""
        results = list(self._results.values()) if self._log and self._begin() else []
        if not results:
            return []
        signed = np.multiply(self._signs, [values for _, values in results])
        best = [results[i] for i in sorted(NonDominatedSorting().do(signed, only_non_dominated_front=True))]
        return [(self._config(shares), dict(zip(self._metrics, values, strict=True))) for shares, values in best]

    def _facts(self) -> dict[str, Any]:
        """What a search that goes on must have in common with the saved one, as JSON keeps it."""
        facts = {name: getattr(self, f"_{name}") for name in ("algorithm", "population", "seed", "metric", "mode")}
        for name, axis in self._axes.items():
            facts[f"parameter {name}"] = {**asdict(axis), "options": [plain(option) for option in axis.options]}
        facts["parameters"] = list(self._axes)
        facts["points_to_evaluate"] = [{n: plain(v) for n, v in point.items()} for point in self._given.values()]
        return facts

    def save(self, checkpoint_path: str) -> None:
        flat = flatten_dict(self._space or {})
        constants = {name: part for name, part in flat.items() if name not in self._axes and plain(part) is part}
        state = {"format": _FORMAT, "facts": self._facts(), "constants": constants, "log": self._log}
        write_atomic(Path(checkpoint_path), json.dumps(state))

    def restore(self, checkpoint_path: str) -> None:
        log, self._pymoo, self._refusal = self._log, None, None
        try:
            saved = json.loads(Path(checkpoint_path).read_text())
            if saved["format"] != _FORMAT:
                raise ValueError(f"{saved['format']} is not {_FORMAT}")
            self._match(saved["facts"], saved["constants"])
            self._log = saved["log"]
            if self._log:
                self._begin()
        except UserError as refusal:
            self._log, self._refusal = log, refusal
            raise
        except (OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            reason = " ".join(f"{checkpoint_path} is no saved search: {type(error).__name__} {error}".split())
            self._log, self._refusal = log, UserError(reason)
            raise self._refusal from None

    def _match(self, saved: dict[str, Any], constants: dict[str, Any]) -> None:
        """Take over what this search has not been given yet; raise ``FieldError`` for what it was given otherwise."""
        self._use_metrics(self._metric or saved["metric"], self._mode or saved["mode"])
        if self._space is None and saved["parameters"]:
            axes = {}
            for name in saved["parameters"]:
                axis = saved[f"parameter {name}"]
                if any(isinstance(option, dict) and "not JSON" in option for option in axis["options"]):
                    raise FieldError(name, "options that JSON cannot hold", "param_space given to Tuner.restore, too")
                axes[name] = Axis(**{**axis, "options": tuple(axis["options"])})
            self._use_space(unflatten_dict({**constants, **axes}), axes)
        mine = json.loads(json.dumps(self._facts()))
        for name in sorted({*mine, *saved}):
            if mine.get(name) != saved.get(name):
                raise FieldError(name, str(mine.get(name)), f"{saved.get(name)}, as in the saved search")

    def restore_from_dir(self, checkpoint_dir: str) -> None:
        """As Tune's, and in agreement with the table of trials that the Tuner has saved beside it.

        Tune saves both at the same time, but a kill while it copies them may leave either older than the other. What
        the table says has ended is told; what it has begun is asked for again, and is the same setting; what it doesn't
        know goes out again as another trial.
        """
        super().restore_from_dir(checkpoint_dir)
        known = {trial_id for _, trial_id, _ in self._log}
        agree(self, checkpoint_dir, set(self.waiting()), known, self.reopen)
