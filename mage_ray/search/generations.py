"""pymoo's algorithms by generations: asked for points of the unit cube, told what these gave, repeatable by a seed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2, binary_tournament
from pymoo.algorithms.soo.nonconvex.cmaes import CMAES
from pymoo.algorithms.soo.nonconvex.de import DE
from pymoo.core.duplicate import DefaultDuplicateElimination
from pymoo.core.mixed import MixedVariableMating, MixedVariableSampling
from pymoo.core.population import Population
from pymoo.core.problem import Problem
from pymoo.core.termination import NoTermination
from pymoo.core.variable import Choice, Real
from pymoo.operators.selection.tournament import TournamentSelection

from mage_ray.search.axes import Axis


def shares_of(axes: Mapping[str, Axis], x: Any) -> list[float]:
    """pymoo's variables as shares; of a space with choices, for NSGA-II, a dictionary that holds options' numbers."""
    if not isinstance(x, dict):
        return [float(share) for share in x]
    sizes = {name: len(axis.options) for name, axis in axes.items()}
    return [(int(x[name]) + 0.5) / size if size else float(x[name]) for name, size in sizes.items()]


def variables_of(axes: Mapping[str, Axis], shares: Sequence[float]) -> dict[str, Any]:
    """The inverse of ``_shares``, for a space with choices."""
    pairs = zip(axes.items(), shares, strict=True)
    return {name: int(share * len(axis.options)) if axis.options else share for (name, axis), share in pairs}


def _nsga2(axes: Mapping[str, Axis], population: int) -> NSGA2:
    if all(axis.kind == "float" and not axis.q for axis in axes.values()):
        return NSGA2(pop_size=population)

    def settings(individuals: Population) -> np.ndarray:
        rows = (zip(axes.values(), shares_of(axes, each.X), strict=True) for each in individuals)
        return np.array([[axis.share(axis.value(share)) for axis, share in row] for row in rows])

    same = DefaultDuplicateElimination(func=settings)
    if not any(axis.options for axis in axes.values()):
        return NSGA2(pop_size=population, eliminate_duplicates=same)
    selection = TournamentSelection(func_comp=binary_tournament)
    mating = MixedVariableMating(selection=selection, eliminate_duplicates=same)
    return NSGA2(pop_size=population, sampling=MixedVariableSampling(), mating=mating, eliminate_duplicates=same)


ALGORITHMS: dict[str, Callable[[Mapping[str, Axis], int], Any]] = {
    "nsga2": _nsga2,
    "cmaes": lambda axes, population: CMAES(pop_size=population),
    "de": lambda axes, population: DE(pop_size=population),
}


class Generations:
    """A pymoo algorithm that is asked for generations of shares and told what they gave; its seed decides the rest."""

    def __init__(self, name: str, axes: Mapping[str, Axis], signs: Sequence[int], population: int, seed: int) -> None:
        self.axes, self.signs, self.ended = axes, signs, False
        self.mixed = name == "nsga2" and any(axis.options for axis in axes.values())
        self.ranks_only = name == "cmaes"
        problem: dict[str, Any] = {"n_var": len(axes), "xl": 0.0, "xu": 1.0}
        if self.mixed:
            sizes = {name: len(axis.options) for name, axis in axes.items()}
            kinds = {name: Choice(options=range(size)) if size else Real(bounds=(0, 1)) for name, size in sizes.items()}
            problem = {"vars": kinds}
        self.algorithm = ALGORITHMS[name](axes, population)
        problem |= {"n_obj": len(signs), "n_ieq_constr": int(not self.ranks_only)}
        self.algorithm.setup(Problem(**problem), termination=NoTermination(), seed=seed)
        if self.ranks_only:
            # Its constructor takes no size of the first sample, and cma takes 0 for a seed by the clock.
            self.algorithm.n_sample_points = population
            self.algorithm.options["seed"] = seed or 2**32 - 1
        self.random = np.random.RandomState(seed).get_state()
        self.worst, self.failures = 0.0, 0

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        # cma draws from numpy's global generator, as others in this process may.
        outside = np.random.get_state()
        np.random.set_state(self.random)
        try:
            yield
        finally:
            self.random = np.random.get_state()
            np.random.set_state(outside)

    def ask(self, first: Sequence[Sequence[float]]) -> list[list[float]]:
        """The next generation, the very first one with ``first`` in front; empty once the algorithm has ended."""
        begins = not self.algorithm.is_initialized
        self.asked = None
        if self.algorithm.has_next() and not self.ended:
            with self._own_random():
                self.asked = self.algorithm.ask()
        self.ended = self.asked is None
        if self.asked is None:
            return []
        if begins and first:
            x = [variables_of(self.axes, shares) if self.mixed else np.array(shares) for shares in first]
            both = Population.merge(Population.new(X=x), self.asked[len(first) :])
            self.asked = self.algorithm.initialization.eliminate_duplicates.do(both)
        return [shares_of(self.axes, individual.X) for individual in self.asked]

    def tell(self, values: Sequence[Sequence[float] | None], violations: Sequence[float]) -> None:
        """What the generation gave: values, or None for a member that is infeasible by its violation (0 for others)."""
        assert self.asked is not None
        F = np.full((len(values), len(self.signs)), np.inf)
        for i, row in enumerate(values):
            if row is not None:
                F[i] = np.multiply(self.signs, row)
        if self.ranks_only:
            # pymoo gives CMA-ES infinity for whatever is infeasible, and cma ends where whole generations are level. It
            # goes by ranks only, so: behind all that is known, the least infeasible first, no two level.
            self.worst = float(max(self.worst, *F[np.isfinite(F)], 0.0))
            for i in sorted(range(len(values)), key=violations.__getitem__):
                if values[i] is None:
                    self.failures += 1
                    F[i] = self.worst + (1.0 + self.worst) * self.failures
        else:
            self.asked.set("G", np.array(violations, dtype=float)[:, None])
        self.asked.set("F", F)
        with self._own_random():
            self.algorithm.tell(infills=self.asked)
