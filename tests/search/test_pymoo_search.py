"""PymooSearch against pymoo's own ``minimize``, Tune's own sampling, brute force, and real Tuners that are killed."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymoo.algorithms.moo.nsga2 import NSGA2, binary_tournament
from pymoo.algorithms.soo.nonconvex.cmaes import CMAES
from pymoo.algorithms.soo.nonconvex.de import DE
from pymoo.core.mixed import MixedVariableDuplicateElimination, MixedVariableMating, MixedVariableSampling
from pymoo.core.problem import ElementwiseProblem, Problem
from pymoo.core.variable import Choice, Real
from pymoo.operators.selection.tournament import TournamentSelection
from pymoo.optimize import minimize
from pymoo.problems import get_problem
from ray import cloudpickle, tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search import ConcurrencyLimiter
from ray.tune.search.sample import Float

from mage_ray.errors import FieldError, UserError
from mage_ray.search.pymoo_search import PymooSearch

Evaluate = Callable[[dict[str, Any]], dict[str, float] | None]


def drive(
    search: Any, evaluate: Evaluate, trials: int | None, shuffle: np.random.Generator | None = None
) -> list[dict[str, Any]]:
    """Run trials until ``trials`` are out (None: until the search ends), all that it gives at a time; their settings.

    ``evaluate`` gives the result, None for a failure; results come back in the order of ``shuffle``.
    """
    configs: list[dict[str, Any]] = []
    while trials is None or len(configs) < trials:
        batch = []
        while trials is None or len(configs) < trials:
            config = search.suggest(f"t{len(configs)}")
            if not isinstance(config, dict):
                break
            batch.append((f"t{len(configs)}", config))
            configs.append(config)
        if not batch:
            assert config == PymooSearch.FINISHED
            return configs
        if shuffle is not None:
            shuffle.shuffle(batch)
        for trial_id, config in batch:
            result = evaluate(config)
            search.on_trial_complete(trial_id, result, error=result is None)
    return configs


def unit(n: int) -> dict[str, Any]:
    """A space whose shares are its values, so that pymoo's own run sees the same numbers."""
    return {f"x{i}": tune.uniform(0.0, 1.0) for i in range(n)}


