"""Generic wrong specs: for every field that a family may set, what it is turned to.

A comparison with transformers that holds for a wrong spec proves nothing, so each of these must
make it fail wherever it applies. `FLIPS` is the table; lineages add mutants of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

from moescope.engine import decoder
from moescope.engine.decoder import Attention, Branch, DecoderSpec, MoE, RoutedAttention
from moescope.kernels import spec as router_spec
from moescope.kernels.algebra import canonical
from tests.families.kit import Edit, Mutant, on_attention, on_branches, on_moe, on_operators

Turn = Callable[[Any], Any]


def _to(value: Any) -> Turn:
    return lambda old: value


def _other(**others: Any) -> Turn:
    """What a word becomes; words that are not named stay."""
    return lambda old: others.get(old, old)


_SCORES = _other(
    softmax="sigmoid", sigmoid="softmax", sqrtsoftplus="sigmoid", sparsemixer="softmax"
)
_ACTIVATIONS = _other(
    silu="gelu_tanh", gelu="silu", gelu_tanh="silu", relu2="silu", swiglu_oai="silu"
)

# `Class.field` -> what it is turned to where it is off its default; several, by what they are.
FLIPS: dict[str, dict[str, Turn]] = {
    "DecoderSpec.final_norm": {"none": _to(None)},
    "DecoderSpec.embedding_scale": {"one": _to(1.0)},
    "DecoderSpec.logit_scale": {"one": _to(1.0)},
    "DecoderSpec.logit_softcap": {"none": _to(0.0)},
    "DecoderSpec.head_bias": {"none": _to(False)},
    "DecoderSpec.norm_head": {"none": _to(False)},
    "Layer.learned_scale": {"none": _to(False)},
    "Branch.pre_norm": {"none": _to(None)},
    "Branch.post_norm": {"none": _to(None)},
    "Branch.multiplier": {"one": _to(1.0)},
    "Branch.keeps": {"one": _to(1.0)},
    "Branch.reads": {"the residual": _to("residual")},
    "Branch.adds_to": {"the residual": _to("residual")},
    "Norm.eps": {"large": _to(0.05)},
    "Norm.kind": {"another": _other(rms_zero_centred="rms", layer="rms", l2="layer")},
    "Norm.bias": {"none": _to(False)},
    "Norm.gate_rank": {"none": _to(0)},
    "Rope.theta": {"larger": lambda theta: theta * 3.1},
    "Rope.style": {"half": _to("half")},
    "Rope.scaling": {"none": _to(None)},
    "RopeScaling.factor": {"smaller": lambda factor: factor * 0.75},
    "RopeScaling.original_context": {"four times": lambda context: context * 4},
    "RopeScaling.attention_factor": {"one": _to(1.0)},
    "RopeScaling.beta_fast": {"usual": _to(32.0)},
    "RopeScaling.beta_slow": {"usual": _to(1.0)},
    "RopeScaling.truncate": {"true": _to(True)},
    "RopeScaling.low_freq_factor": {"usual": _to(1.0)},
    "RopeScaling.high_freq_factor": {"usual": _to(4.0)},
    "RopeScaling.kind": {
        "another": _other(
            linear="alpha", yarn="linear", llama3="linear", alpha="linear", proportional="linear"
        )
    },
    "RopeScaling.short_factor": {"ones": lambda factors: (1.0,) * len(factors)},
    "RopeScaling.long_factor": {"ones": lambda factors: (1.0,) * len(factors)},
    "RopeScaling.short_mscale": {"none": _to(0.0)},
    "RopeScaling.long_mscale": {"none": _to(0.0)},
    "RopeScaling.rotated_dims": {"half of them": lambda dims: dims // 2},
    "Attention.scale": {"larger": lambda scale: scale * 1.4},
    "Attention.rope": {"none": _to(None)},
    "Attention.window": {"none": _to(0), "one more": lambda window: window + 1},
    "Attention.chunk": {"none": _to(0), "one more": lambda chunk: chunk + 1},
    "Attention.qkv_bias": {"none": _to(False)},
    "Attention.out_bias": {"none": _to(False)},
    "Attention.qk_norm": {"none": _to(None)},
    "Attention.qk_norm_after_rope": {"before": _to(False)},
    "Attention.v_norm": {"none": _to(None)},
    "Attention.clip_qkv": {"none": _to(None)},
    "Attention.sinks": {"none": _to(False)},
    "Attention.softcap": {"none": _to(0.0)},
    "Attention.gate": {
        "another": _other(
            sigmoid="none",
            softplus="sigmoid",
            sigmoid_per_head="softplus_per_head",
            softplus_per_head="sigmoid_per_head",
        )
    },
    "Attention.value_scale": {"one": _to(1.0)},
    "Attention.temperature_scale": {"none": _to(0.0)},
    "Attention.temperature_floor": {"twice": lambda floor: floor * 2},
    "Attention.temperature_kind": {"log": _to("log")},
    "Attention.gate_bias": {"none": _to(False)},
    "MLA.scale": {"larger": lambda scale: scale * 1.4},
    "MLA.latent_norm": {"none": _to(None)},
    "MLA.q_latent_norm": {"none": _to(None)},
    "MLA.q_latent_scale": {"one": _to(1.0)},
    "MLA.kv_latent_scale": {"one": _to(1.0)},
    "MLA.rope": {"none": _to(None)},
    "MLA.bias": {"none": _to(False)},
    "MLA.temperature_scale": {"none": _to(0.0)},
    "MLA.temperature_floor": {"twice": lambda floor: floor * 2},
    "MLA.indexer": {"none": _to(None)},
    "Indexer.topk": {"one more": lambda topk: topk + 1},
    "Indexer.rope": {"none": _to(None)},
    "RoutedAttention.scale": {"larger": lambda scale: scale * 1.4},
    "RoutedAttention.rope": {"none": _to(None)},
    "RoutedAttention.output_bias": {"none": _to(False)},
    "LinearAttention.out_gate": {"silu": _to("silu")},
    "LinearAttention.decay_floor": {"softplus": _to(0.0)},
    "StateSpace.inner_norms": {"none": _to(None)},
    "StateSpace.dt_floor": {"higher": lambda floor: floor + 0.5},
    "StateSpace.dt_ceiling": {"none": _to(float("inf"))},
    "StateSpace.bias": {"none": _to(False)},
    "ShortConv.bias": {"none": _to(False)},
    "MLP.activation": {"another": _ACTIVATIONS},
    "MLP.bias": {"none": _to(False)},
    "MLP.limit": {"none": _to(0.0)},
    "MLP.limit_site": {"before": _to("before")},
    "MLP.alpha": {"one": _to(1.0)},
    "MLP.up_shift": {"none": _to(0.0)},
    "Experts.activation": {"another": _ACTIVATIONS},
    "Experts.bias": {"none": _to(False)},
    "Experts.limit": {"none": _to(0.0)},
    "Experts.limit_site": {"before": _to("before")},
    "Experts.alpha": {"one": _to(1.0)},
    "Experts.up_shift": {"none": _to(0.0)},
    "MoE.output_bias": {"none": _to(False)},
    "RouterPolicy.num_experts_per_tok": {
        "one more": lambda count: count + 1,
        "one less": lambda count: count - 1,
    },
    "RouterPolicy.router_logit_scale": {"one": _to(1.0)},
    "RouterPolicy.router_logit_softcapping": {"none": _to(0.0)},
    "RouterPolicy.score_order": {"score first": _to("score_then_topk")},
    "RouterPolicy.router_jitter_noise": {"none": _to(0.0)},
    "RouterPolicy.correction_bias": {"none": _to("none")},
    "RouterPolicy.topk_group": {"one more": lambda count: count + 1},
    "RouterPolicy.group_score": {"another": _other(max="top2_sum", top2_sum="max")},
    "RouterPolicy.group_mask_fill": {"another": _to("-inf")},
    "RouterPolicy.norm_p": {"one": _to(1.0)},
    "RouterPolicy.per_expert_scale": {"none": _to(False)},
    "RouterPolicy.routed_scaling_factor": {"one": _to(1.0)},
    "RouterPolicy.scale_site": {"weights": _to("weights")},
    "RouterWiring.router_input": {"normed": _to("normed")},
    "RouterWiring.gate_bias": {"none": _to(False)},
    "RouterWiring.null_expert_kind": {"another": _other(identity="skip", skip="identity")},
    "RouterWiring.shared_expert_gate": {"none": _to("none")},
    "RouterWiring.shared_combination": {"add": _to("add")},
    "RouterWiring.apply_router_weight_on_input": {"on the output": _to(False)},
}

# Fields that no float32 comparison can flip, and why.
EXEMPT: dict[str, str] = {
    "DecoderSpec.vocab_size": "a shape: another value does not load",
    "DecoderSpec.hidden": "a shape",
    "DecoderSpec.layers": "a shape",
    "DecoderSpec.context": "how long a lane may grow; changes no number",
    "DecoderSpec.tied_head": "another value does not load",
    "DecoderSpec.carried": "names",
    "Layer.branches": "holds the branches",
    "Branch.name": "a name",
    "Branch.operator": "holds the operator",
    "Norm.width": "a shape",
    "Norm.weight": "a tensor: another value does not load",
    "Norm.applies": "rounding: seen in bfloat16 only",
    "Rope.dims": "a shape, where it is not part of a head",
    "Rope.applies": "rounding: seen in bfloat16 only",
    "Rope.sections": "positions of text are equal on every axis",
    "Attention.hidden": "a shape",
    "Attention.heads": "a shape",
    "Attention.kv_heads": "a shape",
    "Attention.head_dim": "a shape",
    "Attention.v_head_dim": "a shape",
    "Attention.kv_norm": "goes with qk_norm",
    "Attention.float32_scores": "rounding: seen in bfloat16 only",
    "Attention.qk_norm_over": "a shape",
    "Attention.gate": "a shape where it is in the queries' projection, else turned",
    "Attention.keys_are_values": "a shape",
    "MLA.hidden": "a shape",
    "MLA.heads": "a shape",
    "MLA.kv_lora_rank": "a shape",
    "MLA.q_lora_rank": "a shape",
    "MLA.nope_dim": "a shape",
    "MLA.rope_dim": "a shape",
    "MLA.v_dim": "a shape",
    "MLA.q_reads_raw": "a shape",
    "MLA.gate": "a shape",
    "Indexer.heads": "a shape",
    "Indexer.head_dim": "a shape",
    "Indexer.norm": "its fields are turned",
    "MLP.hidden": "a shape",
    "MLP.width": "a shape",
    "MLP.glu": "a shape",
    **{
        f"LinearAttention.{name}": "a shape"
        for name in ("hidden", "key_heads", "value_heads", "key_dim", "value_dim", "conv_kernel")
    },
    "LinearAttention.kind": "another kind holds other tensors",
    "LinearAttention.gate_rank": "a shape",
    "LinearAttention.out_norm": "its eps is turned",
    **{
        f"StateSpace.{name}": "a shape"
        for name in ("hidden", "inner", "state_size", "conv_kernel", "heads", "head_dim")
    },
    "StateSpace.kind": "another kind holds other tensors",
    "StateSpace.groups": "a shape",
    "StateSpace.dt_rank": "a shape",
    "StateSpace.conv_bias": "a tensor: another value does not load",
    "StateSpace.gated_norm": "its eps is turned",
    "ShortConv.hidden": "a shape",
    "ShortConv.kernel": "a shape",
    "RoutedAttention.hidden": "a shape",
    "RoutedAttention.router": "holds the router",
    "RoutedAttention.kv_heads": "a shape",
    "RoutedAttention.head_dim": "a shape",
    "MoE.hidden": "a shape",
    "MoE.router": "holds the router",
    "MoE.experts": "holds the experts",
    "MoE.router_norm": "its eps is turned",
    "MoE.sums_in_float32": "rounding: seen in bfloat16 only",
    "Experts.width": "a shape",
    "Experts.glu": "a shape",
    "Experts.hidden": "a shape",
    "RouterSpec.policy": "holds the policy",
    "RouterSpec.wiring": "holds the wiring",
    "RouterPolicy.logits_dtype": "rounding: seen in bfloat16 only",
    "RouterPolicy.score_dtype": "rounding: seen in bfloat16 only",
    "RouterPolicy.correction_bias_dtype": "rounding: seen in bfloat16 only",
    "RouterPolicy.norm_eps": "as small as rounding",
    "RouterPolicy.norm_eps_mode": "sums of scores are far from the eps",
    "RouterWiring.num_experts": "a shape",
    "RouterWiring.num_null_experts": "a shape",
    "RouterWiring.router_dtype": "rounding: seen in bfloat16 only",
    "RouterWiring.combine_dtype": "rounding: seen in bfloat16 only",
    "RouterWiring.moe_latent_size": "a shape",
}

ROUTED = MoE | RoutedAttention
_CLASSES: dict[str, Any] = {
    name: held
    for module in (decoder, router_spec)
    for name, held in vars(module).items()
    if is_dataclass(held)
}


def set_fields(value: Any) -> set[str]:
    """`Class.field` for every field that is off its default, or has none, in a spec."""
    found: set[str] = set()
    for f in fields(value):
        held = getattr(value, f.name)
        if held != f.default:
            found.add(f"{type(value).__name__}.{f.name}")
        for item in held if isinstance(held, tuple) else (held,):
            if is_dataclass(item):
                found |= set_fields(item)
    return found


def matters(name: str, spec: DecoderSpec) -> bool:
    """Whether a field's default would be another spec, and not the same in other words."""
    kind, _, field = name.partition(".")
    default = next(f.default for f in fields(_CLASSES[kind]) if f.name == field)
    return default is MISSING or changes(Mutant(name, turned(name, _to(default))), spec, wrong=True)


