"""What MLX makes of a launch of the Metal kernels, as far as that can be had without a Mac.

It writes the whole source while a function is exported, and `route_mlx` runs against a device made
of the compiled text.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings

from moescope.kernels import RouterPolicy, RouterSpec, RouterWiring, compare, mlx_ops, route
from moescope.kernels.mlx_ops import compare_twins, gate_and_route_mlx, route_mlx
from moescope.kernels.policy_rows import pack, pack_rows
from moescope.kernels.reference import gate_logits
from tests.kernels.metal_shim.build import SMALL, Variant, signature, text
from tests.kernels.metal_shim.device import Library
from tests.kernels.metal_shim.mlx_device import DTYPES, Device
from tests.kernels.metal_shim.routers import gate_variant, router_variants
from tests.kernels.mlx_cases import on_mlx, to_numpy
from tests.kernels.strategies import Case, cases, rows_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
VARIANTS = [
    *router_variants((1, 2, 4)),
    *router_variants((2,), ("bfloat16",)),
    gate_variant("bfloat16", "bfloat16"),
    gate_variant("float32", "bfloat16"),
]


def spec_of(E: int, K: int, **policy: Any) -> RouterSpec:
    return RouterSpec(RouterPolicy(K, **policy), RouterWiring(E)).resolved("float32")


@pytest.fixture
def device(compiled: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device(Library(compiled(text(VARIANTS)), VARIANTS))
    mlx_ops._kernel.cache_clear()
    monkeypatch.setattr(mx.fast, "metal_kernel", found.metal_kernel)
    yield found
    mlx_ops._kernel.cache_clear()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(case=cases((4, 12, 33, 60, 96)))
def test_what_mlx_is_told_routes_as_the_reference(
    compiled: Callable[..., Path], case: Case
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        library = Library(compiled(text(VARIANTS)), VARIANTS)
        mlx_ops._kernel.cache_clear()
        patch.setattr(mx.fast, "metal_kernel", Device(library).metal_kernel)
        found = on_mlx(case.logits, case.spec, use_metal=True, keep_logits=True, **case.inputs)
        mlx_ops._kernel.cache_clear()
    expected = route(case.logits, case.spec, **case.inputs)
    assert not compare(expected, found, case.spec, case.logits, correction_bias=case.bias)
    np.testing.assert_array_equal(found.logits, case.logits)


def test_several_policies_a_token_and_vectors_of_each_row(device: Device) -> None:
    """In bfloat16, as a decoder's gate gives logits."""
    spec = spec_of(40, 3, scoring_func="sigmoid", correction_bias="score", per_expert_scale=True)
    specs = [spec, spec.with_policy(num_experts_per_tok=5, weights_from="biased_scores")]
    rng = np.random.default_rng(0)
    logits = mx.array(rows_of("ties", 3, 40, rng)).astype(mx.bfloat16)
    bias, scale = (rng.normal(size=s).astype(np.float32) for s in ((3, 40), (40,)))
    rows = mx.array(np.tile(pack_rows(specs).astype(np.float32)[None], (3, 1, 1)))
    vectors = {"correction_bias": mx.array(bias), "per_expert_scale": mx.array(scale)}
    found = to_numpy(route_mlx(logits, rows, 6, use_metal=True, keep_logits=True, **vectors))
    plain = to_numpy(route_mlx(logits, rows, 6, use_metal=False, **vectors))
    assert len(device.launched) == 1 and found.expert_ids.shape == (3, 2, 6)
    np.testing.assert_array_equal(found.expert_ids, plain.expert_ids)
    np.testing.assert_array_equal(found.runner_up, plain.runner_up)
    for name in ("scores", "weights", "score_sum", "mass", "entropy", "margin"):
        np.testing.assert_allclose(getattr(found, name), getattr(plain, name), rtol=1e-5, atol=1e-6)
    difference = compare_twins(logits, rows, 6, use_metal=True, **vectors)
    assert difference.rows == 6 and difference.other_ids == 0 and difference.weight < 1e-6


@pytest.mark.parametrize("stored", [mx.bfloat16, mx.float32])
def test_the_gate_in_one_launch(device: Device, stored: mx.Dtype) -> None:
    E, H = 60, 90
    spec = RouterSpec(RouterPolicy(4), RouterWiring(E, router_dtype="bfloat16", gate_bias=True))
    spec = spec.resolved("float32")
    rng = np.random.default_rng(2)
    hidden = mx.array(rng.normal(size=(1, H)).astype(np.float32)).astype(stored)
    gate, gate_bias = (
        mx.array(rng.normal(size=s).astype(np.float32)).astype(mx.bfloat16) for s in ((E, H), (E,))
    )
    rows = mx.array(pack_rows([spec, spec.with_policy(norm_topk_prob=True)]).astype(np.float32))
    inputs: dict[str, Any] = {"router_dtype": "bfloat16", "gate_bias": gate_bias}
    fused, plain = (
        to_numpy(
            gate_and_route_mlx(
                hidden, gate, rows[None], 4, use_metal=on, keep_logits=True, **inputs
            )
        )
        for on in (True, False)
    )
    assert len(device.launched) == 1 and fused.weights.shape == (1, 2, 4)
    exact = gate_logits(
        *(np.array(a.astype(mx.float32)) for a in (hidden, gate)),
        spec,
        gate_bias=np.array(gate_bias.astype(mx.float32)),
    )
    np.testing.assert_allclose(fused.logits, exact, rtol=2**-7, atol=2**-7)
    np.testing.assert_allclose(plain.logits, exact, rtol=2**-7, atol=2**-7)
    again = on_mlx(fused.logits, spec)
    np.testing.assert_array_equal(fused.expert_ids[:, 0], again.expert_ids)
    np.testing.assert_allclose(fused.weights[:, 0], again.weights, rtol=1e-6)