class Own(Problem):
    """On the unit cube, ``F`` and, if given, one column ``G``, both of rows of X."""

    def __init__(self, n: int, objectives: int, F: Callable[..., Any], G: Callable[..., Any] | None = None) -> None:
        super().__init__(n_var=n, n_obj=objectives, n_ieq_constr=int(G is not None), xl=0.0, xu=1.0)
        self.F, self.G = F, G

    def _evaluate(self, X: np.ndarray, out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        out["F"] = self.F(X)
        if self.G is not None:
            out["G"] = self.G(X)


def rows(configs: Sequence[dict[str, Any]]) -> np.ndarray:
    return np.array([list(config.values()) for config in configs])


def sphere(X: np.ndarray) -> np.ndarray:
    return ((X - 0.3) ** 2).sum(axis=1, keepdims=True)


def rosenbrock(X: np.ndarray) -> np.ndarray:
    X = 4 * X - 2
    return (100 * (X[:, 1:] - X[:, :-1] ** 2) ** 2 + (1 - X[:, :-1]) ** 2).sum(axis=1, keepdims=True)


def pair(X: np.ndarray) -> np.ndarray:
    """Two objectives at odds, each 0 somewhere."""
    return np.column_stack([((X - 0.2) ** 2).sum(axis=1), ((X - 0.8) ** 2).sum(axis=1)])


def evaluator(F: Callable[[np.ndarray], np.ndarray]) -> Evaluate:
    return lambda config: {f"f{i}": float(value) for i, value in enumerate(F(rows([config]))[0])}


# pymoo's own runs, with the same algorithm, seed and number of generations, are the oracle.


@pytest.mark.parametrize("shuffled", [False, True])
@pytest.mark.parametrize("seed", [0, 5])
@pytest.mark.parametrize("name", ["zdt1", "zdt3", "dtlz2"])
def test_nsga2_is_pymoos_own(name: str, seed: int, shuffled: bool) -> None:
    problem = get_problem(name)
    metrics = [f"f{i}" for i in range(problem.n_obj)]
    search = PymooSearch(unit(problem.n_var), metrics, "min", population=20, seed=seed)
    configs = drive(search, evaluator(problem.evaluate), 20 * 12, np.random.default_rng(seed) if shuffled else None)
    own = minimize(problem, NSGA2(pop_size=20), ("n_gen", 12), seed=seed, save_history=True)
    want = np.concatenate([generation.off.get("X") for generation in own.history])
    assert np.array_equal(rows(configs), want)
    # pymoo keeps the front of its population; the front of all that ran may hold more, never worse ones.
    got = {tuple(values[metric] for metric in metrics) for _, values in search.front()}
    assert got >= {tuple(row) for row in own.F} or len(own.F) == 20
    assert not any(all(np.less_equal(theirs, ours)) and tuple(theirs) != ours for theirs in own.F for ours in got)


def test_nsga2_with_choices_is_pymoos_own() -> None:
    def F(x: dict[str, Any]) -> list[float]:
        return [(x["x"] - 0.1 * x["c"]) ** 2 + x["y"], (x["x"] - 0.9) ** 2 + (x["c"] - 3) ** 2 / 9 - x["y"]]

    class Mixed(ElementwiseProblem):
        def _evaluate(self, x: dict[str, Any], out: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            out["F"] = F(x)

    same = MixedVariableDuplicateElimination()
    mating = MixedVariableMating(selection=TournamentSelection(func_comp=binary_tournament), eliminate_duplicates=same)
    own = minimize(
        Mixed(vars={"x": Real(bounds=(0, 1)), "c": Choice(options=range(4)), "y": Real(bounds=(0, 1))}, n_obj=2),
        NSGA2(pop_size=10, sampling=MixedVariableSampling(), mating=mating, eliminate_duplicates=same),
        ("n_gen", 25),
        seed=2,
        save_history=True,
    )
    space = {"x": tune.uniform(0, 1), "c": tune.choice(range(4)), "y": tune.uniform(0, 1)}
    search = PymooSearch(space, ["f0", "f1"], "min", population=10, seed=2)
    configs = drive(search, lambda c: dict(zip(("f0", "f1"), F(c), strict=True)), 250, np.random.default_rng(0))
    assert configs == [{k: x[k] for k in space} for generation in own.history for x in generation.off.get("X")]


@pytest.mark.parametrize("seed", [1, 7])
@pytest.mark.parametrize("F", [sphere, rosenbrock])
@pytest.mark.parametrize("algorithm", ["cmaes", "de"])
def test_cmaes_and_de_are_pymoos_own(algorithm: str, F: Callable[[np.ndarray], np.ndarray], seed: int) -> None:
    theirs = CMAES(pop_size=10) if algorithm == "cmaes" else DE(pop_size=10)
    theirs.n_sample_points = 10
    own = minimize(Own(4, 1, F), theirs, ("n_gen", 40), seed=seed, save_history=True)
    search = PymooSearch(unit(4), "f0", "min", algorithm=algorithm, population=10, seed=seed)
    configs = drive(search, evaluator(F), 400, np.random.default_rng(seed))
    assert np.array_equal(rows(configs), np.concatenate([generation.off.get("X") for generation in own.history]))
    assert search.front()[0][1]["f0"] == own.F[0]


@pytest.mark.parametrize("algorithm", ["nsga2", "de"])
def test_what_breaks_constraints_or_fails_is_infeasible_to_pymoo(algorithm: str) -> None:
    """pymoo is given constraints and failures as a column of its own; the search must propose the same, but those."""
    F = pair if algorithm == "nsga2" else sphere

    def broken(X: np.ndarray) -> np.ndarray:
        return np.maximum(X[:, :1] + X[:, 1:2] - 1.2, 0) + np.maximum(0.3 - X[:, 2:3], 0)

    def fails(X: np.ndarray) -> np.ndarray:
        return (np.floor(7 * X[:, :1]) % 3 == 1) * 1.0

    own = minimize(
        Own(3, F(np.zeros((1, 3))).shape[1], F, lambda X: np.where(broken(X) > 0, broken(X), fails(X))),
        NSGA2(pop_size=12) if algorithm == "nsga2" else DE(pop_size=12),
        ("n_gen", 25),
        seed=3,
        save_history=True,
    )
    want = np.concatenate([generation.off.get("X") for generation in own.history])
    constraints = [lambda c: c["x0"] + c["x1"] - 1.2, lambda c: 0.3 - c["x2"]]
    metrics = ["f0", "f1"] if algorithm == "nsga2" else "f0"
    search = PymooSearch(unit(3), metrics, "min", algorithm=algorithm, population=12, seed=3, constraints=constraints)
    want = want[broken(want)[:, 0] <= 0]
    configs = drive(
        search, lambda c: None if fails(rows([c]))[0, 0] else evaluator(F)(c), len(want), np.random.default_rng(0)
    )
    assert len(want) < 300
    assert np.array_equal(rows(configs), want)


def test_searches_side_by_side_do_not_disturb_each_other_nor_numpy() -> None:
    def make(seed: int) -> PymooSearch:
        return PymooSearch(unit(3), "f0", "min", algorithm="cmaes", population=6, seed=seed)

    def noisy(config: dict[str, Any]) -> dict[str, float] | None:
        np.random.seed(1)
        return evaluator(sphere)(config)

    alone = [drive(make(seed), evaluator(sphere), 60) for seed in (0, 1)]
    first, second = make(0), make(1)
    together: list[list[dict[str, Any]]] = [[], []]
    for generation in range(10):
        for k, search in enumerate((first, second)):
            for i in range(6):
                config = search.suggest(f"{generation}/{i}")
                np.random.random(3)
                together[k].append(config)
            for i in range(6):
                search.on_trial_complete(f"{generation}/{i}", noisy(together[k][-6 + i]))
    assert together == alone and alone[0] != alone[1]
    np.random.seed(4)
    want = np.random.random()
    np.random.seed(4)
    drive(make(0), evaluator(sphere), 12)
    assert np.random.random() == want


# Domains. What Tune itself draws is the oracle.

KINDS: dict[str, Callable[[], Any]] = {
    "uniform": lambda: tune.uniform(-3.0, 5.0),
    "loguniform": lambda: tune.loguniform(1e-5, 1e-1),
    "quniform": lambda: tune.quniform(-0.6, 1.2, 0.3),
    "qloguniform": lambda: tune.qloguniform(0.1, 1.5, 0.1),
    "randint": lambda: tune.randint(-4, 7),
    "lograndint": lambda: tune.lograndint(1, 40),
    "qrandint": lambda: tune.qrandint(-7, 22, 5),
    "qrandint by 1": lambda: tune.qrandint(0, 4, 1),
    "qlograndint": lambda: tune.qlograndint(4, 64, 4),
    "choice": lambda: tune.choice(["a", "b", "c"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_first_settings_are_drawn_as_tune_draws(kind: str) -> None:
    """Two-sample Kolmogorov-Smirnov: beyond 1.95 sqrt(2/n) once in a thousand, and both seeds are fixed."""
    n = 2000
    search = PymooSearch({"x": KINDS[kind]()}, "f", "min", algorithm="de", population=n)
    got = [search.suggest(str(i))["x"] for i in range(n)]
    want = KINDS[kind]().sample(size=n, random_state=7)
    at = sorted(set(want) | set(got))
    assert len(at) > 2000 or set(want) == set(got)
    index = {value: i for i, value in enumerate(at)}
    sums = [np.cumsum(np.bincount([index[v] for v in values], minlength=len(at))) / n for values in (got, want)]
    assert np.abs(sums[0] - sums[1]).max() < 1.95 * math.sqrt(2 / n)
    assert {type(value) for value in got} == {str if kind == "choice" else int if "int" in kind else float}


@st.composite
def domains(draw: st.DrawFn) -> tuple[Any, Callable[[Any], bool]]:
    """A domain of Tune's, and whether a value is one of it."""
    kind = draw(st.sampled_from(["float", "log", "q", "qlog", "int", "logint", "qint", "qlogint", "choice"]))
    if kind in ("float", "log"):
        low = draw(st.floats(1e-8, 1e3) if kind == "log" else st.floats(-1e6, 1e6))
        high = low + draw(st.floats(0, 1e6))
        domain = tune.loguniform(low, high) if kind == "log" else tune.uniform(low, high)
        return domain, lambda v: type(v) is float and low <= v <= high
    if kind in ("q", "qlog"):
        q = draw(st.sampled_from([0.1, 0.25, 0.3, 1e-4, 3.0]))
        first = draw(st.integers(1 if kind == "qlog" else -50, 50))
        last = first + draw(st.integers(0, 60))
        domain = (tune.qloguniform if kind == "qlog" else tune.quniform)(first * q, last * q, q)

        def on_grid(v: Any) -> bool:
            return type(v) is float and first * q <= v <= last * q and math.isclose(v / q, round(v / q), abs_tol=1e-9)

        return domain, on_grid
    if kind == "choice":
        options = draw(st.lists(st.one_of(st.integers(), st.text(), st.none(), st.booleans()), min_size=1, max_size=6))
        return tune.choice(options), lambda v: any(v is option or v == option for option in options)
    low = draw(st.integers(1 if "log" in kind else -1000, 1000))
    high = low + draw(st.integers(1, 500))
    if kind in ("int", "logint"):
        domain = (tune.lograndint if kind == "logint" else tune.randint)(low, high)
        return domain, lambda v: type(v) is int and low <= v < high
    q = draw(st.integers(1, high - low))
    domain = (tune.qlograndint if kind == "qlogint" else tune.qrandint)(low, high, q)
    return domain, lambda v: type(v) is int and low <= v <= high - (q == 1) and v % q == 0


@settings(max_examples=60, deadline=None)
@given(
    st.lists(domains(), min_size=1, max_size=4), st.sampled_from(["nsga2", "cmaes", "de"]), st.integers(0, 2**32 - 1)
)
def test_every_kind_of_domain_gives_legal_values(
    drawn: list[tuple[Any, Callable[[Any], bool]]], algorithm: str, seed: int
) -> None:
    space = {f"p{i}": domain for i, (domain, _) in enumerate(drawn)}
    if algorithm == "cmaes" and len(space) == 1:
        space["more"] = tune.uniform(0, 1)
    search = PymooSearch(space, "f", "max", algorithm=algorithm, population=5, seed=seed)
    rng = np.random.default_rng(seed)
    for config in drive(search, lambda config: {"f": rng.random()}, 15):
        assert config.keys() == space.keys()
        for i, (_, legal) in enumerate(drawn):
            assert legal(config[f"p{i}"]), (space[f"p{i}"], config)


def test_a_mixed_space_is_searched_to_its_optimum() -> None:
    space = {
        "x": tune.uniform(-1, 1),
        "net": {"width": tune.qrandint(8, 64, 8), "kind": tune.choice(["gelu", "relu", "silu"])},
        "lr": tune.loguniform(1e-5, 1e-1),
    }

    def loss(config: dict[str, Any]) -> dict[str, float]:
        net = config["net"]
        return {
            "f": config["x"] ** 2
            + abs(net["width"] - 24) / 8
            + (net["kind"] != "relu")
            + (math.log10(config["lr"]) + 3) ** 2
        }

    for algorithm in ("nsga2", "cmaes", "de"):
        # By chance alone, 600 draws come below 0.05 once in about three searches.
        best = []
        for seed in range(3):
            search = PymooSearch(space, "f", "min", algorithm=algorithm, population=20, seed=seed)
            drive(search, loss, 600)
            best.append(search.front()[0])
        assert sum(values["f"] < 0.05 for _, values in best) >= 2, (algorithm, best)


@pytest.mark.parametrize("seed", range(4))
def test_nsga2_tries_each_setting_of_a_small_space_once_and_ends(seed: int) -> None:
    space = {"a": tune.choice(["u", "v", "w"]), "b": tune.randint(0, 4)}
    points = [{"a": a, "b": 1} for a in ("u", "v", "w", "v")]
    search = PymooSearch(space, ["f", "g"], ["min", "max"], population=12, seed=seed, points_to_evaluate=points)
    configs = drive(search, lambda c: {"f": c["b"], "g": float(c["b"])}, None)
    counts = Counter((c["a"], c["b"]) for c in configs)
    assert max(counts.values()) == 1 and len(counts) == 12
    assert search.suggest("one more") == PymooSearch.FINISHED
    # Every value is as good as any other here.
    assert len(search.front()) == 12


def test_cmaes_ends_when_it_has_converged() -> None:
    search = PymooSearch(unit(2), "f0", "min", algorithm="cmaes", population=8)
    assert 100 < len(drive(search, evaluator(sphere), None)) < 3000
    assert search.front()[0][1]["f0"] < 1e-12


# What a search is given.


def test_nested_spaces_and_constants() -> None:
    class Kept:
        __deepcopy__ = None  # cannot be copied

    kept, empty = Kept(), {}
    space = {
        "a": {"b": {"c": tune.uniform(0, 1), "d": [1, {"e": 2}]}},
        "k": kept,
        "n": None,
        "none": empty,
        "t": "text",
    }
    search = PymooSearch(space, "f", "min")
    config = search.suggest("0")
    assert config["k"] is kept and config["none"] == {} and config["n"] is None and config["t"] == "text"
    assert config["a"]["b"]["d"] == [1, {"e": 2}] and 0 <= config["a"]["b"]["c"] <= 1
    assert config.keys() == space.keys() and config["a"]["b"].keys() == {"c", "d"}
    assert isinstance(space["a"]["b"]["c"], type(tune.uniform(0, 1)))


@pytest.mark.parametrize(
    ("space", "named"),
    [
        ({"a": {"b": tune.grid_search([1, 2])}, "c": tune.uniform(0, 1)}, "a/b: "),
        ({"a": tune.sample_from(lambda config: 1)}, "a: "),
        ({"a": {"eval": "1"}}, "a: "),
        ({"a": tune.randn(0, 1)}, "a: "),
        ({"a": tune.qrandn(0, 1, 0.5)}, "a: "),
        ({"a": [tune.uniform(0, 1)]}, "a/0: "),
        ({"a": Float(None, None)}, "a: "),
        ({"a": tune.choice([])}, "a: "),
        ({"a": tune.randint(3, 3)}, "a: "),
        ({"a": tune.uniform(3, 1)}, "a: "),
        ({"a": tune.qrandint(1, 4, 5)}, "a: "),
        ({"a/b": tune.uniform(0, 1)}, "space: "),
        ({1: tune.uniform(0, 1)}, "space: "),
        ({"a": 3}, "space: "),
        ({}, "space: "),
    ],
)
def test_what_cannot_be_searched_is_refused_by_name(space: dict[str, Any], named: str) -> None:
    with pytest.raises(FieldError, match=f"^{named}"):
        PymooSearch(space, "f", "min")
    with pytest.raises(FieldError, match=f"^{named}"):
        PymooSearch().set_search_properties("f", "min", space)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"algorithm": "pso"}, "algorithm: got pso, allowed: nsga2, cmaes, de"),
        ({"algorithm": "cmaes", "metric": ["f", "g"]}, "algorithm: got cmaes"),
        ({"algorithm": "de", "metric": ["f", "g"]}, "algorithm: got de"),
        ({"algorithm": "cmaes", "space": {"x": tune.uniform(0, 1)}}, "algorithm: got cmaes"),
        ({"mode": "best"}, "mode: got best"),
        ({"metric": ["f", "g"], "mode": ["min"]}, "mode: "),
        ({"metric": ["f", "g"], "mode": ["min", "obs"]}, "mode: "),
        ({"population": 3}, "population: got 3"),
        ({"population": 8.0}, "population: got 8.0"),
        ({"seed": -1}, "seed: got -1"),
        ({"seed": True}, "seed: got True"),
        ({"tries": 0}, "tries: got 0"),
        ({"points_to_evaluate": [{"x0": 0.5}]}, "points_to_evaluate: x1: got nothing"),
        ({"points_to_evaluate": [{"x0": 0.5, "x1": 1.5}]}, "points_to_evaluate: x1: got 1.5, allowed: 0.0 to 1.0"),
        ({"points_to_evaluate": [{"x0": 0.5, "x1": "a"}]}, "points_to_evaluate: x1: got a"),
        ({"points_to_evaluate": [{"x0": 0.5, "x1": 0.5}] * 21}, "points_to_evaluate: got 21"),
        (
            {"points_to_evaluate": [{"x0": 0.5, "x1": 0.5}], "constraints": [lambda c: c["x0"] - 0.4]},
            "points_to_evaluate: got {'x0': 0.5, 'x1': 0.5}",
        ),
    ],
)
def test_what_is_given_wrongly_is_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(FieldError) as error:
        PymooSearch(**{"space": unit(2), "metric": "f", "mode": "min", **given})
    assert str(error.value).startswith(named) and "\n" not in str(error.value)


def test_space_metric_and_mode_come_from_tune() -> None:
    search = PymooSearch()
    with pytest.raises(FieldError, match=r"^space: "):
        search.suggest("0")
    assert search.set_search_properties("loss", "max", {"x": tune.uniform(0, 1), "c": 1}, num_samples=3)
    assert (search.metric, search.mode) == ("loss", "max")
    assert search.suggest("0")["c"] == 1
    assert not search.set_search_properties("loss", "max", {"x": tune.uniform(0, 2)})

    several = PymooSearch(metric=("f", "g"), mode="min")
    assert (several.metric, several.mode) == (["f", "g"], ["min", "min"])
    assert several.set_search_properties(None, None, unit(2))
    with pytest.raises(FieldError, match=r"^metric of TuneConfig: got f, "):
        several.set_search_properties("f", "min", unit(2))

    anonymous = PymooSearch(unit(2), mode="max", population=4)
    drive(anonymous, lambda c: {"_metric": c["x0"]}, 12)
    assert anonymous.metric == "_metric" and anonymous.front()[0][1]["_metric"] > 0.5
    with pytest.raises(FieldError, match=r"^metric and mode: "):
        PymooSearch(unit(2), metric="f").suggest("0")
    with pytest.raises(FieldError, match=r"^metric and mode: "):
        PymooSearch(unit(2), mode=["min", "max"]).suggest("0")


@pytest.mark.parametrize("algorithm", ["nsga2", "cmaes", "de"])
def test_points_to_evaluate_come_first_and_as_they_are(algorithm: str, tmp_path: Path) -> None:
    space = {
        "lr": tune.loguniform(1e-5, 1e-1),
        "net": {"width": tune.qrandint(8, 64, 8), "kind": tune.choice(["gelu", "relu"])},
        "drop": tune.quniform(0.1, 0.7, 0.1),
        "const": "c",
    }
    points = [
        {"lr": 0.0003, "net": {"width": 8, "kind": "relu"}, "drop": 0.3},
        {"lr": 1e-1, "net": {"width": 64, "kind": "gelu"}, "drop": 0.7, "const": "c"},
        {"lr": 1e-5, "net": {"width": 48, "kind": "gelu"}, "drop": 0.1},
    ]
    search = PymooSearch(space, "f", "min", algorithm=algorithm, population=6, points_to_evaluate=points)
    configs = drive(search, lambda c: {"f": abs(math.log(c["lr"] / 0.0003))}, 60)
    assert configs[:3] == [{**point, "const": "c"} for point in points]
    again = PymooSearch(space, "f", "min", algorithm=algorithm, population=6, points_to_evaluate=points)
    assert [again.suggest(str(i)) for i in range(6)] == configs[:6] and again.suggest("6") is None
    # Where several shares stand for a value, a point lies in their middle, and not where rounding decides.
    again.save(str(tmp_path / "saved"))
    shares = json.loads((tmp_path / "saved").read_text())["log"][0][2]
    assert shares[1:3] == pytest.approx([0.5 / 8, 0.75])
    assert search.front()[0] == (configs[0], {"f": 0.0})
    assert len({c["lr"] for c in configs}) > 6


# Constraints and failures.


@pytest.mark.parametrize("algorithm", ["nsga2", "cmaes", "de"])
def test_nothing_that_breaks_a_constraint_is_suggested(algorithm: str) -> None:
    """A twentieth of the square is left, and the best is on its edge: at (0.75, 0.75), 0.405 from (0.3, 0.3)."""
    constraints = [lambda c: 1.5 - c["x0"] - c["x1"], lambda c: -math.inf]
    search = PymooSearch(unit(2), "f0", "min", algorithm=algorithm, constraints=constraints, tries=150)
    configs = drive(search, evaluator(sphere), 400)
    assert all(c["x0"] + c["x1"] >= 1.5 for c in configs)
    assert search.front()[0][1]["f0"] == pytest.approx(2 * 0.45**2, rel=0.01)


@pytest.mark.parametrize("algorithm", ["nsga2", "cmaes", "de"])
def test_how_far_constraints_are_broken_leads_to_where_they_are_not(algorithm: str) -> None:
    """Four of a million settings satisfy it; uniform draws find none in 3000 but once in eighty searches."""
    search = PymooSearch(
        unit(4), "f0", "min", algorithm=algorithm, constraints=[lambda c: 3.9 - sum(c.values())], tries=3000
    )
    assert sum(search.suggest("0").values()) >= 3.9


@pytest.mark.parametrize("algorithm", ["nsga2", "cmaes", "de"])
def test_constraints_that_leave_nothing_are_reported(algorithm: str) -> None:
    for number in (1.0, math.nan, math.inf, 1e-300):
        search = PymooSearch(unit(2), "f0", "min", algorithm=algorithm, constraints=[lambda c, n=number: n], tries=300)
        with pytest.raises(FieldError, match=r"^constraints: got 300 proposals in a row that break them"):
            search.suggest("0")


def test_constraints_see_settings_as_trials_do() -> None:
    space = {"net": {"width": tune.randint(1, 9), "kind": tune.choice(["a", "b"])}, "limit": 4}
    seen: list[tuple[int, str]] = []
    search = PymooSearch(
        space,
        "f",
        "min",
        population=4,
        tries=60,
        constraints=[lambda c: c["net"]["width"] - c["limit"], lambda c: c["net"]["kind"] != "a"],
    )
    # Four settings are left; they all go out, and then the search has ended.
    drive(search, lambda c: seen.append((c["net"]["width"], c["net"]["kind"])) or {"f": 0.0}, None)
    assert sorted(seen) == [(width, "a") for width in (1, 2, 3, 4)]


@pytest.mark.parametrize("algorithm", ["nsga2", "cmaes", "de"])
def test_failures_do_not_stop_a_search(algorithm: str) -> None:
    """The first three generations fail to a man, then a third of all trials, each in another way."""
    rng = np.random.default_rng(0)
    calls = 0

    def evaluate(config: dict[str, Any]) -> dict[str, Any] | None:
        nonlocal calls
        calls += 1
        if calls > 30 and rng.random() > 1 / 3:
            return evaluator(sphere)(config)
        bad: list[Any] = [None, {}, {"other": 1.0}, {"f0": math.nan}, {"f0": -math.inf}, {"f0": "text"}, {"f0": None}]
        return bad[calls % len(bad)]

    search = PymooSearch(unit(3), "f0", "min", algorithm=algorithm, population=10)
    configs = drive(search, evaluate, 400)
    assert len(configs) == 400
    assert search.front()[0][1]["f0"] < 0.01


def test_an_error_counts_more_than_its_result_and_results_may_be_nested() -> None:
    search = PymooSearch(unit(2), "eval/loss", "min", population=4)
    for i in range(4):
        search.suggest(str(i))
    search.on_trial_complete("0", {"eval": {"loss": 1.0}})
    search.on_trial_complete("1", {"eval/loss": 0.5}, error=True)
    search.on_trial_complete("2")
    search.on_trial_complete("3", {"eval/loss": np.float32(2.0)})
    assert [values for _, values in search.front()] == [{"eval/loss": 1.0}]


def test_front_is_what_nothing_dominates_in_the_users_sign() -> None:
    def scores(config: dict[str, Any]) -> dict[str, float] | None:
        x, y = config["x0"], config["x1"]
        return None if x < 0.1 else {"gain": x * (2 - y), "cost": x**2 + y, "note": 1.0}

    search = PymooSearch(unit(2), ["gain", "cost"], ["max", "min"], population=10, seed=2)
    assert search.front() == []
    seen: list[tuple[float, float]] = []

    def noted(config: dict[str, Any]) -> dict[str, float] | None:
        result = scores(config)
        if result:
            seen.append((result["gain"], result["cost"]))
        return result

    drive(search, noted, 75)
    want = {a for a in seen if not any(b[0] >= a[0] and b[1] <= a[1] and b != a for b in seen)}
    got = search.front()
    assert {(values["gain"], values["cost"]) for _, values in got} == want and 3 < len(want) < len(seen)
    assert all(scores(config) == {**values, "note": 1.0} for config, values in got)
    assert max(gain for gain, _ in want) > 1.5


# What reports what and when.


def test_a_generation_waits_for_all_its_reports() -> None:
    search = PymooSearch(unit(2), "f0", "min", population=4)
    configs = [search.suggest(str(i)) for i in range(4)]
    assert search.suggest("2") == configs[2]
    for i in (2, 0, 3):
        assert search.suggest("next") is None and str(i) in search.waiting()
        search.on_trial_complete(str(i), {"f0": float(i) if i != 2 else -4.0})
    assert search.front() == [(configs[2], {"f0": -4.0})]
    search.on_trial_complete("unknown", {"f0": -1.0})
    assert search.suggest("next") is None and search.waiting() == ["1"]
    # Until its generation is over, a trial may report again, as one that ran again does.
    search.on_trial_complete("3", {"f0": -3.0})
    search.on_trial_complete("2", error=True)
    search.on_trial_complete("1", {"f0": 1.0})
    assert isinstance(search.suggest("next"), dict) and search.waiting() == ["next"]
    search.on_trial_complete("0", {"f0": -9.0})
    assert search.front() == [(configs[3], {"f0": -3.0})]


def test_a_reopened_setting_goes_out_again() -> None:
    search = PymooSearch(unit(2), "f0", "min", population=4)
    configs = [search.suggest(str(i)) for i in range(4)]
    search.reopen("2")
    assert search.suggest("again") == configs[2]
    assert search.waiting() == ["0", "1", "3", "again"]
    search.on_trial_complete("2", {"f0": -1.0})
    search.on_trial_complete("0", {"f0": 1.0})
    search.reopen("0")
    assert search.waiting() == ["1", "3", "again"] and search.front() == [(configs[0], {"f0": 1.0})]


@pytest.mark.parametrize("behind", range(1, 9))
@pytest.mark.parametrize("which", ["searcher", "table"])
def test_a_searcher_and_a_table_of_trials_that_disagree_go_on_as_one(tmp_path: Path, which: str, behind: int) -> None:
    """A kill between the two leaves one some events older: asked for (a trial begins) or told (it ends)."""
    unbroken = drive(PymooSearch(unit(2), "f0", "min", population=4, seed=3), evaluator(sphere), 24)

    def events(search: PymooSearch, until: int) -> dict[str, dict[str, Any]]:
        """Two trials at a time; the table of trials after so many events."""
        table: dict[str, dict[str, Any]] = {}
        for _ in range(until):
            running = [name for name, row in table.items() if row["status"] == "RUNNING"]
            config = search.suggest(f"t{len(table)}") if len(running) < 2 else None
            if isinstance(config, dict):
                table[f"t{len(table)}"] = {"config": config, "status": "RUNNING", "result": None}
            else:
                done = running[0]
                result = evaluator(sphere)(table[done]["config"])
                table[done] |= {"status": "TERMINATED", "result": result}
                search.on_trial_complete(done, result)
        return table

    last = 20
    searched, tabled = (last - behind, last) if which == "searcher" else (last, last - behind)
    older = PymooSearch(unit(2), "f0", "min", population=4, seed=3)
    events(older, searched)
    older.save(str(tmp_path / "searcher-state-1.json"))
    table = events(PymooSearch(unit(2), "f0", "min", population=4, seed=3), tabled)
    rows = [
        [json.dumps({"trial_id": name, **row}), json.dumps({"last_result": row["result"] or {}})]
        for name, row in table.items()
    ]
    (tmp_path / "experiment_state-1.json").write_text(json.dumps({"trial_data": rows}))

    search = PymooSearch(unit(2), "f0", "min", population=4, seed=3)
    search.restore_from_dir(str(tmp_path))
    running = [name for name, row in table.items() if row["status"] == "RUNNING"]
    # An older table runs again what the searcher has a result of.
    assert set(search.waiting()) <= set(running)
    assert which == "table" or len(search.waiting()) == len(running)
    for name in running:
        search.on_trial_complete(name, evaluator(sphere)(table[name]["config"]))
    left = 16 - len(table)
    ours = [row["config"] for row in table.values()]
    for n in range(left):
        config = search.suggest(f"new{n}")
        ours.append(config)
        search.on_trial_complete(f"new{n}", evaluator(sphere)(config))
    key = lambda config: sorted(config.items())  # noqa: E731
    ours = sorted(map(key, ours))
    # No setting twice, and none that the unbroken search would not have tried.
    assert all(one != other for one, other in pairwise(ours))
    if which == "searcher":
        assert ours == sorted(map(key, unbroken[:16]))
    else:
        assert all(one in map(key, unbroken) for one in ours)


def test_in_a_concurrency_limiter() -> None:
    plain = drive(PymooSearch(unit(2), "f0", "min", population=5), evaluator(sphere), 20)
    search = PymooSearch(unit(2), "f0", "min", population=5)
    limited = ConcurrencyLimiter(search, max_concurrent=2)
    assert isinstance(limited.suggest("t0"), dict) and isinstance(limited.suggest("t1"), dict)
    assert limited.suggest("t2") is None
    limited.on_trial_complete("t0", {"f0": 1.0})
    assert isinstance(limited.suggest("t2"), dict) and limited.suggest("t3") is None
    again = ConcurrencyLimiter(PymooSearch(unit(2), "f0", "min", population=5), max_concurrent=2)
    assert drive(again, evaluator(sphere), 20) == plain


# Saving and restoring.


SPACE = {
    "x": tune.uniform(-1, 1),
    "net": {"width": tune.qrandint(8, 64, 8), "kind": tune.choice(["gelu", "relu", "silu"])},
    "lr": tune.loguniform(1e-5, 1e-1),
    "const": {"path": "/data"},
}
GIVEN: dict[str, dict[str, Any]] = {
    "real": {"space": unit(3), "metric": ["f0", "f1"], "mode": ["min", "max"]},
    "mixed": {"space": SPACE, "metric": ["f0", "f1"], "mode": "min", "seed": 9},
    "cmaes": {"space": unit(3), "metric": "f0", "mode": "max", "algorithm": "cmaes", "seed": 0},
    "de": {"space": SPACE, "metric": "f0", "mode": "min", "algorithm": "de"},
    "constrained": {
        "space": SPACE,
        "metric": "f0",
        "mode": "min",
        "algorithm": "cmaes",
        "constraints": [lambda c: c["x"] - 0.7],
        "points_to_evaluate": [{"x": 0.1, "net": {"width": 8, "kind": "relu"}, "lr": 3e-4}],
    },
}


def make(case: str, **other: Any) -> PymooSearch:
    return PymooSearch(**{"population": 5, **GIVEN[case], **other})


def score(config: dict[str, Any]) -> dict[str, float] | None:
    x = config.get("x", config.get("x0"))
    return None if 0.2 < x < 0.3 else {"f0": x**2, "f1": math.sin(9 * x)}


def traced(case: str, steps: int) -> list[tuple[str, Any]]:
    """What an unbroken search was asked and told, with its answers: reports come in a random order in between."""
    search, rng = make(case), np.random.default_rng(3)
    trace: list[tuple[str, Any]] = []
    out: dict[str, Any] = {}
    for step in range(steps):
        config = search.suggest(f"t{step}") if rng.random() < 0.6 or not out else None
        if config is None:
            trial_id = list(out)[rng.integers(len(out))]
            trace.append((trial_id, score(out.pop(trial_id))))
            search.on_trial_complete(*trace[-1], error=trace[-1][1] is None)
        else:
            trace.append((f"t{step}", config))
            out[f"t{step}"] = config
    return trace


def replay(search: PymooSearch, trace: Sequence[tuple[str, Any]], out: set[str]) -> None:
    """Ask and tell as in the trace; every answer must be the trace's. ``out`` are the trials under way."""
    for trial_id, what in trace:
        if trial_id in out:
            search.on_trial_complete(trial_id, what, error=what is None)
            out.discard(trial_id)
        else:
            assert search.suggest(trial_id) == what
            out.add(trial_id)


@pytest.mark.parametrize("case", GIVEN)
def test_a_restored_search_goes_on_as_the_unbroken_one_wherever_it_was_cut(case: str, tmp_path: Path) -> None:
    trace = traced(case, 48)
    whole = make(case)
    replay(whole, trace, set())
    # The last generation was proposed from reports of at least two that had been complete.
    assert sum(what is None or "f0" in what for _, what in trace) > 15
    file = tmp_path / "search.json"
    first = make(case)
    out: set[str] = set()
    for cut in range(len(trace) + 1):
        first.save(str(file))
        copies = [make(case)]
        copies[0].restore(str(file))
        if cut % 8 == 0:
            copies += [copy.deepcopy(first), cloudpickle.loads(cloudpickle.dumps(first))]
        for search in copies:
            np.random.seed(cut)
            assert set(search.waiting()) == out
            replay(search, trace[cut:], set(out))
            assert search.front() == whole.front()
        replay(first, trace[cut : cut + 1], out)
    assert os.listdir(tmp_path) == ["search.json"]


def test_saved_in_between_is_the_file_of_before_or_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "search.json"
    search = make("real")
    search.suggest("0")
    search.save(str(file))
    before = file.read_text()
    search.suggest("1")
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("killed")))
    with pytest.raises(OSError, match="killed"):
        search.save(str(file))
    assert file.read_text() == before
    monkeypatch.undo()
    search.save(str(file))
    assert json.loads(file.read_text())["log"][:1] == json.loads(before)["log"]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"space": {**SPACE, "x": tune.uniform(-1, 2)}}, "parameter x: "),
        ({"space": {**SPACE, "y": tune.uniform(-1, 2)}}, "parameter y: "),
        ({"space": {k: v for k, v in SPACE.items() if k != "lr"}}, "parameter lr: got None"),
        ({"space": dict(reversed(SPACE.items()))}, "parameters: "),
        ({"space": {**SPACE, "x": tune.quniform(-1, 1, 0.5)}}, "parameter x: "),
        ({"seed": 10}, "seed: got 10, allowed: 9, as in the saved search"),
        ({"population": 6}, "population: got 6, allowed: 5"),
        ({"metric": ["f0", "f2"]}, "metric: "),
        ({"mode": ["min", "max"]}, "mode: "),
        ({"algorithm": "de", "metric": "f0"}, "algorithm: got de, allowed: nsga2"),
        ({"points_to_evaluate": [{"x": 0.1, "net": {"width": 8, "kind": "relu"}, "lr": 3e-4}]}, "points_to_evaluate: "),
    ],
)
def test_another_search_does_not_restore(other: dict[str, Any], named: str, tmp_path: Path) -> None:
    search = make("mixed")
    drive(search, score, 12)
    search.save(str(tmp_path / "search"))
    stranger = make("mixed", **other)
    with pytest.raises(FieldError) as error:
        stranger.restore(str(tmp_path / "search"))
    assert str(error.value).startswith(named) and "\n" not in str(error.value)
    # Tune only logs that, and would begin anew.
    with pytest.raises(FieldError) as again:
        stranger.suggest("0")
    assert str(again.value) == str(error.value)


