"""Packed weights against float64, and the way back to plain ones where MKL isn't or doesn't do as it did."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_ray.merging import packed
from mage_ray.merging.packed import can_pack, mkl_is_exact, projection


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    mkl_is_exact.cache_clear()
    yield
    mkl_is_exact.cache_clear()


def product(
    shape: tuple[int, ...], out: int, bias: bool, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """x, a weight, a bias and what they give in float64."""
    dice = torch.Generator().manual_seed(out)
    x = torch.randn(shape, generator=dice)
    weight_oi = torch.randn(out, shape[-1], generator=dice)
    if transposed:
        weight_oi = weight_oi.t().contiguous().t()
    bias_o = torch.randn(out, generator=dice) if bias else None
    exact = x.double() @ weight_oi.double().T + (0 if bias_o is None else bias_o.double())
    return x, weight_oi, bias_o, exact


@settings(max_examples=80, deadline=None)
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 200), st.integers(1, 300)),
        st.tuples(st.integers(1, 24), st.integers(1, 9), st.integers(1, 300)),
    ),
    out=st.integers(1, 300),
    bias=st.booleans(),
    transposed=st.booleans(),
)
def test_any_shape_is_exact_to_float32(shape: tuple[int, ...], out: int, bias: bool, transposed: bool) -> None:
    x, weight_oi, bias_o, exact = product(shape, out, bias, transposed)
    got = projection(weight_oi, bias_o)(x)
    assert got.is_contiguous() and got.shape == exact.shape
    torch.testing.assert_close(got.double(), exact, rtol=0, atol=3e-6 * shape[-1])


def test_rows_of_a_view_and_another_number_of_threads() -> None:
    x, weight_oi, bias_o, exact = product((8, 2, 300), 70, True)
    project, threads = projection(weight_oi, bias_o), torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            torch.testing.assert_close(project(x[:, 1]).double(), exact[:, 1], rtol=0, atol=1e-3)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="there is nothing to pack with")
def test_a_packed_weight_is_not_kept() -> None:
    x, weight_oi, _, exact = product((3, 100), 50, False)
    assert can_pack(weight_oi)
    project, weight = projection(weight_oi, None), weakref.ref(weight_oi)
    del weight_oi
    gc.collect()
    assert weight() is None
    torch.testing.assert_close(project(x).double(), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_stay_plain(dtype: torch.dtype) -> None:
    x, weight_oi, bias_o, _ = product((3, 100), 50, True)
    x, weight_oi, bias_o = x.to(dtype), weight_oi.to(dtype), bias_o.to(dtype) if bias_o is not None else None
    assert not can_pack(weight_oi)
    assert torch.equal(projection(weight_oi, bias_o)(x), torch.nn.functional.linear(x, weight_oi, bias_o))


def wrong(weight_oi: torch.Tensor, bias_o: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """As a library would be that heeds the number of rows that a weight was packed for."""

    def project(x: torch.Tensor) -> torch.Tensor:
        y = torch.nn.functional.linear(x, weight_oi, bias_o)
        return y if len(x) == 64 else y + 0.01

    return project


def missing(*_: object) -> Callable[[torch.Tensor], torch.Tensor]:
    raise AttributeError("'_OpNamespace' 'mkl' object has no attribute '_mkl_linear'")


@pytest.mark.parametrize("broken", ["no MKL", wrong, missing])
def test_without_a_trusted_mkl_the_numbers_are_the_same(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight_oi, bias_o, exact = product((24, 1, 300), 70, True)
    here = projection(weight_oi, bias_o)(x)
    mkl_is_exact.cache_clear()
    if broken == "no MKL":
        monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    else:
        monkeypatch.setattr(packed, "_packed", broken)
    assert not mkl_is_exact() and not can_pack(weight_oi)
    there = projection(weight_oi, bias_o)(x)
    torch.testing.assert_close(there, here, rtol=0, atol=1e-3)
    torch.testing.assert_close(there.double(), exact, rtol=0, atol=1e-3)
