"""What is compared with transformers: configs, prompts, and the mutants a comparison must catch.

Tables only. Seeds were searched (`python -m tests.oracle.harness`) so that no greedy choice and no
selection of experts lies within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from moescope.engine.decoder import Attention, Branch, DecoderSpec, Layer, MoE, RopeScaling

STEPS = 24


@dataclass(frozen=True)
class Case:
    """One tiny checkpoint."""

    family: str
    name: str
    seed: int
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.family}-{self.name}"


_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
CASES: tuple[Case, ...] = (
    Case("olmoe", "released", 0),
    Case(
        "olmoe",
        "clipped",
        205,
        {
            "clip_qkv": 0.75,
            "norm_topk_prob": True,
            "num_experts_per_tok": 2,
            "num_key_value_heads": 4,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    Case("flex_olmo", "released", 0),
    Case(
        "flex_olmo",
        "renormalised",
        0,
        {
            "norm_topk_prob": True,
            "attention_bias": True,
            "num_experts_per_tok": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0},
        },
    ),
    Case("qwen2_moe", "released", 0),
    Case(
        "qwen2_moe",
        "sparse-window",
        2,
        {
            "num_hidden_layers": 6,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 4,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    Case("qwen3_moe", "released", 0),
    Case(
        "qwen3_moe",
        "window-yarn",
        0,
        {
            "norm_topk_prob": False,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "mlp_only_layers": [0],
            "rope_parameters": _YARN,
        },
    ),
    Case("mixtral", "released", 6),
    Case(
        "mixtral",
        "window-linear",
        0,
        {
            "sliding_window": 5,
            "head_dim": 24,
            "num_experts_per_tok": 3,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e6, "factor": 2.0},
        },
    ),
)
FIRST = tuple(case for case in CASES if case.name == "released")


def _prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng(seed).integers(0, 256, length))


PROMPTS: dict[str, tuple[int, ...]] = {
    "short": _prompt(1, 9),
    "longer-than-window": _prompt(2, 33),
}

Edit = Callable[[DecoderSpec], DecoderSpec]


@dataclass(frozen=True)
class Mutant:
    """A spec that is wrong in one field. `moves` renames tensors (ours: from, to) where the wrong
    spec calls them otherwise; `fields` are the spec fields this shows to matter."""

    name: str
    cases: tuple[str, ...]
    edit: Edit
    fields: tuple[str, ...]
    moves: tuple[tuple[str, str], ...] = ()


def on_branches(change: Callable[[Branch], Branch]) -> Edit:
    def edit(spec: DecoderSpec) -> DecoderSpec:
        return replace(
            spec,
            layers=tuple(
                replace(layer, branches=tuple(change(branch) for branch in layer.branches))
                for layer in spec.layers
            ),
        )

    return edit


def on_attention(change: Callable[[Attention], Attention]) -> Edit:
    def one(branch: Branch) -> Branch:
        if isinstance(branch.operator, Attention):
            return replace(branch, operator=change(branch.operator))
        return branch

    return on_branches(one)


def on_moe(change: Callable[[MoE], MoE]) -> Edit:
    def one(branch: Branch) -> Branch:
        if isinstance(branch.operator, MoE):
            return replace(branch, operator=change(branch.operator))
        return branch

    return on_branches(one)


def policy(**edits: Any) -> Edit:
    return on_moe(lambda moe: replace(moe, router=moe.router.with_policy(**edits)))


def _flip_norm(moe: MoE) -> MoE:
    flipped = not moe.router.policy.norm_topk_prob
    return replace(moe, router=moe.router.with_policy(norm_topk_prob=flipped))


def _more(by: int) -> Edit:
    return on_moe(
        lambda moe: replace(
            moe, router=moe.router.with_policy(num_experts_per_tok=moe.router.K + by)
        )
    )


def _without_shared(moe: MoE) -> MoE:
    wiring = {"shared_experts": 0, "shared_expert_gate": "none"}
    return replace(moe, shared=None, router=moe.router.with_wiring(**wiring))


def _to_pre_norm(branch: Branch) -> Branch:
    return replace(branch, pre_norm=branch.post_norm, post_norm=None)


def _rope(attention: Attention, **edits: Any) -> Attention:
    assert attention.rope is not None
    return replace(attention, rope=replace(attention.rope, **edits))


def _eps(branch: Branch) -> Branch:
    wrong = {
        name: replace(norm, eps=0.05)
        for name in ("pre_norm", "post_norm")
        if (norm := getattr(branch, name)) is not None
    }
    return replace(branch, **wrong)


def _yarn(attention: Attention, **edits: Any) -> Attention:
    assert attention.rope is not None and attention.rope.scaling is not None
    return _rope(attention, scaling=replace(attention.rope.scaling, **edits))


def _window_in_layer_0(spec: DecoderSpec) -> DecoderSpec:
    """A window where the config has none, and the other way round, in one layer."""
    first = spec.layers[0]
    branches = tuple(
        replace(b, operator=replace(b.operator, window=0 if b.operator.window else 6))
        if isinstance(b.operator, Attention)
        else b
        for b in first.branches
    )
    return replace(spec, layers=(Layer(branches), *spec.layers[1:]))


ALL = tuple(case.id for case in CASES)
_QK_NORM = tuple(i for i in ALL if i.startswith(("olmoe", "flex_olmo", "qwen3_moe")))
_QWEN2 = ("qwen2_moe-released", "qwen2_moe-sparse-window")
_FLEX = ("flex_olmo-released", "flex_olmo-renormalised")
_WINDOWED = ("qwen2_moe-sparse-window", "qwen3_moe-window-yarn", "mixtral-window-linear")

MUTANTS: tuple[Mutant, ...] = (
    Mutant("norm_topk_prob", ALL, on_moe(_flip_norm), ("RouterPolicy.norm_topk_prob",)),
    Mutant("top-k + 1", ALL, _more(+1), ("RouterPolicy.num_experts_per_tok",)),
    Mutant("top-k - 1", ALL, _more(-1), ("RouterPolicy.num_experts_per_tok",)),
    Mutant("sigmoid scores", ALL, policy(scoring_func="sigmoid"), ("RouterPolicy.scoring_func",)),
    Mutant("window of layer 0", ALL, _window_in_layer_0, ("Attention.window",)),
    Mutant(
        "no window",
        _WINDOWED,
        on_attention(lambda a: replace(a, window=0)),
        ("Attention.window",),
    ),
    Mutant(
        "window off by one",
        _WINDOWED,
        on_attention(lambda a: replace(a, window=a.window and a.window + 1)),
        ("Attention.window",),
    ),
    Mutant(
        "no q/k norm",
        _QK_NORM,
        on_attention(lambda a: replace(a, qk_norm=None, kv_norm=None)),
        ("Attention.qk_norm", "Attention.kv_norm", "Attention.qk_norm_over"),
    ),
    Mutant(
        "clip_qkv",
        ("olmoe-released",),
        on_attention(lambda a: replace(a, clip_qkv=0.75)),
        ("Attention.clip_qkv",),
    ),
    Mutant(
        "no clip_qkv",
        ("olmoe-clipped",),
        on_attention(lambda a: replace(a, clip_qkv=None)),
        ("Attention.clip_qkv",),
    ),
    Mutant(
        "no shared gate",
        _QWEN2,
        on_moe(lambda moe: replace(moe, router=moe.router.with_wiring(shared_expert_gate="none"))),
        ("RouterWiring.shared_expert_gate",),
    ),
    Mutant(
        "no shared expert",
        _QWEN2,
        on_moe(_without_shared),
        ("MoE.shared", "RouterWiring.shared_experts"),
    ),
    Mutant(
        "no q, k, v bias",
        (
            "olmoe-clipped",
            "flex_olmo-renormalised",
            "qwen2_moe-released",
            "qwen3_moe-window-yarn",
        ),
        on_attention(lambda a: replace(a, qkv_bias=False)),
        ("Attention.qkv_bias",),
    ),
    Mutant(
        "no output bias",
        ("olmoe-clipped", "flex_olmo-renormalised", "qwen3_moe-window-yarn"),
        on_attention(lambda a: replace(a, out_bias=False)),
        ("Attention.out_bias",),
    ),
    Mutant(
        "rope theta",
        ALL,
        on_attention(lambda a: _rope(a, theta=31000.0)),
        ("Attention.rope", "Rope.theta"),
    ),
    Mutant(
        "no rope scaling",
        ("qwen3_moe-window-yarn", "mixtral-window-linear"),
        on_attention(lambda a: _rope(a, scaling=None)),
        ("Rope.scaling",),
    ),
    Mutant(
        "rope scaling factor",
        ("qwen3_moe-window-yarn", "mixtral-window-linear"),
        on_attention(lambda a: _yarn(a, factor=3.0)),
        ("RopeScaling.factor",),
    ),
    Mutant(
        "yarn attention factor",
        ("qwen3_moe-window-yarn",),
        on_attention(lambda a: _yarn(a, attention_factor=1.0)),
        ("RopeScaling.attention_factor",),
    ),
    Mutant(
        "yarn original context",
        ("qwen3_moe-window-yarn",),
        on_attention(lambda a: _yarn(a, original_context=64)),
        ("RopeScaling.original_context",),
    ),
    Mutant(
        "linear for yarn",
        ("qwen3_moe-window-yarn",),
        on_attention(lambda a: _rope(a, scaling=RopeScaling("linear", 4.0))),
        ("RopeScaling.kind",),
    ),
    Mutant(
        "yarn for linear",
        ("mixtral-window-linear",),
        on_attention(lambda a: _rope(a, scaling=RopeScaling("yarn", 2.0, 64))),
        ("RopeScaling.kind",),
    ),
    Mutant(
        "attention scale", ALL, on_attention(lambda a: replace(a, scale=0.2)), ("Attention.scale",)
    ),
    Mutant("norm eps", ALL, on_branches(_eps), ("Norm.eps",)),
    Mutant(
        "norms before, not after",
        _FLEX,
        on_branches(_to_pre_norm),
        ("Branch.post_norm", "Branch.pre_norm"),
        (("post_norm", "pre_norm"),),
    ),
    Mutant(
        "norms after, not before",
        tuple(i for i in ALL if i not in _FLEX),
        on_branches(lambda b: replace(b, post_norm=b.pre_norm, pre_norm=None)),
        ("Branch.post_norm", "Branch.pre_norm"),
        (("pre_norm", "post_norm"),),
    ),
    Mutant(
        "no final norm",
        ALL,
        lambda spec: replace(spec, final_norm=None),
        ("DecoderSpec.final_norm",),
    ),
)

# Fields that no float32 comparison can flip, and why.
EXEMPT: dict[str, str] = {
    "DecoderSpec.vocab_size": "a shape: another value does not load",
    "DecoderSpec.hidden": "a shape",
    "DecoderSpec.layers": "a shape",
    "DecoderSpec.context": "how long a lane may grow; changes no number",
    "DecoderSpec.tied_head": "another value does not load",
    "Layer.branches": "holds the branches",
    "Branch.name": "a name",
    "Branch.operator": "holds the operator",
    "Norm.width": "a shape",
    "Norm.applies": "rounding: seen in bfloat16 only",
    "Rope.dims": "a shape",
    "Rope.applies": "rounding: seen in bfloat16 only",
    "Attention.hidden": "a shape",
    "Attention.heads": "a shape",
    "Attention.kv_heads": "a shape",
    "Attention.head_dim": "a shape",
    "MLP.hidden": "a shape",
    "MLP.width": "a shape",
    "MoE.hidden": "a shape",
    "MoE.router": "holds the router",
    "MoE.experts": "holds the experts",
    "Experts.width": "a shape",
    "RouterSpec.policy": "holds the policy",
    "RouterSpec.wiring": "holds the wiring",
    "RouterWiring.num_experts": "a shape",
    "RouterWiring.router_input": "FlexOlmo has no norm before its router: both inputs are one",
    "RouterWiring.router_dtype": "rounding: seen in bfloat16 only",
    "RouterWiring.combine_dtype": "rounding: seen in bfloat16 only",
}

# Config edits that must not load, because the tensors are of another model.
REFUSED_EDITS: tuple[tuple[str, str, Any, str], ...] = (
    ("qwen2_moe-sparse-window", "decoder_sparse_step", 1, "mlp.gate.weight"),
    ("qwen2_moe-sparse-window", "mlp_only_layers", [1], "mlp.gate_proj"),
    ("qwen3_moe-window-yarn", "mlp_only_layers", [], "mlp.gate.weight"),
    ("qwen3_moe-released", "head_dim", 16, "head_dim"),
    ("olmoe-released", "num_key_value_heads", 4, "num_key_value_heads"),
    ("olmoe-released", "num_experts", 16, "num_experts 16"),
    ("mixtral-released", "num_local_experts", 4, "num_local_experts 4"),
    ("flex_olmo-released", "intermediate_size", 32, "intermediate_size 32"),
    (
        "qwen2_moe-released",
        "shared_expert_intermediate_size",
        32,
        "shared_expert_intermediate_size",
    ),
    ("olmoe-clipped", "tie_word_embeddings", False, "lm_head"),
)
