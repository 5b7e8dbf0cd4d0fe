"""Which guide goes with which base: a value learnt on one model's answers misleads another one (docs/method.md).

Bases: the reference, Rewarded Soup, Bone Soup. Guides: none, implicit and explicit ones, merged and ensembled.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from mage_ray.analysis.fronts import Planner, fronts, whole_setup
from mage_ray.decoding.methods import BASES, GUIDES, Setup, steered
from mage_ray.evaluation.summary import Summary
from mage_ray.folder import StudyFolder
from mage_ray.study import Study

if TYPE_CHECKING:
    from rich.console import Console


def compatibility(
    study: Study, folder: StudyFolder, console: Console | None = None
) -> tuple[dict[str, tuple[str, str | None]], Summary]:
    """Every base with every guide that the study has: ``pairs``, and their fronts. Ray must be connected."""
    setup = whole_setup(study, folder)
    named = pairs(setup)
    planners: dict[str, Planner] = {label: partial(steered, *pair, setup=setup) for label, pair in named.items()}
    return named, fronts(study, folder, planners, setup, console, "compatibility")


def pairs(setup: Setup) -> dict[str, tuple[str, str | None]]:
    """A label for each base and guide, those of explicit values only where there are value models."""
    guides = [guide for guide in GUIDES if setup.values is not None or not guide.startswith("explicit")]
    alone: list[str | None] = [None]
    return {
        base if guide is None else f"{base} + {guide}": (base, guide) for base in BASES for guide in [*alone, *guides]
    }