def turned(name: str, turn: Turn) -> Edit:
    """A field turned wherever it is off its default (or has none)."""
    kind, _, field = name.partition(".")

    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(of, value))
        if not is_dataclass(value):
            return value
        edits = {}
        for f in fields(value):
            old = getattr(value, f.name)
            here = (type(value).__name__, f.name) == (kind, field)
            new = turn(old) if here and old != f.default else of(old)
            if new is not old and new != old:
                edits[f.name] = new
        return replace(value, **edits) if edits else value

    return of


def _without_shared(moe: MoE) -> MoE:
    wiring = {"shared_experts": 0, "shared_expert_gate": "none", "shared_combination": "add"}
    return replace(moe, shared=None, router=moe.router.with_wiring(**wiring))


def _flip_norm(moe: Any) -> Any:
    flipped = not moe.router.policy.norm_topk_prob
    return replace(moe, router=moe.router.with_policy(norm_topk_prob=flipped))


def _scores(moe: Any) -> Any:
    wrong = _SCORES(moe.router.policy.scoring_func)
    edits = {"router_jitter_noise": 0.0} if wrong != "sparsemixer" else {}
    return replace(moe, router=moe.router.with_policy(scoring_func=wrong, **edits))


def _activation(moe: MoE) -> MoE:
    wrong = _ACTIVATIONS(moe.experts.activation)
    return replace(moe, experts=replace(moe.experts, activation=wrong))


