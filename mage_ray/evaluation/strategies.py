"""Ways to an answer beyond drawing it once from a method's plan: searches on top of it, and asking in words.

They are methods of the evaluation alone, with the constants of ``study.strategies``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mage_ray.decoding.methods import Setup, plan_for
from mage_ray.decoding.plan import Cadence, Plan
from mage_ray.errors import FieldError
from mage_ray.preference import Preference, preference_label

if TYPE_CHECKING:
    from mage_ray.decoding.request import Request
    from mage_ray.decoding.search import Strategy
    from mage_ray.decoding.text import Decode
    from mage_ray.study import Study


@dataclass(frozen=True)
class BestOf:
    """The best of ``n`` samples, by the guide's score."""

    n: int

    def start(self, request: Request, decode: Decode) -> Strategy:
        from mage_ray.decoding.search import best_of

        return best_of(request, self.n)

    @property
    def draws(self) -> int:
        return self.n


@dataclass(frozen=True)
class Beams:
    """A beam search that goes on with the ``width`` best pieces of ``chunk`` tokens, by the guide's score."""

    width: int
    expansions: int
    chunk: int

    def start(self, request: Request, decode: Decode) -> Strategy:
        from mage_ray.decoding.search import beam_search

        return beam_search(request, self.width, self.expansions, self.chunk, decode)

    @property
    def draws(self) -> int:
        return self.width * self.expansions


@dataclass(frozen=True)
class Way:
    """What is done with a plan: one draw, or what ``search`` says, after ``system`` where it isn't the study's own.

    Ways with a ``stream`` draw other random numbers than all others.
    """

    search: BestOf | Beams | None = None
    system: str | None = None
    stream: str = ""

    def start(self, request: Request, decode: Decode) -> Strategy:
        """The strategy for one request."""
        from mage_ray.decoding.search import drawn_once

        return drawn_once(request) if self.search is None else self.search.start(request, decode)

    @property
    def draws(self) -> int:
        """How many answers, or pieces of them, are drawn at once for one."""
        return 1 if self.search is None else self.search.draws


def _ranked(mu: Preference, setup: Setup, study: Study) -> Plan:
    """The plan of ``strategies.method`` whose guide scores every token, and draws with ``strategies.strength``."""
    spec = study.strategies
    plan = plan_for(spec.method, mu, setup.given(spec.strength, cadence=Cadence(), valued=True))
    if not plan.values:
        raise FieldError("strategies.method", spec.method, "a guided method, whose guide ranks the candidates")
    return plan


def _best_of_n(mu: Preference, setup: Setup, study: Study) -> tuple[Plan, Way]:
    return _ranked(mu, setup, study), Way(BestOf(study.strategies.n))


def _beam_search(mu: Preference, setup: Setup, study: Study) -> tuple[Plan, Way]:
    spec = study.strategies
    return _ranked(mu, setup, study), Way(Beams(spec.width, spec.expansions, spec.chunk))


def _prompting(mu: Preference, setup: Setup, study: Study) -> tuple[Plan, Way]:
    asked = in_words(study.objective_names, mu)
    system = asked if study.system is None else f"{study.system} {asked}"
    return plan_for("reference", mu, setup), Way(system=system)


def _redrawn_reference(mu: Preference, setup: Setup, study: Study) -> tuple[Plan, Way]:
    return plan_for("reference", mu, setup), Way(stream=preference_label(mu))


STRATEGIES: dict[str, Callable[[Preference, Setup, Study], tuple[Plan, Way]]] = {
    "best-of-n": _best_of_n,
    "beam-search": _beam_search,
    "prompting": _prompting,
    "redrawn-reference": _redrawn_reference,
}
"""The best of several samples of the base by the merged value; guided beam search (weak-to-strong search,
arXiv:2405.19262); rewards in context: the reference model, told the preference (as RiC, arXiv:2402.10207, but without
training); and the reference drawn anew for each preference: what chance alone makes of a front."""


def way_to(method: str, mu: Preference, setup: Setup, study: Study) -> tuple[Plan, Way]:
    """A method's plan at a preference, and what is done with it. Raises FieldError as ``plan_for``."""
    return STRATEGIES[method](mu, setup, study) if method in STRATEGIES else (plan_for(method, mu, setup), Way())


_IMPORTANCE = (
    (0.8, "most important"),
    (0.6, "very important"),
    (0.4, "important"),
    (0.2, "somewhat important"),
    (0.0, "slightly important"),
)
"""From which weight on an aim is called so; one of weight 0 is called not important."""


def in_words(objectives: Sequence[str], mu: Preference) -> str:
    """A preference as a system message says it, in words and numbers."""
    aims = []
    for name, weight in zip(objectives, mu, strict=True):
        word = next(word for least, word in _IMPORTANCE if weight >= least) if weight > 0 else "not important"
        aims.append(f"{name.replace('_', ' ')}: {word} (weight {weight:.2f})")
    return f"Write the answer that is best by these aims, whose weights add up to 1. {'; '.join(aims)}."
