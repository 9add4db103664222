"""Seeing and replacing what routers decide, on the torch path, also where a fused step runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moescope.engine.opening import open_model
from moescope.engine.protocol import LoadRequest
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tiny_checkpoint("olmoe", tmp_path_factory.mktemp("interventions"))
    return open_model(LoadRequest(str(folder), device="cpu", dtype="float32"))[0]


def fed(model: Any, ids: list[int]) -> Any:
    interpreter = model.interpreter
    interpreter.open(1, 32)
    interpreter.truncate(0, 0)
    parts = [interpreter.run([0], np.array([ids[:4]]), all_logits=True)]
    parts += [interpreter.run([0], np.array([[token]])) for token in ids[4:]]
    return parts


def test_an_observer_changes_nothing_and_sees_every_row(model: Any) -> None:
    ids = [5, 6, 7, 8, 9, 10]
    before = fed(model, ids)
    seen: list[tuple[int, tuple[int, ...], Any]] = []

    def look(router: Any, x: Any, routing: Any, call: Any) -> Any:
        seen.append(
            (router.index, tuple(x.shape), router.route(x, call.groups[router.index][0][0], call))
        )
        assert torch.equal(seen[-1][2].expert_ids, routing.expert_ids)
        assert torch.equal(routing.logits, seen[-1][2].logits)
        return routing

    model.interpreter.set_intervention(look)
    try:
        after = fed(model, ids)
    finally:
        model.interpreter.set_intervention(None)
    assert [(index, shape[0]) for index, shape, _ in seen] == [
        (router, rows) for rows in (4, 1, 1) for router in range(4)
    ]
    for a, b in zip(before, after, strict=True):
        assert np.array_equal(a.expert_ids, b.expert_ids)
        assert np.allclose(a.logits, b.logits, atol=2e-4)
    assert after[0].router_logits is None  # not asked for


def test_a_replaced_routing_is_executed_and_recorded(model: Any) -> None:
    ids = [5, 6, 7, 8, 9]
    before = fed(model, ids)

    def swap(router: Any, x: Any, routing: Any, call: Any) -> Any:
        if router.index:
            return routing
        return replace(routing, expert_ids=(routing.expert_ids + 1) % 8)

    model.interpreter.set_intervention(swap)
    try:
        after = fed(model, ids)
    finally:
        model.interpreter.set_intervention(None)
    for a, b in zip(before, after, strict=True):
        assert np.array_equal((a.expert_ids[:, :, 0] + 1) % 8, b.expert_ids[:, :, 0])
        assert not np.allclose(a.logits, b.logits, atol=1e-3)
    again = fed(model, ids)
    assert all(np.array_equal(a.logits, b.logits) for a, b in zip(before, again, strict=True))
