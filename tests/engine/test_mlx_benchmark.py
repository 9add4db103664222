"""The benchmark beside mlx-lm runs, on weights that both read alike."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.mlx_tiny import compiling_in

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.mark.parametrize("bits", [0, 4])
def test_both_engines_say_the_same(bits: int, tmp_path: Path) -> None:
    import mlx_decode

    shapes: Any = mlx_decode.Shapes(2, 64, 64, 8, 2, 2, 128, bits)
    with compiling_in(tmp_path):
        figures = mlx_decode.run(shapes, "float32", rounds=2, tokens=5, folder=tmp_path)
    assert figures["same_tokens"] and len(figures["ratios"]) == 2
    assert all(rate > 0 for rate in figures["tokens_per_second"].values())
