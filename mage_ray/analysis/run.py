"""The analyses by their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mage_ray.analysis.compatibility import compatibility
from mage_ray.analysis.connectivity import connectivity
from mage_ray.analysis.merging import merging
from mage_ray.analysis.sections import (
    Section,
    compatibility_section,
    connectivity_section,
    merging_section,
    sensitivity_section,
)
from mage_ray.analysis.sensitivity import sensitivity
from mage_ray.folder import StudyFolder
from mage_ray.study import Study

if TYPE_CHECKING:
    from rich.console import Console


def section(name: str, study: Study, folder: StudyFolder, console: Console | None = None) -> Section:
    """Run one analysis, or what is missing of it. Ray must be connected. Raises UserError."""
    if name == "connectivity":
        return connectivity_section(connectivity(study, folder, console))
    if name == "merging":
        return merging_section(*merging(study, folder, console))
    if name == "compatibility":
        return compatibility_section(*compatibility(study, folder, console))
    return sensitivity_section(study, *sensitivity(study, folder, console))
