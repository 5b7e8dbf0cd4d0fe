"""Guidance at some tokens only: each token against the formula that its cadence calls for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from engines import BASE, ZERO, Tiny, guided, ids
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from mage_ray.decoding.engine import Engine
from mage_ray.decoding.plan import Cadence, Plan
from mage_ray.decoding.request import Request, Sampling
from mage_ray.decoding.speculation import accepts, residual
from mage_ray.errors import FieldError

PROMPT = ids("tell me more")


@pytest.fixture(scope="module")
def tiny(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return Tiny(tiny_model_folder, tmp_path_factory.mktemp("experts"))


@pytest.fixture(scope="module")
def engine(tiny: Tiny) -> Engine:
    return tiny.engine(stop=())


@pytest.mark.parametrize("every", [1, 2, 5])
def test_every_b_guides_the_first_of_b_tokens(tiny: Tiny, engine: Engine, every: int) -> None:
    plan = guided().at(Cadence(every=every))
    tokens = list(engine.stream(Request(PROMPT, plan, Sampling(17, seed=3))))
    answer = [t.id for t in tokens]
    with_guide, alone = (tiny.drawn(plan, PROMPT, answer, alone) for alone in (False, True))
    for t, token in enumerate(tokens):
        assert token.guided == (t % every == 0)
        assert token.logprob == pytest.approx(float((with_guide if token.guided else alone)[t]), abs=2e-4)
    assert engine.runner.live == 0


def test_the_gate_opens_where_the_base_is_uncertain(tiny: Tiny, engine: Engine) -> None:
    free = Request(PROMPT, guided().at(Cadence(entropy=1e-9)), Sampling(40, seed=1))
    answer = engine.generate([free])[0].ids
    base_TV = tiny.rows(free.plan, [*PROMPT, *answer][:-1])[0][len(PROMPT) - 1 :]
    nats = -(base_TV.exp() * base_TV).sum(-1)
    plan = guided().at(Cadence(entropy=float(nats.median())))
    tokens = list(engine.stream(Request(PROMPT, plan, Sampling(40, seed=1))))
    answer_ids = [t.id for t in tokens]
    base_TV = tiny.rows(plan, [*PROMPT, *answer_ids][:-1])[0][len(PROMPT) - 1 :]
    nats = -(base_TV.exp() * base_TV).sum(-1)
    with_guide, alone = (tiny.drawn(plan, PROMPT, answer_ids, a) for a in (False, True))
    clear = [t for t in range(40) if abs(float(nats[t]) - plan.cadence.entropy) > 1e-3]
    assert [tokens[t].guided for t in clear] == [float(nats[t]) >= plan.cadence.entropy for t in clear]
    assert 3 < sum(t.guided for t in tokens) < 37
    for t, token in enumerate(tokens):
        assert token.logprob == pytest.approx(float((with_guide if token.guided else alone)[t]), abs=2e-4)


def test_a_gate_that_is_always_open_or_shut_is_the_plan_or_its_base(engine: Engine) -> None:
    sampling = Sampling(20, 0.9, 0.95, seed=4)
    plans = [guided(), guided().at(Cadence(entropy=1e-9)), guided().at(Cadence(entropy=100.0)), guided(0.0)]
    always, opened, shut, base = engine.generate([Request(PROMPT, plan, sampling) for plan in plans])
    assert always.ids == opened.ids
    assert shut.ids == base.ids != always.ids
    assert (opened.guided, shut.guided) == (20, 0)


@pytest.mark.parametrize("speculate", [1, 3, 8])
@pytest.mark.parametrize("candidates", [12, None])
def test_speculative_greedy_decoding_is_guided_greedy_decoding(
    tiny: Tiny, engine: Engine, speculate: int, candidates: int | None
) -> None:
    plan = guided(candidates=candidates)
    requests = [Request(ids(p), plan, Sampling(30, 0.0)) for p in ("a", "some words", "tell me more")]
    ahead = [Request(r.prompt, plan.at(Cadence(speculate=speculate)), r.sampling) for r in requests]
    for request, exact, drawn in zip(requests, engine.generate(requests), engine.generate(ahead), strict=True):
        assert drawn.ids == exact.ids
        assert drawn.guided == 30
        np.testing.assert_allclose(drawn.logprobs, tiny.drawn(plan, request.prompt, drawn.ids), atol=2e-4)
    assert engine.runner.live == 0


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [(1.0, 1.0), (0.7, 0.8)])
def test_speculative_guidance_has_exactly_the_guided_distribution(
    tmp_path_factory: pytest.TempPathFactory, sampling: tuple[float, float]
) -> None:
    """Chi-square of 3-token answers over a vocabulary of 260, of which the plan's 5 candidates can come."""
    from tiny import make_tiny_model

    place = tmp_path_factory.mktemp("small")
    tiny = Tiny(make_tiny_model(place / "model", initializer_range=0.08), place, scale=0.15)
    engine = tiny.engine(rows=300, length=16, stop=(), kept=64)
    plan = guided(strength=2.0, candidates=5)
    temperature, top_p = sampling
    count, prompt = 3000, ids("ab")
    requests = [
        Request(prompt, plan.at(Cadence(speculate=3)), Sampling(3, temperature, top_p, seed=s)) for s in range(count)
    ]
    seen: dict[tuple[int, ...], int] = {}
    for drawn in engine.generate(requests):
        seen[drawn.ids] = seen.get(drawn.ids, 0) + 1
    expected = _answers(tiny, plan, prompt, 3, temperature, top_p)
    assert set(seen) <= set(expected)
    base_only = _answers(tiny, guided(0.0, candidates=5), prompt, 3, temperature, top_p)
    assert _p_value(seen, expected, count) > 1e-3
    assert _p_value(seen, base_only, count) < 1e-6  # it would show if the guide had no say


