"""Attention, norms and drawing in Triton against the torch operators and the host's sampling."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET"):
    import tests.kernels.interpreted  # noqa: F401

from moescope.engine import sampling as host
from moescope.engine import torch_operators as ops
from moescope.engine.graph_attention import attention_shape
from moescope.engine.operators import Attention, Norm, Rope
from moescope.engine.protocol import Sampling
from moescope.kernels.triton_ops import attention, norms, sampling

CAPACITY = 200
ROPE, WIDE_ROPE = Rope(1e4, 24), Rope(1e4, 24, applies="float32")
PLAIN = Attention(32, 4, 2, 24, 0.2)
FLAT = {"qk_norm_over": "flat", "qk_norm": Norm(96, 1e-5), "kv_norm": Norm(48, 1e-3)}
FLAT_WIDE = {
    "qk_norm_over": "flat",
    "qk_norm": Norm(96, applies="float32"),
    "kv_norm": Norm(48, applies="float32"),
}
# name -> attention, dtype, where the lanes' tokens stand
CASES: dict[str, tuple[Attention, torch.dtype, tuple[int, ...]]] = {
    "first token": (replace(PLAIN, rope=ROPE), torch.float32, (0,)),
    "ends of tiles and splits": (PLAIN, torch.float32, (64, 65, 199)),
    "flat norm": (replace(PLAIN, rope=ROPE, **FLAT), torch.float32, (0, 130)),  # type: ignore[arg-type]
    "flat norm, float32 weights": (
        replace(PLAIN, rope=ROPE, **FLAT_WIDE),  # type: ignore[arg-type]
        torch.bfloat16,
        (90,),
    ),
    "norm per head": (
        replace(PLAIN, rope=WIDE_ROPE, qk_norm=Norm(24, 1e-5), heads=2),
        torch.bfloat16,
        (3, 150),
    ),
    "half": (replace(PLAIN, rope=ROPE, heads=8, qk_norm=Norm(24)), torch.float16, (70,)),
    "window": (replace(PLAIN, window=70), torch.float32, (69, 70, 199)),
    "window of one": (replace(PLAIN, window=1), torch.float32, (0, 9)),
    "clip": (replace(PLAIN, rope=ROPE, clip_qkv=0.7), torch.bfloat16, (66,)),
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of interpreted -inf and NaN
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def _attention(
    spec: Attention, dtype: torch.dtype
) -> tuple[ops.TorchAttention, dict[str, torch.Tensor], torch.Generator]:
    """The operator without its last product, on random weights and a cache full of noise."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    width = spec.heads * spec.head_dim
    weights = {
        "a.qkv.weight": random((spec.heads + 2 * spec.kv_heads) * spec.head_dim, spec.hidden),
        "a.o_proj.weight": torch.eye(width, dtype=dtype),
    }
    if spec.qk_norm is not None:
        weights["a.q_norm.weight"] = random(spec.qk_norm.width)
        weights["a.k_norm.weight"] = random((spec.kv_norm or spec.qk_norm).width)
    twin = ops.TorchAttention(spec, weights, "a", dtype)
    twin.open(7, CAPACITY, "cpu")
    twin.cache.copy_(random(*twin.cache.shape))
    return twin, weights, generator


@pytest.mark.parametrize("name", CASES)
def test_attention_of_one_token(name: str) -> None:
    """Outputs and new rows of the cache; what lies behind a lane's end is noise, and stays."""
    spec, dtype, starts = CASES[name]
    twin, weights, generator = _attention(spec, dtype)
    lanes = [6, 1, 4, 0, 3][: len(starts)]
    h = torch.randn(len(starts), spec.hidden, generator=generator).to(dtype)
    cache, rotation, turned = twin.cache.clone(), None, {}
    if spec.rope is not None:
        kind = torch.float32 if spec.rope.applies == "float32" else dtype
        cos, sin = (part.to(kind) for part in ops.rotary_table(spec.rope, CAPACITY, "cpu"))
        at, rotation = torch.tensor(starts), (cos, sin)
        turned = {id(spec.rope): (cos[at].unsqueeze(1), sin[at].unsqueeze(1))}
    nothing: list[Any] = []
    token = torch.zeros(0)
    call = ops.Call(
        *(tuple(lanes), starts, 1, token, torch.tensor(starts)),
        *(nothing, (), False, nothing, nothing, turned),
    )
    expected = twin(h, call)

    shape = attention_shape(spec)
    scratch = attention.Scratch.of([shape], len(starts), "cpu", 4 * len(starts) * spec.kv_heads)
    assert scratch.splits == 4
    out = torch.full((len(starts), spec.heads * spec.head_dim), torch.nan, dtype=dtype)
    for _ in range(2):  # again, on the counters that the first launch left
        attention.attend(
            ops.linear(h, twin.qkv),
            *cache,
            torch.tensor(lanes, dtype=torch.int32),
            torch.tensor(starts, dtype=torch.int32),
            shape,
            scratch,
            weights=None
            if spec.qk_norm is None
            else (weights["a.q_norm.weight"], weights["a.k_norm.weight"]),
            rotation=rotation,
            out=out,
        )
    near = TOLERANCE[dtype]
    assert torch.allclose(out.float(), expected.float(), rtol=near, atol=near)
    assert torch.allclose(cache.float(), twin.cache.float(), rtol=near, atol=near)
    touched = (cache != _attention(spec, dtype)[0].cache).any(-1).any(2).any(0)  # [lanes, capacity]
    assert touched.nonzero().tolist() == sorted(
        [lane, start] for lane, start in zip(lanes, starts, strict=True)
    )


