"""Rows and plans: every decode-time method is a weighted list of rows (docs/method.md).

A *row* is one forward of the model under one coefficient vector over the adapter bank. A *plan* says which rows a
request runs and how their log-probabilities are added up. Which rows a method has is in ``methods.py``.

Legend: K experts in the bank, w guidance strength.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mage_ray.errors import FieldError
from mage_ray.merging.coefficients import Vector

if TYPE_CHECKING:
    from mage_ray.merging.value_head import Kind


@dataclass(frozen=True)
class Row:
    """One forward of the backbone with experts mixed by ``coefficients`` [K]; all zeros is the reference model.

    Without a ``head`` it is a policy, whose log-probabilities count. With one it is a value model, its head mixed by
    the same coefficients: a *vocabulary* head scores all tokens from the state at hand, ``Q(s, a)``; a *scalar* head
    looks ahead at each candidate, ``V(s + a)``.
    """

    coefficients: tuple[float, ...]
    head: Kind | None = None
    home: int = 0
    """Which runner of a gang it lives in (``gang.py``); 0 is the engine's own. Each has a model and a bank."""

    def check(self, heads: Mapping[str, Kind | None]) -> None:
        """Raises FieldError when it doesn't fit a bank of these experts, each with the kind of its value head."""
        if len(self.coefficients) != len(heads):
            raise FieldError("coefficients", list(self.coefficients), f"{len(heads)} numbers, one for each expert")
        if self.head is None:
            return
        for coefficient, (name, head) in zip(self.coefficients, heads.items(), strict=True):
            if coefficient != 0 and (head is None or (self.head == "vocabulary" and head != "vocabulary")):
                got = "no value head" if head is None else f"a {head} head"
                what = f"a {self.head} row over expert {name}, which has {got}"
                raise FieldError("plan.rows", what, f"experts with a {self.head} head")


@dataclass(frozen=True)
class Cadence:
    """At which tokens the guide runs; the base alone draws the others. The defaults guide every token.

    ``every`` b guides the first of every b tokens. ``entropy`` guides where the base's next-token entropy, in nats over
    the whole vocabulary, is at least that; skipped tokens are caught up in one forward. Both may be combined: a token
    is guided when both say so. ``speculate`` m lets the base propose m tokens that the guide checks in one forward, by
    the rule of speculative sampling (arXiv:2211.17192), so that the distribution is exactly the guided one; it goes
    with neither of the others. Raises FieldError for a value that isn't allowed.
    """

    every: int = 1
    entropy: float = 0.0
    speculate: int = 0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise FieldError("every", self.every, "1 or more")
        if not (math.isfinite(self.entropy) and self.entropy >= 0):
            raise FieldError("entropy", self.entropy, "a finite number of nats, 0 or more")
        if self.speculate < 0:
            raise FieldError("speculate", self.speculate, "0 or more")
        if self.speculate and (self.every > 1 or self.entropy > 0):
            raise FieldError("speculate", self.speculate, "0 where every or entropy is set")

    @property
    def always(self) -> bool:
        """Whether all rows run at every token."""
        return self == Cadence()


