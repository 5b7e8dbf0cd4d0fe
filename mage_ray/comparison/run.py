"""A comparison, whole: train what is missing, tune on validation prompts, test once, and write it all down."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from mage_ray.comparison.checks import check_comparison, drawn_on
from mage_ray.comparison.costs import middle, time_cells, trained_for
from mage_ray.comparison.judge import win_rates
from mage_ray.comparison.results import Found
from mage_ray.comparison.tuning import Arm, arms_cells, evaluated, tuned_arms
from mage_ray.comparison.variants import compared_methods, study_variants, train_variant
from mage_ray.decoding.methods import EXPLICIT
from mage_ray.errors import UserError
from mage_ray.evaluation.cells import Cell
from mage_ray.evaluation.summary import summary_of
from mage_ray.files import write_atomic
from mage_ray.folder import StudyFolder
from mage_ray.progress import shown
from mage_ray.study import Study
from mage_ray.training.rollouts import sample_pool

if TYPE_CHECKING:
    from rich.console import Console

RESULT = "comparison.json"
TESTED = "tested.json"
FACTS = "facts.json"


def compare_study(
    study: Study,
    folder: StudyFolder,
    console: Console | None = None,
    fresh: bool = False,
    facts: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """Train, tune, test and report; returns what ``comparison/comparison.json`` has, which is written last.

    Killed at any moment, it goes on from there. The test prompts are used once: with a comparison of another study or
    of other settings in ``folder``, that has got as far as to use them, it is refused unless ``fresh`` forgets it. Ray
    must be connected. Raises UserError.
    """
    check_comparison(study, folder)
    if fresh:
        # Samples are found again by their content.
        folder.remove(*(folder.comparison / name for name in (TESTED, FACTS, RESULT)))
    study = train_all(study, folder, console)
    variants = study_variants(study, folder)
    for variant in variants:
        if variant.name:
            _say(console, f"training for {variant.name}")
            train_variant(variant, study, folder, console)
    arms = [arm for variant in variants for arm in tuned_arms(variant, console)]
    cells = {
        variant.name: arms_cells(variant, [arm for arm in arms if arm.variant is variant], "test")
        for variant in variants
    }
    facts = _claim_test(study, folder, arms, [cell for own in cells.values() for cell in own], facts)
    import pandas as pd

    parts = [evaluated(variant, cells[variant.name], console, f"test {variant.name}".strip()) for variant in variants]
    samples = pd.concat(parts, ignore_index=True)
    own = {arm.label: [cell for cell in cells[arm.variant.name] if cell.method == arm.label] for arm in arms}
    forwards = samples.groupby("method")["forwards"].mean()
    timed = {arm.label: middle(own[arm.label]) for arm in arms if not arm.variant.name}
    found = Found(
        study=study,
        arms=arms,
        summary=summary_of(study, samples),
        trained={arm.label: trained_for(arm.variant, own[arm.label]) for arm in arms},
        timing=time_cells(study, folder, timed, console),
        forwards={str(label): float(value) for label, value in forwards.items()},
        wins=win_rates(study, folder, samples, console) if study.compare.judge is not None else {},
        facts=facts,
    )
    from mage_ray.comparison.page import write_comparison_page

    content = found.content()
    write_comparison_page(folder, found, content)
    write_atomic(folder.comparison / RESULT, json.dumps(content, indent=1, allow_nan=False) + "\n")
    return content


def train_all(study: Study, folder: StudyFolder, console: Console | None) -> Study:
    """All that the compared methods draw on, as far as it is missing: the study with what training has chosen."""
    from mage_ray.search.beta import choose_betas
    from mage_ray.training.baselines import train_baselines
    from mage_ray.training.experts import train_experts
    from mage_ray.training.rewards import train_rewards
    from mage_ray.training.values import train_values

    if study.rewards:
        train_rewards(study, folder, console)
    with shown(console, "rollouts") as progress:
        sample_pool(study, folder, progress=progress)
    study = choose_betas(study, folder, console)
    train_experts(study, folder, console)
    methods = compared_methods(study)
    if {study.strategies.method, *methods} & {*EXPLICIT} and study.values:
        train_values(study, folder, console)
    if needed := drawn_on(study, methods):
        train_baselines(study.model_copy(update={"baselines": needed}), folder, console)
    return study


def _claim_test(
    study: Study, folder: StudyFolder, arms: Sequence[Arm], cells: Sequence[Cell], facts: Mapping[str, str]
) -> dict[str, str]:
    """Write down with what the test prompts are used, or see that it is the same. Raises UserError.

    Returns the facts of when they were first used.
    """
    ours = {
        "study": study.digest,
        "arms": {arm.label: [arm.method, dict(arm.constants)] for arm in arms},
        "evaluation": study.evaluation.model_dump(mode="json", exclude={"methods", "workers", "batch_rows"}),
        "strategies": study.strategies.model_dump(mode="json"),
        "guidance": study.guidance.model_dump(mode="json"),
        "what was trained": sorted(PurePosixPath(cell.file).name for cell in cells),
    }
    path = folder.comparison / TESTED
    text = json.dumps(ours, indent=1, sort_keys=True) + "\n"
    if not path.exists():
        write_atomic(folder.comparison / FACTS, json.dumps(dict(facts), indent=1) + "\n")
        write_atomic(path, text)
        folder.publish(folder.comparison / FACTS, path)
    elif path.read_text() != text:
        theirs = json.loads(path.read_text())
        differs = next((name for name in ours if theirs.get(name) != json.loads(json.dumps(ours[name]))), "something")
        raise UserError(
            f"{path}: the test prompts were used by a comparison that differs in {differs}, allowed: the same again, "
            "or --fresh to forget it"
        )
    found: dict[str, str] = json.loads((folder.comparison / FACTS).read_text())
    return found


def _say(console: Console | None, text: str) -> None:
    if console is not None:
        console.print(text, highlight=False)
