"""Attention, norms and drawing in Triton against the torch operators and the host's sampling."""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if os.environ.get("TRITON_INTERPRET"):
    import tests.kernels.interpreted  # noqa: F401

from moescope.engine import sampling as host
from moescope.engine import torch_operators as ops
from moescope.engine.decoder import Branch, DecoderSpec, Layer
from moescope.engine.graph_attention import FusedAttention, attention_shape, why_not_attention
from moescope.engine.graph_parts import After, Before
from moescope.engine.operators import Attention, Norm, Rope, RopeScaling
from moescope.engine.parameters import slots
from moescope.engine.protocol import Sampling
from moescope.kernels.triton_ops import attention, norms, sampling

CAPACITY = 200
ROPE, WIDE_ROPE = Rope(1e4, 24), Rope(1e4, 24, applies="float32")
PART, PAIRS = Rope(1e4, 8), Rope(1e4, 24, style="interleaved")
LONG = RopeScaling("longrope", 2.0, 100, 1.1, short_factor=(1.0,) * 12, long_factor=(3.0,) * 12)
PLAIN = Attention(32, 4, 2, 24, 0.2)
FLAT = {"qk_norm_over": "flat", "qk_norm": Norm(96, 1e-5), "kv_norm": Norm(48, 1e-3)}
FLAT_WIDE = {
    "qk_norm_over": "flat",
    "qk_norm": Norm(96, applies="float32"),
    "kv_norm": Norm(48, applies="float32"),
}
GEMMA = {"v_norm": Norm(24, 1e-3, weight=False), "keys_are_values": True, "qk_norm": Norm(24)}
# name -> attention, dtype, where the lanes' tokens stand
CASES: dict[str, tuple[Attention, torch.dtype, tuple[int, ...]]] = {
    "first token": (replace(PLAIN, rope=ROPE), torch.float32, (0,)),
    "ends of tiles and splits": (PLAIN, torch.float32, (64, 65, 199)),
    "flat norm": (replace(PLAIN, rope=ROPE, **FLAT), torch.float32, (0, 130)),  # type: ignore[arg-type]
    "flat norm, float32 weights": (
        replace(PLAIN, rope=ROPE, **FLAT_WIDE),  # type: ignore[arg-type]
        torch.bfloat16,
        (90,),
    ),
    "norm per head": (
        replace(PLAIN, rope=WIDE_ROPE, qk_norm=Norm(24, 1e-5), heads=2),
        torch.bfloat16,
        (3, 150),
    ),
    "half": (replace(PLAIN, rope=ROPE, heads=8, qk_norm=Norm(24)), torch.float16, (70,)),
    "window": (replace(PLAIN, window=70), torch.float32, (69, 70, 199)),
    "window of one": (replace(PLAIN, window=1), torch.float32, (0, 9)),
    "clip": (replace(PLAIN, rope=ROPE, clip_qkv=0.7), torch.bfloat16, (66,)),
    "chunk": (replace(PLAIN, chunk=70), torch.float32, (69, 70)),
    "part of a head turned": (replace(PLAIN, rope=PART), torch.bfloat16, (50,)),
    "pairs turned": (replace(PLAIN, rope=PAIRS, qk_norm=Norm(24)), torch.float32, (50,)),
    "other frequencies from 100 on": (
        replace(PLAIN, rope=replace(ROPE, scaling=LONG)),
        torch.float32,
        (99, 100),
    ),
    "normed once turned": (
        replace(PLAIN, rope=ROPE, qk_norm=Norm(24, 1e-2, "l2", False), qk_norm_after_rope=True),
        torch.float32,
        (7,),
    ),
    "norm of weights less 1": (
        replace(PLAIN, rope=ROPE, qk_norm=Norm(24, 1e-5, "rms_zero_centred", applies="float32")),
        torch.bfloat16,
        (7,),
    ),
    "narrower values": (replace(PLAIN, v_head_dim=16, value_scale=0.7), torch.float32, (150,)),
    "keys are values": (replace(PLAIN, rope=ROPE, **GEMMA), torch.float32, (70,)),  # type: ignore[arg-type]
    "sinks": (replace(PLAIN, sinks=True), torch.float32, (150,)),
    "softcap": (replace(PLAIN, softcap=0.8), torch.float32, (90,)),
    "warm queries": (
        replace(PLAIN, temperature_scale=0.4, temperature_floor=16),
        torch.float32,
        (40,),
    ),
    "gate behind each query": (replace(PLAIN, gate="in_q_proj"), torch.float32, (5, 150)),
    "gate of every column": (replace(PLAIN, gate="softplus"), torch.bfloat16, (5,)),
    "gate of every head": (
        replace(PLAIN, gate="sigmoid_per_head", gate_bias=True),
        torch.float32,
        (5, 199),
    ),
}
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of interpreted -inf and NaN
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def _attention(
    spec: Attention, dtype: torch.dtype
) -> tuple[ops.TorchAttention, dict[str, torch.Tensor], torch.Generator]:
    """The operator on random weights, and a cache of noise."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    found = slots(DecoderSpec(1, 32, 1, (Layer((Branch("a", spec),)),), None))
    weights = {
        slot.name.removeprefix("layers.0."): random(*slot.shape)
        for slot in found
        if slot.name.startswith("layers.0.")
    }
    weights["a.o_proj.weight"] /= weights["a.o_proj.weight"].shape[1] ** 0.5
    twin = ops.TorchAttention(spec, weights, "a", dtype)
    twin.open(7, CAPACITY, "cpu")
    for cache in (twin.keys, twin.values):
        cache.copy_(random(*cache.shape))
    return twin, weights, generator


def _rotations(
    spec: Attention, dtype: torch.dtype, starts: tuple[int, ...]
) -> tuple[dict[int, Any], dict[int, Any]]:
    """The whole table, and its rows for the lanes' tokens, by the id of the rope."""
    if spec.rope is None:
        return {}, {}
    kind = torch.float32 if spec.rope.applies == "float32" else dtype
    cos, sin = (part.to(kind) for part in ops.rotary_table(spec.rope, CAPACITY, "cpu"))
    scaling = spec.rope.scaling
    late = scaling.original_context if scaling and ops.switches(spec.rope) else CAPACITY
    at = torch.tensor([start + CAPACITY * (start >= late) for start in starts])
    key = id(spec.rope)
    return {key: (cos, sin)}, {key: (cos[at].unsqueeze(1), sin[at].unsqueeze(1))}


