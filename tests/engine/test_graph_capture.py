"""The fused step captured in CUDA graphs: what they do is what their kernels do one by one, what is
captured when, and what a graph reads and writes while others run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("no Triton here", allow_module_level=True)

from moescope.engine import sampling
from moescope.engine.graph_step import GraphStep
from moescope.engine.interpreter import StepOutput
from moescope.engine.lane import policies_of
from moescope.engine.protocol import Sampling
from moescope.engine.torch_decoder import TorchDecoder
from tests.engine.graph_pairs import (
    FAMILIES,
    GREEDY,
    IDS,
    WARM,
    column,
    draws_for,
    pair,
    same,
    step_of,
    vary,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


def generated(
    decoder: TorchDecoder,
    lanes: Sequence[int],
    asked: Sampling,
    count: int,
    record: Any = "weights",
) -> list[StepOutput]:
    """`count` tokens for each of `lanes`, drawn by the step, each fed to it again."""
    outs: list[StepOutput] = []
    tokens: Any = range(3, 3 + len(lanes))
    for _ in range(count):
        draws = draws_for(decoder, lanes, asked)
        outs.append(decoder.run(lanes, column([*tokens]), record=record, draws=draws))
        tokens = outs[-1].drawn
    return outs


def equal_steps(a: list[StepOutput], b: list[StepOutput]) -> bool:
    """Bit for bit, drawn tokens too."""
    return len(a) == len(b) and all(
        same(x, y, 0.0) and np.array_equal(x.drawn, y.drawn)  # type: ignore[arg-type]
        for x, y in zip(a, b, strict=True)
    )


def device_pair(folder: Path, family: str = "olmoe", **options: Any) -> tuple[TorchDecoder, ...]:
    """With graphs, and with the same kernels launched one by one."""
    captured, eager = pair(folder, family, device="cuda", graph=True, **options)
    eager.step = GraphStep(eager.shared, graph=False)
    eager.step.opened()
    return captured, eager


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_graph_does_what_its_kernels_do(folder: Path, family: str, dtype: str) -> None:
    both = device_pair(folder, family, dtype=dtype, lanes=3)
    for each in both:
        each.run([1], IDS[:1, :5])
        vary(each, 1, "num_experts_per_tok=1")
    for lanes in ([0], [1, 2], [2, 0, 1], [1]):
        assert equal_steps(*(generated(each, lanes, GREEDY, 6) for each in both))


@pytest.mark.parametrize("asked", [GREEDY, WARM, replace(WARM, top_k=20, top_p=0.9)])
def test_running_ahead_changes_no_token(folder: Path, asked: Sampling) -> None:
    """Nor does the host draw any other."""
    captured, _ = device_pair(folder, lanes=2, capacity=128)
    outs = generated(captured, [0, 1], asked, 40)
    step = step_of(captured)
    assert step.launches == 41
    for lane in (0, 1):
        captured.truncate(lane, 0)
    step.run_ahead = False
    assert equal_steps(outs, generated(captured, [0, 1], asked, 40))
    assert step.launches == 81
    for position, out in enumerate(outs):
        for row, token in zip(out.logits[:, 0], out.drawn, strict=True):  # type: ignore[arg-type]
            assert token == sampling.choose(sampling.Expectation(row, 0.0), asked, position + 1)


def test_toggles_capture_nothing(folder: Path) -> None:
    both = device_pair(folder, lanes=2)
    captured = step_of(both[0])
    expressions = ("trained", "num_experts_per_tok=5", "double_softmax", "softmax_over_selected")
    for number in range(24):
        for each in both:
            vary(each, number % 2, expressions[number // 2 % 4])
            if number == 6:
                each.set_shadows([policies_of("trained", each.routers, each.dtype)])
            if number > 6:
                each.set_shadows([policies_of(expressions[number % 4], each.routers, each.dtype)])
        a, b = (each.run([0, 1], column([number, 9])) for each in both)
        assert same(a, b, 0.0)
        assert captured.captures == (1 if number < 6 else 2)


def test_one_capture_for_each_kind_of_step(folder: Path) -> None:
    captured, eager = device_pair(folder, lanes=2)
    counts = []
    kinds: list[tuple[list[int], Any, Sampling]] = [
        ([0], "weights", GREEDY),
        ([0], "ids", GREEDY),
        ([1], "weights", GREEDY),
        ([0], "logits", GREEDY),
        ([0, 1], "weights", GREEDY),
        ([1, 0], "weights", WARM),
        ([1, 0], "weights", replace(WARM, temperature=0.5, min_p=0.1)),
        ([1, 0], "weights", replace(WARM, top_k=3)),
        ([0], "weights", GREEDY),
    ]
    for lanes, record, asked in kinds:
        a, b = (generated(each, lanes, asked, 3, record) for each in (captured, eager))
        assert equal_steps(a, b)
        counts.append(step_of(captured).captures)
    assert counts == [1, 1, 1, 2, 3, 4, 4, 5, 5] and step_of(eager).captures == 0


def test_caches_that_moved_are_found(folder: Path) -> None:
    both = device_pair(folder, capacity=16)
    for lanes, capacity in ((1, 16), (1, 40), (3, 40)):
        for each in both:
            each.open(lanes, capacity)
        assert equal_steps(*(generated(each, [0], GREEDY, 5) for each in both))
    assert equal_steps(*(generated(each, [2, 1], GREEDY, 5) for each in both))


def test_host_memory_lives_as_long_as_what_writes_it(folder: Path) -> None:
    """Blocks that others pin and drop meanwhile are none of the graph's."""
    captured, eager = device_pair(folder, capacity=128)
    wanted = generated(eager, [0], GREEDY, 40)
    found: list[StepOutput] = []
    token: Any = 3
    for _ in range(40):
        others = [torch.full((50000,), 7, dtype=torch.uint8).pin_memory() for _ in range(4)]
        draws = draws_for(captured, [0], GREEDY)
        found.append(captured.run([0], column(token), draws=draws))
        token = found[-1].drawn
        assert all(bool((other == 7).all()) for other in others)
    assert equal_steps(found, wanted)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_says_what_the_operators_say(folder: Path, family: str) -> None:
    fused, twin = pair(folder, family, device="cuda", graph=True)
    for each in (fused, twin):
        each.run([0], IDS[:1])
    token = 7
    for _ in range(24):
        a, b = (each.run([0], column([token]), record="logits") for each in (fused, twin))
        assert same(a, b, 2e-3)
        token = int(b.logits.argmax())
