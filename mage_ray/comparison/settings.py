"""Settings: which constants of the guidance matter to a method, and which values of them are tried for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from pydantic import ValidationError

from mage_ray.decoding.methods import Setup, planned_at
from mage_ray.evaluation.strategies import STRATEGIES, way_to
from mage_ray.fields import one_line
from mage_ray.preference import Preference
from mage_ray.search.spec import RangeSpec
from mage_ray.study import Study

Constants = Mapping[str, Any]
"""Fields of ``guidance`` in place of the study's."""


def with_constants(study: Study, constants: Constants) -> Study:
    """The study with these in its guidance. Raises UserError, naming the field, for what may not be there."""
    if not constants:
        return study
    guidance = study.guidance.model_dump() | dict(constants)
    try:
        return Study.model_validate(study.model_dump() | {"guidance": guidance})
    except ValidationError as error:
        raise one_line(error, Study, "compare.space") from None


def constants_that_matter(
    study: Study, method: str, setup_of: Callable[[Constants], Setup], grid: Sequence[Preference]
) -> list[str]:
    """The names in ``compare.space`` along which the method's plans change, with whatever the others are.

    Of each option where there are several is enough: what is tuned for a method is what it has a use for, no more.
    Raises UserError for a value that its constant may not have, or a set that isn't trained.
    """
    space = _space(study, method)
    far = {name: _ends(value)[-1] for name, value in space.items()}

    def plans(constants: Constants) -> list[Any]:
        setup = setup_of(constants)
        own = None if method in STRATEGIES else planned_at(method, setup)
        return [way_to(method, mu, setup, study) for mu in (grid if own is None else own)]

    found = []
    for name, value in space.items():
        tried = [plans({**far, name: one}) for one in _ends(value)]
        if any(one != other for one, other in pairwise(tried)):
            found.append(name)
    return found


def settings(study: Study, method: str, names: Sequence[str]) -> list[dict[str, Any]]:
    """What is tried of these constants: the study's own (an empty setting), then points spread over the space.

    ``compare.settings`` in all, the same number for every method, or fewer where the space has no more. A scrambled
    Halton sequence (Owen 2017): later points lie where earlier ones don't, whatever the number of constants.
    """
    from scipy.stats import qmc

    from mage_ray.search.axes import axis_of
    from mage_ray.search.space import domain

    space = _space(study, method)
    count = study.compare.settings - 1
    if not names or not count:
        return [{}]
    axes = {name: axis_of(name, domain(space[name], whole=name == "candidates")) for name in names}
    own = study.guidance.model_dump() | {"values": study.value_set}
    known: dict[str, dict[str, Any]] = {json.dumps({name: own[name] for name in names}): {}}
    shares = qmc.Halton(len(axes), scramble=True, seed=study.seed).random(8 * count)
    for point in shares.tolist():
        setting = {name: axis.value(share) for (name, axis), share in zip(axes.items(), point, strict=True)}
        known.setdefault(json.dumps(setting), setting)
    return list(known.values())[: count + 1]


def _space(study: Study, method: str) -> dict[str, Any]:
    """``compare.space`` as a method has it: Bone Soup takes part with each of its sets under a label of its own."""
    return {name: value for name, value in study.compare.space.named.items() if (method, name) != ("bone-soup", "base")}


def _ends(value: RangeSpec | Sequence[Any]) -> list[Any]:
    """The options, or the ends of a range; the last one is where other constants matter, too."""
    if isinstance(value, RangeSpec):
        return [value.low, value.high]
    return sorted(value) if all(isinstance(one, int | float) for one in value) else list(value)