def _agrees(
    spec: Attention, dtype: torch.dtype, starts: tuple[int, ...], launches: int = 1
) -> None:
    """Outputs and new rows of the cache; what lies behind a lane's end is noise, and stays."""
    twin, weights, generator = _attention(spec, dtype)
    lanes = [6, 1, 4, 0, 3][: len(starts)]
    h = torch.randn(len(starts), spec.hidden, generator=generator).to(dtype)
    table, turned = _rotations(spec, dtype, starts)
    nothing: list[Any] = []
    call = ops.Call(
        *(tuple(lanes), starts, 1, torch.zeros(0), torch.tensor(starts)),
        *(nothing, (), False, nothing, nothing, turned),
    )
    mine = _attention(spec, dtype)[0]
    kept = mine.keys.clone()
    expected = twin(h, call)

    run = FusedAttention(spec, weights, "a", dtype, mine)
    processors = 4 * len(starts) * spec.kv_heads
    scratch = attention.Scratch.of([run.shape], len(starts), "cpu", processors)
    assert scratch.splits == 4
    inputs = {"lanes": lanes, "positions": starts}
    device = {name: torch.tensor(given, dtype=torch.int32) for name, given in inputs.items()}
    buffers = Namespace(inputs=Namespace(device=device), shared=Namespace(tables=table))
    step: Any = Namespace(buffers=buffers, scratch=Namespace(attention=scratch), pdl=False)
    for _ in range(launches):  # again, on the counters that the first launch left
        found = run(h, None, Before(), After(Before(), 1.0), step)
        near = TOLERANCE[dtype]
        assert torch.allclose(found.float(), expected.float(), rtol=near, atol=near)
    for cache, theirs in ((mine.keys, twin.keys), (mine.values, twin.values)):
        assert torch.allclose(cache.float(), theirs.float(), rtol=near, atol=near)
    touched = (mine.keys != kept).any(-1).any(1)  # [lanes, capacity]
    assert touched.nonzero().tolist() == sorted(
        [lane, start] for lane, start in zip(lanes, starts, strict=True)
    )


