"""Every Triton kernel compiles for CUDA and ROCm devices that are not here, and hardly spills."""

from __future__ import annotations

import pytest

from tests.kernels.aot import TARGETS, compiled

A_FEW_BYTES = 16  # one register a thread, in a kernel of hundreds of instructions


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(target: str) -> None:
    rows = compiled(target)
    assert rows
    errors = {key: row["error"] for key, row in rows.items() if "error" in row}
    assert not errors
    assert all(row["binary"] > 1000 for row in rows.values())
    spilled = {key: row["stack"] for key, row in rows.items() if row.get("stack", 0) > A_FEW_BYTES}
    assert not spilled
    if target == "cuda":
        assert rows["router", "Qwen3-30B"]["stack"] == 0
