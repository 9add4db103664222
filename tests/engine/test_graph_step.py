"""The fused step for CUDA: its kernels under Triton's interpreter against the torch operators, and
running ahead. Captured in graphs: `test_graph_capture`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

if find_spec("triton") is None:
    pytest.skip("no Triton here", allow_module_level=True)

from moescope.engine import sampling
from moescope.engine.graph_layers import LANES
from moescope.engine.graph_step import GraphStep
from moescope.engine.lane import policies_of
from moescope.engine.protocol import Sampling
from moescope.engine.torch_decoder import TorchDecoder
from moescope.kernels.triton_ops import gate_router
from tests.engine.graph_models import large_tiles
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

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of interpreted -inf and NaN


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    large_tiles(monkeypatch)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_lanes_of_every_family(folder: Path, family: str) -> None:
    """Lanes that differ in length and policy, with shadow variants, at two levels of record."""
    both = pair(folder, family, lanes=3)
    for each in both:
        each.run([0], IDS[:1, :7])
        each.run([2], IDS[1:2, :2])
        vary(each, 2, "num_experts_per_tok=1")
        shadows = ("softmax_over_selected", "always_renormalised")
        each.set_shadows([policies_of(s, each.routers, each.dtype) for s in shadows])
    fused, twin = both
    step_of(fused).run_ahead = False
    tokens = column([5, 9])
    for record in ("logits", "ids"):
        expected = twin.run([2, 0], tokens, record=record)
        found = fused.run([2, 0], tokens, record=record, draws=draws_for(fused, [2, 0], GREEDY))
        assert same(found, expected)
        assert found.shadow_ids is not None and found.shadow_ids.shape[2] == 2
        tokens = column(expected.logits[:, 0].argmax(-1))
        assert found.drawn is not None and (found.drawn == tokens[:, 0]).all()


def test_bfloat16_is_rounded_where_the_operators_round(folder: Path) -> None:
    fused, twin = pair(folder, "qwen3_moe", dtype="bfloat16")
    for token in (3, 4):
        found, expected = (
            each.run([0], column([token]), record="logits") for each in (fused, twin)
        )
        assert (found.expert_ids == expected.expert_ids).all()
        apart = np.linalg.norm(found.logits - expected.logits) / np.linalg.norm(expected.logits)
        assert apart < 0.01


def test_toggles_and_prompts_between_tokens(folder: Path) -> None:
    """A variant counts from the next token; the lane goes on after what torch operators fed it."""
    fused, twin = pair(folder)
    picked = []
    for expression in ("trained", "num_experts_per_tok=5", "double_softmax", "router_quantised"):
        for each in (fused, twin):
            vary(each, 0, expression)
        a, b = (each.run([0], column([8])) for each in (fused, twin))
        assert same(a, b)
        picked.append(a.expert_ids.shape[-1])
    assert picked == [3, 5, 3, 3]
    for each in (fused, twin):
        each.run([0], IDS[:1, :3])
    assert same(*(each.run([0], column([8])) for each in (fused, twin)))


def test_gates_of_several_precisions_in_one_step(folder: Path) -> None:
    """Each place of each lane routes on logits of its own gate; the record has those in force."""
    both = pair(folder, lanes=2)
    for each in both:
        vary(each, 1, "router_quantised")
        each.set_shadows([policies_of("router_quantised", each.routers, each.dtype)])
    a, b = (each.run([0, 1], column([4, 4]), record="logits") for each in both)
    assert same(a, b)
    assert not np.allclose(a.router_logits[0], a.router_logits[1], atol=1e-3)  # type: ignore[index]


def test_a_router_wider_than_its_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whose gate is read in parts, each of which needs the norm of the whole row."""
    monkeypatch.setattr(gate_router, "PART", 24)
    fused, _ = pair(folder, dtype="bfloat16")
    spec, weights = fused.spec, fused.shared.weights
    layers = []
    for layer in spec.layers:
        attend, moe = layer.branches
        wide = replace(moe.operator, router=moe.operator.router.with_wiring(router_dtype="float32"))  # type: ignore[arg-type, union-attr]
        layers.append(replace(layer, branches=(attend, replace(moe, operator=wide))))
    spec = replace(spec, layers=tuple(layers))
    options = {"device": "cpu", "dtype": "bfloat16"}
    fused, twin = (TorchDecoder(spec, weights, **options, fused=False) for _ in range(2))
    fused.step = GraphStep(fused.shared, graph=False)
    for each in (fused, twin):
        each.open(1, 8)
    a, b = (each.run([0], column([4]), record="logits") for each in (fused, twin))
    assert (a.expert_ids == b.expert_ids).all()
    assert np.allclose(a.router_logits, b.router_logits, atol=2e-2)  # type: ignore[arg-type]
    shown = torch.from_numpy(a.router_logits)  # type: ignore[arg-type]
    assert not torch.equal(shown, shown.bfloat16().float()), "logits were rounded"


