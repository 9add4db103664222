"""N lanes under N variants give what N separate runs give, in every family; steered lanes too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moescope.engine.lane import policies_of, steering_of
from moescope.engine.protocol import Generate, Sampling
from moescope.engine.session import Session
from moescope.errors import MoescopeError
from moescope.trace.frames import Frame
from tests.oracle import harness
from tests.oracle.matrix import BY_FAMILY

REQUEST = Generate(prompt_ids=(5, 9, 33, 70, 101, 7), sampling=Sampling(max_new_tokens=4))
SHORT = Generate(prompt_ids=(5, 9, 33, 70), sampling=Sampling(max_new_tokens=2))
WANTED = (
    "trained",
    "norm_topk_prob=true",
    "norm_topk_prob=false",
    "num_experts_per_tok-1",
    "weights_from=logits",
    "trained with forbid=0",
    "num_experts_per_tok+1 with scale=1*0.5,min_p=0.3",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lanes")


def model_of(family: str, folder: Path) -> Any:
    interpreter, _ = harness.loaded(BY_FAMILY[family][0], folder)
    return SimpleNamespace(interpreter=interpreter, facts={"context": 128})


def meaningful(model: Any) -> list[str]:
    """The trained router, another one that this model can run, and one that is steered."""
    interpreter = model.interpreter
    routers, kept, same = interpreter.routers, list[str](), list[str]()
    for expression in WANTED:
        try:
            policies = policies_of(expression, routers, interpreter.dtype)
            steering_of(expression, interpreter, policies)
        except (MoescopeError, ValueError):
            continue
        specs = tuple(replace(r.spec, policy=p) for r, p in zip(routers, policies, strict=True))
        if all(spec.equal(router.spec) for spec, router in zip(specs, routers, strict=True)):
            same.append(expression)
        kept.append(expression)
    return [*kept[:1], *(name for name in kept[1:] if name not in same)][:2] + kept[-1:]


def runs(model: Any, variants: list[str], request: Generate = REQUEST) -> dict[int, list[Frame]]:
    session = Session(model, None, variants=variants)
    found: dict[int, list[Frame]] = {}
    for frame in session.generate(request):
        found.setdefault(frame.lane, []).append(frame)
    assert not session.invalid
    model.interpreter.set_intervention(None)
    return found


@pytest.mark.parametrize("family", BY_FAMILY)
def test_lanes_are_what_separate_runs_are(family: str, folder: Path) -> None:
    model = model_of(family, folder)
    variants = meaningful(model)
    assert len(variants) == 3, variants
    together = runs(model, variants, SHORT)
    apart = [runs(model, [variant], SHORT)[0] for variant in variants]
    for lane, alone in enumerate(apart):
        beside = together[lane]
        assert [f.token_id for f in beside] == [f.token_id for f in alone], variants[lane]
        for a, b in zip(beside, alone, strict=True):
            width = min(a.expert_ids.shape[1], b.expert_ids.shape[1])
            assert (a.expert_ids[:, :width] == b.expert_ids[:, :width]).all(), variants[lane]
            assert (a.expert_ids[:, width:] < 0).all() and (b.expert_ids[:, width:] < 0).all()
            assert a.weights is not None and b.weights is not None
            np.testing.assert_allclose(a.weights[:, :width], b.weights[:, :width], atol=1e-5)
    first = [frames[0] for frames in together.values()]
    made = {(f.expert_ids[0].tobytes(), np.round(f.weights[0], 4).tobytes()) for f in first}
    assert len(made) > 1, "the variants differ in something"


# --- steered lanes --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def qwen(folder: Path) -> Any:
    return model_of("qwen3_moe", folder)


def test_a_steered_lane_never_picks_what_is_forbidden(qwen: Any) -> None:
    lanes = runs(qwen, ["trained", "trained with forbid=L0-1:2+5,force=L2:3"])
    for frame in lanes[1]:
        assert not np.isin(frame.expert_ids[:2], (2, 5)).any()
        assert (frame.expert_ids[2] == 3).any()
        assert frame.score_sum == pytest.approx(1.0, abs=1e-5)  # renormalised
        assert frame.variant == "trained with forbid=L0-1:2+5,force=L2:3"
    free = np.stack([frame.expert_ids for frame in lanes[0]])
    assert np.isin(free[:, :2], (2, 5)).any() and not (free[:, 2] == 3).any(1).all()


def test_steering_acts_from_the_next_token_on_and_ends(qwen: Any) -> None:
    session = Session(qwen, None)
    session.start(REQUEST)
    frames: list[Frame] = []
    while session.running:
        if len(frames) == 8:
            session.set_variant(0, "trained with forbid=0-3")
        if len(frames) == 9:
            session.set_variant(0, "trained")
        frames += session.step()
    steered = [bool((frame.expert_ids > 3).all()) for frame in frames]
    assert steered == [False] * 8 + [True, False]
    assert qwen.interpreter.intervene is None


def test_a_fork_is_steered_and_its_source_goes_on(qwen: Any) -> None:
    plain = runs(qwen, ["trained"])[0]
    session = Session(qwen, None)
    session.start(REQUEST)
    frames: list[Frame] = []
    while session.running:
        frames += session.step()
        if session.lanes[0].fed == 9 and len(session.lanes) == 1:
            session.add_lane("trained with force=L0:1", 0, 7)
    source = [f for f in frames if f.lane == 0]
    forked = [f for f in frames if f.lane == 1]
    assert [f.token_id for f in source] == [f.token_id for f in plain]
    assert forked[0].position == 7 and all((f.expert_ids[0] == 1).any() for f in forked)
    qwen.interpreter.set_intervention(None)


def test_what_cannot_be_steered_is_refused_and_changes_nothing(qwen: Any) -> None:
    session = Session(qwen, None)
    for expression, words in (
        ("num_experts_per_tok+1 with forbid=99", "experts 0 to 7"),
        ("trained with drop=1", "expected forbid"),
        ("trained with forbid=L9:1", "layers with a router"),
    ):
        with pytest.raises(MoescopeError, match=words):
            session.set_variant(0, expression)
        assert session.lanes[0].expression == "trained"
        policies = qwen.interpreter.policies.specs[0]
        assert all(spec.K == 3 for spec in policies), "nothing changed"
    with pytest.raises(MoescopeError, match="expected a variant"):
        session.set_shadows(["trained with forbid=1"])
    from tests.engine.fake import fake

    with pytest.raises(MoescopeError, match="cannot steer"):
        Session(fake(), None, variants=["trained with forbid=1"])


# --- forks ----------------------------------------------------------------------------------------

LONG = Generate(prompt_ids=REQUEST.prompt_ids, sampling=Sampling(max_new_tokens=9))
STEERED = ("trained with forbid=0+1", "trained with scale=2*0.25,force=3")
HISTORIES = (  # what the lane runs under at first, and from token 8 on
    ("trained", "trained"),
    (STEERED[0], STEERED[0]),
    ("trained", STEERED[0]),
    (STEERED[0], STEERED[1]),
)


def forked(model: Any, history: tuple[str, str], expression: str, at: int) -> list[Frame]:
    """A lane forked at token `at` from one that is fed 12 tokens under `history`."""
    session, found = Session(model, None, variants=history[:1]), list[Frame]()
    session.start(LONG)
    while session.running:
        found += session.step()
        if session.lanes[0].fed == 8:
            session.set_variant(0, history[1])
        if session.lanes[0].fed == 12 and len(session.lanes) == 1:
            session.add_lane(expression, 0, at)
    model.interpreter.set_intervention(None)
    return [frame for frame in found if frame.lane == 1]


def switched(model: Any, history: tuple[str, str], expression: str, at: int) -> list[Frame]:
    """One lane that turns to `expression` at token `at`, having run under `history`."""
    session, found = Session(model, None, variants=history[:1]), list[Frame]()
    session.start(LONG)
    while session.running:
        found += session.step()
        if session.lanes[0].fed == 8 < at:
            session.set_variant(0, history[1])
        if session.lanes[0].fed == at:
            session.set_variant(0, expression)
    model.interpreter.set_intervention(None)
    return [frame for frame in found if frame.position >= at]


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_next", "lfm2_moe"])
@pytest.mark.parametrize("history", HISTORIES, ids=lambda history: " then ".join(history))
def test_a_fork_is_what_one_lane_would_be(
    family: str, history: tuple[str, str], folder: Path
) -> None:
    """Also where state cannot be cut and the tokens before the fork are fed again."""
    model = model_of(family, folder)
    for expression, at in ((STEERED[1], 9), ("num_experts_per_tok-1", 10)):
        beside = forked(model, history, expression, at)
        alone = switched(model, history, expression, at)
        assert [f.position for f in beside] == [f.position for f in alone] == [*range(at, 15)]
        assert [f.token_id for f in beside] == [f.token_id for f in alone]
        for a, b in zip(beside, alone, strict=True):
            assert a.variant == b.variant
            K = b.expert_ids.shape[1]  # a lane beside it may pick more
            assert (a.expert_ids[:, :K] == b.expert_ids).all() and (a.expert_ids[:, K:] < 0).all()
            np.testing.assert_allclose(a.weights[:, :K], b.weights, atol=1e-5)