@pytest.mark.parametrize("name", CASES)
def test_attention_of_one_token(name: str) -> None:
    _agrees(*CASES[name], launches=2 if name.startswith(("ends", "gate")) else 1)


@st.composite
def _attentions(draw: st.DrawFn) -> Attention:
    """Any combination that a spec can say and the kernel does."""
    kv_heads, group, D = draw(st.sampled_from([1, 2])), draw(st.sampled_from([1, 3])), 8
    ropes = [None, Rope(1e3, D), Rope(1e3, 4, style="interleaved"), Rope(1e3, 6, applies="float32")]
    norms = [None, Norm(D, 1e-3), Norm(D, 1e-3, "l2", False), Norm(D, applies="float32")]
    same = draw(st.booleans())
    return Attention(
        *(32, kv_heads * group, kv_heads, D, 0.4, draw(st.sampled_from(ropes))),
        window=(window := draw(st.sampled_from([0, 3]))),
        chunk=0 if window else draw(st.sampled_from([0, 50])),
        v_head_dim=0 if same else draw(st.sampled_from([0, 4, 12])),
        qkv_bias=draw(st.booleans()),
        out_bias=draw(st.booleans()),
        qk_norm=draw(st.sampled_from(norms)),
        qk_norm_after_rope=draw(st.booleans()),
        clip_qkv=draw(st.sampled_from([None, 0.9])),
        sinks=draw(st.booleans()),
        softcap=draw(st.sampled_from([0.0, 1.5])),
        keys_are_values=same,
        value_scale=draw(st.sampled_from([1.0, 0.3])),
        temperature_scale=(warm := draw(st.sampled_from([0.0, 0.4]))),
        temperature_floor=9 if warm else 0,
        temperature_kind=draw(st.sampled_from(["log", "power"])),
        gate=draw(st.sampled_from(["none", "sigmoid", "softplus_per_head"])),
    )


@settings(max_examples=6, deadline=None, derandomize=True)
@given(_attentions(), st.sampled_from([(0,), (70,), (3, 190)]))
def test_attention_of_any_kind(spec: Attention, starts: tuple[int, ...]) -> None:
    _agrees(spec, torch.float32, starts)


def test_what_the_kernel_does_not_do_is_said() -> None:
    assert why_not_attention(replace(PLAIN, qk_norm=Norm(24, kind="layer"))).startswith("a norm of")
    assert why_not_attention(replace(PLAIN, v_norm=Norm(24))).startswith("a norm of values")
    late = replace(PLAIN, **FLAT, qk_norm_after_rope=True)  # type: ignore[arg-type]
    assert why_not_attention(late).startswith("a flat norm")
    assert not any(why_not_attention(spec) for spec, _, _ in CASES.values())


@pytest.mark.parametrize("place", ["query", "cached key", "behind the end"])
def test_attention_passes_on_what_is_not_finite(place: str) -> None:
    spec = replace(PLAIN, heads=2)
    twin, _, generator = _attention(spec, torch.float32)
    qkv = torch.randn(1, 6 * 24, generator=generator)
    if place == "query":
        qkv[0, 5] = torch.nan
    else:
        twin.cache[0, 2, 0, 20 if place == "cached key" else 90] = torch.nan
    shape = attention_shape(spec)
    out = attention.attend(
        qkv,
        *twin.cache,
        torch.tensor([2], dtype=torch.int32),
        torch.tensor([80], dtype=torch.int32),
        shape,
        attention.Scratch.of([shape], 1, "cpu", 4),
        out=torch.zeros(1, 48),
    )
    heads = out.view(2, 24).isnan()
    assert heads[0].all() == (place != "behind the end")
    assert not heads[1].any()


