"""A layer in a few words: what mixes tokens, and what feeds forward. For lists 80 columns wide."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

from moescope.engine.decoder import DecoderSpec, Layer
from moescope.engine.operators import (
    MLA,
    MLP,
    Attention,
    ConvolvedAttention,
    Experts,
    LinearAttention,
    MoE,
    RoutedAttention,
    ShortConv,
    StateSpace,
)

_LINEAR = {"gated_delta": "gated DeltaNet", "kda": "KDA", "lightning": "lightning attention"}
_ACTIVATIONS = {"gelu_tanh": "gelu", "relu2": "relu²", "swiglu_oai": "clamped SwiGLU"}


def layer_words(layer: Layer) -> tuple[str, str]:
    """(mixers, feed-forward parts)."""
    mixers, rest = [], []
    for branch in layer.branches:
        kind = type(branch.operator)
        if kind in _MIXERS:
            mixers.append(_MIXERS[kind](branch.operator))
        elif kind in _FEED_FORWARD:
            rest.append(_FEED_FORWARD[kind](branch.operator))
    return _joined(mixers) or "-", _joined(rest) or "-"


def layer_kinds(spec: DecoderSpec) -> dict[tuple[str, str], list[int]]:
    """Words of each different layer, with the numbers of the layers that read so."""
    found: dict[tuple[str, str], list[int]] = {}
    for number, layer in enumerate(spec.layers):
        found.setdefault(layer_words(layer), []).append(number)
    return found


def spans(numbers: list[int]) -> str:
    """`0-2, 7` of numbers that ascend; of many runs the first two and the last: `3, 7 … 47`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    words = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
    return ", ".join(words) if len(words) < 4 else f"{words[0]}, {words[1]} … {words[-1]}"


def _joined(parts: list[str]) -> str:
    """Parts in order, equal neighbours counted."""
    runs = [(words, len(list(group))) for words, group in groupby(parts)]
    return " + ".join(words if count == 1 else f"{count} × {words}" for words, count in runs)


def _attention(a: Attention) -> str:
    parts = [f"attention {a.heads}×{a.head_dim}", f"kv {a.kv_heads}"]
    parts += [f"window {a.window}"] * bool(a.window) + [f"chunk {a.chunk}"] * bool(a.chunk)
    parts += ["no rope"] * (a.rope is None) + ["q/k norm"] * (a.qk_norm is not None)
    parts += ["sinks"] * a.sinks + ["gated"] * (a.gate != "none")
    parts += ["k as v"] * a.keys_are_values
    return ", ".join(parts)


def _convolved(a: ConvolvedAttention) -> str:
    words = f"convolved attention {a.heads}×{a.head_dim}, kv {a.kv_heads}"
    return words + (f", window {a.window}" if a.window else "")


def _latent(m: MLA) -> str:
    words = f"MLA {m.heads}×{m.nope_dim + m.rope_dim}, latent {m.kv_lora_rank}"
    return words if m.indexer is None else f"{words}, top {m.indexer.topk} tokens"


def _linear(a: LinearAttention) -> str:
    return f"{_LINEAR[a.kind]} {a.value_heads}×{a.value_dim}"


def _state_space(m: StateSpace) -> str:
    if m.kind == "mamba1":
        return f"Mamba {m.inner}, state {m.state_size}"
    return f"Mamba-2 {m.heads}×{m.head_dim}, state {m.state_size}"


def _routed_attention(a: RoutedAttention) -> str:
    policy, wiring = a.router.policy, a.router.wiring
    return f"attention, {policy.num_experts_per_tok} of {wiring.num_experts} experts"


def _dense(m: MLP) -> str:
    return f"dense {m.width}" + _activation(m)


def _experts(m: MoE) -> str:
    policy, wiring = m.router.policy, m.router.wiring
    words = f"{policy.num_experts_per_tok} of {wiring.num_experts} experts × {m.experts.width}"
    if m.experts.hidden:
        words += f" in {m.experts.hidden}"
    words += _activation(m.experts)
    if m.gate_network is not None:
        words += f", gate by {m.gate_network.layers + 1} layers of {m.gate_network.width}"
    if wiring.num_null_experts:
        words += f", {wiring.num_null_experts} {wiring.null_expert_kind}"
    if m.shared is not None:
        words += f", shared {m.shared.width}" + _clamp(m.shared)
        words += " gated" if wiring.shared_expert_gate != "none" else ""
    return words


def _activation(block: MLP | Experts) -> str:
    known = _ACTIVATIONS.get(block.activation)
    return _clamp(block) + (f", {known}" if known else "")


def _clamp(block: MLP | Experts) -> str:
    """What gate and up are held to, where the name of the activation does not say that they are."""
    named = not block.limit or block.activation == "swiglu_oai"
    return "" if named else f" clamped {block.limit:g}"


_MIXERS: dict[type, Callable[[Any], str]] = {
    Attention: _attention,
    ConvolvedAttention: _convolved,
    MLA: _latent,
    LinearAttention: _linear,
    StateSpace: _state_space,
    ShortConv: lambda c: f"short convolution {c.kernel}",
    RoutedAttention: _routed_attention,
}
_FEED_FORWARD: dict[type, Callable[[Any], str]] = {MLP: _dense, MoE: _experts}
