"""The experts of a prompt in C against the torch operators, rounding point by rounding point."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from moescope.engine import torch_operators
from moescope.engine.operators import Experts, MoE
from moescope.engine.torch_operators import TorchExperts
from moescope.kernels import native_experts, native_ops
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

pytestmark = pytest.mark.skipif(
    "avx512-bf16" not in native_ops.instruction_sets(), reason="this CPU multiplies no bfloat16"
)


def case(
    T: int, E: int, K: int, H: int, width: int, *, on_input: bool = False, seed: int = 0
) -> tuple[TorchExperts, tuple[Tensor, ...]]:
    """The operators of torch, and h, gate_up, down, ids, weights."""
    random = torch.Generator().manual_seed(seed)
    gate_up, down, h = (
        torch.randn(shape, generator=random).bfloat16()
        for shape in ((E, 2 * width, H), (E, H, width), (T, H))
    )
    ids = torch.stack([torch.randperm(E, generator=random)[:K] for _ in range(T)]).int()
    weights = torch.rand(T, K, generator=random).bfloat16().float()
    wiring = RouterWiring(E, apply_router_weight_on_input=on_input)
    spec = MoE(H, RouterSpec(RouterPolicy(K), wiring).resolved("bfloat16"), Experts(width))
    with torch.inference_mode():
        plain = TorchExperts(spec, {"x.gate_up": gate_up, "x.down": down}, "x")
    plain.grouped = None
    return plain, (h, gate_up, down, ids, weights)


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize(
    ("T", "E", "K", "H", "width"),
    [
        (2, 4, 2, 32, 32),
        (5, 8, 3, 96, 64),
        (40, 6, 4, 160, 96),
        (77, 3, 1, 64, 128),
        (13, 2, 2, 64, 32),
    ],
)
def test_it_rounds_where_torch_rounds(
    T: int, E: int, K: int, H: int, width: int, on_input: bool
) -> None:
    plain, given = case(T, E, K, H, width, on_input=on_input)
    with torch.inference_mode():
        wanted = plain(given[0], given[3], given[4])
        found = native_experts.experts(*given, weight_on_input=on_input, threads=2)
    # sums are taken in another order: here and there a rounding falls to the other side
    assert (found == wanted).float().mean() > 0.9
    worst = wanted.float().abs().max() * 2.0**-6
    assert (found.float() - wanted.float()).abs().max() <= worst


def test_unused_picks_and_null_experts_add_nothing() -> None:
    plain, (h, gate_up, down, ids, weights) = case(9, 5, 3, 64, 32)
    ids[0] = -1
    ids[1, 2], ids[2, 0], ids[3] = -1, 5, torch.tensor([7, 6, 5])
    with torch.inference_mode():
        wanted = plain(h, ids, weights)
        found = native_experts.experts(h, gate_up, down, ids, weights)
        nothing = native_experts.experts(h, gate_up, down, torch.full_like(ids, -1), weights)
    assert (found[0] == 0).all() and (found[3] == 0).all() and (nothing == 0).all()
    assert (found.float() - wanted.float()).abs().max() <= wanted.float().abs().max() * 2.0**-6


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_a_row_gets_the_same_bits_beside_any_others(threads: int) -> None:
    _, (h, gate_up, down, ids, weights) = case(33, 4, 2, 96, 64, seed=3)
    whole = native_experts.experts(h, gate_up, down, ids, weights, threads=threads)
    for chosen in np.array_split(np.random.default_rng(0).permutation(33), 4):
        part = native_experts.experts(h[chosen], gate_up, down, ids[chosen], weights[chosen])
        assert torch.equal(part, whole[chosen])


def test_what_it_does_not_cover_goes_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (_, gate_up, down, *_) = case(2, 2, 1, 64, 32)
    assert native_experts.covers(gate_up, down)
    assert not native_experts.covers(gate_up.float(), down.float())
    assert not native_experts.covers(gate_up[:, :, :48], down[:, :48])  # not whole in memory
    assert not native_experts.covers(
        torch.zeros(2, 40, 64).bfloat16(), torch.zeros(2, 64, 20).bfloat16()
    )
    for name, value in (("MOESCOPE_NATIVE", "0"), ("MOESCOPE_ISA", "avx2")):
        with monkeypatch.context() as patched:
            patched.setenv(name, value)
            assert not native_experts.covers(gate_up, down)


def test_the_torch_operators_use_it() -> None:
    plain, (h, gate_up, down, ids, weights) = case(6, 4, 2, 64, 32)
    spec = MoE(64, RouterSpec(RouterPolicy(2), RouterWiring(4)).resolved("bfloat16"), Experts(32))
    found = torch_operators.TorchExperts(spec, {"x.gate_up": gate_up, "x.down": down}, "x")
    assert found.grouped is not None and plain.grouped is None
    with torch.inference_mode():
        assert torch.equal(
            found(h, ids, weights), native_experts.experts(h, gate_up, down, ids, weights)
        )
