"""Norms, products, attention and sampling of one token on the device, in real sizes, against plain
formulas in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moescope.engine import sampling as host
from moescope.engine.protocol import Sampling

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CLOSE = {"float32": 2e-6, "bfloat16": 4e-3, "float16": 5e-4}  # relative error of a rounded result


def random(*shape: int, seed: int = 0, dtype: str = "float32", scale: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    values = torch.randn(shape, generator=generator, device=DEVICE) * scale
    return values.to(DTYPES[dtype])


def apart(found: Tensor, expected: Tensor) -> float:
    """Relative error; NaN is never small."""
    return float((found.double() - expected).norm() / expected.norm())


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm that rounds before it multiplies, in float64 of values rounded as the model does."""
    wide = x.double()
    factor = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    once = (wide * factor).to(x.dtype).double()
    return (once * weight.double()).to(x.dtype)


# qkv, output, head and gate of OLMoE and Qwen3-30B-A3B, and sizes that no tile divides
PRODUCTS = [
    (6144, 2048),
    (5120, 2048),
    (2048, 4096),
    (50304, 2048),
    (151936, 2048),
    (128, 2048),
    (77, 1000),
    (1, 64),
    (300, 10240),
]


@pytest.mark.parametrize("outputs, width", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products(outputs: int, width: int, dtype: str) -> None:
    from moescope.kernels.triton_ops.gemv import linear_small

    weight = random(outputs, width, dtype=dtype, scale=width**-0.5)
    x, residual = random(3, width, seed=1, dtype=dtype), random(3, outputs, seed=2, dtype=dtype)
    norm = random(width, seed=3, dtype=dtype)
    plain = x.double() @ weight.double().T
    assert apart(linear_small(x, weight), plain) < CLOSE[dtype]
    rounded = (normed(x, norm, 1e-5).double() @ weight.double().T).to(x.dtype)
    expected = residual.double() + rounded.double()
    found = linear_small(x, weight, norm=norm, eps=1e-5, residual=residual)
    assert apart(found, expected) < 2 * CLOSE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lane_does_not_depend_on_its_neighbours(dtype: str) -> None:
    from moescope.kernels.triton_ops.gemv import linear_small

    weight, x = random(1000, 2048, dtype=dtype), random(8, 2048, seed=1, dtype=dtype)
    whole = linear_small(x, weight)
    for lane in range(8):
        assert torch.equal(linear_small(x[lane : lane + 1].clone(), weight)[0], whole[lane])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 1000, 2048, 7168])
def test_norms(width: int, dtype: str) -> None:
    from moescope.kernels.triton_ops.norms import rms_norm

    x, weight = random(4, width, dtype=dtype), random(width, seed=1, dtype=dtype)
    found = rms_norm(x, weight, 1e-5, "model", out=torch.empty_like(x))
    assert apart(found, normed(x, weight, 1e-5).double()) < CLOSE[dtype]


# heads, key heads, head width
HEADS = [(16, 16, 128), (32, 4, 128), (8, 2, 64), (6, 2, 24), (16, 2, 256), (8, 2, 512)]


@pytest.mark.parametrize("heads, kv_heads, width", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 100])
def test_attention_over_short_and_long_caches(
    heads: int, kv_heads: int, width: int, dtype: str, window: int
) -> None:
    """Lanes of very different lengths in one launch, twice: scratch memory is left as it was."""
    from moescope.kernels.triton_ops.attention import Scratch, Shape, attend

    capacity = 8192
    positions = [0, 1, 63, 64, 65, 1000, 4095, 8190]
    N = len(positions)
    shape = Shape(heads, kv_heads, width, width**-0.5, window=window)
    cache = random(2, N + 1, kv_heads, capacity, width, dtype=dtype)
    lanes = list(range(N, 0, -1))  # lane 0 is nobody's
    scratch = Scratch.of([shape], N, DEVICE, 132)
    for turn in range(2):
        qkv = random(N, (heads + 2 * kv_heads) * width, seed=turn + 1, dtype=dtype)
        before = cache[:, 0].clone()
        at = [position + turn for position in positions]
        out = attend(
            qkv,
            *cache,
            torch.tensor(lanes, dtype=torch.int32, device=DEVICE),
            torch.tensor(at, dtype=torch.int32, device=DEVICE),
            shape,
            scratch,
            out=torch.full((N, heads * width), float("nan"), dtype=qkv.dtype, device=DEVICE),
        )
        for n in range(N):
            expected = attended(qkv[n], cache[:, lanes[n]], at[n], shape)
            assert apart(out[n], expected) < 3 * CLOSE[dtype], f"lane of {at[n]} tokens"
        assert torch.equal(cache[:, 0], before)
        assert not scratch.counts.any()


