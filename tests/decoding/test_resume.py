"""An answer taken up in its middle goes on as it would have, and plans change at the tokens that a schedule names."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from engines import BASE, ZERO, Tiny, guided, ids
from tiny import make_tiny_tokenizer

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.methods import Backbones, Setup, plan_for
from mage_ray.decoding.plan import Cadence, Plan
from mage_ray.decoding.request import Request, Sampling
from mage_ray.decoding.seeds import ACCEPT, DRAW, REPLACE, uniform
from mage_ray.errors import FieldError

PLANS = {
    "one row": Plan.of([(BASE, 1.0)]),
    "guided": guided(valued=True),
    "whole vocabulary": guided(candidates=None),
    "every third": guided().at(Cadence(every=3)),
    "uncertain": guided().at(Cadence(entropy=4.0)),
    "speculative": guided().at(Cadence(speculate=3)),
}
OTHER = guided(3.0, base=(0.0, 1.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def engine(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    tokenizer = make_tiny_tokenizer()
    tiny = Tiny(tiny_model_folder, tmp_path_factory.mktemp("resume"))
    return tiny.engine(stop=(), decode=lambda tokens: str(tokenizer.decode(tokens, skip_special_tokens=True)))


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_rest_of_an_answer_is_that_of_the_whole(engine: Engine, name: str, temperature: float) -> None:
    sampling = Sampling(17, temperature, 0.95, seed=3, stop=("zz~",))
    request = Request(ids("a day that"), PLANS[name], sampling)
    [whole] = engine.generate([request])
    assert len(whole.ids) == 17
    cuts = range(1, 17)
    rests = engine.generate([replace(request, answer=whole.ids[:cut]) for cut in cuts])
    for cut, rest in zip(cuts, rests, strict=True):
        assert rest.ids == whole.ids[cut:]
        assert rest.logprobs == pytest.approx(whole.logprobs[cut:], abs=1e-4)
        assert whole.text.endswith(rest.text)
        assert rest.finished == whole.finished
    values = [engine.generate([replace(request, sampling=replace(sampling, max_new_tokens=5))])[0], rests[4]]
    assert sum(part.value for part in values) == pytest.approx(whole.value, abs=1e-3)


@pytest.mark.parametrize("name", PLANS)
def test_a_scheduled_change_is_a_new_request_from_there_on(engine: Engine, name: str) -> None:
    plan, prompt = PLANS[name], ids("some words, and then")
    scheduled = Request(prompt, plan, Sampling(15, 0.0), schedule=((4, OTHER), (9, plan)))
    [got] = engine.generate([scheduled])
    expected: tuple[int, ...] = ()
    for drawn_by, tokens in ((plan, 4), (OTHER, 5), (plan, 6)):
        # With its own answer so far, so that a cadence counts on.
        part = Request(prompt, drawn_by, Sampling(len(expected) + tokens, 0.0), answer=expected)
        expected += engine.generate([part])[0].ids
    assert got.ids == expected
    assert got.ids != engine.generate([replace(scheduled, schedule=())])[0].ids
    # And taken up in its middle, before, at and after the changes.
    for cut in (2, 4, 7, 9, 12):
        assert engine.generate([replace(scheduled, answer=got.ids[:cut])])[0].ids == got.ids[cut:]


def test_tokens_tell_the_plan_that_drew_them(engine: Engine) -> None:
    request = Request(ids("tell"), PLANS["speculative"], Sampling(10, 1.0), schedule=((3, OTHER),))
    tokens = list(engine.stream(request))
    assert [token.plan for token in tokens] == [request.plan] * 3 + [OTHER] * 7


def test_a_change_by_hand_ends_the_schedule(engine: Engine) -> None:
    async def changed() -> list[Plan | None]:
        request = Request(ids("by hand"), PLANS["one row"], Sampling(12, 0.0), schedule=((8, OTHER),))
        async with engine.submit(request) as stream:
            first = await anext(stream)
            stream.change(PLANS["guided"])
            return [first.plan] + [token.plan async for token in stream]

    plans = asyncio.run(changed())
    assert OTHER not in plans and plans[0] == PLANS["one row"] and plans[-1] == PLANS["guided"]


def test_what_cannot_be_taken_up_is_refused(engine: Engine) -> None:
    request = Request(ids("x"), PLANS["guided"], Sampling(4))
    for answer in ((1, 2, 3, 4), (1,) * 9):
        with pytest.raises(FieldError, match=f"answer: got {len(answer)} tokens"):
            replace(request, answer=answer)
    for schedule in (((0, OTHER),), ((3, OTHER), (3, OTHER)), ((5, OTHER), (2, OTHER))):
        with pytest.raises(FieldError, match="schedule: got"):
            replace(request, schedule=schedule)
    with pytest.raises(FieldError, match="answer: got unknown tokens"):
        engine.check(replace(request, answer=(260,)))
    with pytest.raises(FieldError, match="coefficients"):
        engine.check(replace(request, schedule=((2, Plan.of([((1.0,), 1.0)])),)))
    many = Plan.of([((float(i), 0, 0, 0), 1.0) for i in range(25)])
    with pytest.raises(FieldError, match=r"schedule\.2: got 25 rows"):
        engine.check(replace(request, schedule=((2, many),)))


def test_a_requests_numbers_are_uniform_and_independent() -> None:
    numbers = np.array(
        [[uniform(seed, n, use) for use in (DRAW, ACCEPT, REPLACE)] for seed in (0, 1) for n in range(4000)]
    )
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    expected = numbers.size / 50
    assert ((counts - expected) ** 2 / expected).sum() < 95  # chi-square with 49 degrees of freedom: p > 1e-4
    columns = numbers.reshape(2, 4000, 3).transpose(0, 2, 1).reshape(6, 4000)
    correlations = np.corrcoef([*columns, columns[0][np.r_[1:4000, 0]]])[np.triu_indices(7, 1)]
    assert np.abs(correlations).max() < 4 / np.sqrt(4000)


def test_equal_rows_of_guides_elsewhere_stay_apart() -> None:
    """The reference of another model is not this one's, though both have no coefficients to speak of."""
    mine = Setup(2, {"bone": Backbones((0, 1), np.eye(2))}, "bone", "bone", strength=1.5)
    whole = plan_for("mage-i-m", (0.3, 0.7), replace(mine, guides=mine))
    assert [row.home for row in whole.rows] == [0, 1, 1] and whole.weights == (1.0, 1.5, -1.5)
    assert [row.coefficients for row in whole.rows] == [(0.3, 0.7), (0.3, 0.7), ZERO[:2]]
    alone = plan_for("mage-i-m", (0.3, 0.7), mine)
    assert alone.weights == (2.5, -1.5)
