"""A study's search as Tune sees it: the searcher of each algorithm, constraints, loggers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher
from studies import tiny_study

from mage_ray.errors import FieldError
from mage_ray.search import tuning
from mage_ray.search.space import Space
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
