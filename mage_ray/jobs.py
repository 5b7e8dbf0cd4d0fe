"""The jobs that the command line and ``jobs/*.py`` run: each finishes what a study is missing, and can be killed."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mage_ray.errors import FieldError, UserError
from mage_ray.folder import StudyFolder
from mage_ray.storage.downloads import local_path
from mage_ray.storage.store import is_url
from mage_ray.study import Study, load_study

if TYPE_CHECKING:
    from rich.console import Console

    from mage_ray.evaluation.summary import Summary
    from mage_ray.search.recipe import Recipe

SHOWN_PROMPT = "How was your day?"
SHOWN_TEMPERATURE = 0.4
"""Low, so that the three answers differ by preference more than by chance."""


def open_study(
    study: Path | str, folder: Path | str | None = None, seed: int | None = None
) -> tuple[Study, StudyFolder]:
    """The study in a YAML file, and its folder (``runs/<name>`` unless given), or an existing study folder.

    Folders may be at URLs; all that jobs before this one have left there, but for checkpoints, is then on this node.

    With a ``seed`` a file's study has this one in place of its own, and ``-<seed>`` in its name. Raises UserError when
    neither is there, or when the folder was made for another study.
    """
    if (is_url(study) and not str(study).endswith((".yaml", ".yml"))) or Path(study).is_dir():
        if seed is not None:
            raise UserError(f"--seed: got {seed}, allowed: nothing, since --study is a study folder already")
        if folder is not None:
            raise UserError(f"--folder: got {folder}, allowed: nothing, since --study is a study folder already")
        place = StudyFolder(study)
        place.check()
        place.fetch(*place.results)
        return place.study, place
    spec = load_study(local_path(study))
    if seed is not None:
        if seed < 0:
            raise FieldError("--seed", seed, "a whole number, 0 or more")
        spec = spec.model_copy(update={"seed": seed, "name": f"{spec.name}-{seed}"})
    place = StudyFolder.create(folder or Path("runs") / spec.name, spec)
    place.fetch(*place.results)
    return place.study, place


@contextmanager
def _kept(folder: StudyFolder) -> Iterator[None]:
    """After it, whatever it ends with, the folder's storage has what was made in it."""
    try:
        yield
    finally:
        folder.publish(*folder.results)


@contextmanager
def _working_on(folder: StudyFolder) -> Iterator[None]:
    """The same, and Ray is there."""
    from mage_ray.cluster import connected

    with connected(), _kept(folder):
        yield


def train(study: Study, folder: StudyFolder, console: Console) -> None:
    """Sample the rollout pool and train the experts, of sets with several betas those of the best one."""
    from mage_ray.progress import shown
    from mage_ray.search.beta import choose_betas
    from mage_ray.training.experts import check_training, train_experts
    from mage_ray.training.rollouts import sample_pool

    check_training(study)
    with _working_on(folder):
        with shown(console, "rollouts") as progress:
            sample_pool(study, folder, progress=progress)
        train_experts(choose_betas(study, folder, console), folder, console)


def values(study: Study, folder: StudyFolder, console: Console) -> None:
    """Train the study's explicit value models on its pool, measure them, and print how well they tell the rewards."""
    import json

    from rich.table import Table

    from mage_ray.progress import shown
    from mage_ray.training.rollouts import sample_pool
    from mage_ray.training.values import QUALITY, check_values, train_values

    check_values(study)
    with _working_on(folder):
        with shown(console, "rollouts") as progress:
            sample_pool(study, folder, progress=progress)
        train_values(study, folder, console)
    table = Table(title="Value models on prompts held out", title_justify="left")
    for column in (
        "value model",
        "of the answer seen",
        "answers",
        "rank correlation [90 %]",
        "mean squared error",
        "variance",
    ):
        table.add_column(column, justify="left" if column == "value model" else "right")
    for place in [folder.value(set, name) for set in study.values for name in study.objective_names]:
        quality = json.loads((place / QUALITY).read_text())
        seen = [(f"{row['seen']:.0%}", row) for row in quality["by_share"]]
        seen += [(f"{row['seen']} tokens", row) for row in quality["by_length"]]
        for label, row in seen:
            correlation = f"{row['correlation']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            numbers = (label, f"{row['answers']}", correlation, f"{row['error']:.2f}", f"{quality['variance']:.2f}")
            table.add_row(place.name, *numbers)
    console.print(table)