def _ungrouped(moe: Any) -> Any:
    return replace(moe, router=moe.router.with_policy(n_group=1, topk_group=1))


def _window_in_layer_0(spec: DecoderSpec) -> DecoderSpec:
    """A window where the config has none, and the other way round, in one layer."""
    first = spec.layers[0]
    branches = tuple(
        replace(b, operator=replace(b.operator, window=0 if b.operator.window else 6))
        if isinstance(b.operator, Attention) and not b.operator.chunk
        else b
        for b in first.branches
    )
    return replace(spec, layers=(replace(first, branches=branches), *spec.layers[1:]))


def _rope_everywhere(spec: DecoderSpec) -> DecoderSpec:
    ropes = [b.operator.rope for _, b in spec.operators() if isinstance(b.operator, Attention)]
    first = next((rope for rope in ropes if rope is not None), None)
    return on_attention(lambda a: replace(a, rope=a.rope or first))(spec)


def _half_the_dims(branch: Branch) -> Branch:
    rope = getattr(branch.operator, "rope", None)
    if rope is None or rope.dims % 4 or (rope.scaling and rope.scaling.kind in _OF_ALL_DIMS):
        return branch
    wrong = replace(rope, dims=rope.dims // 2)
    return replace(branch, operator=replace(branch.operator, rope=wrong))


_OF_ALL_DIMS = ("longrope", "proportional")
# Applied to every case that they change; `fields` do not have to be off their default.
_ALWAYS: tuple[tuple[str, Edit, tuple[str, ...]], ...] = (
    ("norm_topk_prob", on_operators(ROUTED, _flip_norm), ("RouterPolicy.norm_topk_prob",)),
    ("other scores", on_operators(ROUTED, _scores), ("RouterPolicy.scoring_func",)),
    ("other activation of the experts", on_moe(_activation), ()),
    ("no shared expert", on_moe(_without_shared), ("MoE.shared", "RouterWiring.shared_experts")),
    (
        "no groups",
        on_operators(ROUTED, _ungrouped),
        ("RouterPolicy.n_group", "RouterPolicy.topk_group"),
    ),
    ("window of layer 0", _window_in_layer_0, ()),
    ("rope in every layer", _rope_everywhere, ()),
    ("half of the dims of a rope", on_branches(_half_the_dims), ("Rope.dims",)),
)
ALWAYS = tuple(Mutant(name, edit, fields) for name, edit, fields in _ALWAYS)
SETS = tuple(
    Mutant(f"{name}: {word}", turned(name, turn), (name,))
    for name, turns in FLIPS.items()
    for word, turn in turns.items()
)
assert not [n for n in FLIPS if n.partition(".")[2] not in _CLASSES[n.partition(".")[0]].__slots__]


def of_case(
    spec: DecoderSpec, case: str, family: str, more: tuple[Mutant, ...]
) -> Iterator[Mutant]:
    """The mutants of a case: generic ones where they apply, and its lineage's."""
    is_set = set_fields(spec)
    for mutant in (*ALWAYS, *SETS, *more):
        if mutant.cases:
            applies = case in mutant.cases
        else:
            applies = mutant in ALWAYS or any(name in is_set for name in mutant.fields)
        if applies and changes(mutant, spec):
            yield mutant


def changes(mutant: Mutant, spec: DecoderSpec, *, wrong: bool = False) -> bool:
    """Whether the wrong spec is one, and not the same in other words; `wrong` if it is none, for
    its fields exclude each other."""
    try:
        return _plain(mutant.edit(spec)) != _plain(spec)
    except ValueError:
        return wrong


def _plain(spec: DecoderSpec) -> DecoderSpec:
    """With each router as the representative of its equals in float32."""

    def of(operator: Any) -> Any:
        return replace(operator, router=canonical(operator.router.resolved("float32")))

    return on_operators(ROUTED, of)(spec)
