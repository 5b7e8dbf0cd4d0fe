"""How far the front moves with each of the method's constants, one at a time, the others as in the study."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from mage_ray.analysis.fronts import Planner, fronts, whole_setup
from mage_ray.decoding.methods import Setup, Strength, plan_for
from mage_ray.evaluation.summary import Summary
from mage_ray.folder import StudyFolder
from mage_ray.merging.value_head import Kind
from mage_ray.study import Study

if TYPE_CHECKING:
    from rich.console import Console


Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Setting:
    """One value of one constant. ``label`` names its front; the study's own setting has one for all constants."""

    constant: str
    value: str
    label: str
    setup: Setup


def sensitivity(study: Study, folder: StudyFolder, console: Console | None = None) -> tuple[list[Setting], Summary]:
    """The settings of all sweeps of ``analysis.method``, and their fronts. Ray must be connected."""
    setup = whole_setup(study, folder)
    settings = sweeps(study, setup)
    planners: dict[str, Planner] = {
        setting.label: partial(plan_for, study.analysis.method, setup=setting.setup) for setting in settings
    }
    planners = {"bone-soup": partial(plan_for, "bone-soup", setup=setup)} | planners
    return settings, fronts(study, folder, planners, setup, console, "sensitivity")


def sweeps(study: Study, setup: Setup) -> list[Setting]:
    """Every constant that the study has more than one value of, the study's own value among them."""
    spec = study.analysis
    explicit = spec.method.startswith("mage-e")
    strength = setup.value_strength if explicit and setup.value_strength is not None else setup.strength
    # One strength for each objective has no place among these.
    strengths = spec.strengths if isinstance(strength, tuple) else _with(spec.strengths, strength)
    betas = {name: spec.beta for name, spec in study.training.backbones.items() if spec.beta is not None}
    found: dict[str, list[tuple[str, Setup]]] = {
        "beta of the base": [(f"{beta:g}", replace(setup, base=name)) for name, beta in betas.items()],
        "strength": [(f"{w:g}", _at(setup, w, strength)) for w in strengths],
        "candidates": [(str(k), replace(setup, candidates=k)) for k in _with(spec.candidates, setup.candidates)],
    }
    if explicit and setup.values is not None:
        if study.values[setup.values].head == "vocabulary":
            heads: tuple[Kind, ...] = ("vocabulary", "scalar")
            found["head"] = [(head, replace(setup, head=head)) for head in heads]
        valued = [name for name in study.values if name in setup.sets]
        found["value models"] = [(name, replace(setup, values=name, head=_head(study, setup, name))) for name in valued]
    return [
        Setting(constant, value, "as in the study" if own == setup else f"{constant} {value}", own)
        for constant, values in found.items()
        if len(values) > 1
        for value, own in values
    ]


def _head(study: Study, setup: Setup, name: str) -> Kind:
    return setup.head if study.values[name].head == "vocabulary" else "scalar"


def _at(setup: Setup, strength: float, own: Strength) -> Setup:
    return setup if strength == own else setup.given(strength)


def _with(values: Sequence[Number], own: Number) -> list[Number]:
    """All values, the study's own among them."""
    return sorted(set(values) | {own})
