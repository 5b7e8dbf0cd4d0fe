"""Cells: one plan at one preference, generated for some prompts and seeds, scored and kept in one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mage_ray.decoding.methods import Setup, compact
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Generation, Request, Sampling, Token
from mage_ray.errors import UserError
from mage_ray.files import atomic_path
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator, load_experts, set_digests
from mage_ray.objectives import Normaliser
from mage_ray.preference import Preference
from mage_ray.prompts import Prompt
from mage_ray.study import Study
from mage_ray.training.rollouts import draw_seed, load_normaliser, load_objectives, score_all

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Cell:
    """One method at one preference: its prompts, each with every seed of the study's evaluation, kept in one file.

    ``plan`` is over a bank of ``sets``. ``path`` ends in a digest of all that its numbers depend on, so a cell is never
    taken for one of other settings.
    """

    method: str
    point: int
    preference: Preference | None
    plan: Plan
    sets: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    """But for the seed, which is each generation's own."""
    path: Path


def make_cells(
    study: Study,
    folder: StudyFolder,
    place: Path,
    plans: Mapping[str, Sequence[Plan]],
    setup: Setup,
    grid: Sequence[Preference],
    prompts: Sequence[Prompt],
    whole: bool = False,
) -> list[Cell]:
    """The cells of some methods by their names, each with its plan for each preference of ``grid``, in order.

    ``place`` is the folder of their files. All run on one bank: of no more sets than they need, or, with ``whole``, of
    all that ``setup`` has. A method that ignores the preference has one cell.
    """
    everything = [plan for of_method in plans.values() for plan in of_method]
    sets, flat = (list(setup.sets), everything) if whole else compact(everything, setup)
    banked = iter(flat)
    spec = study.evaluation
    sampling = Sampling(spec.max_new_tokens, spec.temperature, spec.top_p)
    shared = {
        "model": study.model,
        "system": study.system,
        "dtype": study.dtype,
        "objectives": {name: spec.model_dump() for name, spec in study.objectives.items()},
        "normalisation": folder.normalisation.read_text(),
        "prompts": [prompt.id for prompt in prompts],
        "sampling": [study.seed, spec.seeds, asdict(sampling)],
    }
    cells = []
    for method, of_method in plans.items():
        mine = [next(banked) for _ in of_method]
        # What a method's numbers depend on are the sets that it draws on itself, whatever else is in the bank.
        used, smallest = compact(of_method, setup)
        experts = [set_digests(folder, study, name) for name in used]
        preferences: list[Preference | None] = list(grid)
        if len(set(mine)) == 1:
            preferences = [None]
        for point, (plan, smaller, preference) in enumerate(zip(mine, smallest, preferences, strict=False)):
            content = json.dumps([shared, experts, asdict(smaller), preference], sort_keys=True)
            digest = hashlib.sha256(content.encode()).hexdigest()[:12]
            path = place / f"{method}-{point:02d}-{digest}.parquet"
            cells.append(Cell(method, point, preference, plan, tuple(sets), tuple(prompts), sampling, path))
    return cells


def read_cells(cells: Sequence[Cell]) -> list[pd.DataFrame]:
    """The cells' samples. Raises UserError for a corrupt file."""
    import pandas as pd

    frames = []
    for cell in cells:
        try:
            frames.append(pd.read_parquet(cell.path))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:80]
            raise UserError(f"{cell.path}: corrupt ({reason}); delete it, and the next run makes it again") from None
    return frames


class CellRunner:
    """A study's model over a bank of ``sets`` and its objectives, loaded once, to generate, score and write cells.

    Raises UserError, one line, for what can't be loaded.
    """

    def __init__(self, study: Study, folder: Path, sets: Sequence[str], device: str | None = None) -> None:
        place = StudyFolder(folder)
        self._study = study
        self._normaliser = load_normaliser(place, study)
        self._scorers = load_objectives(study, place)
        experts = load_experts(place, study, sets)
        self._generator = Generator(study, experts, rows=study.evaluation.batch_rows, device=device)

    def run(self, cells: Sequence[Cell]) -> Iterator[int]:
        """Write those that aren't there yet, all generated in one batch; yields 1 for every generation that ends."""
        todo = [cell for cell in cells if not cell.path.exists()]
        if not todo:
            return
        study, generator = self._study, self._generator
        prompts = dict.fromkeys(prompt for cell in todo for prompt in cell.prompts)
        encoded = {prompt: generator.chat.encode(prompt.text) for prompt in prompts}
        draws = [(prompt, seed) for prompt in prompts for seed in study.evaluation.seeds]
        # Prompt by prompt: rows that several cells share, the reference above all, are computed once.
        asked = [(cell, prompt, seed) for prompt, seed in draws for cell in todo if prompt in cell.prompts]
        requests = [
            Request(encoded[prompt], cell.plan, replace(cell.sampling, seed=draw_seed(study.seed, prompt.id, seed)))
            for cell, prompt, seed in asked
        ]
        tokens: list[list[Token]] = [[] for _ in requests]
        for index, token in generator.engine.events(requests):
            tokens[index].append(token)
            if token.finished:
                yield 1
        answers = [Generation.of(drawn).require() for drawn in tokens]
        scores = generator.reference_logprobs([(r.prompt, a.ids) for r, a in zip(requests, answers, strict=True)])
        for cell in todo:
            own = [i for i, (of, _, _) in enumerate(asked) if of is cell]
            drawn, said = [asked[i][1:] for i in own], [answers[i] for i in own]
            raw_NM = score_all(self._scorers, [prompt.text for prompt, _ in drawn], [a.text for a in said])
            _write(cell, drawn, said, [scores[i] for i in own], raw_NM, self._normaliser)


def _write(
    cell: Cell,
    draws: Sequence[tuple[Prompt, int]],
    answers: Sequence[Generation],
    reference_logprobs: Sequence[Sequence[float]],
    raw_NM: np.ndarray,
    normaliser: Normaliser,
) -> None:
    import pandas as pd

    frame = pd.DataFrame(
        {
            "method": cell.method,
            "point": cell.point,
            "preference": [cell.preference] * len(draws),
            "prompt_id": [prompt.id for prompt, _ in draws],
            "seed": [seed for _, seed in draws],
            "prompt": [prompt.text for prompt, _ in draws],
            "completion": [answer.text for answer in answers],
            "tokens": [len(answer.ids) for answer in answers],
            "forwards": [_forwards(cell.plan, answer) for answer in answers],
            "kl": [_mean_log_ratio(a.logprobs, r) for a, r in zip(answers, reference_logprobs, strict=True)],
            **{f"raw/{name}": column for name, column in zip(normaliser.names, raw_NM.T, strict=True)},
            **{f"reward/{n}": column for n, column in zip(normaliser.names, normaliser.apply(raw_NM).T, strict=True)},
        }
    )
    with atomic_path(cell.path) as partial:
        frame.to_parquet(partial)


def _forwards(plan: Plan, answer: Generation) -> float:
    """Forwards of a row per token: all rows where the guide ran, the base alone elsewhere."""
    share = answer.guided / len(answer.ids) if answer.ids else 1.0
    return 1 + (len(plan.rows) - 1) * share


def _mean_log_ratio(guided: Sequence[float], reference: Sequence[float]) -> float:
    """KL from the reference per token, estimated on the sampled tokens: ``mean(log pi - log pi_ref)``, in nats."""
    return float(np.mean(np.subtract(guided, reference))) if len(guided) else 0.0
