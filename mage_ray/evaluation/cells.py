"""Cells: one plan at one preference, generated for some prompts and seeds, scored and kept in one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mage_ray.chat import Chat, conversation
from mage_ray.decoding.methods import Setup, compact
from mage_ray.decoding.plan import Plan, Row
from mage_ray.decoding.request import Generation, Request, Sampling
from mage_ray.decoding.search import Found, search_all
from mage_ray.errors import UserError
from mage_ray.evaluation.strategies import Beams, Way
from mage_ray.files import atomic_path
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator, load_experts, set_digests
from mage_ray.objectives import Normaliser
from mage_ray.objectives.reward import reward_digests
from mage_ray.preference import Preference
from mage_ray.prompts import Prompt
from mage_ray.study import Study
from mage_ray.training.rollouts import draw_seed, load_normaliser, load_objectives, score_all

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Cell:
    """One method at one preference: its prompts, each with every seed of the study's evaluation, kept in one file.

    ``plan`` is over a bank of ``sets``. ``file`` is its name on every node (``StudyFolder.name_of``), and ends in a
    digest of all that its numbers depend on, so a cell is never taken for one of other settings.
    """

    method: str
    point: int
    preference: Preference | None
    plan: Plan
    sets: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    sampling: Sampling
    """But for the seed, which is each generation's own."""
    file: str
    way: Way = Way()  # noqa: RUF009 (frozen)

    def path(self, folder: StudyFolder) -> Path:
        """Where it lies on this node."""
        return folder.at(self.file)


def make_cells(
    study: Study,
    folder: StudyFolder,
    place: Path,
    plans: Mapping[str, Sequence[Plan]],
    setup: Setup,
    grid: Sequence[Preference],
    prompts: Sequence[Prompt],
    whole: bool = False,
    ways: Mapping[str, Sequence[Way]] | None = None,
) -> list[Cell]:
    """The cells of some methods by their names, each with its plan for each preference of ``grid``, in order.

    Where ``ways`` has a method, they say what is done with its plans, one for each. ``place`` is the folder of their
    files. All run on one bank: of no more sets than they need, or, with ``whole``, of all that ``setup`` has. A method
    that ignores the preference has one cell.
    """
    everything = [plan for of_method in plans.values() for plan in of_method]
    sets, flat = (list(setup.sets), everything) if whole else compact(everything, setup)
    banked = iter(flat)
    spec = study.evaluation
    sampling = Sampling(spec.max_new_tokens, spec.temperature, spec.top_p)
    shared: dict[str, Any] = {
        "model": study.model,
        "system": study.system,
        "dtype": study.dtype,
        "objectives": {name: spec.model_dump() for name, spec in study.objectives.items()},
        "normalisation": folder.normalisation.read_text(),
        "prompts": [prompt.id for prompt in prompts],
        "sampling": [study.seed, spec.seeds, asdict(sampling)],
    }
    if scored_by := reward_digests(folder, study.reward_models):
        shared["rewards"] = scored_by
    cells = []
    for method, of_method in plans.items():
        mine = [next(banked) for _ in of_method]
        # What a method's numbers depend on are the sets that it draws on itself, whatever else is in the bank.
        used, smallest = compact(of_method, setup)
        experts = [set_digests(folder, study, name) for name in used]
        own = (ways or {}).get(method, [Way()] * len(mine))
        preferences: list[Preference | None] = list(grid)
        if len(set(zip(mine, own, strict=True))) == 1:
            preferences = [None]
        for point, (plan, smaller, way, preference) in enumerate(zip(mine, smallest, own, preferences, strict=False)):
            content = [shared, experts, asdict(smaller), preference, *([] if way == Way() else [asdict(way)])]
            digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]
            file = folder.name_of(place / f"{method}-{point:02d}-{digest}.parquet")
            cells.append(Cell(method, point, preference, plan, tuple(sets), tuple(prompts), sampling, file, way))
    return cells


def read_cells(folder: StudyFolder, cells: Sequence[Cell]) -> list[pd.DataFrame]:
    """The cells' samples. Raises UserError for a corrupt file."""
    import pandas as pd

    frames = []
    for cell in cells:
        try:
            frames.append(pd.read_parquet(cell.path(folder)))
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:80]
            raise UserError(
                f"{cell.path(folder)}: corrupt ({reason}); delete it, and the next run makes it again"
            ) from None
    return frames


