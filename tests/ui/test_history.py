"""History: frames as columns, whatever order and size they come in."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moescope.trace.frames import TraceEvent
from moescope.trace.memory import MemoryTrace
from moescope.ui.history import History, Lane
from tests.ui.recorded import frames_of, meta_of, recorded


def test_columns_are_the_frames():
    meta = meta_of()
    frames = frames_of(meta, 300)  # more than one growth
    lane = Lane(0, 0, 6, 4)
    for frame in frames:
        lane.append(frame)
    assert lane.count == 300
    for name in ("expert_ids", "weights", "scores", "score_sum", "margin", "entropy", "runner_up"):
        expected = np.stack([getattr(frame, name) for frame in frames])
        np.testing.assert_array_equal(getattr(lane, name), expected)
    assert lane.texts == [frame.text for frame in frames]
    again = lane.frame(17)
    np.testing.assert_array_equal(again.expert_ids, frames[17].expert_ids)
    assert again.text == frames[17].text and again.logprob is not None


def test_a_position_that_comes_again_replaces_what_followed():
    lane, frames = Lane(0, 0, 6, 4), frames_of(meta_of(), 20)
    for frame in frames:
        lane.append(frame)
    lane.append(replace(frames[12], text="!"))
    assert lane.count == 13 and lane.texts[-1] == "!" and len(lane.alternatives) == 13


def test_a_wider_top_k_widens_the_columns():
    meta = meta_of()
    lane = Lane(0, 0, 6, 4)
    for frame in frames_of(meta, 3):
        lane.append(frame)
    for frame in frames_of(meta, 6, variant="num_experts_per_tok+2")[3:]:
        lane.append(frame)
    assert lane.expert_ids.shape == (6, 6, 6)
    assert (lane.expert_ids[0, :, 4:] == -1).all() and (lane.expert_ids[5] >= 0).all()


def test_experts_are_new_once():
    lane = Lane(0, 0, 6, 4)
    for frame in frames_of(meta_of(), 60):
        lane.append(frame)
    seen = {(r, int(e)) for row in lane.expert_ids for r in range(6) for e in row[r]}
    assert lane.first_use[0] == 24 and sum(lane.first_use) == len(seen)


def test_a_fork_shares_what_came_before_it():
    meta = meta_of()
    trace = MemoryTrace(meta)
    for frame in frames_of(meta, 10):
        trace.append(frame)
    trace.event(TraceEvent("fork", {"fork_of": 0, "sequence": 0}, lane=1, position=6))
    for frame in frames_of(meta, 12, lane=1, seed=9)[6:]:
        trace.append(frame)
    history = History(meta, trace)
    history.pull()
    parent, fork = history.lane(0), history.lane(1)
    assert parent is not None and fork is not None
    assert fork.count == 12 and fork.position.tolist() == list(range(12))
    np.testing.assert_array_equal(fork.expert_ids[:6], parent.expert_ids[:6])
    assert not (fork.expert_ids[6:10] == parent.expert_ids[6:10]).all()


def test_logits_of_old_tokens_are_read_again_from_the_trace():
    trace = recorded(80)
    history = History(trace.meta, trace)
    history._keep = 8
    history.pull()
    lane = history.lane(0)
    assert lane is not None and len(history._logits) == 8
    found = history.logits(lane, 5)
    assert found is not None
    np.testing.assert_array_equal(found, trace.frame(5).logits)


def test_the_newest_sequence_is_the_one_looked_at():
    meta = meta_of()
    trace = MemoryTrace(meta)
    for sequence in range(3):
        for frame in frames_of(meta, 5, sequence=sequence):
            trace.append(frame)
    history = History(meta, trace)
    while history.pull(4):
        pass
    assert history.sequence == 2 and history.sequences() == [0, 1, 2]
    assert history.pieces == {} and not history.behind