def test_other_constraints_do_not_restore(tmp_path: Path) -> None:
    search = make("mixed")
    drive(search, score, 12)
    search.save(str(tmp_path / "search"))
    with pytest.raises(UserError, match=r"^the saved search proposed other settings"):
        make("mixed", constraints=[lambda c: c["x"]]).restore(str(tmp_path / "search"))


def test_a_file_that_is_no_saved_search_is_refused_in_a_line(tmp_path: Path) -> None:
    search = make("mixed")
    drive(search, score, 12)
    good = tmp_path / "good"
    search.save(str(good))
    whole = json.loads(good.read_text())
    log = whole["log"]
    bad: list[Any] = [
        "",
        "{",
        good.read_text()[:-9],
        "[]",
        "3",
        "null",
        b"\x80\x04\x95pickle",
        {},
        {**whole, "format": "mage_ray.PymooSearch/2"},
        {**whole, "log": 3},
        {**whole, "log": [*log, ["tell", "nobody", None]]},
        {**whole, "log": [*log, ["tell"]]},
        {**whole, "log": [["ask", "t0", "text"]]},
        {**whole, "log": [["lost", "t0", None]]},
        {**whole, "facts": None},
        {k: v for k, v in whole.items() if k != "log"},
    ]
    for i, content in enumerate(bad):
        file = tmp_path / f"bad{i}"
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
        fresh = make("mixed")
        with pytest.raises(UserError) as error:
            fresh.restore(str(file))
        assert "\n" not in str(error.value), content
        with pytest.raises(UserError):
            fresh.suggest("0")
        fresh.restore(str(good))
        assert fresh.front() == search.front() and fresh.suggest("next") == copy.deepcopy(search).suggest("next")
    with pytest.raises(UserError, match="no saved search: FileNotFoundError"):
        make("mixed").restore(str(tmp_path / "none"))