@dataclass(frozen=True)
class Plan:
    """``log pi(a|s) = sum_r weights[r] * S_r(s, a) - log Z(s)``, S a row's log-probability or, of a value model, value.

    With ``candidates`` set, ``a`` ranges over that many most likely tokens of ``rows[0]``, the base; else over the
    whole vocabulary. The temperature T divides the sum: where the weights add up to S, the rows' weighted mean is drawn
    from at ``T / S``. The weights of a method add up to 1, but for those of reward models without a reference
    (GenARM), which add up to 1 + w: their mean is drawn from at ``T / (1 + w)``, as its authors set it, and at T = 1
    the draw is from ``pi_base prod_i pi_i^(w mu_i)``.

    ``values``, one for each row, make up the guide's own score ``G(s, a) = sum_r values[r] * S_r(s, a)``, with values
    centred over the candidates; empty where the plan has no guide. ``cadence`` says when the guide runs, ``valued``
    whether its scores of the drawn tokens are wanted.

    Raises FieldError for no rows, another number of weights or values than rows, fewer than 1 candidate, a base that is
    a value model, or rows that look ahead at no candidates in particular or at what is speculated.
    """

    rows: tuple[Row, ...]
    weights: tuple[float, ...]
    candidates: int | None = None
    values: tuple[float, ...] = ()
    cadence: Cadence = Cadence()
    valued: bool = False

    def __post_init__(self) -> None:
        if not self.rows:
            raise FieldError("plan.rows", "none", "1 or more")
        for name, numbers in (("weights", self.weights), ("values", self.values)):
            if len(numbers) != len(self.rows) and (name == "weights" or numbers):
                raise FieldError(f"plan.{name}", list(numbers), f"{len(self.rows)} numbers, one for each row")
        if self.candidates is not None and self.candidates < 1:
            raise FieldError("candidates", self.candidates, "1 or more")
        if self.rows[0].head is not None:
            raise FieldError("plan.rows", f"a value model ({self.rows[0].head}) first", "a policy first, the base")
        if any(row.head == "scalar" for row in self.rows):
            if self.candidates is None:
                raise FieldError("candidates", None, "a number, where scalar values look ahead at each candidate")
            if self.cadence.speculate:
                raise FieldError("speculate", self.cadence.speculate, "0 where scalar values look ahead")

    @classmethod
    def of(cls, terms: Iterable[tuple[Vector | Row, float]], candidates: int | None = None) -> Plan:
        """A plan from (coefficients, weight) terms: equal rows become one, their weights added; a row of weight 0 goes.

        The first term's row stays first, whatever its weight, when it chooses the candidates.
        """
        weights = _by_row(terms)
        base = next(iter(weights), None)
        kept = [row for row, w in weights.items() if w != 0 or (row == base and candidates is not None)]
        return cls._checked(kept, weights, candidates)

    @classmethod
    def guided(
        cls,
        base: Vector,
        guide: Iterable[tuple[Vector | Row, float]],
        strength: float,
        candidates: int | None = None,
        valued: bool = False,
    ) -> Plan:
        """The base plus ``strength`` times the guide's terms (docs/method.md): ``log pi_base + w * G``.

        At strength 0 no guide row runs, unless ``valued`` asks for the guide's scores all the same.
        """
        values = _by_row(guide)
        terms: list[tuple[Vector | Row, float]] = [(base, 1.0)]
        terms += [(row, strength * value) for row, value in values.items()]
        weights = _by_row(terms)
        first = next(iter(weights))
        kept = [row for row, w in weights.items() if w != 0 or row == first or (valued and values[row] != 0)]
        plan = cls._checked(kept, weights, candidates)
        with_values = tuple(values.get(row, 0.0) for row in kept)
        return replace(plan, values=with_values if any(with_values) else (), valued=valued)

    @classmethod
    def _checked(cls, rows: list[Row], weights: Mapping[Row, float], candidates: int | None) -> Plan:
        if not any(weights[row] for row in rows):
            raise FieldError("plan.weights", list(weights.values()), "at least one that is not 0")
        if not all(math.isfinite(number) for row in rows for number in (weights[row], *row.coefficients)):
            raise FieldError("plan", [weights[row] for row in rows], "finite weights and coefficients")
        return cls(tuple(rows), tuple(weights[row] for row in rows), candidates)

    def at(self, cadence: Cadence) -> Plan:
        """The same plan, guided at the tokens that ``cadence`` says. Raises FieldError when there is no guide."""
        if not cadence.always and not self.values and len(self.rows) > 1:
            raise FieldError("cadence", cadence, "one that guides every token: this plan has no guide to leave out")
        return replace(self, cadence=cadence)

    def placed(self, home: Callable[[int], int]) -> Plan:
        """The same plan with ``home(i)`` as the home of its row i. Raises FieldError for a base that isn't at home."""
        if home(0) != 0:
            raise FieldError("plan.rows", f"the base at {home(0)}", "0, the engine's own runner")
        return replace(self, rows=tuple(replace(row, home=home(i)) for i, row in enumerate(self.rows)))

    @property
    def ahead(self) -> int:
        """Positions that it takes beyond its tokens, to look at candidates."""
        return self.candidates or 0 if any(row.head == "scalar" for row in self.rows) else 0

    @property
    def eager(self) -> bool:
        """Whether all rows run at every token."""
        return self.cadence.always or len(self.rows) == 1


def _by_row(terms: Iterable[tuple[Vector | Row, float]]) -> dict[Row, float]:
    """The weights of the terms' rows, equal rows added up, in order of appearance."""
    weights: dict[Row, float] = {}
    for term, weight in terms:
        given = term if isinstance(term, Row) else Row(tuple(term))
        # + 0.0 turns -0.0 into 0.0, so that both are one row in prints and exports.
        row = Row(tuple(float(c) + 0.0 for c in given.coefficients), given.head, given.home)
        weights[row] = weights.get(row, 0.0) + float(weight)
    return weights
