"""The evaluation's cells of baselines and of searches, on a tiny study, against the library asked one by one."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from adapters import make_adapter
from studies import add_baselines, add_value_models, trained_study

from mage_ray.decoding.methods import EXPLICIT, METHODS, compact, plan_for
from mage_ray.decoding.plan import Plan
from mage_ray.decoding.request import Generation, Request, Sampling
from mage_ray.decoding.search import beam_search
from mage_ray.decoding.seeds import derived_seed
from mage_ray.errors import FieldError
from mage_ray.evaluation.cells import Cell, CellRunner
from mage_ray.evaluation.evaluate import method_cells, study_cells
from mage_ray.evaluation.strategies import STRATEGIES, Way, in_words
from mage_ray.folder import StudyFolder
from mage_ray.generator import Generator, bank_setup, needed_sets, set_digests
from mage_ray.models import load_model
from mage_ray.study import Study
from mage_ray.training.rollouts import draw_seed, study_prompts

BASELINES = {"morlhf": {"kind": "morlhf"}, "modpo": {"kind": "modpo"}, "arm": {"kind": "arm"}}
OBJECTIVES = {"positive": {"type": "positivity"}, "short": {"type": "brevity"}}


@pytest.fixture(scope="module")
def folder(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StudyFolder:
    """A study with everything trained, at random: experts, value models, and baselines at three preferences."""
    made = trained_study(
        tmp_path_factory.mktemp("strategies") / "study",
        tiny_model_folder,
        objectives=OBJECTIVES,
        prompts={"train": 6, "evaluation": 2},
        evaluation={"grid": 3, "max_new_tokens": 8},
        values={"final": {"head": "vocabulary", "rank": 3}},
        baselines=BASELINES,
        strategies={"n": 3, "width": 2, "expansions": 2, "chunk": 3},
    )
    add_value_models(made, tiny_model_folder)
    add_baselines(made, tiny_model_folder)
    return made


def changed(study: Study, **fields: Any) -> Study:
    return Study.model_validate(study.model_dump() | fields)


def run(study: Study, folder: StudyFolder, method: str) -> tuple[list[Cell], list[pd.DataFrame]]:
    cells = method_cells(study, folder, {method: method})
    list(CellRunner(study, folder, cells[0].sets).run(cells))
    return cells, [pd.read_parquet(cell.path(folder)) for cell in cells]


def seeds(study: Study) -> list[int]:
    _, prompts = study_prompts(study)
    return [draw_seed(study.seed, prompt.id, seed) for prompt in prompts for seed in study.evaluation.seeds]


def sampling(study: Study, seed: int) -> Sampling:
    spec = study.evaluation
    return Sampling(spec.max_new_tokens, spec.temperature, spec.top_p, seed)


@pytest.fixture(scope="module")
def generator(folder: StudyFolder) -> Generator:
    return Generator.open(folder.path, rows=96, length=200)


Drawn = tuple[Any, tuple[float, ...], int]
"""A sample of a cell, the cell's preference, and the seed that it was drawn by."""


