"""Combination and sampling on plain tensors, against the formula in float64 and against counts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_ray.decoding.outputs import Outputs
from mage_ray.decoding.sampling import Combination, guided_logprobs, sample

V = 23


def combination(plans: list[list[float]], candidates: list[int] | None = None) -> Combination:
    """Requests given as lists of their rows' weights."""
    starts = np.cumsum([0, *[len(p) for p in plans]])[:-1]
    return Combination(
        rows=tuple(range(sum(map(len, plans)))),
        request_R=torch.tensor([q for q, plan in enumerate(plans) for _ in plan]),
        weight_R=torch.tensor([w for plan in plans for w in plan]),
        bases=tuple(starts.tolist()),
        candidates_Q=None if candidates is None else torch.tensor(candidates),
        plain=all(plan == [1.0] for plan in plans),
    )


def formula(logits_RV: np.ndarray, weights: list[float], k: int | None) -> dict[int, float]:
    """Token to guided log-probability: docs/method.md written out, in float64."""
    logits = logits_RV.astype(np.float64)
    logprobs = (
        logits
        - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        - logits.max(1, keepdims=True)
    )
    allowed = range(logits.shape[1]) if k is None else np.argsort(-logits[0], kind="stable")[:k]
    scores = {int(a): float(np.dot(weights, logprobs[:, a])) for a in allowed}
    top = max(scores.values())
    log_z = top + np.log(sum(np.exp(s - top) for s in scores.values()))
    return {a: s - log_z for a, s in scores.items()}


weights = st.lists(st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.lists(weights, min_size=1, max_size=5), st.booleans(), st.integers(0, 10**6), st.data())
def test_guided_logprobs_are_the_formula(plans: list[list[float]], whole: bool, seed: int, data: st.DataObject) -> None:
    logits_RV = torch.randn(sum(map(len, plans)), V, generator=torch.Generator().manual_seed(seed)) * 4
    ks = None if whole else [data.draw(st.integers(1, V + 5)) for _ in plans]
    logprobs_QC, ids_QC = guided_logprobs(Outputs.of(logits_RV), combination(plans, ks))
    start = 0
    for q, plan in enumerate(plans):
        expected = formula(logits_RV[start : start + len(plan)].numpy(), plan, None if ks is None else ks[q])
        ids = range(V) if ids_QC is None else ids_QC[q].tolist()
        got = {a: x for a, x in zip(ids, logprobs_QC[q].tolist(), strict=True) if x != -np.inf}
        assert got.keys() == expected.keys()
        for a, x in got.items():
            assert x == pytest.approx(expected[a], abs=2e-4)
        start += len(plan)