def test_a_search_without_a_space_takes_the_saved_one(tmp_path: Path) -> None:
    """As Tune restores one whose space had come from ``param_space``."""
    search = PymooSearch(metric=["f0", "f1"], mode="min", population=5, seed=9)
    assert search.set_search_properties(None, None, SPACE)
    drive(search, score, 12)
    search.save(str(tmp_path / "search"))
    bare = PymooSearch(population=5, seed=9)
    bare.restore(str(tmp_path / "search"))
    assert bare.metric == ["f0", "f1"]
    assert [bare.suggest(str(i)) for i in range(5)] == [search.suggest(str(i)) for i in range(5)]
    assert bare.front() == search.front()

    unkept = PymooSearch({"f": tune.choice([math.sin, math.cos]), "x": tune.uniform(0, 1)}, "g", "min", population=5)
    unkept.suggest("0")
    unkept.save(str(tmp_path / "unkept"))
    with pytest.raises(FieldError, match=r"^f: got options that JSON cannot hold.*param_space"):
        PymooSearch(population=5).restore(str(tmp_path / "unkept"))
    again = PymooSearch({"f": tune.choice([math.sin, math.cos]), "x": tune.uniform(0, 1)}, "g", "min", population=5)
    again.restore(str(tmp_path / "unkept"))
    assert again.suggest("1") == unkept.suggest("1")


