"""The replay ladder: what each rung takes off, and that forced routing is what is executed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope import cli
from moescope.diagnosis.check import check
from moescope.diagnosis.forced import forced
from moescope.diagnosis.golden import record_golden
from moescope.diagnosis.ladder import RUNGS, Ladder, Rung, climb, forced_routing
from moescope.diagnosis.two_models import Side
from moescope.engine.opening import open_model
from moescope.engine.protocol import Generate, LoadRequest, Sampling
from moescope.engine.recording import trace_meta
from moescope.engine.session import Session
from moescope.errors import ExitCode, MoescopeError
from moescope.trace.memory import MemoryTrace
from tests.engine.fake import fake
from tests.tiny import save_checkpoint, tiny_model

TEXT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ladder")


def model_of(place: Path, name: str, change: Any = None, dtype: str = "float32") -> tuple[Any, Any]:
    model = tiny_model("qwen2_moe")
    if change is not None:
        change(model)
    folder = save_checkpoint(model, place / name)
    return open_model(LoadRequest(str(folder), device="cpu", dtype=dtype))


@pytest.fixture(scope="module")
def base(place: Path) -> tuple[Any, Any]:
    return model_of(place, "base")


def rungs(ladder: Ladder) -> dict[str, Rung]:
    assert tuple(rung.name for rung in ladder.rungs) == RUNGS
    return {rung.name: rung for rung in ladder.rungs}


def test_weights_alone_are_the_difference(base: Any) -> None:
    ids = base[1].encode(TEXT)
    ladder = climb(Side(*base), Side(*base, "norm_topk_prob=true"), ids)
    found = rungs(ladder)
    own, same_ids = found["own routing"], found["ids"]
    assert own.kl_mean is not None and own.kl_mean > 0.01
    assert same_ids.kl_mean is not None and same_ids.kl_mean > 0.1 * own.kl_mean
    last = found["ids and weights"]
    assert last.kl_max == pytest.approx(0, abs=1e-9) and last.logprob_max == pytest.approx(
        0, abs=1e-6
    )
    assert last.top1_agrees == 1.0 and last.same_experts == 1.0
    shares = ladder.shares
    assert shares is not None and sum(shares.values()) == pytest.approx(1)
    assert shares["rest"] == pytest.approx(0, abs=1e-9) and shares["weights"] > 0.1
    assert ladder.tokens == len(ids)


def test_the_choice_alone_is_the_difference(base: Any) -> None:
    """Fewer experts, not renormalised: with the ids of A, B weighs them as A does."""
    ladder = climb(Side(*base), Side(*base, "num_experts_per_tok-1"), base[1].encode(TEXT))
    found = rungs(ladder)
    assert found["own routing"].kl_max > 1e-4 and found["own routing"].same_experts == 0.0
    assert found["ids"].kl_max == pytest.approx(0, abs=1e-9)


def test_what_is_not_routing_is_left_on_the_last_rung(base: Any, place: Path) -> None:
    def louder(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.experts.down_proj.data *= 1.2

    ladder = climb(Side(*base), Side(*model_of(place, "louder", louder)), base[1].encode(TEXT))
    last = rungs(ladder)["ids and weights"]
    assert last.kl_mean is not None and last.kl_mean > 1e-4
    assert ladder.shares is not None and ladder.shares["rest"] > 0.2
    assert ladder.lane_a == "base trained" and ladder.lane_b == "louder trained"


def test_only_the_gate_differs(base: Any, place: Path) -> None:
    def off(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.gate.weight.data *= 0.7

    ladder = climb(Side(*base), Side(*model_of(place, "off", off)), base[1].encode(TEXT))
    found = rungs(ladder)
    assert found["own routing"].kl_mean > found["ids and weights"].kl_mean
    assert found["ids and weights"].kl_max == pytest.approx(0, abs=1e-9)


def test_a_model_beside_itself_has_nothing_to_explain(base: Any) -> None:
    ladder = climb(Side(*base), Side(*base), base[1].encode(TEXT))
    assert ladder.shares is None
    assert all(rung.kl_max == pytest.approx(0, abs=1e-9) for rung in ladder.rungs)
    assert base[0].interpreter.intervene is None
    json.dumps(ladder.to_json(), allow_nan=False)


def test_k3_is_the_estimate_on_the_tokens_fed(base: Any) -> None:
    """Against log probabilities from two plain runs."""
    from moescope.diagnosis.forced import forced

    ids = base[1].encode(TEXT)
    variant = "num_experts_per_tok-1"
    own = climb(Side(*base), Side(*base, variant), ids).rungs[0]
    a = forced(base[0], ids).logprob[1:]
    b = forced(base[0], ids, variant=variant).logprob[1:]
    apart = a - b
    assert own.logprob_max == pytest.approx(np.abs(apart).max(), abs=1e-4)
    assert own.logprob_mean == pytest.approx(np.abs(apart).mean(), abs=1e-4)
    assert own.k3_mean == pytest.approx((np.exp(apart) - 1 - apart).mean(), abs=1e-4)


def test_forced_routing_keeps_what_the_router_said() -> None:
    import torch

    from moescope.kernels import route
    from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

    spec = RouterSpec(RouterPolicy(num_experts_per_tok=2), RouterWiring(num_experts=4))
    own = route(torch.randn(3, 4), spec, backend="torch", keep_logits=True)
    ids = np.array([[1, 0, 2], [3, -1, -1], [2, 1, -1]])
    weights = np.array([[0.5, 0.25, 0.25], [1.0, 9.0, 9.0], [0.5, 0.5, 9.0]])
    forced = forced_routing(own, ids, weights)
    assert forced.expert_ids.tolist() == ids.tolist()
    assert forced.score_sum.tolist() == [1.0, 1.0, 1.0]
    assert forced.weights[1].tolist() == [1.0, 0.0, 0.0]
    assert torch.equal(forced.margin, own.margin) and torch.equal(forced.logits, own.logits)


def test_an_interpreter_that_cannot_be_forced_is_refused() -> None:
    side = Side(fake(), None)
    with pytest.raises(MoescopeError, match="torch interpreter") as caught:
        climb(side, side, [1, 2, 3])
    assert caught.value.code == ExitCode.RESOURCES


def test_shares_of_a_ladder_that_says_nothing() -> None:
    def rung(kl: float | None) -> Rung:
        return Rung("x", kl, kl, None, None, None, None, None)

    assert Ladder("a", "b", 1, tuple(rung(kl) for kl in (0.4, 0.1, 0.1, 0.02))).shares == {
        "experts": pytest.approx(0.75),
        "order": 0.0,
        "weights": pytest.approx(0.2),
        "rest": pytest.approx(0.05),
    }
    assert Ladder("a", "b", 1, tuple(rung(kl) for kl in (None, 0.1, 0.1, 0.0))).shares is None


def test_on_the_command_line(capsys: Any, place: Path, base: Any) -> None:
    arguments = ["compare", str(place / "base"), "--variant", "norm_topk_prob=true", "--ladder"]
    arguments += ["--prompt", TEXT, "--max-new-tokens", "4", "--dtype", "float32"]
    capsys.readouterr()
    assert cli.run([*arguments, "--json"]) == 0
    (ladder,) = json.loads(capsys.readouterr().out)["ladders"]
    assert [rung["name"] for rung in ladder["rungs"]] == list(RUNGS)
    assert math.isclose(ladder["rungs"][-1]["kl_max"], 0, abs_tol=1e-9)
    assert cli.run(arguments) == 0
    assert "of the mean KL: the choice of experts" in capsys.readouterr().out


# --- decoders that are rewired --------------------------------------------------------------------


def test_a_rewired_gate_is_routing_and_nothing_else(base: Any) -> None:
    ladder = climb(Side(*base), Side(*base, "gate_rows_shifted"), base[1].encode(TEXT))
    found = rungs(ladder)
    assert found["own routing"].kl_mean > 0.01 and found["own routing"].same_experts < 0.5
    assert found["ids and weights"].kl_max == pytest.approx(0, abs=1e-9)
    shares = ladder.shares
    assert shares is not None and shares["rest"] == pytest.approx(0, abs=1e-9)


def test_permuted_experts_are_left_when_the_routing_is_the_same(base: Any) -> None:
    ladder = climb(Side(*base), Side(*base, "experts_shifted"), base[1].encode(TEXT))
    assert ladder.shares is not None and ladder.shares["rest"] > 0.5


def test_both_sides_may_be_rewired(base: Any) -> None:
    side = Side(*base, "experts_shifted")
    ladder = climb(side, side, base[1].encode(TEXT))
    assert ladder.rungs[0].kl_max == pytest.approx(0, abs=1e-9) and ladder.shares is None


@pytest.mark.parametrize("variant", ["gate_rows_reversed", "experts_shifted@1-2"])
def test_a_rewired_model_is_fed_as_its_lane_runs(base: Any, variant: str) -> None:
    model, tokenizer = base
    ids = tokenizer.encode(TEXT)
    session = Session(model, tokenizer, variants=(variant,))
    request = Generate(prompt_ids=tuple(ids), sampling=Sampling(max_new_tokens=0))
    frames = list(session.generate(request))
    fed = forced(model, ids, variant=variant)
    assert (np.stack([frame.expert_ids for frame in frames]) == fed.expert_ids).all()
    weights = np.stack([frame.weights for frame in frames])
    np.testing.assert_allclose(weights, fed.weights, atol=1e-6)
    trained = forced(model, ids)
    assert (fed.expert_ids != trained.expert_ids).any()


def test_a_golden_of_a_rewired_model(base: Any) -> None:
    model, tokenizer = base
    golden = MemoryTrace(trace_meta(model, tokenizer))
    record_golden(model, tokenizer, golden, variant="gate_rows_shifted", new_tokens=4)
    assert check(model, golden, variant="gate_rows_shifted").passed
    result = check(model, golden)
    assert not result.passed and {f.layer for f in result.findings} >= {0}