@pytest.mark.parametrize("place", ["query", "cached key", "behind the end"])
def test_attention_passes_on_what_is_not_finite(place: str) -> None:
    spec = replace(PLAIN, heads=2)
    twin, _, generator = _attention(spec, torch.float32)
    qkv = torch.randn(1, 6 * 24, generator=generator)
    if place == "query":
        qkv[0, 5] = torch.nan
    else:
        twin.cache[0, 2, 0, 20 if place == "cached key" else 90] = torch.nan
    shape = attention_shape(spec)
    out = attention.attend(
        qkv,
        *twin.cache,
        torch.tensor([2], dtype=torch.int32),
        torch.tensor([80], dtype=torch.int32),
        shape,
        attention.Scratch.of([shape], 1, "cpu", 4),
        out=torch.zeros(1, 48),
    )
    heads = out.view(2, 24).isnan()
    assert heads[0].all() == (place != "behind the end")
    assert not heads[1].any()


@pytest.mark.parametrize("applies", ["model", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_with_the_sum_it_goes_into(applies: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, held = torch.randn(2, 3, 40, generator=generator).mul(3).to(dtype)
    weight = torch.randn(40, generator=generator).to(dtype)
    normed = ops.make_norm(Norm(40, 1e-3, applies=applies), weight)(x)
    out = norms.rms_norm(x, weight, 1e-3, applies, out=torch.empty_like(x))
    near = TOLERANCE[dtype]
    assert torch.allclose(out.float(), normed.float(), rtol=near, atol=near)
    expected = held + normed * 0.3
    into = norms.rms_norm(x, weight, 1e-3, applies, multiplier=0.3, held=held, out=held)
    assert into is held and torch.allclose(held.float(), expected.float(), rtol=near, atol=near)


def test_greedy_tokens_and_the_next_input() -> None:
    """The lower of equal ids, over the border of two programs; a row of NaN still names a token."""
    V = sampling.BLOCK + 900
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(2))
    logits[1, [77, 78, V - 1]] = 9.0
    logits[2, sampling.BLOCK - 1 : sampling.BLOCK + 1] = 9.0
    logits[3] = torch.nan
    logits[4, 0], logits[4, V - 1] = torch.nan, 9.0
    scratch = sampling.Scratch.of(5, V, "cpu")
    drawn, token_ids = torch.zeros(2, 5, dtype=torch.int64)
    positions = torch.tensor([0, 5, 9, 2, 7], dtype=torch.int32)
    for step in (1, 2):
        sampling.greedy(logits, scratch, drawn=drawn, token_ids=token_ids, positions=positions)
        assert drawn[0] == logits[0].argmax()
        assert drawn[1:3].tolist() == [77, sampling.BLOCK - 1] and drawn[4] == V - 1
        assert 0 <= drawn[3] < V and torch.equal(drawn, token_ids)
        assert positions.tolist() == [step, 5 + step, 9 + step, 2 + step, 7 + step]


@pytest.mark.parametrize("rounded", [False, True])
def test_drawn_tokens_are_the_hosts(rounded: bool) -> None:
    """Over filters, temperatures and ties; all lanes of a launch have settings of their own."""
    random = np.random.default_rng(5)
    for seed in range(24):
        V = int(random.integers(2, 3000))
        logits = random.normal(0, 3, (4, V)).astype(np.float32)
        logits[3, : V // 2] = -np.inf
        logits = logits.round(1) if rounded else logits
        asked = [
            Sampling(
                temperature=float(random.choice([1e-3, 0.3, 1.0, 2.5])),
                top_k=int(random.choice([0, 1, 5, 50, 5000])),
                top_p=float(random.choice([1.0, 0.9, 0.5, 0.0])),
                min_p=float(random.choice([0.0, 0.05, 0.3, 1.0])),
                seed=seed,
            )
            for _ in range(4)
        ]
        for ranked in (True, False):
            if not ranked:
                asked = [replace(s, top_k=0, top_p=1.0) for s in asked]
            expected = [
                host.choose(host.Expectation(row, 0.0), s, 11)
                for row, s in zip(logits, asked, strict=True)
            ]
            columns = [
                torch.tensor([[getattr(s, name)] for s in asked], dtype=torch.float64)
                for name in ("temperature", "top_k", "top_p", "min_p")
            ]
            uniform = torch.full((4, 1), host.uniform(seed, 11), dtype=torch.float64)
            drawn = sampling.draw(torch.from_numpy(logits), *columns, uniform, ranked=ranked)
            assert drawn.tolist() == expected


def test_drawing_from_nothing_finite_names_a_token() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    for value in (torch.nan, -torch.inf, torch.inf):
        logits = torch.full((1, 50), value)
        for ranked in (True, False):
            drawn = sampling.draw(logits, one, one, one, one, one * 0.5, ranked=ranked)
            assert 0 <= int(drawn) < 50