# Real Tuners.

TRIALS = 18
PARAMS = {"x": tune.uniform(-1, 1), "net": {"width": tune.randint(1, 9)}, "const": {"k": 3}}


def trainable(runs: Path) -> Callable[[dict[str, Any]], None]:
    """Two metrics over ``PARAMS``; a trial notes its settings in a file of its own in ``runs`` whenever it starts."""

    def train(config: dict[str, Any]) -> None:
        with open(runs / tune.get_context().get_trial_id(), "a") as file:
            file.write(json.dumps([config["x"], config["net"]["width"], config["const"]["k"]]) + "\n")
        time.sleep(0.4)
        if 0.2 < config["x"] < 0.5:
            raise RuntimeError("as many do")
        tune.report({"eval": {"gain": config["x"] * config["net"]["width"], "cost": config["x"] ** 2}})

    return train


def started(runs: Path) -> dict[str, list[tuple[float, ...]]]:
    """The settings of each trial by its id, as often as it started."""
    return {file.name: [tuple(json.loads(line)) for line in file.read_text().splitlines()] for file in runs.iterdir()}


def tuner(runs: Path, storage: Path) -> tune.Tuner:
    search = PymooSearch(metric=["eval/gain", "eval/cost"], mode=["max", "min"], population=6, seed=4)
    return tune.Tuner(
        trainable(runs),
        param_space=PARAMS,
        tune_config=tune.TuneConfig(search_alg=search, num_samples=TRIALS, max_concurrent_trials=2, reuse_actors=True),
        run_config=tune.RunConfig(name="experiment", storage_path=str(storage), verbose=0),
    )


