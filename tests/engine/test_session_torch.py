"""Sessions on a tiny real checkpoint: what the toy model promises holds with torch underneath."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from moescope import variants
from moescope.engine import link
from moescope.engine.opening import open_model
from moescope.engine.protocol import Failed, Finished, Generate, LoadRequest, Sampling
from moescope.engine.session import Session
from moescope.kernels import compare, route
from moescope.kernels.spec import Routing
from moescope.trace.frames import Frame
from moescope.trace.store import TraceReader
from tests.engine.test_link import Talk
from tests.tiny import tiny_checkpoint

EXPRESSIONS = ("trained", "softmax_over_selected", "num_experts_per_tok+1", "raw_logits_as_weights")
CHAT = Generate(
    messages=(("user", "Which way?"),),
    sampling=Sampling(temperature=0.8, top_p=0.95, seed=11, max_new_tokens=24),
)


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("olmoe", tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def qwen2_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen2_moe", tmp_path_factory.mktemp("checkpoints"))


def session(checkpoint: Path, expressions: tuple[str, ...] = ("trained",)) -> Session:
    request = LoadRequest(str(checkpoint), device="cpu", dtype="float32")
    model, tokenizer = open_model(request, lambda _: None)
    return Session(model, tokenizer, record="logits", variants=expressions)


def ids_and_sums(frames: list[Frame], lane: int) -> tuple[list[int], np.ndarray]:
    mine = [frame for frame in frames if frame.lane == lane]
    return [frame.token_id for frame in mine], np.array([frame.score_sum for frame in mine])


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_lanes_equal_separate_runs_and_every_frame_reroutes(
    family: str, request: pytest.FixtureRequest
) -> None:
    checkpoint = request.getfixturevalue(family)
    together = session(checkpoint, EXPRESSIONS)
    frames = list(together.generate(CHAT))
    for lane, expression in enumerate(EXPRESSIONS):
        alone = list(session(checkpoint, (expression,)).generate(CHAT))
        ids, sums = ids_and_sums(frames, lane)
        expected_ids, expected_sums = ids_and_sums(alone, 0)
        assert ids == expected_ids
        np.testing.assert_allclose(sums, expected_sums, atol=1e-4)
    assert len({together.lanes[lane].text for lane in together.lanes}) >= 3
    for frame in frames[:: len(frames) // 40]:
        for index, router in enumerate(together.interpreter.routers):
            spec = variants.apply(frame.variant, router.spec, router.layer)
            spec = spec.resolved(together.interpreter.dtype)
            assert frame.logits is not None
            logits = frame.logits[index][None]
            again = route(logits, spec)
            assert compare(recorded(frame, index, again), again, spec, logits) == []


def recorded(frame: Frame, router: int, shape: Routing) -> Routing:
    width = shape.expert_ids.shape[1]
    assert frame.weights is not None and frame.scores is not None
    return Routing(
        expert_ids=frame.expert_ids[None, router, :width].astype(np.int32),
        scores=frame.scores[None, router, :width],
        weights=frame.weights[None, router, :width],
        **{
            name: getattr(frame, name)[None, router]
            for name in ("score_sum", "mass", "entropy", "margin", "runner_up")
        },
    )


def test_a_fork_is_what_a_rerun_with_the_switch_there_would_be(olmoe: Path) -> None:
    first = session(olmoe)
    frames = list(first.generate(CHAT))
    position = first.lanes[0].start + 5
    number = first.add_lane("softmax_over_selected", 0, position)
    forked = []
    while first.running:
        forked += first.step()
    rerun = session(olmoe)
    rerun.start(CHAT)
    again: list[Frame] = []
    while rerun.running:
        if len(again) == position:
            rerun.set_variant(0, "softmax_over_selected")
        again += rerun.step()
    ids, sums = ids_and_sums(forked, number)
    expected_ids, expected_sums = ids_and_sums(again[position:], 0)
    assert ids == expected_ids and forked[0].position == position
    np.testing.assert_allclose(sums, expected_sums, atol=1e-4)
    assert [f.token_id for f in frames[: position + 1]] == [
        f.token_id for f in again[: position + 1]
    ]


def test_a_turn_equals_the_conversation_in_one_prompt(olmoe: Path) -> None:
    chat = session(olmoe)
    list(chat.generate(CHAT))
    more = Generate(messages=(("user", "And then?"),), continues=True, sampling=CHAT.sampling)
    list(chat.generate(more))
    whole = session(olmoe)
    prompt = tuple(chat.lanes[0].prompt_ids)
    list(whole.generate(Generate(prompt_ids=prompt, sampling=CHAT.sampling)))
    assert whole.lanes[0].ids == chat.lanes[0].ids


def test_a_checkpoint_without_a_tokenizer_takes_ids(olmoe: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(olmoe, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    model, tokenizer = open_model(LoadRequest(str(bare), device="cpu"), lambda _: None)
    assert tokenizer is None and model.facts["has_chat_template"] is False
    assert any("tokenizer.json" in note for note in model.facts["notes"])
    bare_ids = list(Session(model).generate(Generate(prompt_ids=(1, 2, 3))))
    assert bare_ids[0].text == "" and len(bare_ids) > 3


def test_the_engine_in_a_child_writes_what_the_one_in_process_does(
    olmoe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESCOPE_STATE", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path = tmp_path / "run.moetrace"
    talk = Talk(link.start(LoadRequest(str(olmoe), "cpu", "float32", trace_path=str(path))))
    talk.link.send(CHAT)
    event = talk.until(lambda e: isinstance(e, Finished | Failed), seconds=60)
    assert isinstance(event, Finished), event
    talk.link.close()
    frames = list(session(olmoe).generate(CHAT))
    with TraceReader.open(path) as reader:
        told = list(reader.frames())
        assert [f.token_id for f in told] == [f.token_id for f in frames]
        assert [f.text for f in told] == [f.text for f in frames]
        assert reader.meta.models[0]["tokenizer_hash"] and reader.meta.models[0]["weights_hash"]
