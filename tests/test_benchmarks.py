"""The benchmarks are right about bytes, ratios and verdicts, and measure what they say."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))

import child  # noqa: E402
import lanes  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import tracing  # noqa: E402
import weights  # noqa: E402
from asked import Asked  # noqa: E402
from shapes import Shapes, distinct_experts  # noqa: E402

from moescope.engine import families, parameters  # noqa: E402

TINY = Shapes(layers=2, hidden=32, heads=2, experts=8, top_k=2, width=16, vocab=1024, context=128)


@pytest.mark.parametrize("shapes", [TINY, Shapes(), Shapes(layers=16)])
def test_the_byte_model_counts_what_the_decoder_has(shapes: Shapes) -> None:
    spec = families.build(shapes.config())
    norms = shapes.layers * 4 * shapes.hidden + shapes.hidden
    assert shapes.parameters == parameters.count(spec)
    counted = parameters.count_active(spec)
    assert shapes.active <= counted <= shapes.active + norms + shapes.hidden
    assert sum(_elements(shape) for shard in weights.names(shapes) for _, shape in shard) == (
        shapes.parameters
    )


def test_the_byte_model_is_that_of_the_published_figures() -> None:
    assert Shapes(layers=16).token_bytes() / 1e9 == pytest.approx(2.358, abs=1e-3)
    assert Shapes(layers=4).token_bytes() / 1e6 == pytest.approx(744.0, abs=0.1)


def test_lanes_are_bound_by_the_union_of_their_experts() -> None:
    shapes = Shapes()
    assert shapes.bound(shapes.top_k) == 1.0
    by_hand = (shapes.shared + 4 * 15 * shapes.expert) / (shapes.shared + 4 * 8 * shapes.expert)
    assert shapes.bound(15) == pytest.approx(by_hand)
    cache = 4 * 2 * 2048 * 100  # keys and values of 100 tokens
    by_hand = (shapes.active + 8 * cache) / (shapes.active + cache)
    assert shapes.bound(8, lanes=8, held=100) == pytest.approx(by_hand)
    first, second = [[0, 1], [2, 3]], [[1, 4], [3, -1]]
    assert distinct_experts([first]) == 2
    assert distinct_experts([first, second]) == 2.5  # {0, 1, 4} and {2, 3}


def test_rounds_rotate_and_a_noisy_turn_is_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    foreign = iter([0.0, 0.0, 0.0, 5.0, 0.0, 7.0, 6.0, 8.0, 0.0])
    monkeypatch.setattr(measure, "Meter", lambda: _Meter(next(foreign)))
    contestants = {name: (lambda name=name: order.append(name) or {"s": 1.0}) for name in "abc"}
    asked = Asked(Path(), rounds=2, retries=2, settle=0.0)
    turns = measure.rounds(contestants, asked)
    assert "".join(order) == "abc" + "bb" + "ccc" + "a"
    told = [(turn["name"], turn["foreign_cores"], turn["noisy"]) for turn in turns[3:]]
    assert told == [("b", 0.0, False), ("c", 6.0, True), ("a", 0.0, False)]


def test_ratios_are_paired_by_round_and_leave_noise_out() -> None:
    turns = [
        _turn("a", 0, 10.0),
        _turn("b", 0, 5.0),
        _turn("a", 1, 30.0),
        _turn("b", 1, 10.0),
        _turn("a", 2, 900.0, noisy=True),
        _turn("b", 2, 1.0),
    ]
    found = measure.ratios(turns, "a", "b", "rate")
    assert found["median"] == 2.5 and found["n"] == 2 and "noisy" not in found
    noisy = [{**turn, "noisy": True} for turn in turns]
    assert measure.ratios(noisy, "a", "b", "rate")["noisy"]
    assert measure.medians(turns, "a", ("rate",))["rate"]["median"] == 20.0


def test_costs_are_paired_by_block_and_have_an_interval() -> None:
    """A drift that all levels share is no cost; one slow block does not move a median."""
    drift = [1.0 + 0.01 * number for number in range(40)]
    blocks = {
        "off": drift,
        "ids": [base * 1.01 for base in drift],
        "weights": [base * (3.0 if n == 7 else 1.02) for n, base in enumerate(drift)],
        "logits": drift,
        tracing.SHADOWS: [base * 1.02 for base in drift],
    }
    turn = {"blocks": blocks, "folding": {"ids": 1e-5}, "bytes_a_token": {"ids": 200.4}}
    found = tracing.compared([turn], noisy=False)
    costs = {name: cost["median"] for name, cost in found["cost over off"].items()}
    assert costs == {"ids": 1.01, "weights": 1.02, "logits": 1.0}
    assert found["4 shadows over 0"]["median"] == 1.0
    assert found["levels"]["ids"]["bytes_a_token"] == 200
    spread = measure.resampled([0.9, 1.1] * 200 + [1.0])
    assert spread["interval"][0] <= spread["median"] <= spread["interval"][1]
    few, many = (measure.resampled([0.97, 0.99, 1.0, 1.02, 1.03] * n) for n in (2, 80))
    assert many["standard_error"] < few["standard_error"] / 3


def test_lanes_are_compared_with_their_neighbours_in_time() -> None:
    asked = Asked(Path())
    drift = [1.0 + 0.1 * number for number in range(12)]
    steps = {name: [1.5 * base for base in drift] for name in lanes.asks()} | {"1": drift}
    distinct = {name: 8.0 if "variants" not in name else 16.0 for name in steps}
    turn = {"steps": steps, "distinct": distinct, "tokens": 200}
    found = lanes.compared([turn, turn], asked)
    assert found["4 equal"]["cost"]["median"] == pytest.approx(1.5)
    wanted = 1.5 / asked.shapes.bound(16.0, 4, 200)
    assert found["4 variants"]["over_bound"] == pytest.approx(wanted, abs=1e-3)
    assert len(found) == 10 and "noisy" not in found["1"]["cost"]


def test_the_report_chooses_the_best_of_a_peer_and_gives_verdicts(tmp_path: Path) -> None:
    rates = {"moescope": 30.0, "llama.cpp": 25.0, "llama.cpp, no flash attention": 28.0}
    document = {
        "asked": Asked(tmp_path).figures(),
        "machine": {
            "processor": "a CPU",
            "instructions": ["avx2"],
            "cores": 2,
            "memory_gb": 25.0,
            "system": "Linux",
            "python": "3.11",
            "packages": {"torch": "2"},
        },
        "missing": {"mlx-lm bfloat16": "float32 only"},
        "read_gb_s": {"gb_s": {"median": 30.0}},
        "engines": {
            name: {key: {"median": rate} for key in ("tokens_per_s", "gb_s", "first_s")}
            for name, rate in rates.items()
        },
        "share_of_read": {"moescope": {"median": 0.7, "quartiles": [0.69, 0.71]}},
        "decode: moescope over": {
            name: {"median": 30.0 / rate, "quartiles": [1.0, 1.3]}
            for name, rate in rates.items()
            if name != "moescope"
        },
    }
    (tmp_path / report.file_of("decode")).write_text(json.dumps(document))
    plain, marked = report.table(tmp_path), report.table(tmp_path, markdown=True)
    (row,) = [line for line in plain.splitlines() if line.startswith("decode, over llama.cpp")]
    assert "1.07" in row and "NO" in row and "no flash attention" in row
    (row,) = [line for line in plain.splitlines() if "share of the read" in line]
    assert "0.70" in row and "0.69 to 0.71" in row and "NO" in row
    assert "| mlx-lm bfloat16 | float32 only |" in marked
    assert report.table(tmp_path / "nothing") == "no results"


def test_a_child_answers_for_its_errors() -> None:
    with child.Child("engine_reading.py", threads=1) as reader:
        with pytest.raises(child.Unavailable, match="OSError"):
            reader.ask("read", folder="/nonexistent", place=True)
        with pytest.raises(child.Unavailable, match="KeyError"):
            reader.ask("sing")


def test_a_real_step_on_a_tiny_model(tmp_path: Path) -> None:
    """Weights that moescope loads, a child that decodes and records, ratios of what it measured."""
    weights.prepare(tmp_path, TINY, gguf=False)
    asked = Asked(tmp_path, TINY, 1, prompt=4, tokens=8, skip=2, rounds=1, retries=0, settle=0)
    found = tracing.run(asked)
    assert set(found["cost over off"]) == {"ids", "weights", "logits"}
    sizes = {name: row["bytes_a_token"] for name, row in found["levels"].items()}
    assert sizes["off"] == 0 < sizes["ids"] <= sizes["logits"]
    for turn in found["turns"]:
        assert {len(steps) for steps in turn["blocks"].values()} == {2}
        assert all(second > 0 for steps in turn["blocks"].values() for second in steps)
    beside = lanes.run(asked)["lanes"]
    assert beside["1"]["over_bound"] == pytest.approx(1.0, abs=1e-3)
    assert beside["8 equal"]["distinct_experts"] == 2 <= beside["8 variants"]["distinct_experts"]
    assert all(row["step_s"]["median"] > 0 for row in beside.values())
    before = (tmp_path / weights.MADE).stat().st_mtime_ns
    weights.prepare(tmp_path, TINY, gguf=False)
    assert (tmp_path / weights.MADE).stat().st_mtime_ns == before, "made twice"


def _elements(shape: tuple[int, ...]) -> int:
    return list(itertools.accumulate(shape, lambda a, b: a * b))[-1]


def _turn(name: str, number: int, rate: float, noisy: bool = False) -> dict[str, Any]:
    return {"name": name, "round": number, "rate": rate, "noisy": noisy}


class _Meter:
    """A meter that says what it is told."""

    seconds, stolen = 1.0, 0.0

    def __init__(self, foreign: float) -> None:
        self.foreign = foreign

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    figures = measure.Meter.figures
