"""Triton's matrix-vector products against torch's, under Triton's interpreter; the tiles of all
products, and what their kernels compile to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

import tests.kernels.interpreted  # noqa: F401  (before the kernels)
from moescope.kernels.triton_ops import gemv, tuning
from moescope.kernels.triton_ops.tiles import ExpertTiles, Tile, configuration, expert_tiles
from tests.kernels.expert_cases import assert_close, linear_twin, random

HALVES = [torch.bfloat16, torch.float16]
EVERY = [torch.float32, *HALVES]


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize(("N", "rows", "H"), [(1, 11, 37), (3, 16, 64), (8, 5, 7), (2, 3, 2048)])
def test_linear_is_torch_s(dtype: torch.dtype, N: int, rows: int, H: int) -> None:
    x, weight = random(1, dtype, N, H), random(2, dtype, rows, H, scale=H**-0.5)
    out = poisoned(N, rows, dtype=dtype)
    found = gemv.linear_small(x, weight, out=out, tile=Tile(4, 1))
    assert found is out
    assert_close(found, linear_twin(x, weight))
    exact = x.double() @ weight.double().T
    assert (found.double() - exact).abs().max() <= exact.abs().max() * (
        2e-6 if dtype is torch.float32 else 5e-3
    )


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("applies", ["model", "float32"])
def test_norm_before_and_residual_after(dtype: torch.dtype, applies: str) -> None:
    N, rows, H = 2, 10, 48
    x, weight = random(3, dtype, N, H, scale=3.0), random(4, dtype, rows, H, scale=H**-0.5)
    options: dict[str, Any] = {
        "bias": random(5, dtype, rows),
        "norm": random(6, dtype, H),
        "eps": 1e-5,
        "applies": applies,
        "multiplier": 0.22,
        "residual": random(7, dtype, N, rows),
    }
    expected = linear_twin(x, weight, **options)
    held = options["residual"]
    found = gemv.linear_small(x, weight, **options, out=held, tile=Tile(4, 1))
    assert_close(found, expected, wide=2.0)
    assert found is held


@pytest.mark.parametrize("dtype", HALVES)
def test_a_gate_opens_the_product(dtype: torch.dtype) -> None:
    x, weight = random(8, dtype, 2, 16), random(9, dtype, 6, 16, scale=0.25)
    gate = random(10, dtype, 2, 1, scale=3.0)
    found = gemv.linear_small(x, weight, gate=gate, tile=Tile(8, 1))
    assert_close(found, linear_twin(x, weight, gate=gate))


def test_logits_in_float32_hold_rounded_values() -> None:
    x, weight = random(11, torch.bfloat16, 1, 16), random(12, torch.bfloat16, 6, 16)
    out = poisoned(1, 6, dtype=torch.float32)
    gemv.linear_small(x, weight, out=out)
    assert torch.equal(out, gemv.linear_small(x, weight).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_knows_nothing_of_other_lanes(dtype: torch.dtype) -> None:
    x, weight = random(13, dtype, 4, 70), random(14, dtype, 9, 70)
    norm = random(15, dtype, 70)
    together = gemv.linear_small(x, weight, norm=norm, tile=Tile(8, 1))
    assert torch.equal(together, gemv.linear_small(x, weight, norm=norm, tile=Tile(8, 1)))
    for n in (0, 3):
        alone = gemv.linear_small(x[n : n + 1], weight, norm=norm, tile=Tile(4, 1))
        assert torch.equal(alone[0], together[n])


def test_what_is_not_covered_is_refused() -> None:
    x, weight = random(16, torch.float32, 9, 8), random(17, torch.float32, 4, 8)
    with pytest.raises(AssertionError, match="9 lanes"):
        gemv.linear_small(x, weight)
    with pytest.raises(AssertionError):
        gemv.linear_small(x[:1], weight.T.contiguous().T)


# --- tiles and compiled code --------------------------------------------------------------------


def test_tiles_fill_a_device_at_one_lane() -> None:
    """At least twice as many programs as an H200 has processors, in the shapes it is built for."""
    for hidden, width in ((2048, 1024), (2048, 768), (4096, 1536), (7168, 2048)):
        tiles = expert_tiles(hidden, width)
        assert width / tiles.gate_up.rows >= 2 * 132 and hidden / tiles.down.rows >= 2 * 132
        assert hidden / gemv.linear_tile(hidden, hidden).rows >= 2 * 132


def test_configuration_names_every_kernel_s_tiles() -> None:
    said = configuration(2048, 1024, 50304, head=Tile(16, 8, tuned=True))
    assert said["experts"].startswith("triton gemv: gate-up 2 rows by 4 warps, not tuned; down ")
    assert said["head"] == "triton gemv: 16 rows by 8 warps, tuned"
    assert "not tuned" in said["linear"]


def test_every_choice_of_a_tuner_is_right_and_the_fastest_is_marked() -> None:
    x, weight = random(120, torch.bfloat16, 2, 40), random(121, torch.bfloat16, 6, 40)
    expected = gemv.linear_small(x, weight)
    tiles = tuning.linear_choices(2048, 2048)
    assert tiles[0] == gemv.linear_tile(2048, 2048) and len(tiles) > 5
    for tile in tiles[1::3]:
        assert_close(gemv.linear_small(x, weight, tile=tile), expected)
    best, measured = tuning.fastest(tiles, lambda tile: abs(tile.rows - 2) + tile.warps)
    assert best == Tile(2, 2, tuned=True) and len(measured) == len(tiles)

    def no_room_for_many_warps(tiles: ExpertTiles) -> float:
        if tiles.down.warps > 1:
            raise OutOfResources(2, 1, "registers")
        return 1.0

    found, measured = tuning.fastest(tuning.expert_choices(2048, 1024), no_room_for_many_warps)
    assert found.down.tuned and found.down.warps == 1 and 0 < len(measured) < 9


LOOK = """
import json
from moescope.kernels.triton_ops import experts, gemv
from tests.kernels.aot import build, resources
early = gemv.aot_linear("*bf16", 1, 6144, 2048, norm=True, residual=False, pdl=True)
cases = {"ahead": early} | gemv.AOT | experts.AOT
for name in cases:
    if "lanes" not in name and "float32" not in name:
        code = build("cuda", *cases[name]).asm
        print(json.dumps({"name": name, "ptx": code["ptx"]} | resources(code["cubin"])))
"""


@pytest.mark.slow
def test_code_for_one_lane() -> None:
    """Weights are read 16 bytes at a time, before the kernel ahead is waited for where that is
    asked, and 16 warps of each kernel find registers on one processor (65 536)."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LOOK],
        cwd=Path(__file__).parents[2],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) > 6
    for row in rows:
        name, lines = row["name"], row["ptx"].splitlines()
        weights = [line for line in lines if "ld.global.L1::evict_first" in line]
        assert weights and all(".v4.b32" in line for line in weights), name
        assert row["registers"] <= 65536 // (16 * 32), name
        assert row["stack"] == 0, name
    ahead = rows[0]["ptx"]
    assert ahead.index("ld.global.L1::evict_first") < ahead.index("griddepcontrol.wait")
