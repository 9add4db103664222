"""The expert kernels on the device, in the sizes of released models, against plain torch there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.expert_cases import random, routes, torch_experts

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOSE = {"float32": 5e-6, "bfloat16": 8e-3, "float16": 1e-3}
# E, K, H, I: OLMoE, Qwen3-30B-A3B, Mixtral cut down, and widths that no tile divides
SIZES = [(64, 8, 2048, 1024), (128, 8, 2048, 768), (8, 2, 4096, 3584), (9, 3, 200, 136)]
Weights = tuple[Tensor, Tensor]


def there(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def experts(dtype: str, E: int, H: int, width: int) -> Weights:
    """gate_up [E, 2 × width, H] and down [E, H, width], made on the device."""
    generator = torch.Generator(DEVICE).manual_seed(E)
    gate_up = torch.randn(E, 2 * width, H, generator=generator, device=DEVICE) * H**-0.5
    down = torch.randn(E, H, width, generator=generator, device=DEVICE) * width**-0.5
    return gate_up.to(DTYPES[dtype]), down.to(DTYPES[dtype])


def apart(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("E, K, H, width", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_lanes(E: int, K: int, H: int, width: int, dtype: str) -> None:
    from moescope.kernels.triton_ops.experts import experts_small

    gate_up, down = experts(dtype, E, H, width)
    for N in (1, 4):
        (h,) = there(random(N, DTYPES[dtype], N, H))
        ids, weights = there(*routes(N, N, K, E))
        expected = torch_experts(h, gate_up, down, ids, weights)
        out = torch.full_like(h, float("nan"))
        found = experts_small(h, gate_up, down, ids, weights, out=out)
        assert apart(found, expected) < CLOSE[dtype]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unused_picks_and_null_experts(dtype: str) -> None:
    from moescope.kernels.triton_ops.experts import experts_small

    E, K, H, width = 12, 5, 256, 128
    gate_up, down = experts(dtype, E, H, width)
    (h,) = there(random(3, DTYPES[dtype], 8, H))
    ids, weights = there(*routes(3, 8, K, E, nulls=3))
    expected = torch_experts(h, gate_up, down, ids, weights)
    found = experts_small(h, gate_up, down, ids, weights)
    assert not found[0].any()  # of this lane no expert is a real one
    assert apart(found, expected) < CLOSE[dtype]


def test_equal_lanes_get_equal_bits() -> None:
    """Whoever is beside them; and every run gives the same ones."""
    from moescope.kernels.triton_ops.experts import experts_small

    E, K, H, width = 64, 8, 2048, 1024
    gate_up, down = experts("bfloat16", E, H, width)
    (one,) = there(random(5, torch.bfloat16, 1, H))
    ids, weights = there(*routes(5, 1, K, E))
    alone = experts_small(one, gate_up, down, ids, weights)
    (h,) = there(random(6, torch.bfloat16, 8, H))
    every_id, every_weight = there(*routes(6, 8, K, E))
    for lane in (2, 7):
        h[lane], every_id[lane], every_weight[lane] = one[0], ids[0], weights[0]
    for _ in range(3):
        found = experts_small(h, gate_up, down, every_id, every_weight)
        assert torch.equal(found[2], found[7]) and torch.equal(found[2], alone[0])


@pytest.mark.parametrize("E, K, H, width", SIZES[:2])
@pytest.mark.parametrize("T", [9, 128, 1024])
@pytest.mark.parametrize("products", ["triton", "auto"])
def test_prompts(E: int, K: int, H: int, width: int, T: int, products: str) -> None:
    from moescope.kernels.triton_ops.grouped import experts_grouped

    gate_up, down = experts("bfloat16", E, H, width)
    (h,) = there(random(T, torch.bfloat16, T, H))
    ids, weights = there(*routes(T, T, K, E))
    found = experts_grouped(h, gate_up, down, ids, weights, products=products)
    rows = torch.randperm(T, generator=torch.Generator().manual_seed(0))[:24].to(DEVICE)
    expected = torch_experts(h[rows], gate_up, down, ids[rows], weights[rows])
    assert torch.isfinite(found).all()
    assert apart(found[rows], expected) < CLOSE["bfloat16"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_prompts_in_other_dtypes_with_every_token_on_few_experts(dtype: str) -> None:
    from moescope.kernels.triton_ops.grouped import experts_grouped

    E, K, H, width, T = 16, 2, 512, 384, 700
    gate_up, down = experts(dtype, E, H, width)
    (h,) = there(random(1, DTYPES[dtype], T, H))
    ids, weights = there(*routes(1, T, K, E))
    ids[100:] = torch.tensor([3, 9], dtype=torch.int32, device=DEVICE)
    found = experts_grouped(h, gate_up, down, ids, weights, products="triton")
    rows = torch.arange(90, 130, device=DEVICE)
    expected = torch_experts(h[rows], gate_up, down, ids[rows], weights[rows])
    assert apart(found[rows], expected) < CLOSE[dtype]