# --- the source that MLX writes -------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize("E", [4, 60])
def test_mlx_takes_the_router_s_launch_and_writes_the_signature_tested_here(
    dtype: mx.Dtype, E: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of(E, 2)
    rows = mx.array(pack(spec)[None].astype(np.float32))

    def step(logits: mx.array, bias: mx.array) -> list[mx.array]:
        launch = mlx_ops.router_launch(1, 1, E, 2, one_row=True, bias_rows=1)
        return mlx_ops._launched(launch, [logits, rows, bias, None, None], verbose=True)

    mlx_ops._kernel.cache_clear()
    arrays = [mx.zeros((1, E), dtype), mx.zeros((1, E))]
    mx.export_function(str(tmp_path / "step"), step, *arrays)
    variant = Variant.of(
        mlx_ops.router_launch(1, 1, E, 2),
        (DTYPES[dtype], "float32", "float32", "float32", "int32", "int32"),
        (E < SMALL, False, E < SMALL, False, False, False),
    )
    check_source(capfd.readouterr().out, variant)


def test_mlx_takes_the_gate_s_launch(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    E, H = 60, 90
    spec = spec_of(E, 2)
    rows = mx.array(pack(spec)[None].astype(np.float32))

    def step(hidden: mx.array, gate: mx.array) -> list[mx.array]:
        launch = mlx_ops.gate_router_launch(1, E, H, 2, router_dtype=1, casts=False)
        given = [hidden, gate, None, rows, None, None, None]
        return mlx_ops._launched(launch, given, verbose=True)

    mlx_ops._kernel.cache_clear()
    arrays = [mx.zeros((1, H), mx.bfloat16), mx.zeros((E, H), mx.bfloat16)]
    mx.export_function(str(tmp_path / "step"), step, *arrays)
    check_source(capfd.readouterr().out, gate_variant("bfloat16", "bfloat16", E))


def check_source(printed: str, variant: Variant) -> None:
    """MLX's source is the header, the signature that the harness writes, and the body."""
    source = printed.split("```")[1]
    name = re.search(r"void (custom_kernel_\w+)\(", source)
    assert name is not None and variant.kernel.name in name[1]
    wanted = variant.kernel.header + signature(variant, name[1]) + variant.kernel.source
    assert wanted in source


def test_route_mlx_is_exported_with_the_kernel_in_it(tmp_path: Path) -> None:
    """The whole call, as a compiled step has it: MLX accepts it, shapes and dtypes are right."""
    spec = spec_of(60, 4)
    rows = mx.array(pack(spec)[None].astype(np.float32))

    def step(logits: mx.array) -> list[mx.array]:
        found = route_mlx(logits, rows, 4, use_metal=True)
        assert found.expert_ids.shape == (3, 4) and found.expert_ids.dtype == mx.int32
        assert found.margin.shape == (3,) and found.margin.dtype == mx.float32
        return [found.expert_ids, found.weights, found.margin]

    mlx_ops._kernel.cache_clear()
    file = tmp_path / "step.mlxfn"
    mx.export_function(str(file), step, mx.zeros((3, 60)))
    assert b"moescope_router" in file.read_bytes()


# --- the text -------------------------------------------------------------------------------------

TEXTS = {
    path.name: path.read_text()
    for path in map(Path, map(str, files("moescope.kernels.metal").iterdir()))
    if path.name.endswith(".metal")
}


SPACE = re.compile(r"\b(device|threadgroup|thread|constant)\b( const)?$")
TYPED = re.compile(
    r"\b(float|int|uint|ulong|bool|Pair|Power|Policy|Shared)(\* \w+| \(&\w+\)| ?& ?\w+)"
)


def unqualified(code: str) -> list[str]:
    """Pointers and references to a type that is named, without an address space before it."""
    found = (m for m in TYPED.finditer(re.sub(r"//.*", "", code)))
    return [m[0] for m in found if not SPACE.search(m.string[: m.start()].rstrip())]


@pytest.mark.parametrize("name", TEXTS)
def test_every_pointer_and_reference_names_its_address_space(name: str) -> None:
    """Metal asks for it, C++ cannot check it."""
    assert unqualified(TEXTS[name]) == []
    for space in ("threadgroup ", "thread const ", "thread ", "device "):
        for declared in re.findall(rf"{space}\w+(?:\*| \(&)", TEXTS[name]):
            bare = declared.removeprefix(space)
            assert unqualified(TEXTS[name].replace(declared, bare, 1)), declared


@pytest.mark.parametrize("name", TEXTS)
def test_the_text_is_what_metal_speaks(name: str) -> None:
    """No double, no name of the C library, no lambda, and a newline at the end, after which MLX
    writes the signature."""
    code = re.sub(r"//.*", "", TEXTS[name])
    assert not re.search(r"\b(double|std|auto|goto|try|throw|static|new|delete|size_t)\b", code)
    assert not re.search(r"\d\.\d+(e[+-]?\d+)?(?![\d.ef])", code), "a literal without an f"
    assert TEXTS[name].endswith("\n") and "\t" not in TEXTS[name]
