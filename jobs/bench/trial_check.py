"""What fresh trials' tokens are held against, and which settings they try."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from naive import TOLERANCE, Agreement, NaiveReference
from naive_trial import PeftModels, generate_planned
from rivals import MergedModels
from setting import BenchError

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.methods import plan_for
from mage_ray.decoding.request import Request, Sampling
from mage_ray.folder import StudyFolder
from mage_ray.generator import bank_setup, load_experts, load_rows, set_places
from mage_ray.models import load_model
from mage_ray.search.recipe import Recipe, own_recipe
from mage_ray.search.space import Space
from mage_ray.study import Study
from mage_ray.training.rollouts import search_prompts

_LENGTH = 1024
_TRIES = 1000


def check_trials(study: Study, trained: StudyFolder) -> dict[str, Any]:
    """How the engine's and the naive trial's greedy tokens compare with the naive reference's: ``checks``.

    The study's own constants at both ends and in the middle of the grid, two prompts in one batch. Raises BenchError
    when they differ.
    """
    grid, experts = study.search_grid(), load_experts(trained, study)
    setup = bank_setup(study, list(experts))
    plans = [plan_for(study.search.method, mu, setup) for mu in (grid[0], grid[len(grid) // 2], grid[-1])]
    runner, chat = load_rows(study, experts, 2 * max(len(plan.rows) for plan in plans), _LENGTH)
    # With no end, so that every answer has all its tokens to be judged.
    engine = Engine(runner, stop=[])
    prompts = [chat.encode(prompt.text) for prompt in search_prompts(study)[:2]]
    sampling = Sampling(study.evaluation.max_new_tokens, temperature=0.0)
    reference = load_model(study.model, study.dtype)
    adapters = [adapter for members in experts.values() for adapter in members]
    judge = NaiveReference(MergedModels(reference, adapters), exact=study.dtype == "float32")
    models = PeftModels(reference, [path for name in experts for path in set_places(trained, study, name)])
    totals = {"engine": Agreement(), "naive": Agreement()}
    for plan in plans:
        answers = engine.generate([Request(prompt, plan, sampling) for prompt in prompts])
        made = {
            "engine": [list(answer.ids) for answer in answers],
            "naive": generate_planned([models.of(row) for row in plan.rows], plan, prompts, sampling, (), 0),
        }
        for arm, own in made.items():
            # One by one: the reference takes prompts of one length.
            for prompt, tokens in zip(prompts, own, strict=True):
                totals[arm] += judge.check(arm, [plan], [prompt], [tokens], sampling.max_new_tokens)
    return {"tolerance_nats": TOLERANCE, "arms": {arm: asdict(total) for arm, total in totals.items()}}


def tried(study: Study, number: int) -> Recipe:
    """The setting of a round's fresh trials: the study's own constants first, then random points of its space.

    Raises BenchError where none is found that may be tried.
    """
    if number == 0:
        return own_recipe(study, study.search.method)
    space, dice = Space(study), np.random.default_rng(number)
    for _ in range(_TRIES):
        drawn = {name: np.asarray(domain.sample(random_state=dice)).item() for name, domain in space.domains.items()}
        if space.excess(drawn) <= 0:
            return space.recipe(drawn)
    raise BenchError(f"none of {_TRIES} random settings may be tried, allowed: a wider search.max_norm")
