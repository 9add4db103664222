"""Small kernels that apply one function of `numbers.metal` to many numbers, for tests."""

from __future__ import annotations

from moescope.kernels.metal.launch import Kernel, Launch, router_kernel

LANES = 32
# name: the expression for numbers x and y, both float
PROBES = {
    "exponential": "moescope::scaled(power.value.hi, power.exponent)",
    "log_of_one_more": "moescope::log_of_one_more(moescope::pair(x, 0.0f)).hi",
    "soft_cap": "moescope::soft_cap(x, y)",
    "bfloat16": "moescope::to_bfloat16(x)",
    "float16": "moescope::to_float16(x)",
    "scaled": "moescope::scaled(x, int(y))",
    "added": "moescope::added(x, y)",
    "key": "as_type<float>(moescope::ordered(x))",
    "value": "moescope::unordered(moescope::ordered(x))",
    "product": "moescope::product(x, y).lo",
    "quotient": "moescope::divide(moescope::pair(x, 0.0f), moescope::pair(y, 0.0f)).lo",
    "root": "moescope::root(moescope::pair(metal::abs(x), 0.0f)).lo",
    "total": "moescope::simd_total(moescope::pair(x, 0.0f)).hi",
}


def probe(name: str) -> Kernel:
    """out[i] = f(x[i], y[i]), 32 numbers a threadgroup."""
    before = ""
    if name == "exponential":
        before = "moescope::Power power = moescope::exponential_of_difference(x, y);\n"
    source = (
        "uint i = 32 * threadgroup_position_in_grid.y + thread_index_in_simdgroup;\n"
        f"float x = left[i], y = right[i];\n(void)y;\n{before}out[i] = {PROBES[name]};\n"
    )
    return Kernel(f"probe_{name}", ("left", "right"), ("out",), router_kernel().header, source)


def probe_launch(name: str, n: int) -> Launch:
    assert n % LANES == 0
    return Launch(probe(name), (), (LANES, n // LANES, 1), (LANES, 1, 1), ((n,),), ("float32",), ())
