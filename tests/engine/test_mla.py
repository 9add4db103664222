"""Latent attention: a token alone and in a prompt, lanes apart, and what an indexer lets it see."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.engine.decoder import Branch, DecoderSpec, Layer, state_bytes
from moescope.engine.operators import MLA, Experts, Indexer, MoE, Norm, Rope
from moescope.engine.parameters import slots
from moescope.engine.torch_decoder import TorchDecoder
from moescope.engine.torch_operators.mla import TorchMLA
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

H, V, HEADS, LATENT, NOPE, TURNED, VALUES, QUERIES = 32, 64, 4, 16, 12, 8, 10, 24
ROPE = Rope(1e4, TURNED, "interleaved")
PLAIN = MLA(
    H, HEADS, LATENT, NOPE, TURNED, VALUES, 20**-0.5, ROPE, QUERIES, Norm(LATENT), Norm(QUERIES)
)
INDEXER = Indexer(16, 12, 6, replace(ROPE, style="half"), Norm(12, kind="layer", bias=True))
SPARSE = replace(PLAIN, indexer=INDEXER)
SHARES = replace(PLAIN, shares_choice=True)
IDS = np.random.default_rng(3).permutation(V)[:21]  # each once: no two keys tie


def decoder(*mixers: MLA) -> DecoderSpec:
    moe = MoE(H, RouterSpec(RouterPolicy(2), RouterWiring(4)), Experts(20))
    layers = tuple(
        Layer((Branch("attention", mixer, Norm(H)), Branch("mlp", moe, Norm(H))))
        for mixer in mixers
    )
    return DecoderSpec(V, H, 128, layers, Norm(H))


def weights(spec: DecoderSpec, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for slot in slots(spec):
        noise = torch.randn(slot.shape, generator=generator)
        norm = "norm" in slot.name and len(slot.shape) == 1
        found[slot.name] = 1 + 0.25 * noise if norm else noise / slot.shape[-1] ** 0.5
    return found


def model(spec: DecoderSpec, *, lanes: int = 1, devices: Any = ()) -> TorchDecoder:
    made = TorchDecoder(
        spec, weights(spec), device="cpu", dtype="float32", devices=devices, fused=False
    )
    made.open(lanes, 64)
    return made


def fed(made: TorchDecoder, ids: Any, *chunks: int) -> Any:
    """Logits [T, V] of the ids after what lane 0 holds, in chunks; the last takes the rest."""
    parts = np.split(np.asarray(ids), np.cumsum(chunks))
    outs = [made.run([0], part[None], all_logits=True).logits[0] for part in parts if len(part)]
    return np.concatenate(outs)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_tokens_alone_are_as_in_a_prompt(data: st.DataObject) -> None:
    """A single token never expands the rows it sees; a prompt does."""
    choose = data.draw
    mixer = replace(
        PLAIN,
        bias=choose(st.booleans()),
        q_latent_scale=choose(st.sampled_from([1.0, 1.3])),
        kv_latent_scale=choose(st.sampled_from([1.0, 0.8])),
        v_dim=choose(st.sampled_from([6, 10, 28])),
        rope=choose(st.sampled_from([ROPE, None])),
        indexer=choose(st.sampled_from([None, INDEXER])),
        gate=choose(st.sampled_from(["none", "in_q_proj"])),
        temperature_scale=choose(st.sampled_from([0.0, 0.3])),
        temperature_floor=4,
    )
    spec = decoder(mixer, replace(mixer, indexer=None, shares_choice=mixer.indexer is not None))
    whole = fed(model(spec), IDS)
    cuts = choose(st.lists(st.integers(1, 6), max_size=3))
    singles = fed(model(spec), IDS, *cuts, *[1] * 8)
    assert np.abs(whole - singles).max() < 2e-5


@pytest.mark.parametrize("mixers", [(PLAIN, PLAIN), (SPARSE, SHARES)])
def test_lanes_do_not_see_each_other(mixers: Any) -> None:
    spec = decoder(*mixers)
    alone = fed(model(spec), IDS, 15, 1, 1, 1, 1, 1)[-1]
    made = model(spec, lanes=3)
    made.run([0, 2], np.stack([IDS[:15], IDS[::-1][:15]]))
    made.copy(0, 1, 12)
    made.run([1], IDS[None, 12:15])
    for at in range(15, 21):
        out = made.run([2, 1, 0], np.array([[5], [IDS[at]], [IDS[at]]]))
    assert np.abs(out.logits[1:, 0] - alone).max() < 2e-5


def test_a_lane_cut_short_forgets() -> None:
    made = model(decoder(SPARSE, SHARES))
    once = fed(made, IDS)
    made.truncate(0, 9)
    assert np.abs(fed(made, IDS[9:], 1, 1) - once[9:]).max() < 2e-5


@pytest.mark.parametrize("mixer", [PLAIN, SPARSE])
def test_state_is_what_is_kept(mixer: MLA) -> None:
    made = model(decoder(mixer), lanes=2)
    mla = made._operators[0][1]
    assert isinstance(mla, TorchMLA)
    kept = mla.cache.nbytes + (0 if mla.indexer is None else mla.indexer.cache.nbytes)
    assert kept == 2 * state_bytes(decoder(mixer), 64, 4)
    held = mla.cache.clone()
    made.run([0], IDS[None])
    made.open(3, 99)
    assert (mla.cache[0, :21] != 0).any() and (mla.cache[1] == 0).all()
    assert mla.cache.shape == (3, 99, LATENT + TURNED) and held.shape[1] == 64


def test_an_indexer_that_sees_everything_changes_nothing() -> None:
    dense, sparse = decoder(PLAIN), decoder(replace(SPARSE, indexer=replace(INDEXER, topk=21)))
    tensors = weights(sparse)
    logits = []
    for spec in (dense, sparse):
        needed = {slot.name: tensors[slot.name] for slot in slots(spec)}
        made = TorchDecoder(spec, needed, device="cpu", dtype="float32", fused=False)
        made.open(1, 64)
        logits.append(fed(made, IDS, 7, 1))
    assert (logits[0] == logits[1]).all()


def test_an_indexer_chooses_by_the_weighted_sum_of_what_its_heads_score() -> None:
    """Recomputed in float64 from the cached keys, one query and one head at a time."""
    made = model(decoder(replace(SPARSE, indexer=replace(INDEXER, rope=None))))
    mla = made._operators[0][1]
    assert isinstance(mla, TorchMLA) and mla.indexer is not None
    seen: list[Any] = []
    indexer = mla.indexer
    mla.indexer = lambda h, latent, call: (  # type: ignore[assignment]
        seen.append((h, latent)) or indexer(h, latent, call)  # type: ignore[func-returns-value]
    )
    kept: list[Any] = []
    many = mla._many
    mla._many = lambda q, rows, choice: kept.append(choice) or many(q, rows, choice)  # type: ignore
    fed(made, IDS)
    (h, latent), choice = seen[0], kept[0].numpy()
    keys = indexer.cache[0, :21].double().numpy()
    q = (latent @ indexer.q_proj.T).double().numpy().reshape(21, 16, 12)
    shares = (h @ indexer.weights.T).double().numpy()
    for at in range(21):
        scores = [
            sum(shares[at, n] * max(0.0, float(q[at, n] @ keys[s])) for n in range(16))
            for s in range(at + 1)
        ]
        best = (
            set(np.argsort(scores)[-INDEXER.topk :]) if at >= INDEXER.topk else set(range(at + 1))
        )
        assert set(np.flatnonzero(choice[at])) == best


def test_a_choice_is_shared_across_devices() -> None:
    spec = decoder(SPARSE, SHARES, SHARES)
    apart = fed(model(spec, devices=["cpu", "cpu:0", "cpu"]), IDS, 12, 1, 1)
    assert (apart == fed(model(spec), IDS, 12, 1, 1)).all()
