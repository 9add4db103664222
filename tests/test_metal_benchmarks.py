"""What a person with a Mac runs, on MLX's CPU backend in small shapes: programs that run, figures
without worth, and a verdict that says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlx.core", reason="MLX is not installed")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import metal_decode  # noqa: E402
import metal_parity  # noqa: E402
import metal_run  # noqa: E402
from mlx_decode import Shapes  # noqa: E402


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, BENCHMARKS / "metal_run.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def test_the_program_in_small_shapes(tmp_path: Path) -> None:
    """Steps end well; nothing of them counts as Metal; the next run repeats none of them."""
    out = tmp_path / "metal.json"
    steps = ("bandwidth", "decode_4bit")
    done = run("--tiny", "--out", out, *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "This did not run on Metal" in done.stdout and "PASS" not in done.stdout
    document = json.loads(out.read_text())
    assert not document["metal"] and set(document["steps"]) == set(steps)
    figures = {name: step["figures"] for name, step in document["steps"].items()}
    assert figures["bandwidth"]["gb_s"] > 0
    assert figures["decode_4bit"]["same_tokens"] and figures["decode_4bit"]["share"] > 0
    assert figures["decode_4bit"]["ratio"]["peak"] > 0
    again = run("--tiny", "--out", out, *steps)
    assert again.stdout.count("done before") == len(steps)


@pytest.mark.parametrize("program", ["metal_parity.py", "metal_speed.py"])
def test_a_step_ends_well(program: str, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    arguments = ["router"] if program == "metal_speed.py" else []
    command = [sys.executable, str(BENCHMARKS / program), *arguments, "--out", str(out), "--tiny"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=BENCHMARKS.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(out.read_text())
    assert figures.get("wrong_rows", 0) == 0 and "cpu" in figures["on"]


def test_without_metal_it_says_what_to_do() -> None:
    if metal_run.metal():  # on a Mac the suite itself is what runs this
        return
    done = run("parity")
    assert done.returncode == 1 and "MLX finds no Metal here; --tiny" in done.stderr


def test_targets_name_steps_and_programs_that_there_are() -> None:
    assert {target.path[0] for target in metal_run.TARGETS} <= set(metal_run.STEPS)
    for step in metal_run.STEPS.values():
        assert (BENCHMARKS / step.program).exists()


@pytest.mark.parametrize(
    ("value", "on_metal", "word"),
    [(0, True, "PASS"), (2, True, "MISS"), (0, False, "no Metal"), (None, True, "not run")],
)
def test_verdicts(value: int | None, on_metal: bool, word: str) -> None:
    (target,) = (t for t in metal_run.TARGETS if t.path == ("tests", "failed"))
    step: dict[str, Any] = {"figures": {"failed": value}, "metal": on_metal, "sources": "old"}
    said = metal_run.judged(target, {"tests": step})
    assert said.startswith(word)
    assert ("measured with other sources" in said) == (value is not None)


def test_a_row_routed_otherwise_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity is not a program that cannot fail."""
    right = metal_parity.parity("mixtral", 12, use_metal=False)
    assert right["wrong_rows"] == 0 and right["rows"] == 36
    true = metal_parity.route_mlx

    def wrong(logits: Any, rows: Any, K: int, **options: Any) -> Any:
        return true(-logits, rows, K, **options)

    monkeypatch.setattr(metal_parity, "route_mlx", wrong)
    assert metal_parity.parity("mixtral", 12, use_metal=False)["wrong_rows"] > 10


def test_the_share_of_the_bandwidth_counts_the_bytes_of_a_token() -> None:
    shapes = Shapes(bits=4)
    turn = {"decode": 10.0, "first": 1.0, "peak": 4.0, "ids": [1]}
    found = metal_decode.compared({"moescope": [turn], "mlx-lm": [turn]}, shapes, "bfloat16", 100.0)
    assert found["ratio"] == {"decode": 1.0, "first": 1.0, "peak": 1.0} and found["same_tokens"]
    assert found["share"] == pytest.approx(shapes.read_per_token() * 4.5 / 8 * 10 / 100e9)
