"""The slow twin of the router's kernel: it routes, and the kernel beside it is compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.engine import router_twins
from moescope.engine.load import load_model
from moescope.engine.protocol import Generate, LoadRequest, Note, Sampling
from moescope.engine.session import Session
from moescope.errors import MoescopeError
from moescope.kernels.twins import Difference, Picks, difference
from tests.engine.fake import FakeInterpreter
from tests.tiny import tiny_checkpoint

REQUEST = Generate(prompt_ids=(3, 5, 7), sampling=Sampling(max_new_tokens=4))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("olmoe", tmp_path_factory.mktemp("twins") / "olmoe", seed=1)


def opened(path: Path, **options: Any) -> Session:
    model = load_model(LoadRequest(str(path), device="cpu", dtype="float32"))
    if not model.interpreter.twin:
        pytest.fail("the C library is built where the suite runs")
    session = Session(model, record="logits", **options)
    session.take_events()
    return session


def notes(session: Session) -> list[str]:
    return [event.text for event in session.take_events() if isinstance(event, Note)]


def ids(frames: list[Any]) -> list[list[list[int]]]:
    return [frame.expert_ids.tolist() for frame in frames]


def test_the_twin_routes_as_the_kernel_does_and_says_how_far_they_are_apart(
    checkpoint: Path,
) -> None:
    """Two lanes, one of them under another policy: prompts and tokens count, the tokens stay."""
    session = opened(checkpoint, variants=("trained", "norm_topk_prob=true,num_experts_per_tok=1"))
    kernel = list(session.generate(REQUEST))
    assert session.router_says == ""
    session.set_slow_router(True)
    assert notes(session) == ["torch routes now, and native beside it"]
    slow = list(session.generate(REQUEST))
    assert [f.token_id for f in slow] == [f.token_id for f in kernel]
    assert ids(slow) == ids(kernel)
    apart = session.interpreter.router_difference()
    routers = len(session.interpreter.routers)
    assert apart.rows == len(slow) * routers and apart.other_ids == 0 and apart.weight < 1e-6
    assert session.router_says == f"torch, {apart.weight:.1g} from native"
    session.set_slow_router(False)
    (told,) = notes(session)
    assert told.startswith("native routes again; beside torch: largest weight difference")
    assert told.endswith(f"other experts in 0 of {apart.rows} rows")
    assert session.router_says == ""
    assert ids(list(session.generate(REQUEST))) == ids(kernel)


def test_a_kernel_that_routes_wrongly_is_seen(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = router_twins.route

    def wrong(logits: Any, spec: Any, **options: Any) -> Any:
        return true(-logits, spec, **options)

    session = opened(checkpoint)
    session.set_slow_router(True)
    monkeypatch.setattr(router_twins, "route", wrong)
    frames = list(session.generate(REQUEST))
    apart = session.interpreter.router_difference()
    assert apart.other_ids == apart.rows == len(frames) * len(session.interpreter.routers)
    assert session.router_says.endswith(f"from native, other experts in {apart.rows} rows")


def test_the_trace_says_where_the_twin_routed(checkpoint: Path) -> None:
    session = opened(checkpoint)
    told: list[Any] = []
    session._tell = told.append  # type: ignore[method-assign]
    list(session.generate(REQUEST))
    session.set_slow_router(True)
    (note,) = [event for event in told if event.data.get("router")]
    assert note.kind == "note" and note.data["router"] == "torch"
    assert note.position == session.lanes[0].fed > 0


def test_where_there_is_one_way_only_it_is_refused() -> None:
    class Model:
        interpreter, facts = FakeInterpreter(), {"context": 64}

    session = Session(Model())
    with pytest.raises(MoescopeError, match="the router runs in reference, which has no slow twin"):
        session.set_slow_router(True)
    assert session.router_says == ""


def test_differences_are_of_the_same_experts_and_add_up() -> None:
    one = Picks(np.array([[1, 2], [3, 4], [-1, -1]]), np.array([[0.5, 0.25], [0.5, 0.5], [0, 0]]))
    two = Picks(np.array([[2, 1], [3, 5], [-1, -1]]), np.array([[0.25, 0.4], [0.9, 0.1], [0, 0]]))
    found = difference(one, two)
    assert found.weight == pytest.approx(0.1) and (found.other_ids, found.rows) == (1, 3)
    more = found + Difference(0.2, 3, 4)
    assert (more.weight, more.other_ids, more.rows) == (0.2, 4, 7)
    nan = Picks(one.expert_ids, np.full((3, 2), np.nan))
    assert difference(one, nan).weight == np.inf and difference(nan, nan).weight == 0
    assert found.line() == "largest weight difference 0.1, other experts in 1 of 3 rows"
