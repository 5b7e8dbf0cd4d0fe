"""A study's search as Tune sees it: the searcher of each algorithm, constraints, loggers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from studies import tiny_study

from mage_ray.errors import FieldError
from mage_ray.search import tuning
from mage_ray.search.space import Space
from mage_ray.search.trial import SHARE, share_of
from mage_ray.study import parse_study

SPACE: dict[str, Any] = {
    "strength": {"low": 0, "high": 3},
    "extrapolation": {"low": 0, "high": 1},
    "coefficients": {"of": ["base", "guide"], "degree": 1, "spread": 0.5},
}
ALGORITHMS = ("nsga2", "cmaes", "de", "optuna", "random")


def space(**search: Any) -> Space:
    return Space(parse_study(tiny_study(Path("/nowhere"), search={"space": SPACE, "population": 4, **search})))


def tried(searcher: Searcher, count: int, first: int = 0) -> list[dict[str, Any]]:
    """One trial after the other; the fewer its extrapolation, the better."""
    configs = []
    for n in range(first, first + count):
        config = searcher.suggest(f"t{n}")
        assert isinstance(config, dict)
        configs.append(config)
        searcher.on_trial_complete(f"t{n}", {"hypervolume": -config["extrapolation"], "trial_id": f"t{n}"})
    return configs


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_begins_with_the_defaults_and_keeps_to_the_norm(algorithm: str) -> None:
    within = space(algorithm=algorithm, max_norm=2.6)
    configs = tried(tuning.searcher(within), 14)
    assert configs[0] == within.defaults
    assert all(within.excess(config) <= 0 for config in configs)
    assert len({str(config) for config in configs}) > 10  # differential evolution may propose one again
    # Without the limit some would be over it: it is not kept by chance.
    free = space(algorithm=algorithm)
    assert any(within.excess(config) > 0 for config in tried(tuning.searcher(free), 14))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_searchs_seed_decides_what_is_tried(algorithm: str) -> None:
    one, again, other = (tried(tuning.searcher(space(algorithm=algorithm, seed=s)), 6) for s in (1, 1, 2))
    assert one == again and one != other


@pytest.mark.parametrize("algorithm", ["optuna", "random"])
@pytest.mark.parametrize("cut", [1, 5])
def test_a_saved_search_of_optuna_goes_on(tmp_path: Path, algorithm: str, cut: int) -> None:
    within = space(algorithm=algorithm, max_norm=2.6)
    unbroken = tried(tuning.searcher(within), 9)
    first = tuning.searcher(within)
    assert tried(first, cut) == unbroken[:cut]
    first.save(str(tmp_path / "state"))
    second = tuning.searcher(within)
    second.restore(str(tmp_path / "state"))
    assert tried(second, 9 - cut, cut) == unbroken[cut:]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_norm_that_no_setting_keeps_is_said(algorithm: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_TRIES", 60)
    with pytest.raises(FieldError, match=r"^constraints: got .*60"):
        tried(tuning.searcher(space(algorithm=algorithm, max_norm=1.0)), 1)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_more_trials_are_out_than_may_be_at_once(algorithm: str) -> None:
    searcher = tuning.searcher(space(algorithm=algorithm))
    assert searcher.set_max_concurrency(2)
    assert searcher.suggest("a") and searcher.suggest("b") and searcher.suggest("c") is None
    searcher.on_trial_complete("a", {"hypervolume": 1.0})
    assert searcher.suggest("c")


def test_the_worse_half_stops_at_every_rung() -> None:
    scheduler: Any = tuning.scheduler(space(rungs=4, prompts=8).study)
    scheduler.set_search_properties("hypervolume", "max")
    trials = [SimpleNamespace(trial_id=str(i)) for i in range(8)]
    for trial in trials:
        scheduler.on_trial_add(None, trial)

    def goes_on(trial: SimpleNamespace, rung: int, hypervolume: float) -> bool:
        result = {"hypervolume": hypervolume, SHARE: share_of(rung)}
        return bool(scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE)

    for rung in (1, 2, 3):
        # The best reports first: who is among the better half when it reports goes on.
        left = [trial for i, trial in enumerate(trials) if goes_on(trial, rung, 8.0 - i)]
        assert left[0] is trials[0] and len(left) < len(trials)
        trials = left if len(left) > 1 else trials
    assert not goes_on(trials[0], 4, 9.0)  # it has seen all prompts


def test_a_trial_that_comes_back_reports_at_its_own_rung() -> None:
    """After a resume its first report is of the rung that it had reached, on more prompts than the others'."""
    scheduler: Any = tuning.scheduler(space(rungs=3, prompts=8).study)
    scheduler.set_search_properties("hypervolume", "max")
    one, other = (SimpleNamespace(trial_id=name) for name in "ab")
    for trial in (one, other):
        scheduler.on_trial_add(None, trial)
    scheduler.on_trial_result(None, one, {"hypervolume": 9.0, SHARE: share_of(2)})
    # On fewer prompts nobody has reported yet: 1.0 is the best there.
    result = {"hypervolume": 1.0, SHARE: share_of(1)}
    assert scheduler.on_trial_result(None, other, result) == TrialScheduler.CONTINUE
