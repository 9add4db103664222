"""The MLX interpreter with the Metal kernel's text in the place of its router: the same tokens,
experts and weights as with plain operators, for lanes under several policies and their shadows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moescope.engine.interpreter import StepOutput
from moescope.engine.mlx_decoder import MLXDecoder
from moescope.kernels import mlx_ops
from tests.engine.mlx_tiny import on_mlx
from tests.kernels.metal_shim.build import text
from tests.kernels.metal_shim.device import Library
from tests.kernels.metal_shim.mlx_device import Device
from tests.kernels.metal_shim.routers import router_variants
from tests.tiny import tiny_checkpoint

VARIANTS = [*router_variants((1, 2)), *router_variants((1,), ("bfloat16",))]


@contextmanager
def on_metal(compiled: Callable[..., Path]) -> Iterator[Device]:
    device = Device(Library(compiled(text(VARIANTS)), VARIANTS))
    with pytest.MonkeyPatch.context() as patch:
        mlx_ops._kernel.cache_clear()
        patch.setattr(mx.fast, "metal_kernel", device.metal_kernel)
        patch.setattr(mlx_ops, "uses_metal", lambda E, K: True)
        yield device
    mlx_ops._kernel.cache_clear()


def decoded(model: MLXDecoder) -> list[StepOutput]:
    """A prompt in two lanes, one of them under another policy, then tokens in both."""
    trained = [router.spec.policy for router in model.routers]
    other = [replace(policy, norm_topk_prob=True, num_experts_per_tok=3) for policy in trained]
    model.set_policies(1, other)
    model.set_shadows([other])
    outs = [model.run((0, 1), np.array([[3, 5, 7, 11]] * 2), record="logits")]
    for _ in range(3):
        ids = outs[-1].logits[:, -1].argmax(-1)[:, None].astype(np.int64)
        outs.append(model.run((0, 1), ids, record="logits"))
    return outs


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_the_interpreter_on_the_kernel_s_text(
    compiled: Callable[..., Path], family: str, tmp_path: Path
) -> None:
    path = tiny_checkpoint(family, tmp_path / family, seed=1)
    plain = decoded(on_mlx(path, lanes=2))
    with on_metal(compiled) as device:
        model = on_mlx(path, lanes=2)
        model.compiled = False
        metal = decoded(model)
    assert len(device.launched) >= 4 * len(model.routers)
    for a, b in zip(plain, metal, strict=True):
        same(a, b)


def same(a: StepOutput, b: StepOutput) -> None:
    for name in ("expert_ids", "runner_up", "shadow_ids"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), name)
    names = ("logits", "weights", "scores", "score_sum", "mass", "entropy", "margin")
    for name in (*names, "router_logits", "shadow_weights", "shadow_sums"):
        found: Any = getattr(b, name)
        np.testing.assert_allclose(found, getattr(a, name), rtol=2e-5, atol=2e-5, err_msg=name)


def test_the_slow_twin_routes_and_the_kernel_beside_it(
    compiled: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny_checkpoint("olmoe", tmp_path / "olmoe", seed=1)
    assert on_mlx(path).twin == ""
    with on_metal(compiled) as device:
        model = on_mlx(path, lanes=2)
        model.compiled = False
        assert (model.twin, model.kernels["router"]) == ("mlx operators", "metal")
        kernel = decoded(model)
        launched = len(device.launched)
        model.truncate(0, 0)
        model.truncate(1, 0)
        model.use_slow_router(True)
        slow = decoded(model)
        assert len(device.launched) == 2 * launched
        apart = model.router_difference()
    for a, b in zip(kernel, slow, strict=True):
        same(a, b)
    places = 2 * (4 + 3) * len(model.routers) * 2  # lanes, tokens, routers, policy and shadow
    assert (apart.rows, apart.other_ids) == (places, 0) and apart.weight < 1e-6