class CellRunner:
    """A study's model over a bank of ``sets`` and its objectives, loaded once, to generate, score and write cells.

    A cell's own sets must be among them. Raises UserError, one line, for what can't be loaded.
    """

    def __init__(self, study: Study, folder: StudyFolder, sets: Sequence[str], device: str | None = None) -> None:
        self._study, self._folder = study, folder
        self._normaliser = load_normaliser(folder, study)
        self._scorers = load_objectives(study, folder)
        experts = load_experts(folder, study, sets)
        self._sizes = {name: len(members) for name, members in experts.items()}
        self._generator = Generator(study, experts, rows=study.evaluation.batch_rows, device=device)

    def run(self, cells: Sequence[Cell]) -> Iterator[int]:
        """Write those that aren't there yet, all generated in one batch; yields 1 for every generation that ends."""
        todo = [cell for cell in cells if not cell.path(self._folder).exists()]
        if not todo:
            return
        study, generator = self._study, self._generator
        prompts = dict.fromkeys(prompt for cell in todo for prompt in cell.prompts)
        systems = dict.fromkeys([study.system, *(cell.way.system for cell in todo)])
        encoded = {
            (prompt, system): _encoded(generator.chat, prompt, system) for prompt in prompts for system in systems
        }
        draws = [(prompt, seed) for prompt in prompts for seed in study.evaluation.seeds]
        # Prompt by prompt: rows that several cells share, the reference above all, are computed once.
        asked = [(cell, prompt, seed) for prompt, seed in draws for cell in todo if prompt in cell.prompts]
        plans = {cell.file: _over_bank(cell, self._sizes) for cell in todo}
        requests = [
            Request(
                encoded[prompt, study.system if cell.way.system is None else cell.way.system],
                plans[cell.file],
                replace(cell.sampling, seed=_seed(study, cell, prompt, seed)),
            )
            for cell, prompt, seed in asked
        ]
        by_place: dict[int, Found] = {}
        for index, one in self._found(requests, [cell.way for cell, _, _ in asked]):
            by_place[index] = one
            yield 1
        found = [by_place[i] for i in range(len(asked))]
        answers = [one.answer for one in found]
        # What the reference says where it is asked as the study asks, whatever a way has told the model.
        plain = [encoded[prompt, study.system] for _, prompt, _ in asked]
        scores = generator.reference_logprobs([(p, a.ids) for p, a in zip(plain, answers, strict=True)])
        for cell in todo:
            own = [i for i, (of, _, _) in enumerate(asked) if of is cell]
            drawn, said = [asked[i][1:] for i in own], [answers[i] for i in own]
            raw_NM = score_all(self._scorers, [prompt.text for prompt, _ in drawn], [a.text for a in said])
            forwards = [_forwards(cell.plan, answers[i], found[i].drawn) for i in own]
            frame = _frame(cell, drawn, said, forwards, [scores[i] for i in own], raw_NM, self._normaliser)
            with atomic_path(cell.path(self._folder)) as partial:
                frame.to_parquet(partial)

    def _found(self, requests: Sequence[Request], ways: Sequence[Way]) -> Iterator[tuple[int, Found]]:
        """What each request has come to by its way, as (its index, what was found), as they end.

        All that take one round are one batch. Those of several rounds go on from what the last one left, and are few
        enough at a time that the runner keeps it.
        """
        engine, decode = self._generator.engine, self._generator.chat.decode
        beams = [i for i, way in enumerate(ways) if isinstance(way.search, Beams)]
        others = [i for i, way in enumerate(ways) if not isinstance(way.search, Beams)]
        rows = max((ways[i].draws * len(requests[i].plan.rows) for i in beams), default=1)
        for members, at_once in ((others, None), (beams, max(1, engine.runner.rows // rows))):
            for found in search_all(engine, [ways[i].start(requests[i], decode) for i in members], at_once):
                yield members[found.place], found


def cell_request(study: Study, chat: Chat, cell: Cell, prompt: Prompt, seed: int) -> Request:
    """What a cell asks for one of its prompts with one of the evaluation's seeds, over a bank of its own sets."""
    tokens = _encoded(chat, prompt, study.system if cell.way.system is None else cell.way.system)
    return Request(tokens, cell.plan, replace(cell.sampling, seed=_seed(study, cell, prompt, seed)))


def _seed(study: Study, cell: Cell, prompt: Prompt, seed: int) -> int:
    """The same for all preferences and methods, so that what they share cancels; but for ways with a stream."""
    return draw_seed(study.seed, prompt.id, seed, *filter(None, [cell.way.stream]))


def _encoded(chat: Chat, prompt: Prompt, system: str | None) -> tuple[int, ...]:
    return chat.encode_messages(conversation(prompt.text, system))


def _over_bank(cell: Cell, sizes: Mapping[str, int]) -> Plan:
    """A cell's plan over a bank of sets of these sizes, one after the other, which has the cell's own among others."""
    if cell.sets == tuple(sizes):
        return cell.plan
    begins = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    places = [begins[name] + i for name in cell.sets for i in range(sizes[name])]

    def wider(row: Row) -> Row:
        coefficients = np.zeros(sum(sizes.values()))
        coefficients[places] = row.coefficients
        return replace(row, coefficients=tuple(coefficients.tolist()))

    return replace(cell.plan, rows=tuple(map(wider, cell.plan.rows)))


def _frame(
    cell: Cell,
    draws: Sequence[tuple[Prompt, int]],
    answers: Sequence[Generation],
    forwards: Sequence[float],
    reference_logprobs: Sequence[Sequence[float]],
    raw_NM: np.ndarray,
    normaliser: Normaliser,
) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {
            "method": cell.method,
            "point": cell.point,
            "preference": [cell.preference] * len(draws),
            "prompt_id": [prompt.id for prompt, _ in draws],
            "seed": [seed for _, seed in draws],
            "prompt": [prompt.text for prompt, _ in draws],
            "completion": [answer.text for answer in answers],
            "tokens": [len(answer.ids) for answer in answers],
            "forwards": forwards,
            "kl": [_mean_log_ratio(a.logprobs, r) for a, r in zip(answers, reference_logprobs, strict=True)],
            **{f"raw/{name}": column for name, column in zip(normaliser.names, raw_NM.T, strict=True)},
            **{f"reward/{n}": column for n, column in zip(normaliser.names, normaliser.apply(raw_NM).T, strict=True)},
        }
    )


def _forwards(plan: Plan, answer: Generation, drawn: Iterable[Generation]) -> float:
    """Forwards of a row per token of the answer, those of all that was ``drawn`` for it.

    A drawn token takes all rows where the guide ran, the base alone elsewhere.
    """
    if not answer.ids:
        return float(len(plan.rows))
    return sum(len(one.ids) + (len(plan.rows) - 1) * one.guided for one in drawn) / len(answer.ids)


def _mean_log_ratio(guided: Sequence[float], reference: Sequence[float]) -> float:
    """KL from the reference per token, estimated on the sampled tokens: ``mean(log pi - log pi_ref)``, in nats."""
    return float(np.mean(np.subtract(guided, reference))) if len(guided) else 0.0
