"""Decoders and lanes under variants that edit more than a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.engine import rewire
from moescope.engine.edited import facts_of
from moescope.engine.load import load_model
from moescope.engine.protocol import Generate, LoadRequest, Sampling
from moescope.engine.session import Session
from moescope.errors import MoescopeError
from moescope.variants import parse
from tests.tiny import tiny_checkpoint

IDS = tuple(range(7, 40))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With a shared expert behind a gate."""
    return _model(tmp_path_factory.mktemp("rewire"), "qwen2_moe")


def _model(folder: Path, family: str, **overrides: Any) -> Any:
    path = tiny_checkpoint(family, folder, **overrides)
    return load_model(LoadRequest(str(path), device="cpu", dtype="float32"))


def run_of(decoder: Any, ids: tuple[int, ...] = IDS) -> Any:
    decoder.open(1, 64)
    decoder.truncate(0, 0)
    return decoder.run([0], np.array([ids]), all_logits=True, record="logits")


EDITS = (
    *("experts_shifted", "experts_reversed", "experts_halves_swapped", "gate_up_swapped"),
    *("shared_dropped", "shared_gate_missing"),
)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_around_the_router_shows_only_after_the_first_one(qwen: Any, name: str) -> None:
    trained = run_of(qwen.interpreter)
    wrong = run_of(rewire.rewired(qwen.interpreter, parse(name)))
    assert (wrong.router_logits[:, :, 0] == trained.router_logits[:, :, 0]).all()
    assert not np.allclose(wrong.router_logits[:, :, 1], trained.router_logits[:, :, 1], atol=0.1)


@pytest.mark.parametrize(
    "name",
    [
        *("gate_rows_shifted", "gate_rows_reversed", "gate_of_next_layer"),
        *("router_reads_residual", "router_reads_embedding"),
    ],
)
def test_an_edit_of_the_gate_shows_in_the_first_router(qwen: Any, name: str) -> None:
    trained = run_of(qwen.interpreter)
    wrong = run_of(rewire.rewired(qwen.interpreter, parse(name)))
    assert not np.allclose(wrong.router_logits[:, :, 0], trained.router_logits[:, :, 0], atol=0.1)
    if name == "gate_rows_shifted":
        shifted = (trained.expert_ids[:, :, 0] + 1) % 8
        assert (wrong.expert_ids[:, :, 0] == shifted).all()


def test_what_permutes_experts_and_gate_alike_changes_nothing_but_names(qwen: Any) -> None:
    """Gate rows one later and experts one later: the same experts under other names."""
    trained = run_of(qwen.interpreter)
    renamed = run_of(rewire.rewired(qwen.interpreter, parse("gate_rows_reversed,experts_reversed")))
    assert (renamed.expert_ids == 7 - trained.expert_ids).all()
    assert np.allclose(renamed.logits, trained.logits, atol=1e-4)


def test_an_edit_for_some_layers_leaves_the_others(qwen: Any) -> None:
    trained = run_of(qwen.interpreter)
    wrong = run_of(rewire.rewired(qwen.interpreter, parse("experts_shifted@2")))
    same = [
        bool((wrong.router_logits[:, :, r] == trained.router_logits[:, :, r]).all())
        for r in range(4)
    ]
    assert same == [True, True, True, False]


def test_the_model_itself_is_left_as_it_was(qwen: Any) -> None:
    before = run_of(qwen.interpreter)
    for name in (*EDITS, "gate_rows_shifted", "router_reads_embedding"):
        run_of(rewire.rewired(qwen.interpreter, parse(name)))
    assert (run_of(qwen.interpreter).logits == before.logits).all()


def test_a_policy_edit_rewired_is_the_toggle(qwen: Any) -> None:
    """Two ways to the same router: an edited spec, and a lane's policies."""
    from moescope.engine.lane import policies_of

    decoder = qwen.interpreter
    wrong = run_of(rewire.rewired(decoder, parse("softmax_over_selected")))
    decoder.set_policies(0, policies_of("softmax_over_selected", decoder.routers, decoder.dtype))
    toggled = run_of(decoder)
    decoder.set_policies(0, policies_of("trained", decoder.routers, decoder.dtype))
    assert (wrong.expert_ids == toggled.expert_ids).all()
    assert np.allclose(wrong.logits, toggled.logits, atol=1e-5)


# --- lanes ----------------------------------------------------------------------------------------

REQUEST = Generate(prompt_ids=IDS[:9], sampling=Sampling(max_new_tokens=12))


def written(model: Any, *variants: str) -> dict[int, list[tuple[int, bytes]]]:
    session = Session(model, variants=variants)
    found: dict[int, list[tuple[int, bytes]]] = {}
    for frame in session.generate(REQUEST):
        row = (frame.token_id, frame.expert_ids.tobytes())
        found.setdefault(frame.lane, []).append(row)
    session.close()
    return found


def test_rewired_lanes_write_what_they_write_alone(qwen: Any) -> None:
    variants = ("trained", "experts_shifted", "softmax_over_selected", "shared_dropped")
    together = written(qwen, *variants)
    for number, variant in enumerate(variants):
        assert together[number] == written(qwen, variant)[0], variant
    assert len({str(rows) for rows in together.values()}) == 4


def test_a_lane_is_rewired_from_a_token_on_and_back(qwen: Any) -> None:
    """What came before stays as it was; forks carry their past with them."""
    session = Session(qwen)
    session.start(REQUEST)
    for _ in range(4):
        session.step()
    before = list(session.lanes[0].ids)
    other = session.add_lane("experts_reversed", fork_of=0)
    session.set_variant(0, "shared_gate_missing")
    for _ in range(3):
        session.step()
    session.set_variant(0, "trained")
    session.set_variant(other, "trained")
    while session.running:
        session.step()
    assert session.lanes[0].ids[: len(before)] == before
    assert session.lanes[other].ids[: len(before)] == before
    assert session.lanes[0].ids != session.lanes[other].ids
    session.close()


def test_shadows_are_of_policies_only(qwen: Any) -> None:
    session = Session(qwen)
    with pytest.raises(MoescopeError, match="rewires the decoder"):
        session.set_shadows(["experts_shifted"])
    session.close()


@pytest.mark.parametrize(
    ("expression", "named"),
    [
        ("gate_bias=true", "gate.bias"),
        ("router_input=residual_rms_scaled", "gate.scale"),
    ],
)
def test_an_edit_without_its_tensors_is_refused(qwen: Any, expression: str, named: str) -> None:
    session = Session(qwen)
    with pytest.raises(MoescopeError, match=named):
        session.set_variant(0, expression)
    assert session.lanes[0].expression == "trained"
    session.close()


def test_a_shared_expert_that_is_not_there_is_refused(tmp_path: Path) -> None:
    session = Session(_model(tmp_path, "olmoe"))
    with pytest.raises(MoescopeError, match=r"no tensor layers\.0\.mlp\.shared_expert"):
        session.set_variant(0, "shared_experts=1")
    session.close()


def test_facts_of_a_decoder(qwen: Any, tmp_path: Path) -> None:
    def facts(model: Any) -> frozenset[str]:
        spec = model.interpreter.spec
        layer, branch = next((n, b) for n, b in spec.operators() if b.name == "mlp")
        return facts_of(spec, layer, branch)

    assert facts(qwen) == {"several_routers", "norm_before", "gated_experts"}
    olmo = _model(tmp_path, "flex_olmo", num_hidden_layers=1)
    assert facts(olmo) == {"gated_experts"}