def test_logits_that_are_not_finite(folder: Path) -> None:
    fused, twin = pair(folder, lanes=2)
    weight = twin.shared.weights["layers.1.mlp.gate.weight"]
    kept = weight[3].clone()
    weight[3] = torch.nan
    a, b = (each.run([0, 1], column([1, 2])) for each in (fused, twin))
    weight[3] = kept
    assert a.invalid_router == b.invalid_router == 1
    assert np.isnan(a.score_sum[:, 0, 1]).all() and (a.expert_ids[:, 0, 1] == -1).all()
    assert not np.isnan(a.score_sum[:, 0, 0]).any()
    for each in (fused, twin):
        each.truncate(0, 0)
    assert same(*(each.run([0], column([1])) for each in (fused, twin)))


def test_more_lanes_than_a_launch_takes(folder: Path) -> None:
    lanes = [*range(LANES + 1)]
    fused, twin = pair(folder, lanes=len(lanes))
    for each in (fused, twin):
        vary(each, LANES, "num_experts_per_tok=2")
    step_of(fused).layers.layers = step_of(fused).layers.layers[:0]  # what is left is quick
    found = fused.run(lanes, column(lanes), draws=draws_for(fused, lanes, GREEDY))
    assert found.expert_ids.shape == (LANES + 1, 1, 2, 3) and found.drawn is not None
    alone = fused.run([4], column([4]))
    assert np.array_equal(found.logits[4], alone.logits[0])
    assert (found.drawn == found.logits[:, 0].argmax(-1)).all()


# --- running ahead, on a decoder without layers: a token follows from the one before --------------


class Watched:
    """A step without layers, and what it was given at every launch: (lane, position, token)."""

    def __init__(self, folder: Path, lanes: int = 2, capacity: int = 64) -> None:
        self.decoder, self.twin = pair(folder, lanes=lanes, capacity=capacity)
        self.step = step_of(self.decoder)
        self.step.layers.layers = []
        self.given: list[list[tuple[int, int, int]]] = []
        run = self.step.layers.run

        def watched(buffers: Any, *rest: Any) -> None:
            inputs = [
                buffers.inputs.device[n].tolist() for n in ("lanes", "positions", "token_ids")
            ]
            self.given.append(list(zip(*inputs, strict=True)))
            run(buffers, *rest)

        self.step.layers.run = watched  # type: ignore[method-assign]


@pytest.mark.parametrize("asked", [GREEDY, WARM, replace(WARM, top_k=9, top_p=0.8)])
def test_tokens_are_drawn_and_fed_before_they_are_asked_for(folder: Path, asked: Sampling) -> None:
    watched = Watched(folder)
    decoder, tokens, lanes = watched.decoder, [7, 8], [1, 0]
    for position in range(5):
        draws = draws_for(decoder, lanes, asked)
        out = decoder.run(lanes, column(tokens), draws=draws)
        expected = [(lane, position, token) for lane, token in zip(lanes, tokens, strict=True)]
        assert watched.given[position] == expected
        assert len(watched.given) == watched.step.launches == position + 2
        assert out.drawn is not None
        tokens = [
            sampling.choose(sampling.Expectation(row, 0.0), asked, position + 1)
            for row in out.logits[:, 0]
        ]
        assert out.drawn.tolist() == tokens


CHANGES: dict[str, Any] = {
    "another token": lambda d: (d, [0, 1], [[200], [201]], {}),
    "other lanes": lambda d: (d, [1, 0], None, {}),
    "a lane less": lambda d: (d, [0], None, {}),
    "a policy": lambda d: (vary(d, 0, "num_experts_per_tok=1"), [0, 1], None, {}),
    "a shadow": lambda d: (
        d.set_shadows([policies_of("trained", d.routers, d.dtype)]), [0, 1], None, {},
    ),
    "a cut lane": lambda d: (d.truncate(0, 0), [0, 1], None, {}),
    "another prompt of that length": lambda d: (
        (d.truncate(0, 0), d.run([0], IDS[:1, :2])), [0, 1], None, {},
    ),
    "a copy": lambda d: (d.copy(1, 0, 2), [0, 1], None, {}),
    "logits in the record": lambda d: (d, [0, 1], None, {"record": "logits"}),
    "the sampling": lambda d: (d, [0, 1], None, {"asked": WARM}),
    "more room": lambda d: (d.open(3, 80), [0, 1], None, {}),
}  # fmt: skip