def baselines(study: Study, folder: StudyFolder, console: Console) -> None:
    """Train what the study's baselines need, on its pool, and print what is there."""
    from mage_ray.progress import shown
    from mage_ray.training.baselines import check_baselines, train_baselines
    from mage_ray.training.rollouts import sample_pool

    check_baselines(study)
    with _working_on(folder):
        with shown(console, "rollouts") as progress:
            sample_pool(study, folder, progress=progress)
        train_baselines(study, folder, console)
    for name, spec in study.baselines.items():
        console.print(f"{name} ({spec.kind}): {', '.join(study.members(name))}", highlight=False)


def rewards(study: Study, folder: StudyFolder, console: Console) -> None:
    """Train the study's reward models, and print how right they are on prompts held out."""
    import json

    from rich.table import Table

    from mage_ray.training.rewards import train_rewards
    from mage_ray.training.values import QUALITY

    with _kept(folder):
        train_rewards(study, folder, console)
    title = "Reward models on prompts held out (before, after calibration)"
    table = Table(title=title, title_justify="left")
    table.add_column("reward model")
    accuracy = f"accuracy [{study.evaluation.confidence:.0%}]"
    for column in ("rows", accuracy, "rival's", "nats a row", "calibration\nerror"):
        table.add_column(column, justify="right")
    for name in study.rewards:
        quality = json.loads((folder.rewards / name / QUALITY).read_text())
        right, rival = quality["accuracy"], quality["rival"]
        before, after = quality["calibration"]["before"], quality["calibration"]["after"]
        table.add_row(
            name,
            str(quality["held_out"]),
            f"{right['value']:.1%} [{right['low']:.1%}, {right['high']:.1%}]",
            f"{rival['name']} {rival['value']:.1%}",
            f"{before['nll']:.3f}, {after['nll']:.3f}",
            f"{before['ece']:.3f}, {after['ece']:.3f}",
        )
    console.print(table)


def evaluate(study: Study, folder: StudyFolder, console: Console, recipe: Path | str | None = None) -> Summary:
    """Generate and score the evaluation's grid, a recipe beside the methods; write the report, print the table."""
    from mage_ray.evaluation.evaluate import evaluate_study
    from mage_ray.evaluation.report import print_table, write_report
    from mage_ray.evaluation.summary import summary_of
    from mage_ray.merging.coefficients import merging_coefficients, noise_amplification
    from mage_ray.progress import shown
    from mage_ray.search.recipe import load_recipe

    start = time.monotonic()
    with _working_on(folder), shown(console, "evaluation") as progress:
        samples = evaluate_study(study, folder, progress, None if recipe is None else load_recipe(recipe))
    summary = summary_of(study, samples)
    mix = study.training.backbones[study.guidance.base].mix(len(study.objectives))
    amplified = max(noise_amplification(merging_coefficients(mix, mu)) for mu in study.evaluation_grid())
    facts = {
        "study": study.name,
        "noise amplification": f"||lam||_1 of the base's soup is {amplified:.2f} at most on this grid",
        "evaluation": f"{time.monotonic() - start:.0f} s in this run (cells that were there already cost nothing)",
        **_facts(study),
    }
    write_report(folder.report, title=study.name, summary=summary, samples=samples, facts=facts)
    folder.publish(folder.report)
    print_table(summary, console)
    console.print(f"report: {folder.shown(folder.report / 'index.html')}", highlight=False, soft_wrap=True)
    return summary


def search(study: Study, folder: StudyFolder, console: Console, *, resume: bool = False, fresh: bool = False) -> Recipe:
    """Search the study's constants, write the recipe of the best, and print what it gains on unseen prompts."""
    from mage_ray.search.run import search_study

    start = time.monotonic()
    with _working_on(folder):
        recipe = search_study(study, folder, console, resume, fresh, _facts(study))
    made = recipe.provenance
    assert made is not None
    console.print(f"search: {made.trials} settings in {time.monotonic() - start:.0f} s in this run", highlight=False)
    for name, gain in made.gain.items():
        own, ours = made.defaults[name].value, made.unseen[name].value
        between = f"{gain.value} [{gain.low}, {gain.high}]"
        console.print(f"{name} on unseen prompts: {ours}, defaults {own}, difference {between}", highlight=False)
    console.print(f"recipe: {folder.shown(folder.recipe)}", highlight=False, soft_wrap=True)
    return recipe


