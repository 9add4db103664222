"""The benchmark beside mlx-lm runs, on weights that both read alike."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))


@pytest.mark.parametrize("bits", [0, 4])
def test_both_engines_say_the_same(bits: int, tmp_path: Path) -> None:
    import mlx.core as mx
    import mlx_decode

    shapes: Any = mlx_decode.Shapes(2, 64, 64, 8, 2, 2, 128, bits)
    mx.disable_compile()  # functions of mlx-lm's that would each call a C++ compiler
    try:
        figures = mlx_decode.run(shapes, "float32", rounds=2, tokens=5, folder=tmp_path)
    finally:
        mx.enable_compile()
    assert figures["same_tokens"] and len(figures["ratios"]) == 2
    assert all(rate > 0 for rate in figures["tokens_per_second"].values())
