"""The packed product against float64, its rows against themselves in other company, and the way without a compiler.

Legend: M rows, i input and o output features, R ranks.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mage_ray.merging.adapter import Factors
from mage_ray.merging.packed import Norm, PackedLinears, can_pack

pytestmark = pytest.mark.skipif(not can_pack(torch.empty(1, 1)), reason="there is no C compiler")


class Group:
    """Random linears of one input, with and without experts and biases, and what they compute, in float64."""

    def __init__(self, inputs: int, members: Sequence[tuple[int, Sequence[int], bool]], seed: int = 0) -> None:
        """``members``: output features, the rank of each expert (0: not touched), whether there is a bias."""
        self.dice = torch.Generator().manual_seed(seed)
        self.inputs = inputs
        self.weights = [self.random(o, inputs) for o, _, _ in members]
        self.biases = [self.random(o) if bias else None for o, _, bias in members]
        self.factors = [
            {k: Factors(self.random(r, inputs), self.random(o, r), 1.0) for k, r in enumerate(ranks) if r}
            for o, ranks, _ in members
        ]
        self.ranks = sum(len(f.down) for by_expert in self.factors for f in by_expert.values())
        self.outputs = sum(o for o, _, _ in members)
        self.packed = PackedLinears(self.weights, self.biases, self.factors)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.dice)

    def exact(
        self, x: torch.Tensor, d: torch.Tensor | None, norm: Norm | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        x = x.double().flatten(0, -2)
        if norm is not None:
            x = norm.weight_i.double() * x / (x.square().mean(-1, keepdim=True) + norm.epsilon).sqrt()
        parts, column = [], 0
        for weight, bias, by_expert in zip(self.weights, self.biases, self.factors, strict=True):
            y = x @ weight.double().T + (0 if bias is None else bias.double())
            for f in by_expert.values():
                if d is not None:
                    z = (x @ f.down.double().T) * d[:, column : column + len(f.down)].double()
                    y = y + z @ f.up.double().T
                column += len(f.down)
            parts.append(y)
        whole = torch.cat(parts, -1)
        return whole if residual is None else whole + residual.double().flatten(0, -2)


members = st.lists(
    st.tuples(st.integers(1, 70), st.lists(st.integers(0, 20), max_size=3), st.booleans()), min_size=1, max_size=3
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 30), st.integers(1, 90)),
    inputs=st.integers(1, 130),
    members=members,
    mixed=st.booleans(),
    normed=st.booleans(),
    added=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_group_is_exact_to_float32(
    rows: int,
    inputs: int,
    members: list[tuple[int, list[int], bool]],
    mixed: bool,
    normed: bool,
    added: bool,
    seed: int,
) -> None:
    group = Group(inputs, members, seed)
    x = group.random(rows, 1, inputs)
    d = group.random(rows, group.ranks) if mixed and group.ranks else None
    norm = Norm(group.random(inputs), 1e-3) if normed else None
    residual = group.random(rows, 1, group.outputs) if added else None
    got = group.packed(x, d, norm, residual)
    assert got.shape == (rows, 1, group.outputs) and got.is_contiguous()
    exact = group.exact(x, d, norm, residual)
    torch.testing.assert_close(
        got.double().flatten(0, 1), exact, rtol=1e-4, atol=1e-4 * max(1.0, float(exact.abs().max()))
    )


SEVERAL = Group(150, [(37, (5, 16), True), (64, (), False), (100, (0, 33), False)])


def test_a_row_is_the_same_to_the_last_bit_whatever_is_beside_it() -> None:
    x, d = SEVERAL.random(64, 150), SEVERAL.random(64, SEVERAL.ranks)
    alone = torch.cat([SEVERAL.packed(x[m : m + 1], d[m : m + 1]) for m in range(64)])
    for rows in range(2, 65):
        assert torch.equal(SEVERAL.packed(x[:rows], d[:rows]), alone[:rows]), rows


def test_views_and_other_numbers_of_threads() -> None:
    x, d = SEVERAL.random(9, 3, 150), SEVERAL.random(9, 2 * SEVERAL.ranks)
    expected = SEVERAL.packed(x[:, 1].clone(), d[:, ::2].clone())
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            assert torch.equal(SEVERAL.packed(x[:, 1], d[:, ::2]), expected)
    finally:
        torch.set_num_threads(threads)


def test_no_rows_are_no_results() -> None:
    assert SEVERAL.packed(torch.empty(0, 4, 150), None).shape == (0, 4, 201)


def test_what_is_not_finite_stays_in_its_row() -> None:
    x, d = SEVERAL.random(5, 150), SEVERAL.random(5, SEVERAL.ranks)
    clean = SEVERAL.packed(x, d)
    x[2, 7] = torch.nan
    got = SEVERAL.packed(x, d)
    assert got[2].isnan().all()
    assert torch.equal(got[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_are_not_taken(dtype: torch.dtype) -> None:
    assert not can_pack(torch.empty(1, 1, dtype=dtype))
    with pytest.raises(TypeError, match=r"got .* on cpu, allowed: torch.float32"):
        SEVERAL.packed(torch.zeros(1, 150, dtype=dtype), None)


def test_the_weights_themselves_are_not_kept() -> None:
    group = Group(20, [(30, (4,), False)])
    kept = weakref.ref(group.weights[0])
    product, x, exact = group.packed, group.random(1, 20), None
    exact = group.exact(x, None, None, None)
    del group
    gc.collect()
    assert kept() is None
    torch.testing.assert_close(product(x, None).double(), exact, rtol=1e-4, atol=1e-4)


SCRIPT = """
import torch
from mage_ray.merging.packed import can_pack
print(can_pack(torch.empty(1, 1)))
"""


def run(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env={**os.environ, "MAGE_RAY_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_library_is_built_once_for_all_processes(tmp_path: Path) -> None:
    assert run(tmp_path).stdout == "True\n"
    [built] = (tmp_path / "native").iterdir()
    before = built.stat()
    assert run(tmp_path, CC="cc").stdout == "True\n"
    assert [*built.parent.iterdir()] == [built] and built.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_working_compiler_there_is_a_warning_and_no_packing(compiler: str, tmp_path: Path) -> None:
    (tmp_path / "cc").write_text("#!/bin/sh\necho a broken compiler >&2\nexit 1\n")
    (tmp_path / "cc").chmod(0o755)
    path = str(tmp_path) if compiler == "false" else "/nowhere"
    done = run(tmp_path / "cache", CC="cc", PATH=path)
    assert done.stdout == "False\n"
    [line] = [line for line in done.stderr.splitlines() if "slower" in line]
    assert "packed.c" in line and ("no C compiler" in line or "a broken compiler" in line)
    assert not list((tmp_path / "cache").rglob("*.*"))


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_library_that_others_may_have_written_is_not_loaded(where: str, tmp_path: Path) -> None:
    """What lies there could be anything: here it is no library at all, and loading it would end in a warning."""
    assert run(tmp_path).stdout == "True\n"
    [built] = (tmp_path / "native").iterdir()
    built.write_bytes(b"planted")
    (built if where == "file" else built.parent).chmod(0o777)
    done = run(tmp_path)
    assert done.stdout == "True\n" and "slower" not in done.stderr
    assert (built.read_bytes() == b"planted") == (where == "folder")