def alone() -> tuple[list[tuple[float, ...]], list[tuple[float, float]]]:
    """The settings that the same search proposes when it is driven without Tune, sorted, and its front."""
    search = PymooSearch(PARAMS, ["eval/gain", "eval/cost"], ["max", "min"], population=6, seed=4)

    def evaluate(config: dict[str, Any]) -> dict[str, float] | None:
        x = config["x"]
        return None if 0.2 < x < 0.5 else {"eval/gain": x * config["net"]["width"], "eval/cost": x**2}

    configs = drive(search, evaluate, TRIALS)
    settings = sorted((config["x"], config["net"]["width"], config["const"]["k"]) for config in configs)
    return settings, sorted((values["eval/gain"], values["eval/cost"]) for _, values in search.front())


def front_of(results: Any) -> list[tuple[float, float]]:
    scores = [(r.metrics["eval"]["gain"], r.metrics["eval"]["cost"]) for r in results if not r.error]
    return sorted(a for a in scores if not any(b[0] >= a[0] and b[1] <= a[1] and b != a for b in scores))


def saved_trials(experiment: Path) -> dict[str, str]:
    """Their states by id, as the Tuner has last saved them; none while there is no such file, or half of it."""
    try:
        state = json.loads(max(experiment.glob("experiment_state-*.json")).read_text())
        trials = [json.loads(trial) for trial, _ in state["trial_data"]]
    except ValueError:
        return {}
    return {trial["trial_id"]: trial["status"] for trial in trials}


