"""`RouterSpec`: a router as a value, and `Routing`: what it decided.

A spec has two parts. `RouterPolicy` is what a row of numbers can say: a kernel reads it at run
time, so changing it recompiles nothing. `RouterWiring` is what changes the flow of data around it.
Nothing here computes: `reference.py` is the definition of what the fields mean, `words.py` says a
spec in one line, `algebra.py` knows which specs are equal and which score sums they allow.

Letters for shapes in this package: T tokens, E expert classes (null experts included), K picked.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

Dtype = Literal["model", "float32", "bfloat16", "float16"]
MODEL_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class RouterPolicy:
    """How one row of router logits becomes K experts and K combine weights.

    The order of operations is the order of the fields. `model` as a dtype means the dtype the
    decoder runs in; `RouterSpec.resolved` replaces it. A combination that means nothing raises
    ValueError naming both fields.
    """

    num_experts_per_tok: int
    # logits
    gate_quant_bits: int = 0  # 0: the gate as stored; else symmetric per-row rounding to n bits
    logits_dtype: Dtype = "float32"  # what the gate's output is rounded to
    router_logit_scale: float = 1.0
    router_logit_softcapping: float = 0.0  # 0: none; else cap * tanh(logits / cap)
    # scores
    scoring_func: Literal["softmax", "sigmoid", "sqrtsoftplus", "sparsemixer"] = "softmax"
    score_order: Literal["score_then_topk", "topk_then_score"] = "score_then_topk"
    score_passes: Literal[1, 2] = 1
    score_dtype: Dtype = "float32"
    router_jitter_noise: float = 0.0  # sparsemixer's threshold is twice this
    # selection
    correction_bias: Literal["none", "score", "logit"] = "none"
    correction_bias_dtype: Dtype = "float32"
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    group_mask_fill: Literal["-inf", "0"] = "-inf"
    tie_break: Literal["lower_id", "higher_id"] = "lower_id"
    # weights
    weights_from: Literal["scores", "biased_scores", "biased_minus_bias", "logits"] = "scores"
    norm_topk_prob: bool = False
    norm_p: float = 1.0  # 1: the plain sum; else the p-norm of the magnitudes (DBRX)
    norm_eps: float = 0.0
    norm_eps_mode: Literal["add", "clamp", "uniform"] = (
        "add"  # sum + eps | max(sum, eps) | see below
    )
    # uniform: as add, and every selected weight is 1 / K where the sum is 0
    per_expert_scale: bool = False
    routed_scaling_factor: float = 1.0
    scale_power: Literal[0, 1, 2] = 1  # how often the factor is applied; 1 is right
    scale_site: Literal["weights", "routed_output"] = "weights"

    def __post_init__(self) -> None:
        _check_types(self)
        _check_ranges(self)
        if self.gate_quant_bits == 1:
            raise ValueError("gate_quant_bits: expected 0 (off) or 2 to 16, found 1")
        for wrong, names in _policy_conflicts(self):
            if wrong:
                raise ValueError(_conflict(self, names))


@dataclass(frozen=True, slots=True)
class RouterWiring:
    """What the router is connected to: inputs, null and shared experts, gate and combine dtypes."""

    num_experts: int  # routed experts, null experts not counted
    num_null_experts: int = 0
    null_expert_kind: Literal["none", "identity", "skip"] = "none"
    router_input: Literal["normed", "residual", "residual_rms_scaled", "carried_mlp"] = "normed"
    router_dtype: Dtype = "model"  # of the gate's matrix product
    gate_bias: bool = False  # a learned linear bias, part of the logit
    hash_table: bool = False  # ids come from a table indexed by token id
    shared_experts: int = 0
    shared_expert_gate: Literal["none", "sigmoid"] = "none"
    shared_combination: Literal["add", "average", "in_router_softmax", "mix_softmax"] = "add"
    apply_router_weight_on_input: bool = False
    combine_dtype: Dtype = "model"  # what the combine weights are cast to, last of all
    moe_latent_size: int = 0
    expert_pre_norm: bool = False
    expert_post_norm: bool = False

    def __post_init__(self) -> None:
        _check_types(self)
        _check_ranges(self)
        for wrong, names in (
            (
                (self.num_null_experts > 0) != (self.null_expert_kind != "none"),
                "num_null_experts null_expert_kind",
            ),
            (
                self.shared_expert_gate != "none" and self.shared_experts == 0,
                "shared_expert_gate shared_experts",
            ),
            (
                self.shared_combination != "add" and self.shared_experts == 0,
                "shared_combination shared_experts",
            ),
        ):
            if wrong:
                raise ValueError(_conflict(self, names))


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """One router: `policy` (a toggle away) and `wiring` (part of the decoder)."""

    policy: RouterPolicy
    wiring: RouterWiring

    def __post_init__(self) -> None:
        if not isinstance(self.policy, RouterPolicy) or not isinstance(self.wiring, RouterWiring):
            raise ValueError("a RouterSpec is made of a RouterPolicy and a RouterWiring")
        p, E = self.policy, self.E
        counts = f"num_experts {self.wiring.num_experts}"
        if self.wiring.num_null_experts:
            counts += f" + num_null_experts {self.wiring.num_null_experts}"
        if p.num_experts_per_tok > E:
            raise ValueError(
                f"num_experts_per_tok {p.num_experts_per_tok} is more than there are: {counts}"
            )
        if p.scoring_func == "sparsemixer" and self.wiring.hash_table:
            raise ValueError("scoring_func sparsemixer does not go with hash_table True")
        if p.n_group == 1:
            return
        if E % p.n_group:
            raise ValueError(f"n_group {p.n_group} does not divide the experts: {counts}")
        admissible = p.topk_group * (E // p.n_group)
        if p.num_experts_per_tok > admissible and not self.wiring.hash_table:
            raise ValueError(
                f"num_experts_per_tok {p.num_experts_per_tok} is more than topk_group "
                f"{p.topk_group} of n_group {p.n_group} admits: {admissible} experts"
            )
        if p.group_score == "top2_sum" and p.n_group == E:
            raise ValueError(
                f"group_score top2_sum needs two experts in a group: n_group {p.n_group}, {counts}"
            )

    @property
    def E(self) -> int:
        """Expert classes a router row has: routed and null experts."""
        return self.wiring.num_experts + self.wiring.num_null_experts

    @property
    def K(self) -> int:
        return self.policy.num_experts_per_tok

    @property
    def weight_scale(self) -> float:
        """The constant factor in the combine weights."""
        p = self.policy
        return p.routed_scaling_factor**p.scale_power if p.scale_site == "weights" else 1.0

    @property
    def output_scale(self) -> float:
        """The constant factor on the routed output, which is not in the combine weights."""
        p = self.policy
        return p.routed_scaling_factor**p.scale_power if p.scale_site == "routed_output" else 1.0

    @property
    def margin_unit(self) -> str:
        """What margins are of: `score` or `logit`, whichever the experts are chosen by."""
        by_score = self.policy.score_order == "score_then_topk"
        return "score" if by_score and self.policy.scoring_func != "sparsemixer" else "logit"

    def with_policy(self, **edits: Any) -> RouterSpec:
        return replace(self, policy=replace(self.policy, **edits))

    def with_wiring(self, **edits: Any) -> RouterSpec:
        return replace(self, wiring=replace(self.wiring, **edits))

    def resolved(self, model_dtype: str) -> RouterSpec:
        """This spec with every `model` dtype replaced by the dtype the decoder runs in."""
        if model_dtype not in MODEL_DTYPES:
            raise ValueError(f"model_dtype {model_dtype!r} is none of {', '.join(MODEL_DTYPES)}")
        policy, wiring = (
            {f.name: model_dtype for f in fields(part) if _is_model(part, f.name)}
            for part in (self.policy, self.wiring)
        )
        if not policy and not wiring:
            return self
        return self.with_policy(**policy).with_wiring(**wiring)

    def line(self, *, wiring: bool = False) -> str:
        """`softmax → top-8, not renormalised`; with `wiring`, also what is around the router."""
        from moescope.kernels.words import line

        return line(self, wiring=wiring)

    def equal(self, other: RouterSpec) -> bool:
        """Whether ids and weights agree for all logits, in exact arithmetic; False when unsure."""
        from moescope.kernels.algebra import canonical

        return canonical(self) == canonical(other)

    def allowed_score_sum(self) -> float | tuple[float, float] | None:
        """The score sum this spec allows: a number, an open-closed interval, or None (anything)."""
        from moescope.kernels.algebra import allowed_score_sum

        return allowed_score_sum(self)

    def to_json(self) -> dict[str, Any]:
        return {"policy": asdict(self.policy), "wiring": asdict(self.wiring)}

    @classmethod
    def from_json(cls, data: Any) -> RouterSpec:
        """The inverse of `to_json`. Absent fields take their default; anything unknown or of the
        wrong type raises ValueError naming the field."""
        known = {"policy": RouterPolicy, "wiring": RouterWiring}
        if not isinstance(data, dict):
            raise ValueError(f"a router spec is an object, found {type(data).__name__}")
        if unknown := sorted(set(map(str, data)) - set(known)):
            raise ValueError(f"router spec: unknown key {unknown[0]!r}")
        return cls(**{name: _part_from_json(name, kind, data) for name, kind in known.items()})


@dataclass(frozen=True, slots=True, eq=False)
class Routing:
    """What a router decided for T tokens. Arrays are numpy, or torch where torch tensors came in.

    Unused slots (a policy with fewer than K experts) hold id -1, score 0 and weight 0. An invalid
    row (NaN, +inf, or fewer than K finite logits) holds ids -1, weights 0, and NaN elsewhere.
    """

    expert_ids: Any  # [T, K] int32, selection value descending, then id ascending
    scores: Any  # [T, K] float32, unbiased scores of the selected
    weights: Any  # [T, K] float32, the combine weights: factors really multiplied with each expert
    score_sum: Any  # [T] float32, sum of the weights
    mass: Any  # [T] float32, sum of the scores, before normalisation and scaling
    entropy: Any  # [T] float32, nats, of the scores normalised over all E
    margin: Any  # [T] float32, selection value at rank K minus rank K+1; NaN where there is none
    runner_up: Any  # [T] int32, the expert at rank K+1; -1 where there is none
    logits: Any = field(default=None)  # [T, E] float32 as the gate gave them: routing them again
    # under the same spec gives the same decision


# --- validation ---------------------------------------------------------------------------------

# Inclusive bounds of the numeric fields.
_RANGES: dict[str, tuple[float, float]] = {
    "num_experts_per_tok": (1, math.inf),
    "gate_quant_bits": (0, 16),
    "router_logit_scale": (math.ulp(0.0), 1e30),
    "router_logit_softcapping": (0.0, 1e30),
    "router_jitter_noise": (0.0, 1e30),
    "n_group": (1, math.inf),
    "topk_group": (1, math.inf),
    "norm_p": (1e-3, 1e3),
    "norm_eps": (0.0, 1e30),
    "routed_scaling_factor": (0.0, 1e15),
    "num_experts": (1, math.inf),
    "num_null_experts": (0, math.inf),
    "shared_experts": (0, math.inf),
    "moe_latent_size": (0, math.inf),
}


def _policy_conflicts(p: RouterPolicy) -> tuple[tuple[bool, str], ...]:
    """(does it conflict, the two fields that do), for what can be said without E."""
    sparse = p.scoring_func == "sparsemixer"
    biased = p.weights_from in ("biased_scores", "biased_minus_bias")
    return (
        (p.topk_group > p.n_group, "topk_group n_group"),
        (sparse and p.num_experts_per_tok != 2, "scoring_func num_experts_per_tok"),
        (sparse and p.correction_bias != "none", "scoring_func correction_bias"),
        (sparse and p.n_group != 1, "scoring_func n_group"),
        (sparse and p.score_passes != 1, "scoring_func score_passes"),
        (sparse and p.score_order != "score_then_topk", "scoring_func score_order"),
        (
            p.score_order == "topk_then_score" and p.correction_bias == "score",
            "score_order correction_bias",
        ),
        (biased and p.correction_bias == "none", "weights_from correction_bias"),
        (
            p.weights_from == "biased_minus_bias" and p.correction_bias == "logit",
            "weights_from correction_bias",
        ),
    )


def _conflict(part: Any, names: str) -> str:
    first, second = names.split()
    return f"{first} {getattr(part, first)} does not go with {second} {getattr(part, second)}"


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _check_types(part: Any) -> None:
    """Field values have the annotated type: enum words, bools that are bools, finite numbers."""
    kind: Any = type(part)
    for name, hint in _hints(kind).items():
        value = getattr(part, name)
        if allowed := get_args(hint):
            good = any(type(value) is type(a) and value == a for a in allowed)
            expected = "one of " + ", ".join(map(str, allowed))
        elif hint is float:
            good = type(value) in (int, float) and math.isfinite(value)
            expected = "a finite number"
            if good and type(value) is int:
                object.__setattr__(part, name, float(value))
        else:
            good, expected = type(value) is hint, {bool: "true or false", int: "an integer"}[hint]
        if not good:
            raise ValueError(f"{name}: expected {expected}, found {str(value)[:80]!r}")


def _check_ranges(part: Any) -> None:
    for f in fields(part):
        if f.name in _RANGES:
            low, high = _RANGES[f.name]
            value = getattr(part, f.name)
            if not low <= value <= high:
                bound = f"at least {low:g}" if value < low else f"at most {high:g}"
                raise ValueError(f"{f.name}: expected {bound}, found {value}")


def _is_model(part: Any, name: str) -> bool:
    return name.endswith("_dtype") and getattr(part, name) == "model"


def _part_from_json(name: str, kind: type, data: dict[str, Any]) -> Any:
    values = data.get(name, {})
    if not isinstance(values, dict):
        raise ValueError(f"router spec: {name}: expected an object")
    names = {f.name: f for f in fields(kind)}
    if unknown := sorted(set(map(str, values)) - set(names)):
        raise ValueError(f"router spec: {name}: unknown field {unknown[0]!r}")
    required = next(iter(names))  # num_experts_per_tok, num_experts
    if required not in values:
        raise ValueError(f"router spec: {name}: {required} is missing")
    return kind(**values)
