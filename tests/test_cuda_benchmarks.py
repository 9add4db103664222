"""The GPU suite on a CPU in small shapes: figures without worth, programs that run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import cuda_results as results  # noqa: E402
import cuda_run  # noqa: E402


def run(*arguments: object) -> str:
    command = [sys.executable, BENCHMARKS / "cuda_run.py", *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_step_is_written_judged_and_not_repeated(tmp_path: Path) -> None:
    options = ("--device", "cpu", "--tiny", "--out", tmp_path)
    said = run("lanes", *options)
    document = json.loads((tmp_path / "cuda_lanes.json").read_text())
    assert document["finished"] and document["sources"] == results.digest()
    assert document["figures"]["over_union"]["1"] == 1.0
    assert document["figures"]["equal"]["4"]["distinct_experts_a_layer"] == 3
    assert "4 lanes, over the bytes of their union" in said
    assert "done before" in run("lanes", *options)
    assert "not started" in run("router", *options, "--budget", 0)


def test_targets_name_steps_that_there_are() -> None:
    assert {target.step for target in results.TARGETS} <= set(cuda_run.BY_NAME)
    for step in cuda_run.STEPS:
        assert (BENCHMARKS / f"{step.program}.py").exists()
        assert step.expected < step.limit < 600


@pytest.mark.parametrize(
    ("figures", "word"), [({"failed": 0}, "PASS"), ({"failed": 2}, "MISS"), ({}, "not run")]
)
def test_verdicts(figures: dict[str, int], word: str) -> None:
    (target,) = (t for t in results.TARGETS if t.step == "tests")
    assert results.judge(target, {"figures": figures}).word == word
    assert results.judge(target, None).word == "not run"


def test_results_that_are_not_these() -> None:
    whole = {"finished": True, "sources": results.digest(), "tiny": False}
    assert results.is_done(whole, tiny=False)
    assert not results.is_done(whole, tiny=True)
    assert not results.is_done(whole | {"finished": False}, tiny=False)
    assert not results.is_done(whole | {"sources": "0"}, tiny=False)
    assert not results.is_done(None, tiny=False)


def test_bytes_of_a_token_are_those_of_the_model() -> None:
    """OLMoE-1B-7B reads 1.18 G parameters a token of 6.9 G, Qwen3-30B-A3B 3.04 G of 30.5 G."""
    import cuda_shapes
    import torch

    from moescope.engine import families, parameters

    for name, total, active in (("olmoe", 6.92e9, 2.36e9), ("qwen3", 30.53e9, 6.08e9)):
        spec = families.build(cuda_shapes.CONFIGS[name], "bfloat16")
        assert parameters.count(spec) == pytest.approx(total, rel=0.01)
        any_weight = {"x": torch.empty(0, dtype=torch.bfloat16)}
        model = cuda_shapes.Model({}, spec, any_weight, "cpu", "bfloat16")
        assert model.token_bytes(0) == pytest.approx(active, rel=0.01)
        K = spec.routers()[0][2].K
        assert model.union_bytes(K * len(spec.layers), 1, 0) == pytest.approx(model.token_bytes(0))
        assert model.union_bytes(2 * K * len(spec.layers), 1, 0) > 1.4 * model.token_bytes(0)