def _answers(
    tiny: Tiny, plan: Plan, prompt: tuple[int, ...], length: int, temperature: float, top_p: float
) -> dict[tuple[int, ...], float]:
    """The probability of every answer of that length, by whole float64 forwards."""
    answers: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(length):
        longer = {}
        for answer, p in answers.items():
            probs = (tiny.logprobs(plan, [*prompt, *answer])[-1] / temperature).softmax(-1)
            order = probs.argsort(descending=True)
            kept = order[(probs[order].cumsum(0) - probs[order]) < top_p]
            for token in kept[probs[kept] > 0].tolist():
                longer[(*answer, token)] = p * float(probs[token] / probs[kept].sum())
        answers = longer
    return answers


def _p_value(seen: dict[tuple[int, ...], int], expected: dict[tuple[int, ...], float], count: int) -> float:
    """Chi-square over answers that are expected often enough; all others are one cell, with the rarest of these."""
    often = sorted((a for a, p in expected.items() if p * count >= 8), key=lambda a: -expected[a])[:-1]
    observed = [seen.get(a, 0) for a in often]
    wanted = [expected[a] * count for a in often]
    return float(chisquare([*observed, count - sum(observed)], [*wanted, count - sum(wanted)]).pvalue)


@settings(max_examples=30, deadline=None)
@given(
    target=st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
    draft=st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
)
def test_acceptance_and_residual_add_up_to_the_target(target: list[float], draft: list[float]) -> None:
    """P(token) = draft * min(1, target / draft) + P(rejected) * residual, summed exactly instead of sampled."""
    p, q = np.array(target) / sum(target), np.array(draft) / sum(draft)
    grid = (np.arange(2000) + 0.5) / 2000
    accepted = q * np.array([np.mean([accepts(a, b, u) for u in grid]) for a, b in zip(p, q, strict=True)])
    left = residual(torch.from_numpy(p), torch.from_numpy(q)).numpy()
    np.testing.assert_allclose(accepted + (1 - accepted.sum()) * left / left.sum(), p, atol=2e-3)


def test_lazy_requests_share_a_batch_with_others_and_change_nobody(engine: Engine) -> None:
    cadences = [Cadence(), Cadence(every=3), Cadence(entropy=2.0), Cadence(speculate=4), Cadence(every=2, entropy=1.0)]
    prompts = [ids(f"prompt {i}" * (1 + i % 4)) for i in range(15)]
    requests = [
        Request(prompt, guided().at(cadences[i % 5]), Sampling(10 + i, seed=i)) for i, prompt in enumerate(prompts)
    ]
    for request, drawn in zip(requests, engine.generate(requests), strict=True):
        [alone] = engine.generate([request])
        assert drawn.ids == alone.ids
        np.testing.assert_allclose(drawn.logprobs, alone.logprobs, atol=1e-4)
        assert drawn.guided == alone.guided
    assert engine.runner.live == 0


def test_values_are_the_guides_score_of_the_drawn_tokens(tiny: Tiny, engine: Engine) -> None:
    for strength, cadence in ((1.3, Cadence()), (0.0, Cadence()), (1.3, Cadence(speculate=4))):
        plan = guided(strength, valued=True).at(cadence)
        [drawn] = engine.generate([Request(PROMPT, plan, Sampling(12, seed=2))])
        rows_RTV = tiny.rows(plan, [*PROMPT, *drawn.ids][:-1])[:, len(PROMPT) - 1 :]
        picked_RT = rows_RTV.gather(-1, torch.tensor(drawn.ids)[None, :, None].expand(3, -1, -1))[..., 0]
        assert plan.values == (0.0, 1.0, -1.0)
        assert drawn.value == pytest.approx(float((picked_RT[1] - picked_RT[2]).sum()), abs=2e-3)


def test_where_base_and_guide_coincide_the_value_is_still_the_guides() -> None:
    plan = Plan.guided(BASE, [(BASE, 1.0), (ZERO, -1.0)], 2.0, 10)
    assert (plan.weights, plan.values) == ((3.0, -2.0), (1.0, -1.0))


@pytest.mark.parametrize(
    ("fields", "name"),
    [({"every": 0}, "every"), ({"entropy": -1.0}, "entropy"), ({"entropy": float("nan")}, "entropy"),
     ({"speculate": -1}, "speculate"), ({"speculate": 2, "every": 2}, "speculate")],
)  # fmt: skip
def test_unusable_cadences_are_refused(fields: dict[str, float], name: str) -> None:
    with pytest.raises(FieldError, match=name):
        Cadence(**fields)  # type: ignore[arg-type]


def test_a_plan_without_a_guide_takes_no_cadence() -> None:
    with pytest.raises(FieldError, match="cadence"):
        Plan.of([(BASE, 0.5), (ZERO, 0.5)]).at(Cadence(every=2))
    assert Plan.of([(BASE, 1.0)]).at(Cadence(every=2)).eager