def samples(study: Study, cells: list[Cell], frames: list[pd.DataFrame]) -> list[Drawn]:
    return [
        (row, cell.preference or (), seed)
        for cell, frame in zip(cells, frames, strict=True)
        for row, seed in zip(frame.itertuples(), seeds(study), strict=True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["morlhf", "modpo", "genarm"])
def test_a_trained_baselines_cells_are_what_the_library_says(
    folder: StudyFolder, generator: Generator, method: str
) -> None:
    study = folder.study
    cells, frames = run(study, folder, method)
    assert [cell.preference for cell in cells] == [(0.0, 1.0), (0.5, 0.5), (1.0, 0.0)]
    assert cells[0].sets == ({"genarm": "arm"}.get(method, method),)
    drawn = samples(study, cells, frames)
    requests = [generator.request(row.prompt, mu, method, sampling=sampling(study, seed)) for row, mu, seed in drawn]
    for (row, _, _), request, answer in zip(drawn, requests, generator.run(requests), strict=True):
        assert answer.text == row.completion and row.forwards == len(request.plan.rows)
    assert len({tuple(frame["completion"]) for frame in frames}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("guide", ["mage-i-m", "mage-e-m", "genarm"])
def test_best_of_n_is_the_argmax_of_the_guides_score_over_n_samples_of_the_base(
    folder: StudyFolder, generator: Generator, guide: str
) -> None:
    study = changed(folder.study, strategies={"n": 3, "method": guide})
    drawn = samples(study, *run(study, folder, "best-of-n"))
    requests = []
    for row, mu, seed in drawn:
        plan = generator.plan(mu, guide, strength=0.0, valued=True)
        how = [sampling(study, derived_seed(seed, 0, i)) for i in range(3)]
        requests += [Request(generator.chat.encode(row.prompt), plan, one) for one in how]
    answers = generator.run(requests)
    values = np.array([one.value for one in answers])
    if guide not in EXPLICIT:  # policies: their log-probabilities, apart from decoding
        np.testing.assert_allclose(values, scores(generator, requests, answers), atol=2e-3)
    winners = values.reshape(-1, 3).argmax(axis=1)
    assert len(set(winners)) > 1
    for i, ((row, _, _), winner) in enumerate(zip(drawn, winners, strict=True)):
        three = answers[3 * i : 3 * i + 3]
        assert row.completion == three[winner].text and row.tokens == len(three[winner].ids)
        spent = sum(len(one.ids) for one in three) * len(requests[3 * i].plan.rows)
        assert row.forwards == pytest.approx(spent / row.tokens)


def scores(generator: Generator, requests: list[Request], answers: list[Generation]) -> np.ndarray:
    """The guide's score of each answer: its policies' log-probabilities, by whole forwards."""
    totals = np.zeros(len(requests))
    for row in {row for request in requests for row in request.plan.rows}:
        own = [i for i, request in enumerate(requests) if row in request.plan.rows]
        sequences = [[*requests[i].prompt, *answers[i].ids] for i in own]
        logprobs = generator.runner.score(row, sequences, [len(requests[i].prompt) for i in own])
        for i, logprob in zip(own, logprobs, strict=True):
            plan = requests[i].plan
            totals[i] += plan.values[plan.rows.index(row)] * float(logprob.sum())
    return totals


@pytest.mark.slow
def test_beam_search_is_the_librarys_and_all_that_it_draws_counts(folder: StudyFolder, generator: Generator) -> None:
    study = changed(folder.study, strategies={"width": 2, "expansions": 2, "chunk": 3, "strength": 0.7})
    cells, frames = run(study, folder, "beam-search")
    for row, mu, seed in samples(study, cells, frames)[1::2]:
        plan = generator.plan(mu, strength=0.7, valued=True)
        request = Request(generator.chat.encode(row.prompt), plan, sampling(study, seed))
        strategy = beam_search(request, 2, 2, 3, generator.chat.decode)
        requests, spent = next(strategy), 0
        try:
            while True:
                answers = generator.engine.generate(requests)
                spent += sum(len(answer.ids) for answer in answers)
                requests = strategy.send(answers)
        except StopIteration as end:
            best = end.value
        assert row.completion == best.text and row.tokens == len(best.ids) < spent
        assert row.forwards == pytest.approx(spent * len(plan.rows) / row.tokens)


@pytest.mark.slow
def test_prompting_tells_the_reference_the_weights_and_is_measured_against_it_untold(folder: StudyFolder) -> None:
    import torch

    study = changed(folder.study, system="Be nice.")
    cells, frames = run(study, folder, "prompting")
    assert cells[0].sets == () and len({cell.file for cell in cells}) == 3
    bare, drawn = Generator(study, {}, rows=24, length=400), samples(study, cells, frames)
    requests, untold = [], []
    for row, mu, seed in drawn:
        user = {"role": "user", "content": row.prompt}
        told = {"role": "system", "content": f"Be nice. {in_words(['positive', 'short'], mu)}"}
        plan = Plan.of([((), 1.0)])
        requests.append(Request(bare.chat.encode_messages([told, user]), plan, sampling(study, seed)))
        untold.append(bare.chat.encode_messages([{"role": "system", "content": "Be nice."}, user]))
    reference = load_model(study.model).double()
    for (row, _, _), prompt, answer in zip(drawn, untold, bare.run(requests), strict=True):
        assert row.completion == answer.text and row.forwards == 1
        logits = reference(torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0].detach().numpy()
        assert row.kl == pytest.approx(np.mean(np.array(answer.logprobs) - logprobs), abs=1e-4)


def test_a_preference_in_words_and_numbers() -> None:
    text = in_words(["positive", "not_long", "x"], (0.7, 0.3, 0.0))
    assert "positive: very important (weight 0.70)" in text
    assert "not long: somewhat important (weight 0.30)" in text and "x: not important (weight 0.00)" in text
    assert "most important (weight 1.00)" in in_words(["a", "b"], (1.0, 0.0))


def names(study: Study, folder: StudyFolder, method: str) -> set[str]:
    return {Path(cell.file).name for cell in method_cells(study, folder, {method: method})}


def test_cells_of_other_constants_are_other_cells(folder: StudyFolder, tiny_model_folder: Path, tmp_path: Path) -> None:
    study = folder.study
    own = {method: names(study, folder, method) for method in [*METHODS, "morlhf", "genarm", *STRATEGIES]}
    moved = {
        ("n", 4): {"best-of-n"},
        ("method", "mage-e-m"): {"best-of-n", "beam-search"},
        ("strength", 0.5): {"best-of-n", "beam-search"},
        ("width", 3): {"beam-search"},
        ("expansions", 3): {"beam-search"},
        ("chunk", 6): {"beam-search"},
    }
    for (field, value), those in moved.items():
        other = changed(study, strategies=study.strategies.model_dump() | {field: value})
        assert {method for method in own if names(other, folder, method).isdisjoint(own[method])} == those, field
    assert len(own["prompting"]) == 3
    assert names(changed(study, system="Be nice."), folder, "prompting").isdisjoint(own["prompting"])
    # Another expert is another cell, of the methods that draw on it alone.
    copy = StudyFolder(shutil.copytree(folder.path, tmp_path / "copy"))
    make_adapter(tiny_model_folder, copy.baseline("arm", "short"), seed=99)
    assert names(study, copy, "genarm").isdisjoint(own["genarm"])
    assert names(study, copy, "morlhf") == own["morlhf"] and names(study, copy, "mage-i-m") == own["mage-i-m"]


def test_cells_of_a_plan_alone_have_the_names_that_they_had(folder: StudyFolder) -> None:
    """By the formula: what is generated for a study is not thrown away when searches come to it."""
    study = folder.study
    setup, grid = bank_setup(study, needed_sets(folder, study)), study.evaluation_grid()
    _, prompts = study_prompts(study)
    shared = {
        "model": study.model,
        "system": study.system,
        "dtype": study.dtype,
        "objectives": {name: spec.model_dump() for name, spec in study.objectives.items()},
        "normalisation": folder.normalisation.read_text(),
        "prompts": [prompt.id for prompt in prompts],
        "sampling": [study.seed, study.evaluation.seeds, asdict(sampling(study, 0))],
    }
    for method in METHODS:
        used, plans = compact([plan_for(method, mu, setup) for mu in grid], setup)
        experts = [set_digests(folder, study, name) for name in used]
        points = [(plans[0], None)] if len(set(plans)) == 1 else list(zip(plans, grid, strict=True))
        expected = {
            f"{method}-{i:02d}-"
            + hashlib.sha256(json.dumps([shared, experts, asdict(plan), mu], sort_keys=True).encode()).hexdigest()[:12]
            + ".parquet"
            for i, (plan, mu) in enumerate(points)
        }
        assert names(study, folder, method) == expected
        assert all(cell.way == Way() for cell in method_cells(study, folder, {method: method}))


def test_methods_keep_their_order_and_searches_share_the_others_bank(folder: StudyFolder) -> None:
    methods = ["morlhf", "bone-soup", "beam-search", "genarm", "prompting"]
    study = changed(folder.study, evaluation=folder.study.evaluation.model_dump() | {"methods": methods})
    cells = study_cells(study, folder)
    assert list(dict.fromkeys(cell.method for cell in cells)) == methods
    assert {cell.method: cell.sets for cell in cells} == {
        "morlhf": ("morlhf",), "bone-soup": ("bone", "soup"), "beam-search": ("bone", "soup"),
        "genarm": ("arm",), "prompting": ("bone", "soup"),
    }  # fmt: skip
    defaults = Study.model_validate({"objectives": OBJECTIVES}).evaluation.methods
    assert defaults == [method for method in METHODS if method not in EXPLICIT]


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("morlhf", {"baselines": {}}, r"method: got one that needs morlhf, allowed: a study whose morlhf is trained"),
        ("genarm", {"guidance": {"baselines": ["morlhf"]}}, r"method: got one that needs arm, allowed: a study whose"),
        ("modpo", {"evaluation": {"grid": 5}}, r"method: got one that needs modpo, allowed: .*\(mage-ray baselines\)"),
        (
            "modpo",
            {"baselines": BASELINES | {"modpo": {"kind": "modpo", "grid": 3}}, "evaluation": {"grid": 5}},
            r"preference: got \(0.25, 0.75\), allowed: those that modpo was trained for: \(0, 1\), \(0.5, 0.5\),",
        ),
        ("best-of-n", {"strategies": {"method": "bone-soup"}}, r"strategies\.method: got bone-soup, allowed: a guided"),
    ],
)
def test_what_a_study_cannot_do_is_one_line(
    folder: StudyFolder, method: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FieldError, match=message) as caught:
        method_cells(changed(folder.study, **changes), folder, {method: method})
    assert "\n" not in str(caught.value)