def test_float64_logits_keep_their_precision() -> None:
    logits_RV = torch.randn(3, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    how = combination([[1.0, 1.5, -1.5]])
    how = replace(how, weight_R=how.weight_R.double())
    got, _ = guided_logprobs(Outputs.of(logits_RV), how)
    expected = formula(logits_RV.numpy(), [1.0, 1.5, -1.5], None)
    np.testing.assert_allclose(got[0].numpy(), [expected[a] for a in range(V)], atol=1e-12)


def known(*rows: list[float]) -> Outputs:
    return Outputs.of(torch.tensor(rows).log())


BASE = [0.5, 0.3, 0.15, 0.05]


def test_a_guide_that_agrees_with_its_reference_changes_nothing() -> None:
    guide = [0.1, 0.2, 0.3, 0.4]
    got, _ = guided_logprobs(known(BASE, guide, guide), combination([[1.0, 2.0, -2.0]]))
    torch.testing.assert_close(got.exp()[0], torch.tensor(BASE))


def test_a_guide_that_always_agrees_with_the_base_keeps_its_order() -> None:
    uniform = [0.25] * 4
    got, _ = guided_logprobs(known(BASE, BASE, uniform), combination([[1.0, 1.0, -1.0]]))
    torch.testing.assert_close(got.exp()[0], torch.tensor(BASE) ** 2 / (torch.tensor(BASE) ** 2).sum())


@pytest.mark.parametrize("reference", [[0.25, 0.25, 0.25, 0.25], [0.0, 0.4, 0.3, 0.3]])
@pytest.mark.parametrize("candidates", [None, [4]])
def test_a_guide_that_vetoes_a_token_removes_it(reference: list[float], candidates: list[int] | None) -> None:
    """Even when the reference rules the same token out, which would otherwise give -inf + inf."""
    veto = [0.0, 0.5, 0.3, 0.2]
    logprobs, ids = guided_logprobs(known(BASE, veto, reference), combination([[1.0, 1.5, -1.5]], candidates))
    order = range(4) if ids is None else ids[0].tolist()
    probs = dict(zip(order, logprobs.exp()[0].tolist(), strict=True))
    expected = {a: BASE[a] * (veto[a] / reference[a]) ** 1.5 for a in (1, 2, 3)}
    assert probs[0] == 0
    for a, p in expected.items():
        assert probs[a] == pytest.approx(p / sum(expected.values()), rel=1e-5)


def test_a_token_that_the_base_rules_out_stays_out_whatever_the_guide_likes() -> None:
    got, _ = guided_logprobs(
        known([0.0, 0.6, 0.4], [0.98, 0.01, 0.01], [0.0, 0.5, 0.5]), combination([[1.0, 9.0, -9.0]])
    )
    assert got[0, 0] == -torch.inf
    assert got.exp().sum() == pytest.approx(1)


def test_one_requests_veto_leaves_the_others_alone() -> None:
    outputs = known(BASE, [0.0, 1 / 3, 1 / 3, 1 / 3]).then(known(BASE))
    got, _ = guided_logprobs(outputs, combination([[1.0, 1.0], [1.0]]))
    torch.testing.assert_close(got[1].exp(), torch.tensor(BASE))
    assert got[0, 0] == -torch.inf


def test_linear_softmax_merging_and_ensembling_agree_to_rounding() -> None:
    """docs/method.md: for logits linear in the parameters, the second-order difference is exactly 0."""
    dice = np.random.default_rng(0)
    features, theta_0, deltas = dice.normal(size=(7, 6)), dice.normal(size=(6, V)), dice.normal(size=(3, 6, V))
    lam = np.array([1.75, -0.95, 0.2])  # sums to 1
    merged = torch.from_numpy(features @ (theta_0 + np.tensordot(lam, deltas, 1)))
    experts = torch.from_numpy(np.stack([features @ (theta_0 + d) for d in deltas], axis=1)).flatten(0, 1)
    one = combination([[1.0]] * 7)
    exact = torch.tensor(lam.tolist() * 7, dtype=torch.float64)
    many = replace(combination([lam.tolist()] * 7), weight_R=exact)
    from_merge, _ = guided_logprobs(Outputs.of(merged), one)
    from_ensemble, _ = guided_logprobs(Outputs.of(experts), many)
    np.testing.assert_allclose(from_merge.numpy(), from_ensemble.numpy(), atol=1e-12)


def draw(probs: list[float], temperature: float, top_p: float, n: int = 20_000) -> np.ndarray:
    logprobs = torch.tensor(probs).log().expand(n, -1)
    uniform = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = sample(logprobs, torch.full((n,), temperature), torch.full((n,), top_p), uniform)
    return np.bincount(drawn.numpy(), minlength=len(probs)) / n


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.15, 0.5, 0.05, 0.3]),
        (0.5, 1.0, [0.0616, 0.6849, 0.0068, 0.2466]),
        (1.0, 0.7, [0, 0.625, 0, 0.375]),
        (1.0, 0.45, [0, 1, 0, 0]),
        (0.0, 1.0, [0, 1, 0, 0]),
    ],
)
def test_samples_have_the_distribution_asked_for(temperature: float, top_p: float, expected: list[float]) -> None:
    got = draw([0.15, 0.5, 0.05, 0.3], temperature, top_p)
    np.testing.assert_allclose(got, expected, atol=0.012)
    assert all(g == 0 for g, e in zip(got, expected, strict=True) if e == 0)


def test_each_request_has_its_own_temperature_and_top_p() -> None:
    logprobs = torch.tensor([0.15, 0.5, 0.05, 0.3]).log().expand(3, -1)
    drawn = sample(
        logprobs, torch.tensor([0.0, 1.0, 1.0]), torch.tensor([1.0, 0.7, 1.0]), torch.tensor([0.99, 0.9, 0.05])
    )
    assert drawn.tolist() == [1, 3, 0]


@settings(max_examples=50, deadline=None)
@given(st.floats(0, 1, exclude_max=True), st.floats(0.05, 1), st.floats(0.1, 3), st.integers(0, 1000))
def test_a_token_without_probability_is_never_drawn(u: float, top_p: float, temperature: float, seed: int) -> None:
    logprobs = torch.randn(1, 9, generator=torch.Generator().manual_seed(seed))
    logprobs[0, [0, 4, 8]] = -torch.inf
    drawn = sample(
        logprobs.log_softmax(-1),
        torch.tensor([temperature]),
        torch.tensor([top_p]),
        torch.tensor([u], dtype=torch.float64),
    )
    assert drawn.item() not in (0, 4, 8)
