"""The fused step on decoders of every family, against the torch operators: operators without a
fused form stand among kernels, and state is rewritten in place.

A normal run looks at a sample in which every branch is taken once; with `-m gpu` all families are
decoded, on CUDA or, with `--device cpu`, under Triton's interpreter.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest

if find_spec("triton") is None:
    pytest.skip("no Triton here", allow_module_level=True)

from moescope.engine import graph_step
from moescope.engine.graph_step import GraphStep
from moescope.engine.interpreter import Draw
from moescope.engine.lane import policies_of
from moescope.engine.protocol import Sampling
from moescope.engine.torch_decoder import TorchDecoder
from tests.engine.graph_models import (
    BY_ID,
    COVERED,
    IDS,
    differences,
    large_tiles,
    marks,
    pair_of,
    variants_of,
)
from tests.gpu.models import same as nearly

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of interpreted -inf and NaN
# One case at least for every branch that `test_the_sample_takes_every_branch` knows of.
SAMPLE = (
    "axk2-groups",
    "bailing_hybrid-released",
    "beam-released",
    "cohere2_moe-released",
    "gemma4_text-released",
    "glm_moe_dsa-shared-choice",
    "gpt_oss-released",
    "jamba-sparse-first",
    "jetmoe-released",
    "lfm2_moe-unbiased",
    "longcat_flash-released",
    "mistral4-released",
    "nemotron_h-latent",
    "phimoe-released",
    "qwen3_next-released",
    "zaya-sliding",
)
# Branches of kernels, which are tested with those in `tests.kernels`.
_BLOCK = "activation alpha bias glu limit limit_site up_shift"
_ATTENTION = (
    "chunk clip_qkv float32_scores gate gate_bias head_dim keys_are_values kv_norm out_bias "
    "qk_norm_after_rope qk_norm_over qkv_bias scale sinks softcap temperature_floor "
    "temperature_kind temperature_scale v_head_dim v_norm value_scale window"
)
KERNELS = {
    f"{kind}.{name}"
    for kind, names in (
        ("Attention", _ATTENTION),
        ("MLP", _BLOCK),
        ("Experts", _BLOCK),
        ("Rope", "applies sections style"),
    )
    for name in names.split()
}
ELSEWHERE = {
    ("RouterWiring.router_input", "residual"),  # in `test_graph_step`
    ("MoE.sums_in_float32", True),  # rounds as the other sum does
    ("LinearAttention.gate_rank", True),  # the torch operator's own code
    ("DecoderSpec.norm_head", True),  # the torch decoder's own head
    ("RouterWiring.apply_router_weight_on_input", True),  # with the experts' kernels
    ("Norm.kind", "l2"),  # with that of attention
}


@pytest.fixture(autouse=True)
def _large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    large_tiles(monkeypatch)


def column(tokens: Any) -> np.ndarray:
    return np.asarray(tokens, np.int64).reshape(-1, 1)


def filled(
    case: str, device: str = "cpu", dtype: str = "float32", tokens: int = 12
) -> tuple[TorchDecoder, TorchDecoder]:
    """Lanes 0 and 2 hold prompts; lane 2 routes under a variant, and in some another shadows
    both."""
    both = pair_of(BY_ID[case], dtype=dtype, device=device, lanes=3)
    for each in both:
        names = variants_of(each)
        each.run([0], IDS[:1, :tokens])
        each.run([2], IDS[1:2, :2])
        each.set_policies(2, policies_of(names[0], each.routers, each.dtype))
        if case not in SAMPLE or SAMPLE.index(case) % 4 == 0:  # interpreted, they take their time
            each.set_shadows([policies_of(names[-1], each.routers, each.dtype)])
    return both


@pytest.mark.parametrize("case", SAMPLE)
def test_two_lanes_of_a_family(case: str) -> None:
    """A token each, and where state is written over another, which reads what that left behind."""
    fused, twin = filled(case)
    tokens = column([5, 9])
    assert isinstance(fused.step, GraphStep)
    for record in ("logits", "weights") if fused.step.layers.recurrent() else ("logits",):
        expected = twin.run([2, 0], tokens, record=record)
        draws = [Draw(Sampling(), fused.length(lane) + 1, 0.0) for lane in (2, 0)]
        found = fused.run([2, 0], tokens, record=record, draws=draws)
        assert differences(found, expected) == []
        tokens = column(expected.logits[:, 0].argmax(-1))
        assert found.drawn is not None and (found.drawn == tokens[:, 0]).all()


def test_the_sample_takes_every_branch() -> None:
    """Of those that specs of all families take: kinds of operators, and how each is set."""

    def taken(cases: Any) -> set[Any]:
        return {mark for case in cases for mark in marks(BY_ID[case])}

    missing = taken(COVERED) - taken(SAMPLE) - ELSEWHERE
    assert not {mark for mark in missing if mark[0] not in KERNELS}
    assert set(SAMPLE) <= set(COVERED)


# --- state that is rewritten, and how far operators look ------------------------------------------


def test_nothing_runs_ahead_of_state_that_is_written_over() -> None:
    fused, _ = filled("lfm2_moe-unbiased")
    step = fused.step
    assert isinstance(step, GraphStep) and not step.run_ahead
    fused.run([0], column([3]), draws=[Draw(Sampling(), 13, 0.0)])
    assert step.launches == 1


def test_a_graph_looks_as_far_as_its_lanes_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent rows beyond the reach are not looked at; a step that ran ahead stays within it."""
    monkeypatch.setattr(graph_step, "REACH", 8)
    fused, _ = filled("mistral4-released", tokens=14)
    step = fused.step
    assert isinstance(step, GraphStep)
    step.layers.layers = step.layers.layers[:1]
    kinds, launches = [], []
    for token in (3, 4, 5):
        draws = [Draw(Sampling(), fused.length(0) + 1, 0.0)]
        drawn = fused.run([0], column([token]), draws=draws).drawn
        assert drawn is not None
        kinds.append(step.layers.reaches() and step._reach(fused.length(0) - 1))
        launches.append(step.launches)
    assert kinds == [16, 16, 32] and launches == [2, 3, 5]


