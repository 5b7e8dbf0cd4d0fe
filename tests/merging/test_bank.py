"""The bank inside a model against float64 merged weights, and what its linears pass on to each other against nothing.

Legend: B rows, T tokens, K experts.
"""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from mage_ray.errors import FieldError
from mage_ray.merging.adapter import Adapter, Factors
from mage_ray.merging.bank import AdapterBank, linear_shapes, shared_inputs

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def phi() -> PreTrainedModel:
    return PhiForCausalLM(PhiConfig(**SIZES, intermediate_size=48, max_position_embeddings=64))


def random_model(make: Callable[[], PreTrainedModel], dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Every parameter random, biases and norms included, so that each has its share in the result."""
    model = make().eval().to(dtype)
    dice = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=dice).mul_(0.2).to(dtype)
    return model


def random_adapter(name: str, shapes: dict[str, tuple[int, int]], ranks: Sequence[int], scale: float) -> Adapter:
    """A rank for each module, in turn; a module of rank 0 is left out."""
    dice = torch.Generator().manual_seed(len(name) + sum(ranks))
    factors = {}
    for i, (module, (into, out)) in enumerate(shapes.items()):
        if rank := ranks[i % len(ranks)]:
            down, up = torch.randn(rank, into, generator=dice), torch.randn(out, rank, generator=dice)
            factors[module] = Factors(down * 0.2, up * 0.2, scale)
    return Adapter(name, factors)


def three_adapters(model: nn.Module) -> list[Adapter]:
    """Unequal ranks and scales; each leaves out some modules, and not the same members of each group."""
    shapes = linear_shapes(model)
    return [
        random_adapter("all", shapes, [4], 2.0),
        random_adapter("some", shapes, [3, 0, 5], 0.7),
        random_adapter("few", shapes, [0, 1, 0, 0, 7], 1.3),
    ]


def merged(model: nn.Module, adapters: Sequence[Adapter], coefficients: Sequence[float]) -> Any:
    """The model in float64 with W + sum_k lam_k s_k B_k A_k in place of each W."""
    exact = copy.deepcopy(model).double()
    for module, linear in exact.named_modules():
        deltas = [
            c * a.factors[module].delta() for a, c in zip(adapters, coefficients, strict=True) if module in a.factors
        ]
        if deltas:
            delta = sum(deltas)
            # Not in place: a tied weight must change here alone.
            linear.weight = nn.Parameter(linear.weight + (delta.T if isinstance(linear, Conv1D) else delta))
    return exact


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


ROWS = [[1.75, -0.75, 0.4], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-1.1, 0.3, -2.0]]


@torch.inference_mode()
@pytest.mark.parametrize("make", [llama, gpt2, phi])
@pytest.mark.parametrize("tokens", [1, 6])
def test_every_row_is_its_own_full_merge(make: Callable[[], PreTrainedModel], tokens: int) -> None:
    model = random_model(make)
    plain, adapters = copy.deepcopy(model), three_adapters(model)
    mix = AdapterBank(adapters).install(model)
    ids_BT = torch.randint(0, 64, (4, tokens), generator=torch.Generator().manual_seed(1))
    for order in (ROWS, ROWS[::-1]):
        with mix.rows(torch.tensor(order)):
            got_BTV = model(ids_BT).logits
        for row, ids_T, got_TV in zip(order, ids_BT, got_BTV, strict=True):
            assert relative_error(got_TV, merged(plain, adapters, row)(ids_T[None]).logits[0]) < 3e-6
    assert relative_error(model(ids_BT).logits, plain.double()(ids_BT).logits) < 3e-6


@torch.inference_mode()
@pytest.mark.parametrize("make", [llama, gpt2, phi])
def test_a_bank_of_no_experts_is_the_model_itself(make: Callable[[], PreTrainedModel]) -> None:
    model = random_model(make)
    plain = copy.deepcopy(model).double()
    mix = AdapterBank([]).install(model)
    ids_BT = torch.arange(12).view(3, 4)
    with mix.rows(torch.zeros(3, 0)):
        assert relative_error(model(ids_BT).logits, plain(ids_BT).logits) < 3e-6
    assert linear_shapes(model) == {}  # not even the head was left out


@torch.inference_mode()
def test_bfloat16_mixes_without_packing() -> None:
    model = random_model(llama, torch.bfloat16)
    plain, adapters = copy.deepcopy(model), three_adapters(model)
    mix = AdapterBank(adapters).install(model)
    ids_BT = torch.arange(20).view(4, 5)
    with mix.rows(torch.tensor(ROWS)):
        got_BTV = model(ids_BT).logits
    assert got_BTV.dtype == torch.bfloat16
    for row, ids_T, got_TV in zip(ROWS, ids_BT, got_BTV, strict=True):
        # bfloat16 keeps 8 bits, and two layers add up their roundings.
        assert relative_error(got_TV, merged(plain, adapters, row)(ids_T[None]).logits[0]) < 0.05


def named(layer: str, *groups: str) -> list[tuple[str, ...]]:
    return [tuple(f"{layer}.{n}.{name}" for name in group.split()) for n in range(2) for group in groups]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (
            llama,
            named(
                "model.layers",
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj",
                "self_attn.o_proj",
                "mlp.gate_proj mlp.up_proj",
                "mlp.down_proj",
            ),
        ),
        (gpt2, named("transformer.h", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
        (
            phi,
            named(
                "model.layers",
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj mlp.fc1",
                "self_attn.dense",
                "mlp.fc2",
            ),
        ),
    ],
)
def test_linears_of_one_input_are_found(make: Callable[[], PreTrainedModel], expected: list[tuple[str, ...]]) -> None:
    assert shared_inputs(make().eval()) == [*expected, ("lm_head",)]


@torch.inference_mode()
def test_weights_are_freed_but_for_one_that_the_embedding_uses() -> None:
    model = random_model(llama)
    ids = torch.arange(6)[None]
    before = model(ids).logits
    weights = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    AdapterBank(three_adapters(model)).install(model)
    gc.collect()
    alive = {name for name, weight in weights.items() if weight() is not None}
    assert alive == {name for name in weights if "norm" in name or "embed" in name}
    assert sum(p.numel() for p in model.parameters()) == 64 * 32 + 5 * 32
    assert relative_error(model(ids).logits, before) < 3e-6


# Below, a model of three linears that is called as each test likes.

Call = tuple[int, int]
"""A member and the number of the tensor that it gets."""


class Toy(nn.Module):
    """Linears a, b and c of one input. ``forward`` makes ``calls`` with ``tensors``; with none, it can be traced."""

    def __init__(self, outs: Sequence[int] = (5, 3, 4), bias: Sequence[bool] = (True, False, True)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.members = nn.ModuleList([nn.Linear(6, o, bias=b) for o, b in zip(outs, bias, strict=True)])

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        calls: Sequence[Call] | None = None,
        tensors: Sequence[torch.Tensor] = (),
        **_: object,
    ) -> list[torch.Tensor]:
        if calls is None:
            calls, tensors = [(i, 0) for i in range(len(self.members))], [torch.ones(1, 1, 6)]
        results = []
        for member, number in calls:
            result = self.members[member](tensors[number])
            results.append(result.clone())
            result.zero_()  # a result is the caller's: to change it must not show in any other
        return results


def toy_adapters(model: Toy, ranks: Sequence[Sequence[int]]) -> list[Adapter]:
    shapes = linear_shapes(model)
    return [random_adapter(f"e{k}", shapes, r, 0.5 + k) for k, r in enumerate(ranks) if any(r)]


def exact_results(model: Any, calls: Sequence[Call], tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [model.members[m](tensors[n].double()) for m, n in calls]


ranks_of_three = st.lists(st.integers(0, 4), min_size=3, max_size=3)


@torch.inference_mode()
@settings(max_examples=60, deadline=None)
@given(
    ranks=st.lists(ranks_of_three, max_size=4),
    outs=st.lists(st.integers(1, 9), min_size=3, max_size=3),
    bias=st.lists(st.booleans(), min_size=3, max_size=3),
    rows=st.integers(1, 5),
    tokens=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    data=st.data(),
)
def test_a_group_is_exact_for_any_ranks_and_coefficients(
    ranks: list[list[int]],
    outs: list[int],
    bias: list[bool],
    rows: int,
    tokens: int,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    with torch.inference_mode(False):
        model = Toy(outs, bias).to(dtype)
        adapters = toy_adapters(model, ranks)
    plain = copy.deepcopy(model)
    coefficient = st.floats(-3, 3, allow_subnormal=False)
    row = st.lists(coefficient, min_size=len(adapters), max_size=len(adapters))
    coefficients = data.draw(st.lists(row, min_size=rows, max_size=rows))
    mix = AdapterBank(adapters).install(model)  # type: ignore[arg-type]
    x_BTi = torch.randn(rows, tokens, 6, dtype=dtype)
    calls = [(0, 0), (1, 0), (2, 0)]
    with mix.rows(torch.tensor(coefficients, dtype=dtype).view(rows, len(adapters))):
        got = model(calls=calls, tensors=[x_BTi])
    for b in range(rows):
        exact = exact_results(merged(plain, adapters, coefficients[b]), calls, [x_BTi[b]])
        for part, whole in zip(got, exact, strict=True):
            # Adapters are float32 and cast to the model's dtype exactly; their scales are kept in float32.
            torch.testing.assert_close(
                part[b].double(), whole, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-6
            )


@torch.inference_mode()
@settings(max_examples=60, deadline=None)
@given(
    forwards=st.lists(
        st.tuples(st.booleans(), st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1)), max_size=7)), max_size=4
    ),
    mixed=st.booleans(),
)
def test_no_call_sees_the_result_of_another_input(forwards: list[tuple[bool, list[Call]]], mixed: bool) -> None:
    """Members in any order, twice, some never, with either of two tensors whose content changes between forwards."""
    with torch.inference_mode(False):
        model = Toy()
        adapters = toy_adapters(model, [[2, 0, 1], [1, 3, 2]])
    coefficients = [1.5, -0.5] if mixed else [0.0, 0.0]
    exact = merged(model, adapters, coefficients)
    mix = AdapterBank(adapters).install(model)  # type: ignore[arg-type]
    tensors = [torch.randn(2, 1, 6) for _ in range(2)]
    for within_model, calls in forwards:
        with mix.rows(torch.tensor([coefficients] * 2)):
            # Outside a forward of the model each member stands alone, whatever happens between two calls.
            got = []
            if within_model:
                got = model(calls=calls, tensors=tensors)
                expected = exact_results(exact, calls, tensors)
            else:
                expected = []
                for call in calls:
                    got.append(model.members[call[0]](tensors[call[1]]))
                    expected += exact_results(exact, [call], tensors)
                    tensors[call[1]].add_(1.0)
        for part, whole in zip(got, expected, strict=True):
            torch.testing.assert_close(part.double(), whole, rtol=1e-5, atol=1e-5)
        for tensor in tensors:
            tensor.mul_(-0.5).add_(0.3)


@torch.inference_mode()
def test_nothing_outlives_the_last_member_or_the_forward() -> None:
    class Watched(Toy):
        """Drops its input before its last act, and sees what is left of it."""

        stop = 3
        alive: bool | None = None

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            if "watch" not in kwargs:
                return super().forward(*args, **kwargs)
            x = torch.ones(1, 1, 6)
            self.seen = weakref.ref(x)
            for member in list(self.members)[: self.stop]:
                member(x)
            del x
            self.alive = self.seen() is not None
            if kwargs["watch"] == "fail":
                raise ArithmeticError
            return None

    model = Watched()
    AdapterBank([]).install(model)  # type: ignore[arg-type]
    model(watch=True)
    assert model.alive is False
    model.stop = 2  # the third never takes its part
    model(watch=True)
    assert model.alive is True and model.seen() is None
    with pytest.raises(ArithmeticError):
        model(watch="fail")
    assert model.alive is True and model.seen() is None


@torch.inference_mode()
def test_an_input_that_the_model_changes_between_two_linears_is_not_shared() -> None:
    class Changing(Toy):
        def forward(self, input_ids: torch.Tensor, **_: object) -> list[torch.Tensor]:
            x = torch.ones(1, 1, 6)
            first = self.members[0](x), self.members[1](x)
            x += 1
            return [*first, self.members[2](x)]

    model = Changing()
    assert shared_inputs(model) == [("members.0", "members.1"), ("members.2",)]
    exact = [part.clone() for part in model(torch.zeros(1, 1))]
    AdapterBank([]).install(model)  # type: ignore[arg-type]
    for part, whole in zip(model(torch.zeros(1, 1)), exact, strict=True):
        torch.testing.assert_close(part, whole)


@torch.inference_mode()
def test_a_linear_that_is_called_more_than_once_stands_alone() -> None:
    class Twice(Toy):
        def forward(self, input_ids: torch.Tensor, **_: object) -> list[torch.Tensor]:
            x = torch.ones(1, 1, 6, dtype=next(self.parameters(), torch.ones(1)).dtype)
            return [self.members[i](x * f) for f in (1.0, 2.0) for i in (0, 0)] + [m(x) for m in self.members]

    model = Twice()
    assert shared_inputs(model) == [("members.1", "members.2")]
    adapters = toy_adapters(model, [[2, 3, 1]])
    exact = merged(model, adapters, [0.8])(torch.zeros(1, 1))
    mix = AdapterBank(adapters).install(model)  # type: ignore[arg-type]
    with mix.rows(torch.tensor([[0.8]])):
        for part, whole in zip(model(torch.zeros(1, 1)), exact, strict=True):
            torch.testing.assert_close(part.double(), whole.double(), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_member_alone_follows_the_rows_that_are_open() -> None:
    with torch.inference_mode(False):
        model = Toy()
        adapters = toy_adapters(model, [[2, 0, 1]])
    x_BTi, exact = torch.randn(1, 2, 6), [merged(model, adapters, [c]) for c in (0.5, -2.0)]
    mix = AdapterBank(adapters).install(model)  # type: ignore[arg-type]
    for c, whole in zip((0.5, -2.0), exact, strict=True):
        with mix.rows(torch.tensor([[c]])):
            got = model.members[0](x_BTi)
        torch.testing.assert_close(got.double(), whole.members[0](x_BTi.double()), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_model_that_cannot_be_traced_still_mixes() -> None:
    class Closed(Toy):
        def forward(self, *, calls: Sequence[Call], tensors: Sequence[torch.Tensor]) -> Any:  # type: ignore[override]
            return super().forward(calls=calls, tensors=tensors)

    model = Closed()
    assert shared_inputs(model) == []
    adapters = toy_adapters(model, [[2, 0, 1]])
    exact = merged(model, adapters, [-0.7])
    mix = AdapterBank(adapters).install(model)  # type: ignore[arg-type]
    assert isinstance(model.members[1], nn.Linear)  # whether anything else uses its weight isn't known
    calls, tensors = [(0, 0), (1, 0), (2, 0)], [torch.randn(2, 3, 6)]
    with mix.rows(torch.tensor([[-0.7]] * 2)):
        got = model(calls=calls, tensors=tensors)
    for part, whole in zip(got, exact_results(exact, calls, tensors), strict=True):
        torch.testing.assert_close(part.double(), whole, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_forward_reads_the_coefficients_anew() -> None:
    """What a CUDA graph needs: its replays change the tensor's content, and nothing else."""
    model = random_model(llama)
    plain, adapters = copy.deepcopy(model), three_adapters(model)
    mix = AdapterBank(adapters).install(model)
    ids_BT, coefficients_BK = torch.arange(8).view(4, 2), torch.tensor(ROWS)
    with mix.rows(coefficients_BK):
        model(ids_BT)
        coefficients_BK.copy_(coefficients_BK.flip(0))
        again_BTV = model(ids_BT).logits
    exact = merged(plain, adapters, ROWS[-1])(ids_BT[:1]).logits
    assert relative_error(again_BTV[:1], exact) < 3e-6


def test_the_model_runs_with_gradients_on_but_needs_none() -> None:
    model = random_model(llama)
    mix = AdapterBank(three_adapters(model)).install(model)
    with mix.rows(torch.tensor(ROWS)):
        logits = model(torch.arange(8).view(4, 2)).logits
    assert not logits.requires_grad and not any(p.requires_grad for p in model.parameters())


@torch.inference_mode()
def test_other_batches_than_the_rows_are_refused() -> None:
    model = random_model(llama)
    mix = AdapterBank(three_adapters(model)).install(model)
    with mix.rows(torch.tensor(ROWS)):
        with pytest.raises(ValueError, match=r"\[4, T, in\]"):
            model(torch.arange(6).view(3, 2))
        with pytest.raises(RuntimeError, match="one batch at a time"), mix.rows(torch.tensor(ROWS)):
            pass
    # Neither left anything behind.
    with mix.rows(torch.tensor(ROWS[:3])):
        assert model(torch.arange(6).view(3, 2)).logits.isfinite().all()


def test_a_linear_that_computes_another_thing_is_refused() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    model = Toy()
    model.members[1] = Doubled(6, 3)
    adapters = toy_adapters(model, [[2, 0, 1], [0, 1, 0]])
    AdapterBank(adapters[:1]).install(copy.deepcopy(model))  # type: ignore[arg-type]
    with pytest.raises(FieldError, match=r"members\.1, a Doubled"):
        AdapterBank(adapters).install(model)  # type: ignore[arg-type]
