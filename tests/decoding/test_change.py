"""Another preference for a request that runs: recomputed exactly, or on the keys and values that it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import BASE, GUIDE, ZERO, Tiny, guided, ids

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.outputs import Outputs
from mage_ray.decoding.plan import Cadence, Plan
from mage_ray.decoding.request import Request, Sampling, Token
from mage_ray.errors import FieldError

PROMPT = ids("tell me more")
SOUP = Plan.of([((0.0, 0.0, 0.5, 0.5), 1.0)])
ENSEMBLE = Plan.of([((1.0, 0, 0, 0), 0.2), ((0, 1.0, 0, 0), 0.5), ((0, 0, 1.0, 0), 0.3)])
OTHER = guided(0.7, base=(0.0, 0.0, 0.9, 0.1))


@pytest.fixture(scope="module")
def tiny(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tiny_model_folder, tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def engine(tiny: Tiny) -> Engine:
    return tiny.engine(stop=())


def run(engine: Engine, request: Request, at: int, change: Callable[[object], None]) -> list[Token]:
    """The tokens of a request to which something is done after ``at`` of them."""
    tokens: list[Token] = []
    running = engine._add(request, tokens.append)
    due = True
    while not running.ended:
        engine.step()
        if due and len(tokens) >= at:
            due = False
            change(running)
    return tokens


PLANS = {"soup": SOUP, "ensemble": ENSEMBLE, "guided": guided(), "other": OTHER,
         "lazy": guided().at(Cadence(every=3)), "speculative": guided().at(Cadence(speculate=3))}  # fmt: skip
PAIRS = [(a, b) for a in PLANS for b in PLANS if a != b]


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_recomputed_tokens_are_the_new_plans_as_if_the_text_had_been_its_prompt(
    tiny: Tiny, engine: Engine, before: str, after: str
) -> None:
    request = Request(PROMPT, PLANS[before], Sampling(16, 0.0))
    told: list[int] = []

    def change(running: object) -> None:
        told.append(running.generated)  # type: ignore[attr-defined]
        engine.change(running, PLANS[after])  # type: ignore[arg-type]

    tokens = run(engine, request, 6, change)
    [at] = told  # a speculative request gives several tokens at a time, and may have passed by 6
    answer = [t.id for t in tokens]
    prompt, rest = (*PROMPT, *answer[:at]), answer[at:]
    if before != "lazy" and after != "lazy":  # whose turns are counted from the first token
        [fresh] = engine.generate([Request(prompt, PLANS[after], Sampling(16 - at, 0.0))])
        assert tuple(rest) == fresh.ids
    with_guide, alone = (tiny.drawn(PLANS[after], prompt, rest, a) for a in (False, True))
    exact = [float((with_guide if t.guided else alone)[i]) for i, t in enumerate(tokens[at:])]
    np.testing.assert_allclose([t.logprob for t in tokens[at:]], exact, atol=2e-4)
    assert engine.runner.live == 0


@torch.inference_mode()
def mixed_cache(tiny: Tiny, plan_before: Plan, plan_after: Plan, answer: list[int], at: int) -> list[float]:
    """What keeping the cache must give: each row's cache made by the old row up to ``at`` tokens, by the new one after.

    With transformers' own DynamicCache in float64. The last old token is fed by the new row: it is the next step's.
    """
    from transformers import DynamicCache

    sequence = [*PROMPT, *answer]
    switch = len(PROMPT) + at - 1
    rows = []
    for old, new in zip(plan_before.rows, plan_after.rows, strict=True):
        cache = DynamicCache()
        tiny.merged(old)(torch.tensor([sequence[:switch]]), past_key_values=cache, use_cache=True)
        out = tiny.merged(new)(torch.tensor([sequence[switch:-1]]), past_key_values=cache, use_cache=True)
        rows.append(out.logits[0].log_softmax(-1))
    scores = sum(w * row for w, row in zip(plan_after.weights, rows, strict=True))
    assert isinstance(scores, torch.Tensor)
    allowed = rows[0].topk(plan_after.candidates or scores.shape[-1], dim=-1).indices
    scores = torch.full_like(scores, -torch.inf).scatter(-1, allowed, scores.gather(-1, allowed)).log_softmax(-1)
    return [float(scores[t, token]) for t, token in enumerate(answer[at:])]


def test_kept_keys_and_values_are_the_old_rows_own(tiny: Tiny, engine: Engine) -> None:
    request = Request(PROMPT, guided(), Sampling(16, seed=5))
    tokens = run(engine, request, 6, lambda running: engine.change(running, OTHER, recompute=False))  # type: ignore[arg-type]
    answer = [t.id for t in tokens]
    kept = [t.logprob for t in tokens[6:]]
    np.testing.assert_allclose(kept, mixed_cache(tiny, guided(), OTHER, answer, 6), atol=2e-4)
    # And it is an approximation: the exact numbers are others.
    exact = tiny.drawn(OTHER, (*PROMPT, *answer[:6]), answer[6:])
    assert float(np.abs(np.array(kept) - exact.numpy()).max()) > 1e-3
    assert engine.runner.live == 0


def test_what_an_approximate_row_leaves_behind_serves_nobody(tiny: Tiny) -> None:
    engine = tiny.engine(stop=())
    request = Request(PROMPT, guided(), Sampling(16, seed=5))
    run(engine, request, 6, lambda running: engine.change(running, OTHER, recompute=False))  # type: ignore[arg-type]
    again = Request(PROMPT, OTHER, Sampling(16, seed=5))
    [after] = engine.generate([again])
    [fresh] = tiny.engine(stop=(), kept=0).generate([again])
    assert after.ids == fresh.ids
    np.testing.assert_allclose(after.logprobs, fresh.logprobs, atol=1e-4)


@pytest.mark.parametrize("recompute", [True, False])
def test_a_plan_of_more_rows_than_are_free_waits_for_them(tiny: Tiny, recompute: bool) -> None:
    engine = tiny.engine(rows=4, stop=())
    done: list[Token] = []
    other: list[Token] = []
    running = engine._add(Request(PROMPT, SOUP, Sampling(12, 0.0)), done.append)
    engine._add(Request(ids("x"), guided(), Sampling(9, 0.0)), other.append)
    while not running.ended:
        engine.step()
        if len(done) == 3 and running.plan == SOUP:
            engine.change(running, guided(), recompute)
    assert len(done) == 12
    [fresh] = engine.generate([Request((*PROMPT, *(t.id for t in done[:3])), guided(), Sampling(9, 0.0))])
    assert [t.id for t in done[3:]] == list(fresh.ids)
    assert len(other) == 9
    assert engine.runner.live == 0


def test_the_reference_row_stays_when_it_is_in_both_plans(engine: Engine) -> None:
    fed: list[int] = []
    feed = engine.runner.feed

    def counting(rows: list, tokens: list, keep: int = 1) -> Outputs:  # type: ignore[type-arg]
        fed.extend(len(t) for row, t in zip(rows, tokens, strict=True) if row.row.coefficients == ZERO)
        return feed(rows, tokens, keep)

    engine.runner.feed = counting  # type: ignore[assignment,method-assign]
    try:
        prompt = ids("never seen before, and long enough to count")
        run(engine, Request(prompt, guided(), Sampling(10, 0.0)), 5, lambda r: engine.change(r, OTHER))  # type: ignore[arg-type]
    finally:
        del engine.runner.feed  # type: ignore[method-assign]
    assert sum(fed) == len(prompt) - 1 + 10


def test_a_waiting_or_ended_request_may_be_changed(tiny: Tiny) -> None:
    engine = tiny.engine(rows=3, stop=())
    first: list[Token] = []
    second: list[Token] = []
    engine._add(Request(PROMPT, guided(), Sampling(5, 0.0)), first.append)
    waiting = engine._add(Request(PROMPT, guided(), Sampling(5, 0.0)), second.append)
    engine.step()
    engine.change(waiting, SOUP)
    while engine.step():
        pass
    [soup] = engine.generate([Request(PROMPT, SOUP, Sampling(5, 0.0))])
    assert [t.id for t in second] == list(soup.ids)
    engine.change(waiting, OTHER)
    assert not engine.step()
    assert engine.runner.live == 0


def test_a_plan_that_cannot_run_is_refused_and_the_request_goes_on(tiny: Tiny) -> None:
    engine = tiny.engine(rows=3, stop=())
    tokens: list[Token] = []
    running = engine._add(Request(PROMPT, guided(), Sampling(6, 0.0)), tokens.append)
    engine.step()
    wide = Plan.of([((float(i), 0, 0, 0), 0.25) for i in range(4)])
    with pytest.raises(FieldError, match="plan: got 4 rows, allowed: at most 3"):
        engine.change(running, wide)
    with pytest.raises(FieldError, match="4 numbers"):
        engine.change(running, Plan.of([((1.0,), 1.0)]))
    while engine.step():
        pass
    [alone] = engine.generate([Request(PROMPT, guided(), Sampling(6, 0.0))])
    assert [t.id for t in tokens] == list(alone.ids)


def test_base_and_guide_keep_their_parts(engine: Engine) -> None:
    """Keeping the cache hands the base's to the base and the guide's to the guide, whatever else stays."""
    swapped = Plan.guided(GUIDE, [(BASE, 1.0), (ZERO, -1.0)], 1.0, 12)
    tokens: list[Token] = []
    running = engine._add(Request(PROMPT, guided(), Sampling(8, 0.0)), tokens.append)
    for _ in range(3):
        engine.step()
    rows = list(running.rows)
    engine.change(running, swapped, recompute=False)
    assert running.rows == [rows[1], rows[0], rows[2]]  # each row is in both plans, so nothing is approximate
    assert all(row.exact for row in running.rows)
    engine.change(running, OTHER, recompute=False)
    assert [row.row for row in running.rows] == list(OTHER.rows)
    assert [row.exact for row in running.rows] == [False, True, True]
    while engine.step():
        pass
    assert engine.runner.live == 0