def finished(trials: dict[str, str]) -> set[str]:
    return {trial_id for trial_id, status in trials.items() if status in ("TERMINATED", "ERROR")}


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    import ray

    ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


DRIVER = """
import sys
from pathlib import Path
import ray
sys.path[:0] = sys.argv[2:]
from test_pymoo_search import tuner
ray.init(include_dashboard=False, num_cpus=2, log_to_driver=False, configure_logging=False)
tuner(Path(sys.argv[1]) / "runs", Path(sys.argv[1])).fit()
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a Tuner has left that kill -9 ended in its second generation, and where: "runs" and "experiment"."""
    root = tmp_path_factory.mktemp("killed")
    (root / "runs").mkdir()
    with open(root / "driver.log", "w") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(root), str(Path(__file__).parent)],
            env={**os.environ, "TUNE_GLOBAL_CHECKPOINT_S": "0.5"},
            start_new_session=True,
            stdout=log,
            stderr=log,
        )
    end = time.monotonic() + 240
    try:
        # Not while the next state is on its way: a Tuner does not survive half a file of its own.
        while not midway(root / "experiment"):
            assert driver.poll() is None and time.monotonic() < end, (root / "driver.log").read_text()[-3000:]
            time.sleep(0.02)
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    shutil.copytree(root, root.with_suffix(".kept"))
    return root