@pytest.mark.parametrize("applies", ["model", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_with_the_sum_it_goes_into(applies: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, held = torch.randn(2, 3, 40, generator=generator).mul(3).to(dtype)
    weight = torch.randn(40, generator=generator).to(dtype)
    normed = ops.make_norm(Norm(40, 1e-3, applies=applies), weight)(x)
    out = norms.rms_norm(x, weight, 1e-3, applies, out=torch.empty_like(x))
    near = TOLERANCE[dtype]
    assert torch.allclose(out.float(), normed.float(), rtol=near, atol=near)
    expected = held + normed * 0.3
    into = norms.rms_norm(x, weight, 1e-3, applies, multiplier=0.3, held=held, out=held)
    assert into is held and torch.allclose(held.float(), expected.float(), rtol=near, atol=near)


def test_greedy_tokens_and_the_next_input() -> None:
    """The lower of equal ids, over the border of two programs; a row of NaN still names a token."""
    V = sampling.BLOCK + 900
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(2))
    logits[1, [77, 78, V - 1]] = 9.0
    logits[2, sampling.BLOCK - 1 : sampling.BLOCK + 1] = 9.0
    logits[3] = torch.nan
    logits[4, 0], logits[4, V - 1] = torch.nan, 9.0
    scratch = sampling.Scratch.of(5, V, "cpu")
    drawn, token_ids = torch.zeros(2, 5, dtype=torch.int64)
    positions = torch.tensor([0, 5, 9, 2, 7], dtype=torch.int32)
    for step in (1, 2):
        sampling.greedy(logits, scratch, drawn=drawn, token_ids=token_ids, positions=positions)
        assert drawn[0] == logits[0].argmax()
        assert drawn[1:3].tolist() == [77, sampling.BLOCK - 1] and drawn[4] == V - 1
        assert 0 <= drawn[3] < V and torch.equal(drawn, token_ids)
        assert positions.tolist() == [step, 5 + step, 9 + step, 2 + step, 7 + step]


@pytest.mark.parametrize("rounded", [False, True])
def test_drawn_tokens_are_the_hosts(rounded: bool) -> None:
    """Over filters, temperatures and ties; all lanes of a launch have settings of their own."""
    random = np.random.default_rng(5)
    for seed in range(24):
        V = int(random.integers(2, 3000))
        logits = random.normal(0, 3, (4, V)).astype(np.float32)
        logits[3, : V // 2] = -np.inf
        logits = logits.round(1) if rounded else logits
        asked = [
            Sampling(
                temperature=float(random.choice([1e-3, 0.3, 1.0, 2.5])),
                top_k=int(random.choice([0, 1, 5, 50, 5000])),
                top_p=float(random.choice([1.0, 0.9, 0.5, 0.0])),
                min_p=float(random.choice([0.0, 0.05, 0.3, 1.0])),
                seed=seed,
            )
            for _ in range(4)
        ]
        for ranked in (True, False):
            if not ranked:
                asked = [replace(s, top_k=0, top_p=1.0) for s in asked]
            expected = [
                host.choose(host.Expectation(row, 0.0), s, 11)
                for row, s in zip(logits, asked, strict=True)
            ]
            columns = [
                torch.tensor([[getattr(s, name)] for s in asked], dtype=torch.float64)
                for name in ("temperature", "top_k", "top_p", "min_p")
            ]
            uniform = torch.full((4, 1), host.uniform(seed, 11), dtype=torch.float64)
            drawn = sampling.draw(torch.from_numpy(logits), *columns, uniform, ranked=ranked)
            assert drawn.tolist() == expected


def test_drawing_from_nothing_finite_names_a_token() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    for value in (torch.nan, -torch.inf, torch.inf):
        logits = torch.full((1, 50), value)
        for ranked in (True, False):
            drawn = sampling.draw(logits, one, one, one, one, one * 0.5, ranked=ranked)
            assert 0 <= int(drawn) < 50
