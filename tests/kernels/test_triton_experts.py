"""Triton's experts against their slow twins, under Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tests.kernels.interpreted  # noqa: F401  (before the kernels)
from moescope.engine.graph_operators import gating
from moescope.engine.operators import MLP, Experts, MoE
from moescope.engine.torch_operators import TorchExperts, TorchMLP
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring
from moescope.kernels.triton_ops import experts as decode
from moescope.kernels.triton_ops import grouped
from moescope.kernels.triton_ops.gating import ACTIVATIONS, Gating
from moescope.kernels.triton_ops.tiles import Block, ExpertTiles, Tile
from tests.kernels.expert_cases import (
    assert_close,
    biased_experts,
    experts,
    linear_twin,
    random,
    routes,
    torch_experts,
)

HALVES = [torch.bfloat16, torch.float16]
EVERY = [torch.float32, *HALVES]
SMALL = ExpertTiles(Tile(4, 1), Tile(8, 1))


@st.composite
def gatings(draw: st.DrawFn) -> MLP:
    """Any dense block that a spec can say."""
    return MLP(
        *(12, 6, draw(st.sampled_from(ACTIVATIONS)), draw(st.booleans())),
        limit=draw(st.sampled_from([0.0, 0.7])),
        limit_site=draw(st.sampled_from(["before", "after"])),
        alpha=draw(st.sampled_from([1.0, 1.702])),
        up_shift=draw(st.sampled_from([0.0, 1.0])),
    )


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


# --- experts of a few lanes ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize(
    ("N", "K", "E", "nulls", "H", "width"),
    [(1, 3, 5, 0, 37, 9), (3, 4, 6, 2, 16, 8), (8, 2, 3, 0, 8, 5), (2, 5, 4, 3, 9, 16)],
)
def test_experts_are_torch_s(
    dtype: torch.dtype, N: int, K: int, E: int, nulls: int, H: int, width: int
) -> None:
    h, (gate_up, down) = random(20, dtype, N, H), experts(21, dtype, E, H, width)
    ids, weights = routes(22 + N, N, K, E, nulls=nulls)
    inner = poisoned(*decode.inner_shape(N, K, E, width), dtype=dtype)
    out = poisoned(N, H, dtype=dtype)
    found = decode.experts_small(h, gate_up, down, ids, weights, inner=inner, out=out, tiles=SMALL)
    assert found is out
    assert_close(found, torch_experts(h, gate_up, down, ids, weights))


@pytest.mark.parametrize("combine", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("on_input", [False, True])
def test_where_and_in_what_dtype_the_weight_is_applied(combine: str, on_input: bool) -> None:
    dtype = torch.bfloat16
    h, (gate_up, down) = random(30, dtype, 2, 24), experts(31, dtype, 4, 24, 8)
    ids, weights = routes(32, 2, 3, 4)
    found = decode.experts_small(
        h,
        gate_up,
        down,
        ids,
        weights,
        weight_on_input=on_input,
        combine_dtype=getattr(torch, combine),
        tiles=SMALL,
    )
    expected = torch_experts(h, gate_up, down, ids, weights, on_input=on_input, combine=combine)
    assert_close(found, expected)
    if combine == "float32":
        rounded = weights.bfloat16().float()
        other = torch_experts(h, gate_up, down, ids, rounded, on_input=on_input)
        assert not torch.equal(found, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_follows_the_sum(dtype: torch.dtype) -> None:
    N, H = 3, 12
    h, (gate_up, down) = random(40, dtype, N, H), experts(41, dtype, 4, H, 8)
    ids, weights = routes(42, N, 2, 4, nulls=1)
    scale = torch.tensor([2.5, 1.0, 0.3])
    shared, residual = random(43, dtype, N, H), random(44, dtype, N, H)
    bias, passed = random(45, dtype, H), random(46, dtype, N, H)
    expected = torch_experts(h, gate_up, down, ids, weights)
    null = torch.where(ids >= 4, weights, 0.0).sum(1, keepdim=True)
    assert null.any()
    expected = expected + (null * passed).to(dtype)
    for n in range(N):
        expected[n] *= float(scale[n])
    expected = residual + (expected + bias + shared) / 2 * 0.5
    found = decode.experts_small(
        h,
        gate_up,
        down,
        ids,
        weights,
        passed=passed,
        output_scale=scale,
        output_bias=bias,
        shared=shared,
        average=True,
        multiplier=0.5,
        residual=residual,
        out=residual,
        tiles=SMALL,
    )
    assert_close(found, expected)


@pytest.mark.parametrize("activation", grouped.TORCH_ACTIVATIONS)
def test_biases_and_activations(activation: str) -> None:
    dtype, E, H, width = torch.bfloat16, 3, 16, 6
    h, (gate_up, down) = random(50, dtype, 2, H), experts(51, dtype, E, H, width)
    ids, weights = routes(52, 2, 2, E)
    biases = random(53, dtype, E, 2 * width), random(54, dtype, E, H)
    expected = biased_experts(h, gate_up, down, ids, weights, *biases, activation)
    named: dict[str, Any] = {
        "gate_up_bias": biases[0],
        "down_bias": biases[1],
    }
    inputs = h, gate_up, down, ids, weights
    small = decode.experts_small(*inputs, gating=Gating(activation), **named, tiles=SMALL)
    assert_close(small, expected)
    block = Block(16, 16, 16, 1, 1)
    found = grouped.experts_grouped(*inputs, activation=activation, **named, block=block)
    assert_close(found, expected)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(gatings(), st.sampled_from(EVERY), st.booleans())
def test_whatever_stands_between_the_two_products(
    spec: MLP, dtype: torch.dtype, biased: bool
) -> None:
    """Experts and a dense block of the same numbers, against the torch operators."""
    spec, H, width, E = replace(spec, bias=biased), 12, 6, 3
    rows = (2 if spec.glu else 1) * width
    gate_up = random(55, dtype, E, rows, H, scale=2 * H**-0.5)
    down = random(56, dtype, E, H, width, scale=width**-0.5)
    h, (ids, weights) = random(57, dtype, 2, H), routes(58, 2, 2, E)
    biases = (random(59, dtype, E, rows), random(60, dtype, E, H)) if biased else (None, None)
    named = {"gate_up_bias": biases[0], "down_bias": biases[1], "gating": gating(spec)}
    tensors = {"gate_up": gate_up, "down": down, "gate_up_bias": biases[0], "down_bias": biases[1]}
    same = {f: getattr(spec, f) for f in ("activation", "glu", "bias", "limit", "limit_site")}
    every = Experts(width, **same, alpha=spec.alpha, up_shift=spec.up_shift)
    router = RouterSpec(RouterPolicy(2), RouterWiring(E, combine_dtype="float32"))
    moe = TorchExperts(MoE(H, router, every), {f"e.{n}": t for n, t in tensors.items()}, "e")  # type: ignore[misc]
    expected = torch.cat([moe(h[n : n + 1], ids[n : n + 1], weights[n : n + 1]) for n in (0, 1)])
    found = decode.experts_small(h, gate_up, down, ids, weights, **named, tiles=SMALL)
    assert_close(found, expected, wide=2.0)
    names = ("gate_up.weight", "down_proj.weight", "gate_up.bias", "down_proj.bias")
    dense = {
        name: part[1]
        for name, part in zip(names, (gate_up, down, *biases), strict=True)
        if part is not None
    }
    block = {name: dense.get(name) for name in names[2:]}
    found = decode.mlp_small(
        *(h, gate_up[1], down[1]),
        gating=gating(spec),
        gate_up_bias=block["gate_up.bias"],
        down_bias=block["down_proj.bias"],
        tiles=SMALL,
    )
    assert_close(found, TorchMLP(spec, dense, "")(h), wide=2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_know_nothing_of_other_lanes(dtype: torch.dtype) -> None:
    """Bits are the same alone, beside others, in another place, and again."""
    h, (gate_up, down) = random(60, dtype, 3, 36), experts(61, dtype, 4, 36, 8)
    ids, weights = routes(62, 3, 3, 4)
    tiles = ExpertTiles(Tile(8, 1), Tile(64, 1))
    together = decode.experts_small(h, gate_up, down, ids, weights, tiles=tiles)
    again = decode.experts_small(h, gate_up, down, ids, weights, tiles=tiles)
    assert torch.equal(together, again)
    turned = [2, 0, 1]
    picks = ids[turned], weights[turned]
    moved = decode.experts_small(h[turned], gate_up, down, *picks, tiles=tiles)
    assert torch.equal(moved, together[turned])
    for n in range(3):
        lane = slice(n, n + 1)
        alone = decode.experts_small(h[lane], gate_up, down, ids[lane], weights[lane], tiles=SMALL)
        assert torch.equal(alone[0], together[n])


def test_places_of_a_policy_are_read_in_place() -> None:
    """The router writes [N, P, K]; experts read the policy in force, in any order of picks."""
    h, (gate_up, down) = random(70, torch.float32, 2, 8), experts(71, torch.float32, 4, 8, 4)
    ids, weights = routes(72, 2, 3, 4)
    every_id = torch.stack((ids, ids.flip(1) * 0 + 1), 1)
    every_weight = torch.stack((weights, weights * 0 + 9.0), 1)
    found = decode.experts_small(h, gate_up, down, every_id[:, 0], every_weight[:, 0], tiles=SMALL)
    assert torch.equal(found, decode.experts_small(h, gate_up, down, ids, weights, tiles=SMALL))
    flipped = ids.flip(1).contiguous(), weights.flip(1).contiguous()
    assert torch.equal(found, decode.experts_small(h, gate_up, down, *flipped, tiles=SMALL))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_block_with_its_norm(dtype: torch.dtype) -> None:
    x, (gate_up, down) = random(80, dtype, 2, 20), experts(81, dtype, 1, 20, 12)
    norm, residual = random(82, dtype, 20), random(83, dtype, 2, 20)
    h = linear_twin(x, torch.eye(20, dtype=dtype), norm=norm)
    one = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, 1)
    expected = residual + torch_experts(h, gate_up, down, *one)
    found = decode.mlp_small(x, gate_up[0], down[0], norm=norm, residual=residual, tiles=SMALL)
    assert_close(found, expected, wide=2.0)


# --- experts of a prompt ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize(
    ("T", "K", "E", "nulls", "H", "width"), [(1, 3, 5, 0, 37, 9), (20, 4, 7, 2, 40, 24)]
)
def test_grouped_experts_are_torch_s(
    dtype: torch.dtype, on_input: bool, T: int, K: int, E: int, nulls: int, H: int, width: int
) -> None:
    h, (gate_up, down) = random(90, dtype, T, H), experts(91, dtype, E, H, width)
    ids, weights = routes(92, T, K, E, nulls=nulls)
    expected = torch_experts(h, gate_up, down, ids, weights, on_input=on_input)
    inputs = h, gate_up, down, ids, weights
    found = grouped.experts_grouped(*inputs, weight_on_input=on_input, products="triton")
    assert_close(found, expected)
    if dtype is torch.bfloat16 and H % 8 == 0:
        theirs = grouped.experts_grouped(*inputs, weight_on_input=on_input, products="torch")
        assert_close(theirs, expected)


def test_all_rows_for_one_expert_and_none_for_the_others() -> None:
    """More rows than a tile, and empty experts on both sides."""
    h, (gate_up, down) = random(100, torch.float32, 40, 16), experts(101, torch.float32, 5, 16, 8)
    ids, weights = torch.full((40, 1), 3, dtype=torch.int32), torch.rand(40, 1)
    block = Block(16, 16, 16, 1, 1)
    found = grouped.experts_grouped(h, gate_up, down, ids, weights, block=block)
    assert_close(found, torch_experts(h, gate_up, down, ids, weights))
    assert torch.equal(found, grouped.experts_grouped(h, gate_up, down, ids, weights, block=block))


def test_no_expert_at_all_is_zero() -> None:
    h, (gate_up, down) = random(110, torch.float32, 3, 8), experts(111, torch.float32, 4, 8, 4)
    ids, weights = torch.tensor([[-1, -1], [4, -1], [5, 4]]).int(), torch.ones(3, 2)
    for run in (decode.experts_small, grouped.experts_grouped):
        assert torch.equal(run(h, gate_up, down, ids, weights), torch.zeros(3, 8))
