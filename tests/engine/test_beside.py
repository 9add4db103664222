"""A second checkpoint beside the first: its lanes are what a session of its own would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.engine import devices, load
from moescope.engine.beside import TwoModels, beside, correspond, outline
from moescope.engine.opening import open_model
from moescope.engine.protocol import Generate, LoadRequest, Sampling
from moescope.engine.recording import trace_meta
from moescope.engine.session import Session
from moescope.errors import ExitCode, MoescopeError
from moescope.trace.frames import Frame
from tests.tiny import save_checkpoint, tiny_model

PROMPT = (84, 104, 101, 32, 113, 117, 105, 99)
REQUEST = Generate(prompt_ids=PROMPT, sampling=Sampling(max_new_tokens=5))


def saved(place: Path, name: str, **options: Any) -> Path:
    return save_checkpoint(tiny_model("olmoe", **options), place / name)


def opened(folder: Path, **more: Any) -> tuple[Any, Any]:
    return open_model(LoadRequest(str(folder), device="cpu", dtype="float32", **more))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place = tmp_path_factory.mktemp("beside")
    return saved(place, "base"), saved(place, "tuned", seed=1)


@pytest.fixture(scope="module")
def both(folders: tuple[Path, Path]) -> TwoModels:
    model, _ = opened(folders[0], beside=str(folders[1]))
    assert isinstance(model, TwoModels)
    return model


def run(model: Any, request: Generate = REQUEST, **options: Any) -> dict[int, list[Frame]]:
    session = Session(model, None, record="logits", **options)
    found: dict[int, list[Frame]] = {}
    for frame in session.generate(request):
        found.setdefault(frame.lane, []).append(frame)
    session.close()
    assert not session.invalid
    return found


def assert_alike(some: list[Frame], others: list[Frame]) -> None:
    assert [f.token_id for f in some] == [f.token_id for f in others]
    for a, b in zip(some, others, strict=True):
        assert (a.expert_ids == b.expert_ids).all()
        np.testing.assert_allclose(a.weights, b.weights, atol=1e-5)  # of fused steps or not


VARIANTS = ("trained", "trained", "softmax_over_selected", "trained with forbid=0+1")


def test_lanes_of_two_models_are_what_each_gives_alone(both: TwoModels) -> None:
    lanes = run(both, variants=VARIANTS, models=(0, 1, 1, 0))
    for lane, which in enumerate((0, 1, 1, 0)):
        model = (both.first, both.second)[which]
        (alone,) = run(model, variants=VARIANTS[lane : lane + 1]).values()
        assert_alike(lanes[lane], alone)
        model.interpreter.set_intervention(None)
    assert [f.token_id for f in lanes[0]] != [f.token_id for f in lanes[1]]


def test_the_second_model_is_fed_what_the_first_draws(both: TwoModels) -> None:
    lanes = run(both, variants=VARIANTS[:2], models=(0, 1), same_tokens=True)
    assert [f.token_id for f in lanes[0]] == [f.token_id for f in lanes[1]]
    session = Session(both.second, None, record="logits")
    drawn = [f.token_id for f in lanes[0][len(PROMPT) :]]
    alone = list(session.generate(REQUEST, force_ids=drawn))
    assert_alike(lanes[1], alone)
    assert all(f.kl is not None and f.kl > 0 for f in lanes[1])
    assert both.first.interpreter.intervene is both.second.interpreter.intervene is None


def test_a_fork_stays_with_the_model_of_its_lane(both: TwoModels) -> None:
    plain = run(both.second)[0]
    session = Session(both, None, variants=VARIANTS[:2], models=(0, 1))
    session.start(REQUEST)
    frames: list[Frame] = []
    while session.running:
        frames += session.step()
        if session.lanes[1].fed == 10 and len(session.lanes) == 2:
            assert session.add_lane("trained", fork_of=1, position=6) == 2
    assert session.lanes[2].model == 1
    forked = [f for f in frames if f.lane == 2]
    assert forked[0].position == 6 and [f.token_id for f in forked] == [
        f.token_id for f in plain[6:]
    ]
    for lane in (2, 1):
        session.drop_lane(lane)
    assert session.add_lane("trained") == 3 and session.lanes[3].model == 0


def test_a_rewired_lane_of_the_second_model(both: TwoModels) -> None:
    wired = ("trained", "gate_rows_shifted")
    lanes = run(both, variants=wired, models=(0, 1))
    (alone,) = run(both.second, variants=wired[1:]).values()
    assert_alike(lanes[1], alone)
    assert_alike(lanes[0], run(both.first)[0])


def test_one_model_has_nothing_beside_it(both: TwoModels) -> None:
    session = Session(both.first, None)
    with pytest.raises(MoescopeError, match="no checkpoint is open beside this one"):
        session.add_lane("trained", model=1)
    assert list(session.lanes) == [0]


def test_what_is_told_of_both(both: TwoModels) -> None:
    meta = trace_meta(both, None, record="weights")
    assert [model["name"] for model in meta.models] == ["base", "tuned"]
    assert [router.model for router in meta.routers] == [0] * 4 + [1] * 4
    assert both.facts["beside"] == "tuned" and both.facts["name"] == "base"
    sizes = [model.facts["weights_bytes"] for model in (both.first, both.second)]
    assert both.facts["weights_bytes"] == sum(sizes)


def test_models_that_do_not_correspond_are_refused(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = opened(folders[0])
    for options, words in (
        ({"num_experts": 6}, "layer 0: experts: expected 8 as in base, found 6"),
        ({"num_hidden_layers": 3}, "routers: expected 4 as in base, found 3"),
        ({"vocab_size": 272}, "vocabulary: expected 264 as in base, found 272"),
    ):
        folder = saved(tmp_path, "-".join(options), **options)
        with pytest.raises(MoescopeError, match=words):
            correspond(outline(base), outline(opened(folder)[0]))
        with monkeypatch.context() as patch, pytest.raises(MoescopeError, match=words):
            patch.setattr(load, "_reader", lambda _: pytest.fail("a weight was read"))
            opened(folders[0], beside=str(folder))


def test_two_that_do_not_fit_together_are_refused_before_a_weight_is_read(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = load.inspect(LoadRequest(str(folders[0]), device="cpu", dtype="float32"))
    one.checkpoint.close()
    room = int(1.5 * one.memory["needed"])
    monkeypatch.setattr(devices, "free_bytes", lambda _: room)
    monkeypatch.setattr(load, "_reader", lambda _: pytest.fail("a weight was read"))
    with pytest.raises(MoescopeError, match="tuned beside base: needs") as caught:
        opened(folders[0], beside=str(folders[1]))
    assert caught.value.code == ExitCode.RESOURCES


def test_a_model_beside_itself(both: TwoModels) -> None:
    twice = beside(both.first, both.first)
    lanes = run(twice, variants=VARIANTS[:2], models=(0, 1))
    assert_alike(lanes[0], lanes[1])
    assert np.isfinite([f.kl for f in lanes[1]]).all() and not any(f.kl for f in lanes[1])
