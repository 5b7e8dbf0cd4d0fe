"""What a study says of its comparison: who takes part, what is tuned, and which checks must fail for it to hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator

from mage_ray.decoding.methods import EXPLICIT, KNOWN, METHODS
from mage_ray.evaluation.strategies import STRATEGIES
from mage_ray.fields import Part
from mage_ray.search.spec import RangeSpec
from mage_ray.specs import Name, NotNegative, Positive

T = TypeVar("T")
Options = Annotated[list[T], Field(min_length=2)]
Finite = Annotated[float, Field(allow_inf_nan=False)]

TRAINED_ANEW = tuple(method for method in METHODS if method not in (*EXPLICIT, "reference"))
"""Methods that need nothing but the backbones, which a comparison can train in other ways, too."""


Several = Field(default=None, min_length=2)
"""What has one value only is said in ``guidance``."""


class ConstantsSpec(Part):
    """The constants that are tuned for each method that has a use for them, each in a range or among a list."""

    base: list[Name] | None = Several
    """Backbone sets, of the methods that are guided or extrapolated: with them their beta."""
    guide: list[Name] | None = Several
    values: list[Name] | None = Several
    strength: RangeSpec | Options[NotNegative] | None = RangeSpec(low=0, high=3)
    """Of implicit guides, and of GenARM's."""
    value_strength: RangeSpec | Options[NotNegative] | None = RangeSpec(low=1, high=16, log=True)
    """Of explicit ones."""
    extrapolation: RangeSpec | Options[Finite] | None = RangeSpec(low=0, high=2)
    """alpha of the extrapolated soup."""
    candidates: Options[Positive] | None = None

    @property
    def named(self) -> dict[str, Any]:
        """Those that there are, each a RangeSpec or a list."""
        return {name: value for name in type(self).model_fields if (value := getattr(self, name)) is not None}


class JudgeSpec(Part):
    """A language model that is asked which of two answers is better."""

    model: str
    """The embedded model's name, a local folder or a hub id of a decoder-only chat model."""
    question: str = "Which answer is better?"
    max_length: int = Field(default=1024, ge=64)
    """In tokens; what is longer loses its beginning."""
    batch_size: Positive = 8


class CompareSpec(Part):
    """What ``mage-ray compare`` does. Seeds, lengths, the test's grid and the reference point are ``evaluation``'s."""

    methods: list[str] | None = Field(default=None, min_length=1)
    """All that the study says how to train, unless given."""
    space: ConstantsSpec = ConstantsSpec()
    settings: Positive = 6
    """Tried for each method on the validation prompts: the study's own constants, and others all over the space."""
    measure: Literal["hypervolume", "inner_product"] = "hypervolume"
    """By which the best of them is chosen."""
    prompts: Positive = 16
    """To choose by: neither trained nor tested on."""
    grid: int | list[list[float]] | None = 5
    """As in ``evaluation``, of the preferences that settings are tried at; None for the one there."""
    matched: list[str] | None = None
    """Methods beside which the soup is compared that is extrapolated to the same KL from the reference; mage-i-m, where
    it is compared, unless given."""
    steps: list[Positive] = Field(default_factory=list)
    """Lengths of training beside ``training.steps``: the backbones are trained anew for each."""
    at_steps: list[str] = Field(default_factory=lambda: ["rewarded-soup", "bone-soup", "mage-i-m"], min_length=1)
    """What is compared at these."""
    shuffled: list[str] | None = None
    """Methods that take part once more, trained on rewards that were dealt out at random: they should gain nothing. As
    ``matched`` unless given."""
    rounds: int = Field(default=5, ge=5)
    """Of the timing, in each of which every method answers the same prompts once."""
    timed_prompts: Positive = 8
    judge: JudgeSpec | None = None

    @field_validator("methods", "matched")
    @classmethod
    def _known(cls, methods: list[str] | None) -> list[str] | None:
        return _among(methods, (*KNOWN, *STRATEGIES))

    @field_validator("at_steps", "shuffled")
    @classmethod
    def _trained(cls, methods: list[str] | None) -> list[str] | None:
        return _among(methods, TRAINED_ANEW)

    def among(self, field: Literal["matched", "shuffled"], methods: Sequence[str]) -> list[str]:
        """What a field names, or its default, of the methods that are compared."""
        named: list[str] | None = getattr(self, field)
        return [name for name in ["mage-i-m"] if name in methods] if named is None else named


def _among(methods: list[str] | None, allowed: tuple[str, ...]) -> list[str] | None:
    for method in methods or ():
        if method not in allowed:
            raise ValueError(f"{method!r} is not among {', '.join(allowed)}")
    return methods
