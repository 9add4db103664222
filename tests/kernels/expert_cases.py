"""Seeded inputs for expert and product kernels, and their slow twins: plain torch, one lane at a
time, with the rounding points of `torch_operators`. No Triton, no hypothesis."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine.operators import Experts, MoE, Norm
from moescope.engine.torch_operators import ACTIVATIONS, TorchExperts, make_norm
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

ULP = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def random(seed: int, dtype: torch.dtype, *shape: int, scale: float = 1.0) -> Tensor:
    """Normal values, drawn on the CPU so that every device gets the same."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def routes(seed: int, T: int, K: int, E: int, *, nulls: int = 0) -> tuple[Tensor, Tensor]:
    """Ids int32 [T, K], distinct in a row, with unused picks and ids of null experts among them,
    and weights float32 [T, K]. The first row has no real expert at all where there are nulls."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E + nulls, generator=generator)[:K] for _ in range(T)])
    weights = torch.rand(T, K, generator=generator)
    unused = torch.rand(T, K, generator=generator) < (0.2 if nulls else 0.0)
    if nulls:
        ids[0], unused[0] = E, False
    return ids.masked_fill(unused, -1).int(), weights.masked_fill(unused, 0.0)


def experts(seed: int, dtype: torch.dtype, E: int, H: int, width: int) -> tuple[Tensor, Tensor]:
    """gate_up [E, 2 × width, H] and down [E, H, width]."""
    gate_up = random(seed, dtype, E, 2 * width, H, scale=H**-0.5)
    return gate_up, random(seed + 1, dtype, E, H, width, scale=width**-0.5)


def linear_twin(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    eps: float = 1e-6,
    applies: Any = "model",
    gate: Tensor | None = None,
    multiplier: float = 1.0,
    residual: Tensor | None = None,
) -> Tensor:
    if norm is not None:
        x = make_norm(Norm(x.shape[1], eps, applies=applies), norm)(x)
    y = F.linear(x, weight, bias)
    if gate is not None:
        y = torch.sigmoid(gate) * y
    if multiplier != 1.0:
        y = y * multiplier
    return y if residual is None else residual + y


def torch_experts(
    h: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    on_input: bool = False,
    combine: Any = "float32",
) -> Tensor:
    """What `TorchExperts` gives for each row alone."""
    E, H, width = down.shape
    wiring = RouterWiring(
        num_experts=E, apply_router_weight_on_input=on_input, combine_dtype=combine
    )
    spec = RouterSpec(RouterPolicy(num_experts_per_tok=min(ids.shape[1], E)), wiring)
    moe = MoE(H, spec, Experts(width))
    run = TorchExperts(moe, {"e.gate_up": gate_up, "e.down": down}, "e")
    rows = range(len(h))
    return torch.cat([run(h[t : t + 1], ids[t : t + 1], weights[t : t + 1]) for t in rows])


def biased_experts(
    h: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up_bias: Tensor,
    down_bias: Tensor,
    activation: str = "silu",
) -> Tensor:
    """The same sum with biases in the products, and with other activations."""
    table = ACTIVATIONS | {
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    }
    out = torch.zeros_like(h)
    for t in range(len(h)):
        for e, k in sorted((e, k) for k, e in enumerate(ids[t].tolist()) if 0 <= e < len(down)):
            both = F.linear(h[t : t + 1], gate_up[e], gate_up_bias[e])
            gate, up = both.chunk(2, -1)
            part = F.linear(table[activation](gate) * up, down[e], down_bias[e])
            out[t] += (part * weights[t, k]).to(h.dtype)[0]
    return out


def assert_close(found: Tensor, expected: Tensor, *, wide: float = 1.0) -> None:
    """Equal up to the order of float32 sums: nothing further off than a few units in the last
    place of the largest value, and of rounded values nearly all the same."""
    found, expected = found.cpu(), expected.cpu()
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert torch.isfinite(found).all()
    unit = ULP[found.dtype] * max(1.0, expected.abs().max().item())
    assert (found.double() - expected.double()).abs().max().item() <= 8 * wide * unit
    if found.dtype is not torch.float32:
        assert (found != expected).double().mean().item() <= 0.06