def compare(
    study: Study, folder: StudyFolder, console: Console, *, fresh: bool = False, against: Path | str | None = None
) -> None:
    """Train, tune and test every method of the study's comparison, print what it finds, and hold it against another."""
    from mage_ray.comparison.page import print_comparison
    from mage_ray.comparison.results import COMPARED, agreement, read_comparison
    from mage_ray.comparison.run import RESULT, compare_study

    other = None if against is None else read_comparison(local_path(against), study)
    start = time.monotonic()
    with _working_on(folder):
        content = compare_study(study, folder, console, fresh, _facts(study))
    print_comparison(content, console)
    for measure in COMPARED if other is not None else ():
        found = agreement(content, other or {}, measure)
        turned = ", ".join(" and ".join(pair) for pair in found["turned"]) or "none"
        counts = f"both tell {len(found['kept'])} pairs apart alike, one of them alone {len(found['apart_once'])}"
        console.print(f"{measure}: {counts}; the other way round: {turned}", highlight=False, soft_wrap=True)
    console.print(f"comparison: {time.monotonic() - start:.0f} s in this run", highlight=False)
    for path in (folder.comparison / RESULT, folder.report / "comparison.html"):
        console.print(f"wrote {folder.shown(path)}", highlight=False, soft_wrap=True)


def analyse(study: Study, folder: StudyFolder, names: Sequence[str], console: Console) -> None:
    """Run analyses of a trained study by their names, and write each into the report."""
    from mage_ray.analysis.run import section
    from mage_ray.analysis.sections import print_tables, write_section

    with _working_on(folder):
        for name in names:
            start = time.monotonic()
            made = section(name, study, folder, console)
            facts = {"analysis": f"{time.monotonic() - start:.0f} s in this run", **_facts(study)}
            write_section(study, folder, made, facts)
            print_tables(made.tables, console)
    console.print(f"analyses: {folder.shown(folder.report / 'analyses.html')}", highlight=False, soft_wrap=True)


def remove(folder: StudyFolder, parts: Sequence[str]) -> None:
    """Delete these parts of a study's folder, here and in its storage. Raises FieldError for what is no part of it."""
    places = [folder.path / part for part in parts]
    for part, place in zip(parts, places, strict=True):
        if not any(place.is_relative_to(result) for result in folder.results[1:]) or ".." in place.parts:
            raise FieldError("part", part, "what lies in a study's folder beside study.yaml: values/final-helpful, say")
        if not place.exists():
            raise FieldError("part", part, "what is there")
    folder.remove(*places)


def _facts(study: Study) -> dict[str, str]:
    """What a report says of how it came about."""
    return {
        "model": study.model,
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "versions": ", ".join(f"{name} {version(name)}" for name in ("mage-ray", "torch", "transformers", "ray")),
    }


def demo(study: Study, folder: StudyFolder, console: Console) -> None:
    """The main job: train, evaluate, search, and show one prompt answered at three preferences."""
    start = time.monotonic()
    console.print(f"study folder: {folder.place}", highlight=False, soft_wrap=True)
    train(study, folder, console)
    study = folder.study
    evaluate(study, folder, console)
    search(study, folder, console, resume=True)
    show_axis(study, folder, console)
    console.print(f"demo: {time.monotonic() - start:.0f} s in this run", highlight=False)


def show_axis(study: Study, folder: StudyFolder, console: Console, prompt: str = SHOWN_PROMPT) -> None:
    """One prompt answered by the study's recipe at the first objective's corner, in the middle, and at the second's."""
    from rich.panel import Panel
    from rich.text import Text

    from mage_ray.decoding.request import Sampling
    from mage_ray.generator import Generator

    first, second = study.objective_names[:2]
    spec = study.evaluation
    sampling = Sampling(spec.max_new_tokens, SHOWN_TEMPERATURE, spec.top_p, study.seed)
    generator = Generator.open(folder.place, recipe=folder.recipe)
    preferences = [{first: 1.0}, {first: 0.5, second: 0.5}, {second: 1.0}]
    requests = [generator.request(prompt, p, sampling=sampling) for p in preferences]
    console.print(Text(f"\n{prompt}", style="bold"))
    for preference, answer in zip(preferences, generator.run(requests), strict=True):
        title = ", ".join(f"{name} {weight:g}" for name, weight in preference.items())
        console.print(Panel(Text(answer.text), title=f"{generator.method} at {title}", title_align="left"))
