"""The jobs that the command line and ``jobs/*.py`` run: each finishes what a study is missing, and can be killed."""

from __future__ import annotations

import os
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from mage_ray.errors import UserError
from mage_ray.study import Study, StudyFolder, load_study

if TYPE_CHECKING:
    from rich.console import Console

    from mage_ray.evaluation.summary import Summary

SHOWN_PROMPT = "How was your day?"
SHOWN_TEMPERATURE = 0.4
"""Low, so that the three answers differ by preference more than by chance."""


def open_study(study: Path | str, folder: Path | str | None = None) -> tuple[Study, StudyFolder]:
    """The study in a YAML file, and its folder (``runs/<name>`` unless given), or an existing study folder.

    Raises UserError when neither is there, or when the folder was made for another study.
    """
    path = Path(study)
    if path.is_dir():
        if folder is not None:
            raise UserError(f"--folder: got {folder}, allowed: nothing, since --study is a study folder already")
        place = StudyFolder(path)
        return place.study, place
    spec = load_study(path)
    return spec, StudyFolder.create(folder or Path("runs") / spec.name, spec)


def train(study: Study, folder: StudyFolder, console: Console) -> None:
    """Sample the rollout pool and train the experts."""
    from mage_ray.cluster import connected
    from mage_ray.progress import shown
    from mage_ray.training.experts import check_training, train_experts
    from mage_ray.training.rollouts import sample_pool

    check_training(study)
    with connected():
        with shown(console, "rollouts") as progress:
            sample_pool(study, folder, progress=progress)
        train_experts(study, folder, console)


def values(study: Study, folder: StudyFolder, console: Console) -> None:
    """Train the study's explicit value models on its pool, measure them, and print how well they tell the rewards."""
    import json

    from rich.table import Table

    from mage_ray.cluster import connected
    from mage_ray.progress import shown
    from mage_ray.training.rollouts import sample_pool
    from mage_ray.training.values import QUALITY, train_values, values_spec

    values_spec(study)
    with connected():
        with shown(console, "rollouts") as progress:
            sample_pool(study, folder, progress=progress)
        train_values(study, folder, console)
    table = Table(title="Value models on prompts held out", title_justify="left")
    for column in (
        "objective",
        "share of the answer seen",
        "rank correlation [90 %]",
        "mean squared error",
        "variance",
    ):
        table.add_column(column, justify="left" if column == "objective" else "right")
    for name in study.objective_names:
        quality = json.loads((folder.value(name) / QUALITY).read_text())
        for row in quality["by_prefix"]:
            correlation = f"{row['correlation']:.2f} [{row['low']:.2f}, {row['high']:.2f}]"
            numbers = (f"{row['seen']:.0%}", correlation, f"{row['error']:.2f}", f"{quality['variance']:.2f}")
            table.add_row(name, *numbers)
    console.print(table)


def evaluate(study: Study, folder: StudyFolder, console: Console) -> Summary:
    """Generate and score the evaluation's grid, write the report, print the table."""
    from mage_ray.cluster import connected
    from mage_ray.evaluation.evaluate import evaluate_study
    from mage_ray.evaluation.report import print_table, write_report
    from mage_ray.evaluation.summary import summarise
    from mage_ray.merging.coefficients import merging_coefficients, noise_amplification
    from mage_ray.progress import shown

    start = time.monotonic()
    with connected(), shown(console, "evaluation") as progress:
        samples = evaluate_study(study, folder, progress)
    summary = summarise(samples, study.objective_names, study.reference_point(), study.evaluation.resamples, study.seed)
    mix = study.training.backbones[study.guidance.base].mix(len(study.objectives))
    amplified = max(noise_amplification(merging_coefficients(mix, mu)) for mu in study.evaluation_grid())
    facts = {
        "study": study.name,
        "model": study.model,
        "noise amplification": f"||lam||_1 of the base's soup is {amplified:.2f} at most on this grid",
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {platform.system()}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "evaluation": f"{time.monotonic() - start:.0f} s in this run (cells that were there already cost nothing)",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("mage-ray", "torch", "transformers", "ray")),
    }
    write_report(folder.report, title=study.name, summary=summary, samples=samples, facts=facts)
    print_table(summary, console)
    console.print(f"report: {folder.report / 'index.html'}", highlight=False, soft_wrap=True)
    return summary


def demo(study: Study, folder: StudyFolder, console: Console) -> None:
    """The main job: train, evaluate, and show one prompt answered at three preferences."""
    start = time.monotonic()
    console.print(f"study folder: {folder.path}", highlight=False, soft_wrap=True)
    train(study, folder, console)
    evaluate(study, folder, console)
    show_axis(study, folder, console)
    console.print(f"demo: {time.monotonic() - start:.0f} s in this run", highlight=False)


def show_axis(study: Study, folder: StudyFolder, console: Console, prompt: str = SHOWN_PROMPT) -> None:
    """One prompt answered by MAGE-I-M at the first objective's corner, in the middle, and at the second's."""
    from rich.panel import Panel
    from rich.text import Text

    from mage_ray.decoding.request import Sampling
    from mage_ray.generator import Generator

    first, second = study.objective_names[:2]
    spec = study.evaluation
    sampling = Sampling(spec.max_new_tokens, SHOWN_TEMPERATURE, spec.top_p, study.seed)
    generator = Generator.open(folder.path)
    preferences = [{first: 1.0}, {first: 0.5, second: 0.5}, {second: 1.0}]
    requests = [generator.request(prompt, p, sampling=sampling) for p in preferences]
    console.print(Text(f"\n{prompt}", style="bold"))
    for preference, answer in zip(preferences, generator.run(requests), strict=True):
        title = ", ".join(f"{name} {weight:g}" for name, weight in preference.items())
        console.print(Panel(Text(answer.text), title=f"mage-i-m at {title}", title_align="left"))
