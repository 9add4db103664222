"""Products of the C library for every instruction set this CPU has, against float64."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from moescope.kernels import native_ops as native

DTYPES = native.DTYPES
SETS = native.instruction_sets()
BITS = {"float32": 24, "bfloat16": 8, "float16": 11}
needs_library = pytest.mark.skipif(native.library() is None, reason="no C library, no compiler")


def test_the_library_is_there_where_a_compiler_is() -> None:
    assert native.library() is not None or not any(map(shutil.which, ("cc", "gcc", "clang")))


def test_every_cpu_has_the_portable_set() -> None:
    assert not SETS or SETS[-1] == "portable"
    assert set(SETS) <= set(native.INSTRUCTION_SETS)


def stored(values: NDArray[Any], dtype: str) -> tuple[NDArray[Any], NDArray[np.float32]]:
    """`values` as weights of a dtype, and the same as float32."""
    rounded = torch.from_numpy(values.astype(np.float32)).to(getattr(torch, dtype))
    bits = rounded.view(torch.uint16) if dtype == "bfloat16" else rounded
    return bits.numpy(), rounded.float().numpy()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", SETS)
def test_products_are_sums_of_products(isa: str, dtype: str) -> None:
    """Odd sizes, 1 to 9 vectors, one thread and three; off by the last rounding and no more than a
    float32 sum of the magnitudes can be."""
    rng = np.random.default_rng(5)
    for rows, cols in ((1, 1), (3, 31), (7, 33), (40, 64), (33, 100), (129, 257), (600, 72)):
        weight, wide = stored(rng.normal(size=(rows, cols)), dtype)
        _, x = stored(rng.normal(size=(9, cols)), dtype)
        exact = x.astype(np.float64) @ wide.T.astype(np.float64)
        size = np.abs(x).astype(np.float64) @ np.abs(wide).T.astype(np.float64)
        slack = size * cols * 2.0**-24 + np.abs(exact) * 2.0 ** -BITS[dtype] + 1e-7
        for N in range(1, 10):
            found = native.linear(x[:N], weight, dtype=dtype, isa=isa, threads=1 + 2 * (N % 2))
            assert found.shape == (N, rows)
            assert (np.abs(found - exact[:N]) <= slack[:N]).all()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", SETS)
def test_a_vector_gets_the_same_bits_in_every_batch(isa: str, dtype: str) -> None:
    """Whatever stands beside it, wherever it stands, and however many threads there are."""
    rng = np.random.default_rng(6)
    weight, _ = stored(rng.normal(size=(70, 333)), dtype)
    _, x = stored(rng.normal(size=(11, 333)), dtype)
    alone = [native.linear(x[n : n + 1], weight, dtype=dtype, isa=isa)[0] for n in range(len(x))]
    for N in range(1, 12):
        order = rng.permutation(len(x))[:N]
        found = native.linear(x[order], weight, dtype=dtype, isa=isa, threads=3)
        for place, n in enumerate(order):
            assert (found[place] == alone[n]).all()


@needs_library
@pytest.mark.parametrize("isa", SETS)
def test_every_number_of_half_precision_is_read_and_rounded(isa: str) -> None:
    """All 65536 float16 weights times 1, and times numbers that need rounding, as numpy rounds."""
    every = np.arange(65536, dtype=np.uint16).view(np.float16)[:, None]
    factors = np.array([[1.0], [1.0009765625], [0.0625], [3.140625]], np.float32)
    found = native.linear(factors, every, isa=isa)
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = (factors @ every.T.astype(np.float32)).astype(np.float16).astype(np.float32)
    assert np.array_equal(found, wanted, equal_nan=True)


@needs_library
@pytest.mark.parametrize("isa", SETS)
def test_every_normal_bfloat16_is_read_and_rounded(isa: str) -> None:
    bits = np.arange(65536, dtype=np.uint16)
    every = bits[(bits & 0x7F80) >= 0x0400][:, None]  # products below stay normal numbers
    factors = np.array([[1.0], [1.0078125], [3.140625], [0.25]], np.float32)
    found = native.linear(factors, every, dtype="bfloat16", isa=isa)
    wide = torch.from_numpy(every).view(torch.bfloat16).float()
    wanted = (torch.from_numpy(factors) @ wide.T).bfloat16().float()
    assert np.array_equal(found, wanted.numpy(), equal_nan=True)


@needs_library
@pytest.mark.parametrize("isa", SETS)
def test_what_is_not_finite_stays_so(isa: str) -> None:
    weight, _ = stored(np.ones((3, 70)), "bfloat16")
    x = np.ones((4, 70), np.float32)
    x[0, 69], x[1, 3], x[2, 40] = np.nan, np.inf, -np.inf
    found = native.linear(x, weight, dtype="bfloat16", isa=isa)
    wanted = np.array([np.nan, np.inf, -np.inf, 70.0], np.float32)[:, None].repeat(3, 1)
    assert np.array_equal(found, wanted, equal_nan=True)


@needs_library
def test_reading_is_measured() -> None:
    data = np.zeros(3_000_001, np.uint8)
    for threads in (1, 2):
        assert 0 < native.read_bandwidth(data, threads=threads) < 1e5


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESCOPE_NATIVE", "0")
    assert native.library() is None and native.available() == "" and not native.instruction_sets()


@needs_library
def test_an_instruction_set_can_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.available() == SETS[0]
    for isa in SETS:
        monkeypatch.setenv("MOESCOPE_ISA", isa)
        assert native.available() == isa
    monkeypatch.setenv("MOESCOPE_ISA", "unheard-of")
    assert native.available() == ""