# --- all families ---------------------------------------------------------------------------------

FIRST = [
    next(id for id in COVERED if BY_ID[id].family == name)
    for name in dict.fromkeys(BY_ID[id].family for id in COVERED)
]
EVERY = [(case, "float32") for case in dict.fromkeys((*FIRST, *SAMPLE))]
EVERY += [(case, "bfloat16") for case in SAMPLE]


@pytest.mark.gpu
@pytest.mark.parametrize(("case", "dtype"), EVERY)
def test_every_family(case: str, dtype: str, device: str) -> None:
    """In bfloat16, of the tokens that both routed to the same experts: near ties part."""
    fused, twin = filled(case, device, dtype)
    tokens, apart = [5, 9], []
    for _ in range(2 if device == "cpu" else 12):
        a, b = (each.run([2, 0], column(tokens), record="logits") for each in (fused, twin))
        if dtype == "float32":
            assert nearly(a, b) == []
        for n in (0, 1):
            if (np.sort(a.expert_ids[n], -1) == np.sort(b.expert_ids[n], -1)).all():
                off = np.linalg.norm(a.logits[n] - b.logits[n])
                apart.append(off / np.linalg.norm(b.logits[n]))
        tokens = b.logits[:, 0].argmax(-1).tolist()
    assert np.median(apart) < (1e-4 if dtype == "float32" else 0.05)


@pytest.mark.gpu
@pytest.mark.parametrize("case", ["jamba-sparse-first", "lfm2_moe-unbiased", "mistral4-released"])
def test_a_capture_leaves_state_as_it_was(case: str, device: str) -> None:
    """What is captured runs once before, which writes over state; kernels launched one by one show
    what it must have been. Bit for bit, over the edges of what graphs reach."""
    captured, eager = (filled(case, device)[0] for _ in range(2))
    eager.step = GraphStep(eager.shared, graph=False)
    for each in (captured, eager):
        each.open(3, 600)
    tokens = [5, 9]
    for _ in range(2 if device == "cpu" else 280):
        a, b = (each.run([2, 0], column(tokens), record="logits") for each in (captured, eager))
        assert np.array_equal(a.logits, b.logits) and np.array_equal(a.expert_ids, b.expert_ids)
        tokens = a.logits[:, 0].argmax(-1).tolist()