def attended(qkv: Tensor, cache: Tensor, position: int, shape: Any) -> Tensor:
    """The formula for one lane, in float64; checks that the new row is in the cache."""
    D, KV, G = shape.head_dim, shape.kv_heads, shape.heads // shape.kv_heads
    q, k, v = qkv.split((shape.heads * D, KV * D, KV * D))
    assert torch.equal(cache[0, :, position], k.view(KV, D))
    assert torch.equal(cache[1, :, position], v.view(KV, D))
    first = max(0, position + 1 - shape.window) if shape.window else 0
    keys, values = cache[:, :, first : position + 1].double()
    scores = torch.einsum("kgd,ksd->kgs", q.double().view(KV, G, D), keys) * shape.scale
    return torch.einsum("kgs,ksd->kgd", scores.softmax(-1), values).reshape(-1)


@pytest.mark.parametrize("vocabulary", [50304, 151936, 264])
def test_the_likeliest_token(vocabulary: int) -> None:
    """The lower of equal ones; NaN is never it; a row without numbers names a token all the same.
    The step's inputs move on by one."""
    from moescope.kernels.triton_ops.sampling import Scratch, greedy

    logits = random(4, vocabulary).to(torch.bfloat16).float()  # ties
    logits[1, 7] = logits[1, 200] = 100.0
    logits[2, 5], logits[2, 9] = float("nan"), 50.0
    logits[3] = float("nan")
    expected = np.nan_to_num(logits.cpu().numpy(), nan=-np.inf).argmax(1)
    scratch = Scratch.of(4, vocabulary, DEVICE)
    drawn, token_ids = (torch.full((4,), -1, dtype=torch.int64, device=DEVICE) for _ in range(2))
    positions = torch.arange(4, dtype=torch.int32, device=DEVICE)
    for turn in range(1, 3):
        greedy(logits, scratch, drawn=drawn, token_ids=token_ids, positions=positions)
        assert drawn[:3].tolist() == token_ids[:3].tolist() == expected[:3].tolist()
        assert drawn[1].item() == 7 and drawn[2].item() == 9
        assert 0 <= drawn[3].item() < vocabulary
        assert positions.tolist() == [turn + n for n in range(4)]


@pytest.mark.parametrize(
    "asked",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.6, min_p=0.02),
        Sampling(temperature=0.8, top_k=40),
        Sampling(temperature=1.3, top_p=0.9),
        Sampling(temperature=0.9, top_k=100, top_p=0.95, min_p=0.01),
    ],
)
@pytest.mark.parametrize("vocabulary", [50304, 264])
def test_drawing_is_the_hosts_drawing(asked: Sampling, vocabulary: int) -> None:
    from moescope.kernels.triton_ops.sampling import draw

    N = 48
    logits = random(N, vocabulary, scale=3.0)
    seeds = [replace(asked, seed=n) for n in range(N)]
    uniform = [host.uniform(each.seed, 5) for each in seeds]
    fields = {
        name: [getattr(asked, name)] * N for name in ("temperature", "top_k", "top_p", "min_p")
    } | {"uniform": uniform}
    columns = {
        name: torch.tensor(values, dtype=torch.float64, device=DEVICE).unsqueeze(1)
        for name, values in fields.items()
    }
    found = draw(logits, **columns, ranked=asked.top_k > 0 or asked.top_p < 1).tolist()
    rows = logits.cpu().numpy()
    expected = [
        host.choose(host.Expectation.of(row), each, 5)  # type: ignore[arg-type]
        for row, each in zip(rows, seeds, strict=True)
    ]
    assert found == expected
    assert len(set(found)) > 4
