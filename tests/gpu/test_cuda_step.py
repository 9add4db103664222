"""The fused decode step on the device against the torch operators on the same weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moescope.engine.protocol import Generate, Sampling
from moescope.engine.recording import trace_meta
from moescope.engine.session import Session
from moescope.engine.torch_decoder import TorchDecoder
from moescope.trace.frames import Frame
from moescope.trace.store import TraceReader
from moescope.trace.writer import TraceWriter
from tests.gpu.models import Pair, feed, real_pair, same, tiny_pair, vary
from tests.tiny import FAMILIES, VOCAB

pytestmark = pytest.mark.gpu

IDS = np.random.default_rng(3).integers(0, 256, (8, 12))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_there_is_a_fused_step(folder: Path, family: str, dtype: str) -> None:
    decoder, twin = tiny_pair(folder, family, dtype)
    assert decoder.step is not None, decoder.why_no_step
    assert twin.step is None
    assert "torch" not in decoder.kernels["router"]


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_of_every_family_are_those_of_the_torch_operators(folder: Path, family: str) -> None:
    pair = tiny_pair(folder, family)
    for each in pair:
        each.run([0], IDS[:1])
    token = 7
    for _ in range(48):
        a, b = (feed(each, [0], token, record="logits") for each in pair)
        assert same(a, b) == []
        token = int(b.logits.argmax())
        assert int(a.logits.argmax()) == token


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near(folder: Path, family: str, dtype: str) -> None:
    """Rounded where the operators round: a product may still fall on the other side of a tie."""
    pair = tiny_pair(folder, family, dtype)
    for each in pair:
        each.run([0], IDS[:1])
    apart, routed = [], []
    for token in np.random.default_rng(0).integers(0, VOCAB, 48):
        a, b = (feed(each, [0], token) for each in pair)
        apart.append(np.linalg.norm(a.logits - b.logits) / np.linalg.norm(b.logits))
        routed.append((np.sort(a.expert_ids) == np.sort(b.expert_ids)).all(-1).mean())
    assert np.median(apart) < 0.02
    assert np.mean(routed) > 0.95


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe"])
def test_real_shapes(family: str) -> None:
    """Two layers of the released shapes, float32, lanes of different lengths."""
    pair = real_pair(family, "float32", lanes=3)
    vocabulary = pair[0].vocab_size
    random = np.random.default_rng(1)
    for lane, length in enumerate((5, 40, 130)):
        ids = random.integers(0, vocabulary, (1, length))
        for each in pair:
            each.run([lane], ids)
    for lanes in ([0], [2], [0, 1, 2], [2, 0]):
        for _ in range(4):
            tokens = random.integers(0, vocabulary, len(lanes))
            a, b = (feed(each, lanes, tokens, record="logits") for each in pair)
            assert same(a, b, tolerance=1e-3, clear=1e-3) == []


def test_real_shapes_in_bfloat16_read_what_they_should() -> None:
    a, b = real_pair("olmoe", "bfloat16")
    apart = []
    for token in np.random.default_rng(2).integers(0, a.vocab_size, 24):
        x, y = (feed(each, [0], token).logits for each in (a, b))
        apart.append(np.linalg.norm(x - y) / np.linalg.norm(y))
    assert np.median(apart) < 0.03


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe"])
def test_lanes_differ_in_length_and_variant(folder: Path, family: str) -> None:
    pair = tiny_pair(folder, family, lanes=8)
    variants = (
        "trained",
        "softmax_over_selected",
        "num_experts_per_tok=1",
        "always_renormalised",
        "double_softmax@1-2",
        "top_k+2",
        "wrong_scoring_func",
        "router_quantised",
    )
    for each in pair:
        for lane, variant in enumerate(variants):
            each.run([lane], IDS[lane : lane + 1, : lane + 2])
            vary(each, lane, variant)
    for lanes in ([*range(8)], [7, 3, 0], [5], [1, 2, 3, 4, 5]):
        for _ in range(6):
            tokens = IDS[lanes, 5]
            a, b = (feed(each, lanes, tokens, record="logits") for each in pair)
            assert same(a, b) == []


def test_a_toggle_counts_from_the_next_token(folder: Path) -> None:
    pair = tiny_pair(folder, "olmoe")
    changes = ("trained", "num_experts_per_tok=1", "double_softmax", "softmax_over_selected@0-1")
    seen = set()
    for number in range(60):
        if number % 5 == 0:
            for each in pair:
                vary(each, 0, changes[number // 5 % len(changes)])
        a, b = (feed(each, [0], number % VOCAB) for each in pair)
        assert same(a, b) == []
        seen.add(tuple((a.expert_ids[0, 0] >= 0).sum(-1)))
    assert len(seen) > 1, "the number of experts never changed"


def test_shadow_variants(folder: Path) -> None:
    pair = tiny_pair(folder, "olmoe", lanes=2)
    for each in pair:
        shadows = [
            [vary_policy(each, router, variant) for router in range(len(each.routers))]
            for variant in ("always_renormalised", "num_experts_per_tok=2", "wrong_scoring_func")
        ]
        each.set_shadows(shadows)
    for token in range(20):
        a, b = (feed(each, [0, 1], [token, token + 1]) for each in pair)
        assert same(a, b) == []
        assert a.shadow_ids is not None and b.shadow_ids is not None
        assert a.shadow_ids.shape[:4] == b.shadow_ids.shape[:4] == (2, 1, 3, len(pair[0].routers))
        K = b.shadow_ids.shape[-1]
        clear = (b.margin > 1e-4)[:, :, None].repeat(3, 2)
        x, y = np.sort(a.shadow_ids[..., :K])[clear], np.sort(b.shadow_ids)[clear]
        assert (x == y).all()
        assert np.allclose(a.shadow_sums, b.shadow_sums, atol=1e-4)  # type: ignore[arg-type]
    for each in pair:
        each.set_shadows([])
    assert feed(pair[0], [0, 1], [1, 2]).shadow_ids is None


def vary_policy(decoder: TorchDecoder, router: int, expression: str) -> Any:
    from moescope.engine.lane import policies_of

    return policies_of(expression, decoder.routers, decoder.dtype)[router]


def test_room_and_lanes_can_be_added(folder: Path) -> None:
    """Caches move when they grow: addresses are taken again."""
    pair = tiny_pair(folder, "olmoe", capacity=32)
    for number in range(150):
        for each in pair:
            if number in (20, 60, 120):
                each.open(1 + number // 60, 64 + number)
        a, b = (feed(each, [0], number % VOCAB) for each in pair)
        assert same(a, b) == []
    a, b = (feed(each, [2, 0], [3, 4]) for each in pair)
    assert same(a, b) == []


def test_truncating_and_copying(folder: Path) -> None:
    decoder, twin = tiny_pair(folder, "qwen3_moe", lanes=2)
    for each in (decoder, twin):
        each.run([0], IDS[:1])
    first = [feed(decoder, [0], t).logits for t in (1, 2, 3)]
    decoder.truncate(0, 12)
    assert all(
        np.array_equal(feed(decoder, [0], t).logits, x)
        for t, x in zip((1, 2, 3), first, strict=True)
    )
    decoder.copy(0, 1, 13)
    twin.run([1], np.concatenate([IDS[:1], [[1]]], 1))
    a, b = feed(decoder, [1], 9), feed(twin, [1], 9)
    assert same(a, b) == []


def test_the_same_step_gives_the_same_bits(folder: Path) -> None:
    """Sums have one order; lanes that do the same get the same, wherever they stand."""
    decoder, _ = tiny_pair(folder, "olmoe", "bfloat16", lanes=4)
    for lane in range(4):
        decoder.run([lane], IDS[:1])
    for token in range(24):
        out = feed(decoder, [0, 1, 2, 3], [token] * 4, record="logits")
        for name in ("logits", "expert_ids", "weights", "router_logits"):
            value = getattr(out, name)
            assert all(np.array_equal(value[0], value[lane], equal_nan=True) for lane in (1, 2, 3))


def test_nothing_leaks(folder: Path) -> None:
    decoder, _ = tiny_pair(folder, "olmoe", "bfloat16", lanes=2, capacity=512)
    for number in range(16):
        vary(decoder, 0, ("trained", "num_experts_per_tok=1")[number % 2])
        feed(decoder, [0], number, record="logits")
        feed(decoder, [0, 1], [number, 1], record="logits")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for number in range(200):
        vary(decoder, 0, ("trained", "num_experts_per_tok=1")[number % 2])
        feed(decoder, [0, 1] if number % 2 else [0], [number % 200] * (1 + number % 2))
    torch.cuda.synchronize()
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before


def test_logits_that_are_not_finite_are_told(folder: Path) -> None:
    pair = tiny_pair(folder, "olmoe")
    weight = pair[0].shared.weights["layers.2.mlp.gate.weight"]
    kept = weight[3].clone()
    for each in pair:
        feed(each, [0], 1)
    weight[3] = float("nan")
    a, b = (feed(each, [0], 2) for each in pair)
    weight[3] = kept
    assert a.invalid_router == b.invalid_router == 2
    assert np.isnan(a.score_sum[0, 0, 2]) and (a.expert_ids[0, 0, 2] == -1).all()
    for each in pair:
        each.truncate(0, 1)
    a, b = (feed(each, [0], 2) for each in pair)
    assert a.invalid_router is None and same(a, b) == []


# --- a session on top -----------------------------------------------------------------------------


class _Model:
    def __init__(self, interpreter: TorchDecoder) -> None:
        self.interpreter, self.facts = interpreter, {"context": 256, "name": "tiny"}


def recorded(decoder: TorchDecoder, path: Path, request: Generate, *variants: str) -> list[Frame]:
    """The frames of a run as its trace has them."""
    model = _Model(decoder)
    writer = TraceWriter(path, trace_meta(model, record="logits"), force=True)
    session = Session(model, writer=writer, record="logits", max_context=256, variants=variants)
    for _ in session.generate(request):
        pass
    session.close()
    writer.close()
    with TraceReader.open(path) as reader:
        return [reader.frame(number) for number in range(reader.count)]


@pytest.mark.parametrize("variants", [("trained",), ("trained", "always_renormalised", "top_k+1")])
def test_a_trace_of_the_fused_step_is_that_of_the_operators(
    folder: Path, tmp_path: Path, variants: tuple[str, ...]
) -> None:
    pair = tiny_pair(folder, "olmoe")
    request = Generate(prompt_ids=(40, 41, 42, 43), sampling=Sampling(max_new_tokens=40))
    a, b = (
        recorded(each, tmp_path / f"{number}.moetrace", request, *variants)
        for number, each in enumerate(pair)
    )
    assert len(a) == len(b) >= 44 * len(variants)
    for one, other in zip(a, b, strict=True):
        assert (one.lane, one.position, one.token_id) == (
            other.lane,
            other.position,
            other.token_id,
        )
        clear = np.nan_to_num(other.margin, nan=np.inf) > 1e-4
        assert (np.sort(one.expert_ids)[clear] == np.sort(other.expert_ids)[clear]).all()
        for name in ("score_sum", "mass", "entropy"):
            assert np.allclose(getattr(one, name)[clear], getattr(other, name)[clear], atol=1e-4)
        assert np.allclose(one.logits, other.logits, atol=1e-3, equal_nan=True)
        assert one.logprob is None or abs(one.logprob - other.logprob) < 1e-3  # type: ignore[operator]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0, seed=1),
        Sampling(temperature=0.7, top_k=20, seed=2),
        Sampling(temperature=1.2, top_p=0.9, seed=3),
        Sampling(temperature=0.9, min_p=0.05, top_p=0.95, top_k=50, seed=4),
    ],
)
def test_drawn_tokens_are_those_the_host_would_draw(folder: Path, sampling: Sampling) -> None:
    tokens = []
    for each in tiny_pair(folder, "qwen3_moe"):
        session = Session(_Model(each), max_context=256)
        request = Generate(prompt_ids=(40, 41, 42), sampling=sampling)
        frames = []
        session.start(request)
        while session.running and len(frames) < 48:
            frames += session.step()
        tokens.append([frame.token_id for frame in frames][:48])
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0])) > 8, "hardly anything was drawn"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.8, top_p=0.9)])
def test_a_session_finds_its_steps_done(folder: Path, sampling: Sampling) -> None:
    """The device runs one step ahead, and what ran ahead is what the session asks for next."""
    decoder, _ = tiny_pair(folder, "olmoe")
    request = Generate(prompt_ids=(40, 41, 42), sampling=replace(sampling, max_new_tokens=40))
    frames = list(Session(_Model(decoder), max_context=256).generate(request))
    fed = len(frames) - 3
    assert fed >= 20, "it ended too early to say anything"
    assert fed <= decoder.step.launches <= fed + 2  # type: ignore[union-attr]


def test_a_pair_shares_its_weights(folder: Path) -> None:
    pair: Pair = tiny_pair(folder, "olmoe")
    names = pair[0].shared.weights
    assert all(names[name] is pair[1].shared.weights[name] for name in names)
