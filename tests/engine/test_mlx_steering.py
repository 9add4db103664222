"""Steered lanes and watched routers on MLX: what torch's do, on tiny models of every kind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core")

from moescope.engine.beside import beside
from moescope.engine.protocol import Generate, Sampling
from moescope.engine.session import Session
from moescope.trace.frames import Frame
from tests.engine.mlx_tiny import on_mlx, on_torch
from tests.tiny import save_checkpoint, tiny_checkpoint, tiny_model

IDS = (5, 9, 33, 70, 101, 7)
VARIANTS = (
    "trained",
    "trained with forbid=L0-1:2+5,force=L2:3",
    "num_experts_per_tok+1 with scale=1*0.5,min_p=0.3",
)
SHADOW = "norm_topk_prob=true"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("steered")


def run(interpreter: Any, shadows: tuple[str, ...] = (), **options: Any) -> dict[int, list[Frame]]:
    model = SimpleNamespace(interpreter=interpreter, facts={"context": 64})
    session = Session(model, None, record="weights", shadows=shadows, **options)
    found: dict[int, list[Frame]] = {}
    request = Generate(prompt_ids=IDS, sampling=Sampling(max_new_tokens=4))
    for frame in session.generate(request):
        found.setdefault(frame.lane, []).append(frame)
    session.close()
    interpreter.set_intervention(None)
    return found


def assert_alike(some: list[Frame], others: list[Frame], words: str) -> None:
    assert [f.token_id for f in some] == [f.token_id for f in others], words
    for a, b in zip(some, others, strict=True):
        assert (a.expert_ids == b.expert_ids).all(), words
        np.testing.assert_allclose(a.weights, b.weights, atol=1e-4, err_msg=words)
        np.testing.assert_allclose(a.score_sum, b.score_sum, atol=1e-4, err_msg=words)


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "gpt_oss", "jetmoe"])
def test_steered_lanes_are_those_of_torch(family: str, folder: Path) -> None:
    path = tiny_checkpoint(family, folder / family)
    variants = VARIANTS if family != "jetmoe" else (*VARIANTS[:1], "trained with forbid=0")
    ours = run(on_mlx(path), variants=variants)
    theirs = run(on_torch(path), variants=variants)
    assert len(ours) == len(variants)
    for lane, variant in enumerate(variants):
        assert_alike(ours[lane], theirs[lane], variant)
    pairs = zip(ours[0], ours[1], strict=True)
    assert any((a.expert_ids != b.expert_ids).any() for a, b in pairs)


def test_shadows_beside_a_steered_lane_are_not_steered(folder: Path) -> None:
    path = tiny_checkpoint("olmoe", folder / "shadowed")
    variants = ("trained with forbid=0-2",)
    ours = run(on_mlx(path), shadows=(SHADOW,), variants=variants)[0]
    theirs = run(on_torch(path), shadows=(SHADOW,), variants=variants)[0]
    picked = set()
    for a, b in zip(ours, theirs, strict=True):
        shadows = [frame.shadow[SHADOW]["expert_ids"] for frame in (a, b)]
        assert np.array_equal(*shadows)
        picked |= set(np.unique(shadows[0]).tolist())
        assert not np.isin(a.expert_ids, (0, 1, 2)).any()
    assert picked & {0, 1, 2}


def test_steering_ends_and_a_fork_is_steered_alone(folder: Path) -> None:
    path = tiny_checkpoint("olmoe", folder / "forked")
    interpreter = on_mlx(path)
    plain = run(interpreter, variants=("trained",))[0]
    model = SimpleNamespace(interpreter=interpreter, facts={"context": 64})
    session = Session(model, None)
    session.start(Generate(prompt_ids=IDS, sampling=Sampling(max_new_tokens=4)))
    frames: list[Frame] = []
    while session.running:
        frames += session.step()
        if session.lanes[0].fed == 8 and len(session.lanes) == 1:
            session.add_lane("trained with force=L0:1", 0, 7)
        elif session.lanes[0].fed == 9:
            assert interpreter.intervene is not None
            session.set_variant(1, "trained")
            assert interpreter.intervene is None
    assert_alike([f for f in frames if f.lane == 0], plain, "the source goes on")
    forked = [f for f in frames if f.lane == 1]
    assert (forked[0].expert_ids[0] == 1).any() and forked[0].position == 7


def test_gates_of_two_models_are_crossed_as_on_torch(folder: Path) -> None:
    def rounded(model: Any) -> None:
        for name, tensor in model.named_parameters():
            if name.endswith("gate.weight"):
                step = tensor.data.abs().amax(1, keepdim=True) / 7
                tensor.data = (tensor.data / step).round() * step

    paths = [folder / "original", folder / "quantised"]
    for path, change in zip(paths, (lambda model: None, rounded), strict=True):
        model = tiny_model("olmoe")
        change(model)
        save_checkpoint(model, path)
    told = []
    for load in (on_mlx, on_torch):
        models = [
            SimpleNamespace(interpreter=load(path), facts={"name": path.name, "context": 64})
            for path in paths
        ]
        session = Session(beside(*models), None, variants=VARIANTS[:1] * 2, models=(0, 1))
        session.crosses = True
        request = Generate(prompt_ids=(*IDS, *range(40, 60)), sampling=Sampling(max_new_tokens=0))
        list(session.generate(request))
        found = session.crossing.found
        told.append({place: [(f.router, f.cause) for f in found[place]] for place in found})
        blamed = [row for flips in found.values() for flip in flips for row in flip.rows or ()]
        assert blamed and all(error > 0 for _, error in blamed)
        session.close()
        assert all(model.interpreter.intervene is None for model in models)
    assert told[0] == told[1] and told[0]


@pytest.mark.parametrize("load", [on_mlx, on_torch])
def test_a_steered_past_is_fed_again_as_it_was_steered(load: Any, folder: Path) -> None:
    """Convolutions rewrite their state: a fork feeds what came before it once more."""
    interpreter = load(tiny_checkpoint("lfm2_moe", folder / f"conv-{load.__name__}"))
    model = SimpleNamespace(interpreter=interpreter, facts={"context": 64})
    session = Session(model, None, variants=("trained with forbid=0+1",))
    session.start(Generate(prompt_ids=IDS, sampling=Sampling(max_new_tokens=8)))
    frames: list[Frame] = []
    while session.running:
        frames += session.step()
        if session.lanes[0].fed == 12 and len(session.lanes) == 1:
            session.add_lane("trained with forbid=0+1", 0, 9)
    source = [frame for frame in frames if frame.lane == 0 and frame.position >= 9]
    assert_alike([frame for frame in frames if frame.lane == 1], source, "a fork changes nothing")
    session.set_variant(0, "trained")
    session.set_variant(1, "trained")
    assert interpreter.intervene is None
