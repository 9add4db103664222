"""Sessions on the toy model: lanes, forks, toggles, turns, endings, and what is recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope import variants
from moescope.engine import sampling, stepping
from moescope.engine.interpreter import Draw
from moescope.engine.prompts import check_ids
from moescope.engine.protocol import (
    Finished,
    Generate,
    LaneChanged,
    Note,
    Prompted,
    Sampling,
)
from moescope.engine.recording import trace_meta
from moescope.engine.session import Session
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels import route
from moescope.trace.frames import DECODE, PREFILL, Frame
from moescope.trace.memory import MemoryTrace
from moescope.trace.store import TraceReader, TraceWriter
from tests.engine.fake import END, VOCAB, FakeModel, FakeTokenizer, fake

EXPRESSIONS = (
    "trained",
    "softmax_over_selected",
    "num_experts_per_tok=1",
    "num_experts_per_tok+2@1",
    "norm_topk_prob=true",
)
PROMPT = "once upon a time"
HOT = Sampling(temperature=1.0, seed=4, max_new_tokens=24)


def run(
    variants: Sequence[str] = ("trained",),
    request: Generate | None = None,
    model: FakeModel | None = None,
    **options: object,
) -> tuple[Session, list[Frame]]:
    session = Session(model or fake(), FakeTokenizer(), variants=variants, **options)
    return session, list(session.generate(request or Generate(PROMPT, sampling=HOT)))


def finish(session: Session) -> list[Frame]:
    frames = []
    while session.running:
        frames += session.step()
    return frames


def same(a: Frame, b: Frame, but: Sequence[str] = ("lane",)) -> None:
    """Every field equal; unused slots a wider neighbour brought do not count."""
    for field in fields(Frame):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if field.name in (*but, "kl", "top1_agrees"):
            continue
        if isinstance(left, np.ndarray) and isinstance(right, np.ndarray):
            width = min(left.shape[-1], right.shape[-1])
            cut = (..., slice(width)) if left.ndim == 2 else ...
            np.testing.assert_array_equal(left[cut], right[cut], field.name)
        else:
            assert left == right, field.name


def test_every_token_has_a_frame_the_last_one_too() -> None:
    session, frames = run()
    lane = session.lanes[0]
    assert [f.position for f in frames] == list(range(len(PROMPT) + len(lane.new_ids)))
    assert [f.token_id for f in frames] == lane.ids and lane.reason == "length"
    assert [f.phase for f in frames] == [PREFILL] * 16 + [DECODE] * 24
    assert frames[0].logprob is None and frames[0].rank is None
    assert all(f.logprob is not None and f.rank is not None for f in frames[1:])
    assert "".join(f.text for f in frames) == PROMPT + lane.text
    for before, frame in pairwise(frames):
        if frame.rank is not None and frame.rank <= 8:
            token, logprob = before.alternatives[frame.rank - 1]
            assert (token, logprob) == (frame.token_id, frame.logprob)


def test_lanes_equal_separate_runs() -> None:
    session, frames = run(EXPRESSIONS)
    texts = set()
    for number, expression in enumerate(EXPRESSIONS):
        alone, expected = run([expression])
        mine = [f for f in frames if f.lane == number]
        assert len(mine) == len(expected)
        for a, b in zip(mine, expected, strict=True):
            same(a, b)
        assert session.lanes[number].text == alone.lanes[0].text
        texts.add(session.lanes[number].text)
    assert len(texts) >= 4, "the toy model must tell variants apart"


def test_a_rerun_repeats_and_another_seed_does_not() -> None:
    session, first = run()
    again = list(session.generate(Generate(PROMPT, sampling=HOT)))
    for a, b in zip(first, again, strict=True):
        same(a, b, but=("lane", "sequence"))
    assert {f.sequence for f in again} == {1}
    _, other = run(request=Generate(PROMPT, sampling=Sampling(temperature=1.0, seed=5)))
    assert [f.token_id for f in other[:40]] != [f.token_id for f in first]


@settings(max_examples=8, deadline=None)
@given(position=st.integers(0, 39), index=st.integers(0, len(EXPRESSIONS) - 1))
def test_a_fork_is_what_a_rerun_with_the_switch_there_would_be(position: int, index: int) -> None:
    session, _ = run()
    number = session.add_lane(EXPRESSIONS[index], 0, position)
    forked = finish(session)
    assert {f.lane for f in forked} == {number} and forked[0].position == position

    rerun = Session(fake(), FakeTokenizer())
    rerun.start(Generate(PROMPT, sampling=HOT))
    frames: list[Frame] = []
    with patch.object(stepping, "CHUNK", 1):  # so that it can switch inside the prompt
        while rerun.running:
            if len(frames) == position:
                rerun.set_variant(0, EXPRESSIONS[index])
            frames += rerun.step()
    for a, b in zip(forked, frames[position:], strict=True):
        same(a, b)


def test_a_fork_of_a_running_lane_shares_what_it_holds() -> None:
    session = Session(fake(), FakeTokenizer())
    session.start(Generate(PROMPT, sampling=HOT))
    for _ in range(6):
        session.step()
    session.take_events()
    number = session.add_lane("trained", 0)
    assert session.take_events() == [LaneChanged(1, "trained", session.lanes[0].fed, "open", 0)]
    frames = finish(session)
    mine, theirs = ([f for f in frames if f.lane == lane] for lane in (number, 0))
    for a, b in zip(mine, theirs, strict=True):
        same(a, b)
    assert session.lanes[0].text == session.lanes[number].text


def test_a_lane_opened_later_joins_at_the_next_prompt() -> None:
    session, _ = run()
    number = session.add_lane("softmax_over_selected")
    assert not session.running
    frames = list(session.generate(Generate(PROMPT, sampling=HOT)))
    alone, _ = run(["softmax_over_selected"])
    assert session.lanes[number].text == alone.lanes[0].text
    assert {f.lane for f in frames} == {0, number}


def test_a_thousand_toggles_replay_bit_equal(tmp_path: Path) -> None:
    """What was in force by the file, applied to the logits in the file, gives what it recorded."""
    random = np.random.default_rng(7)
    model = fake()
    model.facts["context"] = 2048
    path = tmp_path / "toggles.moetrace"
    writer = TraceWriter(path, trace_meta(model, FakeTokenizer(), record="logits"))
    tokenizer = FakeTokenizer()
    tokenizer.end_ids = ()
    session = Session(model, tokenizer, writer, record="logits")
    session.start(Generate(PROMPT, sampling=Sampling(temperature=1.0, max_new_tokens=270)))
    toggles = 0
    while session.running:
        for _ in range(int(random.integers(0, 9))):
            session.set_variant(0, EXPRESSIONS[random.integers(len(EXPRESSIONS))])
            toggles += 1
        session.step()
    session.close()
    assert toggles >= 1000
    in_force = "trained"
    with TraceReader.open(path) as reader:
        frames = list(reader.frames())
        changes = {e.position: e.data["expression"] for e in reader.events() if e.kind == "variant"}
        assert len(frames) == len(PROMPT) + 270
        for frame in frames:
            in_force = changes.get(frame.position, in_force)
            assert frame.variant == in_force
            assert frame.logits is not None and frame.weights is not None
            for index, router in enumerate(model.interpreter.routers):
                spec = variants.apply(frame.variant, router.spec, router.layer)
                again = route(frame.logits[index][None], spec)
                width = again.expert_ids.shape[1]
                np.testing.assert_array_equal(frame.expert_ids[index, :width], again.expert_ids[0])
                np.testing.assert_array_equal(frame.weights[index, :width], again.weights[0])
                assert frame.score_sum[index] == again.score_sum[0]
    assert len({f.variant for f in frames}) == len(EXPRESSIONS)


def test_fed_the_same_tokens_lanes_carry_their_divergence() -> None:
    session, frames = run(EXPRESSIONS[:3], same_tokens=True)
    assert session.lanes[1].ids == session.lanes[2].ids == session.lanes[0].ids
    assert session.lanes[1].reason == session.lanes[0].reason
    for frame in frames:
        assert (frame.kl is None) == (frame.lane == 0)
        assert (frame.top1_agrees is None) == (frame.lane == 0)
    assert max(f.kl for f in frames if f.kl is not None) > 0.1
    _, alike = run(["trained", "norm_topk_prob=false"], same_tokens=True)
    assert max(f.kl for f in alike if f.kl is not None) == pytest.approx(0, abs=1e-6)


def test_free_lanes_carry_it_until_their_ids_part() -> None:
    session, frames = run(EXPRESSIONS[:2])
    parted = next(
        i
        for i, (a, b) in enumerate(zip(session.lanes[0].ids, session.lanes[1].ids, strict=False))
        if a != b
    )
    known = [f.position for f in frames if f.kl is not None]
    assert known == list(range(parted))


def test_given_ids_are_fed_in_place_of_drawn_ones() -> None:
    forced = [3, END, 5, 7]
    session = Session(fake(), None)
    frames = list(session.generate(Generate(prompt_ids=(1, 2)), force_ids=forced))
    assert [f.token_id for f in frames] == [1, 2, *forced]
    assert [f.phase for f in frames] == [PREFILL] * 2 + [DECODE] * 4
    assert session.lanes[0].reason == "length" and frames[-1].text == ""


def end_token_prompt() -> tuple[str, int]:
    """A prompt whose greedy answer ends with the end token, and how long the answer is."""
    for letter in "abcdefghijklmnopqrstuvwxyz0123456789 .,!":
        session, _ = run(request=Generate(letter, sampling=Sampling(max_new_tokens=60)))
        if session.lanes[0].reason == "end_token":
            return letter, len(session.lanes[0].new_ids)
    raise AssertionError("the toy model never ends")


def test_a_sampled_end_token_ends_the_lane_and_is_recorded() -> None:
    prompt, length = end_token_prompt()
    session, frames = run(request=Generate(prompt, sampling=Sampling(max_new_tokens=60)))
    assert frames[-1].token_id == END and len(frames) == 1 + length
    assert "".join(f.text for f in frames[1:]) == session.lanes[0].text
    assert Finished(0, len(frames), "end_token") in session.take_events()
    exactly, _ = run(request=Generate(prompt, sampling=Sampling(max_new_tokens=length)))
    assert exactly.lanes[0].reason == "end_token"
    short, _ = run(request=Generate(prompt, sampling=Sampling(max_new_tokens=length - 1)))
    assert short.lanes[0].reason == "length"


def test_half_a_character_waits_and_the_last_frame_brings_the_rest() -> None:
    session = Session(fake(), FakeTokenizer())
    frames = list(session.generate(Generate(prompt_ids=(0, 40, 41, 1)), force_ids=[40, 41, 2, 42]))
    assert [f.text for f in frames] == [
        "a",
        "",
        "é",
        "b",
        "",
        "é",
        "c",
        "\N{REPLACEMENT CHARACTER}",
    ]


def test_the_context_and_no_new_tokens_end_a_lane() -> None:
    session, frames = run(max_context=20)
    assert session.lanes[0].reason == "context" and len(frames) == 20
    session, frames = run(request=Generate(PROMPT, sampling=Sampling(max_new_tokens=0)))
    assert session.lanes[0].reason == "length" and len(frames) == len(PROMPT)
    with pytest.raises(MoescopeError, match="7 tokens: the model's context is 6") as caught:
        check_ids([1] * 7, 9, 6, 6)
    assert "--max-context" not in caught.value.hint
    with pytest.raises(MoescopeError, match="the prompt has 16 tokens: expected at most 10"):
        run(max_context=10)


def test_prompts_are_fed_in_chunks_and_caches_grow() -> None:
    model = fake()
    ids = tuple(int(i) for i in np.random.default_rng(0).integers(0, 40, 300))
    sampling = Sampling(max_new_tokens=130)
    _, frames = run(request=Generate(prompt_ids=ids, sampling=sampling), model=model)
    assert [width for _, width in model.interpreter.calls[:4]] == [128, 128, 44, 1]
    assert model.interpreter.capacity >= len(frames) == 430 or frames[-1].token_id == END
    small, _ = run(request=Generate(prompt_ids=ids, sampling=Sampling(max_new_tokens=1)))
    assert small.interpreter.capacity == 512  # type: ignore[attr-defined]


def test_invalid_router_logits_stop_the_lane_and_are_recorded() -> None:
    session, frames = run(
        request=Generate(prompt_ids=(1, 2, 20, 3)), model=fake(poison=20), record="logits"
    )
    assert [f.token_id for f in frames] == [1, 2, 20]
    last = frames[-1]
    assert np.isnan(last.score_sum[1]) and (last.expert_ids[1] == -1).all()
    assert last.logits is not None and np.isnan(last.logits[1]).any()
    assert last.alternatives == ()
    assert session.lanes[0].reason == "invalid_logits"
    assert session.invalid == "layer 1: router logits are not finite"
    notes = [e for e in session.take_events() if isinstance(e, Note)]
    assert [n.kind for n in notes] == ["error"] and session.invalid in notes[0].text
    assert session.interpreter.length(0) == 3
    assert list(session.generate(Generate("abc", sampling=HOT))), "the next prompt is fine"
    assert session.invalid == ""


def test_token_logits_that_are_not_finite_stop_the_sampling() -> None:
    model = fake()
    model.interpreter.head[3, 0] = np.nan
    session, frames = run(model=model)
    assert session.lanes[0].reason == "invalid_logits" and len(frames) == len(PROMPT)
    assert "sampling stopped: token logits are not finite at token 16" in session.invalid


def test_a_raw_turn_continues_every_lane() -> None:
    session, _ = run(EXPRESSIONS[:2])
    before = [list(lane.ids) for lane in session.lanes.values()]
    session.take_events()
    frames = list(session.generate(Generate(" and", continues=True, sampling=HOT)))
    for lane, ids in zip(session.lanes.values(), before, strict=True):
        assert lane.prompt_ids == ids + FakeTokenizer().encode(" and")
        mine = [f for f in frames if f.lane == lane.index]
        assert mine[0].position == len(ids) and mine[0].logprob is not None
        assert [f.phase for f in mine[:5]] == [PREFILL] * 4 + [DECODE]
    assert {f.sequence for f in frames} == {0}
    prompted = [e for e in session.take_events() if isinstance(e, Prompted)]
    assert [(p.lane, p.position) for p in prompted] == [(i, len(b)) for i, b in enumerate(before)]


def test_an_empty_turn_goes_on_where_the_lane_stopped() -> None:
    long = Sampling(temperature=1.0, seed=4, max_new_tokens=40)
    whole, _ = run(request=Generate(PROMPT, sampling=long))
    session, _ = run()
    if session.lanes[0].reason == "length":
        more = Sampling(temperature=1.0, seed=4, max_new_tokens=16)
        list(session.generate(Generate(continues=True, sampling=more)))
    assert session.lanes[0].ids == whole.lanes[0].ids


def test_a_stopped_lane_goes_on_with_the_token_it_had_drawn() -> None:
    whole, _ = run()
    session = Session(fake(), FakeTokenizer())
    session.start(Generate(PROMPT, sampling=HOT))
    for _ in range(8):
        session.step()
    session.stop()
    assert session.lanes[0].reason == "stopped" and not session.running
    done = len(session.lanes[0].new_ids)
    rest = Sampling(temperature=1.0, seed=4, max_new_tokens=24 - done)
    list(session.generate(Generate(continues=True, sampling=rest)))
    assert session.lanes[0].ids == whole.lanes[0].ids


def test_a_chat_turn_that_renders_anew_is_refilled_from_the_first_difference() -> None:
    session = Session(fake(), FakeTokenizer())
    session.start(Generate(messages=(("user", "hi"),)), force_ids=FakeTokenizer().encode(" yes "))
    finish(session)
    session.take_events()
    answer_at = session.lanes[0].start
    session.start(Generate(messages=(("user", "and"),), continues=True, sampling=HOT))
    (prompted,) = [e for e in session.take_events() if isinstance(e, Prompted)]
    assert f"differs from token {answer_at} on" in prompted.note
    assert prompted.position == answer_at
    expected = FakeTokenizer().encode("<u>hi<a>yes<e><u>and<a>")
    assert session.lanes[0].prompt_ids == expected
    frames = finish(session)
    assert frames[0].position == answer_at
    fresh, _ = run(request=Generate(prompt_ids=tuple(expected), sampling=HOT))
    assert session.lanes[0].ids == fresh.lanes[0].ids


@pytest.mark.parametrize("before", [(), (("user", "hi"), ("assistant", "of another lane"))])
def test_a_chat_turn_with_the_same_prefix_feeds_only_what_is_new(
    before: tuple[tuple[str, str], ...],
) -> None:
    session = Session(fake(), FakeTokenizer())
    session.start(Generate(messages=(("user", "hi"),)), force_ids=FakeTokenizer().encode("yes"))
    finish(session)
    session.take_events()
    held = session.lanes[0].fed
    frames = list(session.generate(Generate(messages=(*before, ("user", "so")), continues=True)))
    assert session.lanes[0].prompt_ids == FakeTokenizer().encode("<u>hi<a>yes<e><u>so<a>")
    assert frames[0].position == held
    assert [e.note for e in session.take_events() if isinstance(e, Prompted)] == [""]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Generate(""), "the prompt is empty"),
        (Generate(prompt_ids=(1, VOCAB)), "token 1 of the prompt: expected an id from 0 to 47"),
        (Generate("a", sampling=Sampling(top_p=2)), "top_p: expected 0 to 1"),
        (Generate(messages=(("user", "x"),), continues=True), "raw text, not a chat"),
    ],
)
def test_a_refused_prompt_leaves_everything_as_it_was(request_: Generate, message: str) -> None:
    session, _ = run()
    ids, text = list(session.lanes[0].ids), session.lanes[0].text
    with pytest.raises(MoescopeError, match=message):
        session.start(request_)
    assert (session.lanes[0].ids, session.lanes[0].text) == (ids, text)
    assert session.sequence == 0


def test_refused_variants_and_lanes_name_the_reason() -> None:
    session, _ = run()
    for expression, message in (
        ("router_dtype=bfloat16", "a variant that rewires the decoder needs torch"),
        ("no_such_thing", "unknown name"),
        ("num_experts_per_tok=99", "num_experts_per_tok"),
        ("trained,logits_bf16@40-47", "'logits_bf16@40-47': expected layers with a router, 0 to"),
        ("logits_bf16@1/top_k=1@40", "'num_experts_per_tok=1@40': expected layers with"),
    ):
        with pytest.raises(MoescopeError, match=message):
            session.set_variant(0, expression)
    assert session.lanes[0].expression == "trained"
    with pytest.raises(MoescopeError, match="lane C is not open"):
        session.set_variant(2, "trained")
    with pytest.raises(MoescopeError, match="last lane"):
        session.drop_lane(0)
    for _ in range(7):
        session.add_lane("trained")
    with pytest.raises(MoescopeError, match="at most 8 lanes"):
        session.add_lane("trained")
    session.drop_lane(3)
    assert session.add_lane("trained") == 3


def test_without_a_tokenizer_prompts_are_ids() -> None:
    session = Session(fake(), None)
    frames = list(session.generate(Generate(prompt_ids=(1, 2), sampling=HOT)))
    assert len(frames) == 26 and {f.text for f in frames} == {""}
    with pytest.raises(MoescopeError, match="no tokenizer"):
        session.start(Generate("text"))


def test_the_trace_tells_prompts_changes_pieces_and_ends() -> None:
    model = fake()
    trace = MemoryTrace(trace_meta(model, FakeTokenizer()))
    session = Session(model, FakeTokenizer(), trace)
    list(session.generate(Generate(PROMPT, sampling=HOT)))
    session.set_variant(0, "softmax_over_selected")
    session.add_lane("trained", 0, 20)
    finish(session)
    session.close()
    kinds = [(e.kind, e.lane, e.position) for e in trace.events() if e.kind != "pieces"]
    assert kinds == [
        ("variant", 0, 0),
        ("prompt", 0, 0),
        ("finished", 0, 40),
        ("variant", 0, 40),
        ("fork", 1, 20),
        ("finished", 1, session.lanes[1].fed),
    ]
    prompt = next(e for e in trace.events() if e.kind == "prompt")
    assert prompt.data["prompt_ids"] == FakeTokenizer().encode(PROMPT)
    assert prompt.data["sampling"]["seed"] == 4
    fork = next(e for e in trace.events() if e.kind == "fork")
    assert fork.data == {"sequence": 0, "expression": "trained", "fork_of": 0}
    pieces = {}
    for event in trace.events():
        if event.kind == "pieces":
            assert not set(event.data["pieces"]) & set(pieces), "each id once"
            pieces.update(event.data["pieces"])
    for frame in trace.frames():
        for token in (frame.token_id, *(i for i, _ in frame.alternatives)):
            assert pieces[str(token)] == FakeTokenizer().piece(token)
    assert dict(session.take_pieces()) == {int(k): v for k, v in pieces.items()}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_commands_in_any_order_keep_lanes_whole(data: st.DataObject) -> None:
    """Nothing but a `MoescopeError`, and cache, ids and frames always tell the same story."""
    trace = MemoryTrace(trace_meta(fake()))
    session = Session(fake(poison=39), FakeTokenizer(), trace, max_context=60)
    commands = {
        "start": lambda: session.start(draw_prompt(data)),
        "step": session.step,
        "stop": session.stop,
        "add": lambda: session.add_lane(data.draw(st.sampled_from(EXPRESSIONS))),
        "fork": lambda: session.add_lane(
            data.draw(st.sampled_from(EXPRESSIONS)),
            data.draw(st.sampled_from(sorted(session.lanes))),
            data.draw(st.none() | st.integers(0, 40)),
        ),
        "drop": lambda: session.drop_lane(data.draw(st.sampled_from(sorted(session.lanes)))),
        "variant": lambda: session.set_variant(
            data.draw(st.sampled_from(sorted(session.lanes))),
            data.draw(st.sampled_from(EXPRESSIONS)),
        ),
    }
    names = st.sampled_from([*commands, "step", "step", "step", "start"])
    for name in data.draw(st.lists(names, max_size=30)):
        try:
            commands[name]()
        except MoescopeError as error:
            assert error.code == ExitCode.USAGE
        for lane in session.lanes.values():
            assert session.interpreter.length(lane.index) == lane.fed <= len(lane.ids) <= 60
            assert len(lane.texts) == lane.fed <= len(lane.told) + 1
            assert not (lane.running and lane.reason == "invalid_logits")
    finish(session)
    for lane in session.lanes.values():
        newest: dict[int, Frame] = {}
        for frame in trace.frames():
            if frame.lane == lane.index and frame.sequence == session.sequence:
                newest[frame.position] = frame
        told = [p for p, f in newest.items() if p < lane.fed and f.token_id != lane.ids[p]]
        assert told == [] or len(session._used) == 8, "the trace tells another story"


def draw_prompt(data: st.DataObject) -> Generate:
    sampling = Sampling(temperature=1.0, max_new_tokens=data.draw(st.integers(0, 12)))
    continues = data.draw(st.booleans())
    text = data.draw(st.text("ab c9", max_size=9))
    if data.draw(st.booleans()):
        return Generate(messages=(("user", text),), continues=continues, sampling=sampling)
    return Generate(text, continues=continues, sampling=sampling)


class FullDisk(MemoryTrace):
    def append(self, frame: Frame) -> None:
        if self.count == 10:
            message = "disk full: recording stopped at token 10; the file is good"
            raise MoescopeError(message, code=ExitCode.OUTPUT)
        super().append(frame)


def test_a_full_disk_stops_the_recording_and_not_the_generation() -> None:
    model = fake()
    session = Session(model, FakeTokenizer(), FullDisk(trace_meta(model)))
    frames = list(session.generate(Generate(PROMPT, sampling=HOT)))
    assert len(frames) == 40 and session.recorder.acknowledged == 10
    notes = [e.text for e in session.take_events() if isinstance(e, Note)]
    assert notes == ["disk full: recording stopped at token 10; the file is good"]
    assert session.recorder.failure is not None
    assert session.recorder.failure.code == ExitCode.OUTPUT


@pytest.mark.parametrize("chunk", [1, 2, 5, 128])
def test_a_prompt_of_which_no_logits_are_kept_is_told_alike(chunk: int) -> None:
    """Whole rows, or only what frames tell: the same frames, over turns, forks and forced ids."""
    stories = []
    for expects in (False, True):
        model = fake()
        model.interpreter.expects = expects
        with patch.object(stepping, "CHUNK", chunk):
            session = Session(model, FakeTokenizer())
            frames = list(session.generate(Generate(PROMPT, sampling=HOT), force_ids=[3, 9, 4]))
            more = Generate("and then", continues=True, sampling=HOT)
            frames += session.generate(more)
            session.add_lane("trained", fork_of=0, position=len(PROMPT) - 2)
            session.set_variant(1, "softmax_over_selected")
            while session.running:
                frames += session.step()
        stories.append(frames)
    assert len(stories[0]) == len(stories[1]) > 60
    for whole, told in zip(*stories, strict=True):
        assert (whole.token_id, whole.rank, whole.lane) == (told.token_id, told.rank, told.lane)
        assert whole.logprob == pytest.approx(told.logprob)
        ids, logprobs = zip(*whole.alternatives, strict=True)
        assert ids == tuple(i for i, _ in told.alternatives)
        assert logprobs == pytest.approx([p for _, p in told.alternatives])


@pytest.mark.parametrize("level", ["ids", "weights", "logits"])
def test_frames_hold_what_the_level_says(level: str) -> None:
    _, frames = run(record=level)
    for frame in frames:
        assert (frame.weights is None) == (frame.scores is None) == (level == "ids")
        assert (frame.logits is None) == (level != "logits")


def test_the_meta_says_what_made_the_trace() -> None:
    meta = trace_meta(fake(), FakeTokenizer(), record="ids", redact=True)
    assert [r.layer for r in meta.routers] == [0, 1, 2] and meta.redacted
    assert meta.models[0]["tokenizer_hash"] == "fake" and meta.record == "ids"
    assert meta.engine["device"] == "cpu" and meta.routers[0].num_experts_per_tok == 3


# --- shadow variants, and tokens drawn by the device ----------------------------------------------


def test_shadow_variants_are_recorded_beside_the_real_choice(tmp_path: Path) -> None:
    model = fake()
    names = ("softmax_over_selected", "num_experts_per_tok=1")
    with TraceWriter(tmp_path / "x.moetrace", trace_meta(model)) as writer:
        session, frames = run(model=model, writer=writer, record="logits", shadows=names)
        session.close()
    _, plain = run(record="logits")
    with TraceReader.open(tmp_path / "x.moetrace") as reader:
        read = list(reader.frames())
    assert len(frames) == len(plain) == len(read) > 0
    for frame, other, again in zip(frames, plain, read, strict=True):
        same(frame, other, but=("lane", "shadow"))
        assert frame.shadow is not None and again.shadow is not None
        assert tuple(frame.shadow) == tuple(again.shadow) == names
        for name, shadow in frame.shadow.items():
            policies = session._policies(name)[1]
            for layer, policy in enumerate(policies):
                spec = replace(model.interpreter.routers[layer].spec, policy=policy)
                wanted = route(frame.logits[layer][None], spec)
                K = policy.num_experts_per_tok
                assert np.array_equal(shadow["expert_ids"][layer, :K], wanted.expert_ids[0])
                assert shadow["score_sum"][layer] == pytest.approx(wanted.score_sum[0])
            for column, values in shadow.items():
                assert np.array_equal(values, again.shadow[name][column])


def test_shadow_variants_are_checked() -> None:
    with pytest.raises(MoescopeError, match="nonsense"):
        run(shadows=("nonsense",))
    with pytest.raises(MoescopeError, match="at most 8 shadow variants"):
        run(shadows=[f"num_experts_per_tok=1@{n % 3}/norm_p={1 + n}" for n in range(9)])


class DrawingModel(FakeModel):
    """Draws like a device: with the numbers it is given, and before the session asks."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[list[Draw] | None] = []
        run_plain = self.interpreter.run

        def run(lanes, ids, *, draws=None, **options):  # type: ignore[no-untyped-def]
            self.asked.append(draws)
            out = run_plain(lanes, ids, **options)
            if draws is None:
                return out
            drawn = []
            for row, draw in enumerate(draws):
                expected = sampling.Expectation.of(out.logits[row, -1])
                assert draw.uniform == sampling.uniform(draw.sampling.seed, draw.position)
                drawn.append(sampling.choose(expected, draw.sampling, draw.position))
            return replace(out, drawn=np.array(drawn))

        self.interpreter.run = run  # type: ignore[method-assign]
        self.interpreter.draws = True


@pytest.mark.parametrize("same_tokens", [False, True])
def test_a_device_that_draws_gives_the_tokens_the_host_draws(same_tokens: bool) -> None:
    device = DrawingModel()
    variants = EXPRESSIONS[:2]
    _, frames = run(variants, model=device, same_tokens=same_tokens)
    _, plain = run(variants, same_tokens=same_tokens)
    assert [f.token_id for f in frames] == [f.token_id for f in plain]
    decoding = device.asked[1:]
    if same_tokens:
        assert decoding == [None] * len(decoding)  # lane 0 decides for the others
    else:
        # known in advance but where a lane is fed its last token
        assert [d is None for d in decoding].count(True) <= len(variants)
        assert decoding[-1] is None


def test_nothing_is_drawn_for_a_prompt_that_is_forced() -> None:
    device = DrawingModel()
    session = Session(device, FakeTokenizer())
    list(session.generate(Generate(PROMPT, sampling=HOT), force_ids=[1, 2, 3]))
    assert device.asked == [None] * len(device.asked)
