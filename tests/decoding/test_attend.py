"""Attention over KV slots against float64, and engines with and without compiled code against each other.

Legend: B rows, T new tokens, H query heads, G key-value heads, D head size, S slots, L positions.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import Tiny, guided, ids
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_tiny_model

from mage_ray.decoding import lean
from mage_ray.decoding.attend import attend, can_attend
from mage_ray.decoding.plan import Cadence, Plan
from mage_ray.decoding.request import Request, Sampling
from mage_ray.decoding.slots import KVSlots
from mage_ray.merging import bank, mixed_linear

pytestmark = pytest.mark.skipif(not can_attend(torch.empty(1), 16), reason="there is no C compiler")


def rotated(x_D: torch.Tensor, cos_D: torch.Tensor, sin_D: torch.Tensor) -> torch.Tensor:
    first, second = x_D.chunk(2)
    return x_D * cos_D + torch.cat([-second, first]) * sin_D


@settings(max_examples=80, deadline=None)
@given(
    rows=st.integers(1, 5),
    tokens=st.integers(1, 8),
    groups=st.integers(1, 3),
    per_group=st.integers(1, 4),
    head=st.sampled_from([16, 32, 64, 128, 256]),
    data=st.data(),
)
def test_it_is_softmax_attention(
    rows: int, tokens: int, groups: int, per_group: int, head: int, data: st.DataObject
) -> None:
    """Rows in any slots, each with its own past, some padded; in float64, one head of one token at a time."""
    dice = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    heads, scale = groups * per_group, 0.7 / head**0.5
    places = data.draw(st.permutations(range(6)))[:rows]
    pasts = [data.draw(st.integers(0, 70)) for _ in range(rows)]
    real = [data.draw(st.integers(1, tokens)) for _ in range(rows)]
    visible = max(past + n for past, n in zip(pasts, real, strict=True))
    slots = KVSlots(1, 6, 200)
    position_BT = torch.zeros(rows, tokens, dtype=torch.long)
    written_BT = torch.full((rows, tokens), slots.padding(visible))
    for b, (past, n) in enumerate(zip(pasts, real, strict=True)):
        position_BT[b, :n] = written_BT[b, :n] = torch.arange(past, past + n)
    slots.open(torch.tensor(places), torch.tensor(places), position_BT, written_BT, visible)
    qkv_BTX = torch.randn(rows, tokens, (heads + 2 * groups) * head, generator=dice)
    angles_BTD = torch.rand(rows, tokens, head, generator=dice) * 6
    cos_BTD, sin_BTD = angles_BTD.cos(), angles_BTD.sin()
    keys, values = slots.whole(0, groups, head, qkv_BTX)
    keys.copy_(torch.randn(keys.shape, generator=dice))
    values.copy_(torch.randn(values.shape, generator=dice))
    past_keys, past_values = keys.double(), values.double()

    seen_BTX = attend(qkv_BTX, cos_BTD, sin_BTD, slots, 0, (heads, groups), scale)

    qkv_BTHD = qkv_BTX.double().unflatten(-1, (heads + 2 * groups, head))
    for b, place in enumerate(places):
        for t in range(real[b]):
            turn = cos_BTD[b, t].double(), sin_BTD[b, t].double()
            for g in range(groups):
                past_keys[place, pasts[b] + t, g] = rotated(qkv_BTHD[b, t, heads + g], *turn)
                past_values[place, pasts[b] + t, g] = qkv_BTHD[b, t, heads + groups + g]
            for h in range(heads):
                k_LD, v_LD = (x[place, : pasts[b] + t + 1, h // per_group] for x in (past_keys, past_values))
                weight_L = (k_LD @ rotated(qkv_BTHD[b, t, h], *turn) * scale).softmax(0)
                got = seen_BTX.unflatten(-1, (heads, head))[b, t, h].double()
                torch.testing.assert_close(got, weight_L @ v_LD, rtol=1e-4, atol=1e-4)
        end = pasts[b] + real[b]
        torch.testing.assert_close(keys[place, :end].double(), past_keys[place, :end], rtol=1e-5, atol=1e-5)
        assert torch.equal(values[place, :end].double(), past_values[place, :end])
    for place in set(range(6)) - set(places):  # nobody else's slot is touched
        assert torch.equal(keys[place].double(), past_keys[place])
        assert torch.equal(values[place].double(), past_values[place])


def test_heads_of_a_size_that_it_does_not_know_and_other_dtypes_are_not_taken() -> None:
    assert not can_attend(torch.empty(1), 8)
    assert not can_attend(torch.empty(1), 512)
    assert not can_attend(torch.empty(1, dtype=torch.bfloat16), 64)


@pytest.mark.parametrize("compiled", ["products", "attention"])
def test_without_compiled_code_answers_are_the_same(
    compiled: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Tiny(make_tiny_model(tmp_path / "model"), tmp_path)
    plans = [guided(), guided().at(Cadence(every=3)), guided().at(Cadence(speculate=4)), Plan.of([((0.5,) * 4, 1.0)])]
    requests = [Request(ids(f"prompt {i}"), plan, Sampling(20, seed=i)) for i, plan in enumerate(plans)]
    here = tiny.engine(stop=()).generate(requests)
    if compiled == "products":
        for module in (bank, mixed_linear):
            monkeypatch.setattr(module, "can_pack", lambda weight: False)
    monkeypatch.setattr(lean, "can_attend", lambda like, head: False)
    there = tiny.engine(stop=()).generate(requests)
    for one, other in zip(here, there, strict=True):
        assert one.require().ids == other.require().ids
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), rtol=0, atol=1e-4)