@pytest.mark.parametrize("change", [*CHANGES, "nothing", "draws no more"])
def test_what_was_not_asked_for_is_forgotten(folder: Path, change: str) -> None:
    """After a change, the step that ran ahead counts for nothing; without one, it is the answer."""
    watched = Watched(folder)
    decoder, tokens = watched.decoder, column([3, 4])
    for _ in range(2):
        out = decoder.run([0, 1], tokens, draws=draws_for(decoder, [0, 1], GREEDY))
        assert out.drawn is not None
        tokens = column(out.drawn)
    assert watched.step.launches == 3
    if change in CHANGES:
        _, lanes, other, options = CHANGES[change](decoder)
        tokens = column(other) if other else tokens[: len(lanes)]
    else:
        lanes, options = [0, 1], {}
    starts = [decoder.length(lane) for lane in lanes]
    draws = draws_for(decoder, lanes, options.get("asked", GREEDY))
    out = decoder.run(
        lanes,
        tokens,
        record=options.get("record", "weights"),
        draws=None if change == "draws no more" else draws,
    )
    launches = {"nothing": 4, "draws no more": 3}.get(change, 5)
    assert watched.step.launches == launches
    answered = [*zip(lanes, starts, tokens[:, 0].tolist(), strict=True)]
    assert watched.given[-1 if change == "draws no more" else -2] == answered
    plain = GraphStep(watched.decoder.shared, graph=False, run_ahead=False)
    plain.layers.layers = []
    again = plain(tuple(lanes), tuple(starts), tokens[:, 0], options.get("record", "weights"))
    assert same(out, again, 0.0)


def test_nothing_runs_ahead_into_a_full_lane(folder: Path) -> None:
    watched = Watched(folder, capacity=3)
    tokens = [5, 6]
    for launches in (2, 3, 3):
        draws = draws_for(watched.decoder, [0, 1], GREEDY)
        out = watched.decoder.run([0, 1], column(tokens), draws=draws)
        assert out.drawn is not None and watched.step.launches == launches
        tokens = out.drawn.tolist()
    assert max(position for given in watched.given for _, position, _ in given) == 2


def test_what_is_captured_and_when(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One capture for each kind of step, none for a toggle, and all anew when caches moved."""
    decoder, _ = pair(folder, lanes=2)
    step = step_of(decoder)
    step.layers.layers, step.graph, step.run_ahead = [], True, False

    def stood_in(kind: Any, lanes: Any) -> list[Any]:
        return [SimpleNamespace(replay=partial(step._forward, kind, slot)) for slot in (0, 1)]

    monkeypatch.setattr(step, "_capture", stood_in)
    trained = policies_of("trained", decoder.routers, decoder.dtype)
    doings: list[tuple[Any, list[int], dict[str, Any], int]] = [
        (None, [0], {}, 1),
        (None, [1], {"record": "ids"}, 1),
        (lambda: vary(decoder, 0, "num_experts_per_tok=1"), [0], {}, 1),
        (None, [0], {"record": "logits"}, 2),
        (None, [0, 1], {}, 3),
        (lambda: decoder.set_shadows([trained]), [0], {}, 4),
        (lambda: decoder.set_shadows([trained[:1] * 2]), [0], {}, 4),
        (lambda: decoder.set_shadows([]), [0], {}, 4),
        (None, [0], {"asked": WARM}, 5),
        (None, [0], {"asked": replace(WARM, min_p=0.1, temperature=0.3)}, 5),
        (None, [0], {"asked": replace(WARM, top_k=5)}, 6),
        (None, [0], {"asked": GREEDY}, 6),
        (lambda: decoder.open(2, 70), [0], {}, 7),
    ]
    for number, (first, lanes, options, captures) in enumerate(doings):
        if first is not None:
            first()
        asked = options.pop("asked", None)
        draws = asked and draws_for(decoder, lanes, asked)
        decoder.run(lanes, column(lanes), draws=draws, **options)
        assert step.captures == captures, number


def test_an_output_is_not_written_over(folder: Path) -> None:
    watched = Watched(folder)
    outs = [watched.decoder.run([0], column([token]), record="logits") for token in range(4)]
    kept = [out.logits.copy() for out in outs]
    watched.decoder.run([0], column([9]), record="logits")
    assert all(np.array_equal(out.logits, k) for out, k in zip(outs, kept, strict=True))
    assert not np.array_equal(kept[0], kept[1])