def midway(experiment: Path) -> bool:
    """Whether the state was saved a moment ago, with trials that have finished and others that have not."""
    trials = saved_trials(experiment)
    age = time.time() - max((file.stat().st_mtime for file in experiment.glob("*.json")), default=0.0)
    return 8 <= len(finished(trials)) < len(trials) and 0.1 < age < 0.35


@pytest.fixture()
def moved(ray_here: None, killed: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of what ``killed`` left: the experiment, by a name of its own, and the runs."""
    kept, experiment = killed.with_suffix(".kept"), tmp_path / f"{tmp_path.name}-experiment"
    shutil.copytree(kept / "experiment", experiment)
    shutil.copytree(kept / "runs", tmp_path / "runs")
    return experiment, tmp_path / "runs"


@pytest.mark.slow
def test_a_tuner_runs_what_the_search_alone_would(ray_here: None, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    results = tuner(tmp_path / "runs", tmp_path).fit()
    settings, front = alone()
    assert sorted(run for runs in started(tmp_path / "runs").values() for run in runs) == settings
    assert results.num_errors == sum(0.2 < x < 0.5 for x, *_ in settings) > 0
    assert front_of(results) == front
    assert len(list((tmp_path / "experiment").glob("searcher-state-*.json"))) == 1


@pytest.mark.slow
def test_a_killed_tuner_goes_on_and_runs_nothing_twice_that_had_finished(ray_here: None, killed: Path) -> None:
    trials = saved_trials(killed / "experiment")
    assert 8 <= len(finished(trials)) < len(trials)
    before = started(killed / "runs")
    results = tune.Tuner.restore(str(killed / "experiment"), trainable(killed / "runs")).fit()
    runs = started(killed / "runs")
    assert all(len(runs[trial_id]) == 1 for trial_id in finished(trials))
    # Those that were under way run under their own ids; those that the saved state does not know run as other trials.
    assert all(
        len(runs[trial_id]) == len(before.get(trial_id, [])) + 1 for trial_id in trials.keys() - finished(trials)
    )
    settings, front = alone()
    known = set(before) - set(trials)
    assert sorted(settings[0] for trial_id, settings in runs.items() if trial_id not in known) == settings
    assert len(results) == TRIALS and front_of(results) == front


@pytest.mark.slow
def test_a_tuner_whose_search_is_not_restored_does_not_begin_anew(moved: tuple[Path, Path]) -> None:
    experiment, runs = moved
    next(experiment.glob("searcher-state-*")).write_text("{")
    before = started(runs)
    with pytest.raises(UserError, match="is no saved search"):
        tune.Tuner.restore(str(experiment), trainable(runs)).fit()
    assert started(runs) == before


@pytest.mark.slow
def test_a_search_saved_before_the_tuners_own_state_hears_of_what_had_ended(moved: tuple[Path, Path]) -> None:
    """A kill may fall between the two files; here the last report is lost to the search, not to the Tuner."""
    experiment, runs = moved
    file = next(experiment.glob("searcher-state-*"))
    search = json.loads(file.read_text())
    last = max(i for i, (what, *_) in enumerate(search["log"]) if what == "tell")
    unheard = search["log"][last][1]
    trials = saved_trials(experiment)
    assert unheard in finished(trials)
    file.write_text(json.dumps({**search, "log": search["log"][:last]}))
    before = started(runs)
    results = tune.Tuner.restore(str(experiment), trainable(runs), param_space=PARAMS).fit()
    after = started(runs)
    assert all(len(after[trial_id]) == 1 for trial_id in finished(trials))
    # It goes on as if nothing had been lost: the same settings, each as one trial's.
    unknown = before.keys() - trials.keys()
    settings, _ = alone()
    assert sorted(settings[0] for trial_id, settings in after.items() if trial_id not in unknown) == settings
    assert len(results) == TRIALS


@pytest.mark.slow
def test_trials_that_a_scheduler_stops_count_with_their_last_result(ray_here: None, tmp_path: Path) -> None:
    def train(config: dict[str, Any]) -> None:
        for step in range(4):
            tune.report({"loss": (config["x"] - 0.5) ** 2 + (config["y"] - 0.5) ** 2 - step})

    search = PymooSearch(algorithm="cmaes", population=4)
    results = tune.Tuner(
        train,
        param_space={"x": tune.uniform(0, 1), "y": tune.uniform(0, 1)},
        tune_config=tune.TuneConfig(
            metric="loss",
            mode="min",
            search_alg=search,
            scheduler=ASHAScheduler(max_t=4, grace_period=1, reduction_factor=2),
            num_samples=10,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()
    last = [result.metrics for result in results]
    assert {metrics["training_iteration"] for metrics in last} > {1, 4}
    search.save(str(tmp_path / "saved"))
    told = [values[0] for what, _, values in json.loads((tmp_path / "saved").read_text())["log"] if what == "tell"]
    assert sorted(told) == sorted(metrics["loss"] for metrics in last)
