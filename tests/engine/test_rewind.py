"""Going back in a lane: truncated or forked at any token, it goes on as a fresh one fed as far."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moescope.engine import rewind
from moescope.engine.load import load_model
from moescope.engine.protocol import LoadRequest
from moescope.engine.rewind import Past
from tests.tiny import tiny_checkpoint

IDS = np.random.default_rng(5).integers(0, 256, 40)
CHANGE = 23  # from this token on another policy is in force


@pytest.fixture(scope="module", params=["olmoe", "qwen3_next", "zaya"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tiny_checkpoint(request.param, tmp_path_factory.mktemp("rewind"))
    loaded = load_model(LoadRequest(str(path), device="cpu"))
    loaded.interpreter.open(3, 64)
    return loaded.interpreter


def policies(model: Any, K: int) -> list[Any]:
    return [replace(router.spec.policy, num_experts_per_tok=K) for router in model.routers]


def feed(model: Any, lane: int, end: int) -> None:
    """The first `end` of IDS: a prompt, then one by one, with a change of policy on the way."""
    model.truncate(lane, 0)
    model.set_policies(lane, policies(model, 3))
    if end:
        model.run([lane], IDS[None, : min(9, end)])
    for at in range(9, end):
        if at == CHANGE:
            model.set_policies(lane, policies(model, 2))
        model.run([lane], IDS[None, at : at + 1])


def next_logits(model: Any, lane: int, at: int) -> Any:
    model.set_policies(lane, policies(model, 2 if at >= CHANGE else 3))
    return model.run([lane], IDS[None, at : at + 1]).logits


@pytest.mark.parametrize("at", [0, 1, 9, 17, CHANGE, 31, 39])
def test_truncated_or_forked_a_lane_goes_on_as_a_fresh_one(
    model: Any, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rewind, "EVERY", 6)
    monkeypatch.setattr(rewind, "AT_ONCE", 4)
    feed(model, 0, at)
    wanted = next_logits(model, 0, at)
    feed(model, 1, 40)
    model.copy(1, 2, at)
    assert model.length(2) == at and model.length(1) == 40
    model.truncate(1, at)
    for lane in (1, 2):
        assert np.abs(next_logits(model, lane, at) - wanted).max() < 1e-5
        assert model.length(lane) == at + 1


def test_snapshots_stay_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the limit those go that leave the smallest gaps; the newest stays."""
    monkeypatch.setattr(rewind, "BYTES", 5 * 100)
    past = Past()
    for at in range(1, 65):
        past.fed([at], "specs")
        past.save(f"state {at}", 100)
    places = sorted(past.snapshots)
    assert len(places) == 5 and places[-1] == 64
    assert past.nearest(63) == places[-2] and past.nearest(0) == 0
    gaps = np.diff([0, *places])
    assert gaps.max() <= 40


def test_a_past_is_cut_and_copied() -> None:
    past = Past()
    past.fed([1, 2, 3], "a")
    past.save("three", 1)
    past.fed([4, 5], "b")
    past.fed([6], "b")
    assert list(past.spans(1, 6)) == [([2, 3], "a"), ([4, 5, 6], "b")]
    other = past.copied(4)
    assert list(other.spans(0, 4)) == [([1, 2, 3], "a"), ([4], "b")]
    other.cut(2)
    assert other.ids == [1, 2] and not other.snapshots and past.nearest(6) == 3
