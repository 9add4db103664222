"""The arithmetic of the Metal kernels' text: pairs of float32 against float64 and exact sums,
denormals on a device that takes them for 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from moescope.kernels.reference import round_to
from tests.kernels.metal_shim.build import Variant, text
from tests.kernels.metal_shim.device import How, Library
from tests.kernels.metal_shim.probes import PROBES, probe_launch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
N = 4096
VARIANTS = [Variant.of(probe_launch(name, 32), ("float32", "float32")) for name in PROBES]
HOWS = [How(), How(flush=True)]
NORMAL = np.finfo(np.float32).tiny


@pytest.fixture(scope="module")
def library(compiled: Callable[..., Path]) -> Library:
    return Library(compiled(text(VARIANTS), "-O1"), VARIANTS)


def of(
    library: Library, name: str, how: How, x: np.ndarray, y: np.ndarray | None = None
) -> np.ndarray:
    given = [np.asarray(a, np.float32) for a in (x, x if y is None else y)]
    place = list(PROBES).index(name)
    return library(place, probe_launch(name, len(given[0])), given, how)[0]


def spread(seed: int = 0, low: int = -149, high: int = 127) -> np.ndarray:
    """Numbers of all sizes and both signs; denormals, zeros and infinities among them."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=N) * 2.0 ** rng.integers(low, high, N)).astype(np.float32)
    x[:8] = 0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, NORMAL, 65520.0
    return x


def ulps(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    step = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return np.where(found == exact.astype(np.float32), 0.5, np.abs(found - exact) / step)


@pytest.mark.parametrize("how", HOWS)
def test_the_exponential_of_a_difference_is_rounded_right(library: Library, how: How) -> None:
    """To a hundredth of an ulp more than half of one; also where float32 rounds the difference, and
    down to denormals."""
    rng = np.random.default_rng(2)
    y = np.abs(rng.normal(size=N) * 30).astype(np.float32)
    x = np.minimum(rng.normal(size=N) * 40, y).astype(np.float32)
    x[:4], y[:4] = (1e-7, -101.0, 5.0, -np.inf), (80.0, 0.0, 5.0, 3.0)
    exact = np.exp(x.astype(np.float64) - y)
    assert (exact[exact > 0] < NORMAL).any()
    # what is denormal is rounded twice
    most = np.where(exact < NORMAL, 0.75, 0.51)
    assert (ulps(of(library, "exponential", how, x, y), exact) <= most).all()


@pytest.mark.parametrize("how", HOWS)
def test_the_logarithm_is_rounded_right(library: Library, how: How) -> None:
    u = np.random.default_rng(3).uniform(size=N) ** 8
    u[:3] = 0.0, 1.0, 2.0**-100
    u = u.astype(np.float32)
    exact = np.log1p(u.astype(np.float64))
    assert (ulps(of(library, "log_of_one_more", how, u), exact) <= 0.51).all()


@pytest.mark.parametrize("how", HOWS)
def test_the_soft_cap_is_rounded_right(library: Library, how: How) -> None:
    x = spread(4, -20, 8)
    for cap in (5.0, 30.0, 0.75):
        exact = cap * np.tanh(x.astype(np.float64) / cap)
        exact[np.isinf(x)] = x[np.isinf(x)]
        found = of(library, "soft_cap", how, x, np.full(N, cap))
        large = np.abs(x) > 1e-30  # smaller ones are denormal or nearly so
        assert (ulps(found, exact)[large & np.isfinite(x)] <= 0.51).all()
        np.testing.assert_array_equal(found[np.isinf(x)], x[np.isinf(x)])


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_are_rounded_as_numpy_rounds(library: Library, dtype: str, how: How) -> None:
    x = spread(5)
    x[8:16] = 65519.996, 2.0**-24, 2.0**-25, 6.1e-5, 2.0**-14, 3e38, np.nan, -2.9802322e-8
    np.testing.assert_array_equal(of(library, dtype, how, x), round_to(x, dtype).astype(np.float32))


@pytest.mark.parametrize("how", HOWS)
def test_powers_of_two_scale_denormals_too(library: Library, how: How) -> None:
    x, n = spread(6), np.random.default_rng(6).integers(-300, 300, N)
    np.testing.assert_array_equal(
        of(library, "scaled", how, x, n), np.ldexp(x.astype(np.float64), n).astype(np.float32)
    )


@pytest.mark.parametrize("how", HOWS)
def test_sums_of_denormals(library: Library, how: How) -> None:
    x, y = spread(7, -149, -90), spread(8, -149, -90)[::-1]
    found = of(library, "added", how, x, y)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(found, x + y)


@pytest.mark.parametrize("how", HOWS)
def test_keys_are_in_the_order_of_the_numbers(library: Library, how: How) -> None:
    x = np.sort(spread(9))
    keys = of(library, "key", how, x).view(np.int32)
    np.testing.assert_array_equal(np.diff(keys.astype(np.int64)) > 0, np.diff(x) > 0)
    assert (np.diff(keys.astype(np.int64)) >= 0).all()
    np.testing.assert_array_equal(of(library, "value", how, x), x)


def test_pairs_hold_what_float32_loses(library: Library) -> None:
    x, y = spread(10, -30, 30)[8:], spread(11, -30, 30)[8:]
    x, y = np.append(x, np.ones(8, np.float32)), np.append(y, np.ones(8, np.float32))
    wide = x.astype(np.float64), y.astype(np.float64)
    rest = {
        "product": wide[0] * wide[1] - (x * y).astype(np.float64),
        "quotient": wide[0] / wide[1] - (x / y).astype(np.float64),
        "root": np.sqrt(np.abs(wide[0])) - np.sqrt(np.abs(x)).astype(np.float64),
    }
    for name, exact in rest.items():
        found = of(library, name, How(), x, y)
        scale = np.abs({"product": x * y, "quotient": x / y, "root": np.sqrt(np.abs(x))}[name])
        assert (np.abs(found - exact) <= 2.0**-46 * scale).all(), name


def test_a_sum_over_lanes_cancels_as_float64_does(library: Library) -> None:
    x = spread(12, -3, 3)
    x[2:4] = 1.0
    rows = x.reshape(-1, 32)
    rows[:, 16:] = -rows[:, :16] + rows[:, 16:] * 2.0**-20
    exact = rows.astype(np.float64).sum(1)
    found = of(library, "total", How(), rows.ravel()).reshape(-1, 32)
    assert (found == found[:, :1]).all()
    most = np.abs(rows).max(1)
    assert (np.abs(found[:, 0] - exact) <= 2.0**-46 * most + 1e-7 * np.abs(exact)).all()
