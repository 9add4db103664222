"""A router spec in one line of the field's words: `softmax → top-8, not renormalised`.

Every field that differs from its default shows up (those of the wiring on request), so that two
specs with the same line are the same spec.
"""

from __future__ import annotations

from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

_FUNCS = {
    "softmax": "softmax",
    "sigmoid": "sigmoid",
    "sqrtsoftplus": "sqrt(softplus)",
    "sparsemixer": "SparseMixer",
}
_INPUTS = {
    "normed": "",
    "residual": "reads the raw residual",
    "residual_rms_scaled": "reads the residual, own norm and scale",
    "carried_mlp": "MLP gate with carried state",
}


def line(spec: RouterSpec, *, wiring: bool = False) -> str:
    """Steps joined by arrows, then what is around the router, joined by dots."""
    p = spec.policy
    score = _score(p)
    if p.score_order == "topk_then_score":
        score = f"{score} of the selected"
        steps = [*_logits(p), *_groups(p), _top_k(spec), score + _weights(p)]
    else:
        steps = [*_logits(p), score, *_groups(p), _top_k(spec) + _weights(p)]
    return " · ".join([" → ".join(steps), *(_around(spec.wiring) if wiring else ())])


def _number(value: float) -> str:
    return repr(int(value)) if value == int(value) and abs(value) < 1e6 else repr(value)


def _logits(p: RouterPolicy) -> list[str]:
    steps = []
    if p.gate_quant_bits:
        steps.append(f"gate in {p.gate_quant_bits} bits")
    if p.logits_dtype != "float32":
        steps.append(f"logits in {_dtype(p.logits_dtype)}")
    if p.router_logit_scale != 1.0:
        steps.append(f"logits × {_number(p.router_logit_scale)}")
    if p.router_logit_softcapping:
        steps.append(f"logits capped at {_number(p.router_logit_softcapping)}")
    if p.correction_bias == "logit":
        steps.append("selected by logits + correction bias" + _bias_dtype(p))
    return steps


def _score(p: RouterPolicy) -> str:
    words = _FUNCS[p.scoring_func]
    if p.score_passes == 2:
        words += " twice"
    if p.score_dtype != "float32":
        words += f" in {_dtype(p.score_dtype)}"
    if p.router_jitter_noise:
        words += f" (jitter {_number(p.router_jitter_noise)})"
    if p.correction_bias == "score":
        words += " + correction bias" + _bias_dtype(p)
    return words


def _bias_dtype(p: RouterPolicy) -> str:
    return "" if p.correction_bias_dtype == "float32" else f" in {_dtype(p.correction_bias_dtype)}"


def _dtype(name: str) -> str:
    return "the model's dtype" if name == "model" else name


def _groups(p: RouterPolicy) -> list[str]:
    if p.n_group == 1:
        return []
    rule = "top-2 sum" if p.group_score == "top2_sum" else "max"
    fill = "" if p.group_mask_fill == "-inf" else ", others set to 0"
    return [f"{p.topk_group} of {p.n_group} groups ({rule}{fill})"]


def _top_k(spec: RouterSpec) -> str:
    w = spec.wiring
    words = f"{spec.K} by token id" if w.hash_table else f"top-{spec.K}"
    notes = []
    if w.num_null_experts:
        classes = "class" if w.num_null_experts == 1 else "classes"
        notes.append(f"{w.num_null_experts} {w.null_expert_kind} {classes}")
    if spec.policy.tie_break != "lower_id":
        notes.append("ties to the higher id")
    return f"{words} ({', '.join(notes)})" if notes else words


def _weights(p: RouterPolicy) -> str:
    """What becomes of the selected scores, as `, renormalised, × 2.5`."""
    words = {
        "scores": "",
        "biased_scores": ", weights from the biased scores",
        "biased_minus_bias": ", weights from (score + bias) − bias",
        "logits": ", weights are the raw logits",
    }[p.weights_from]
    if p.norm_topk_prob:
        words += ", renormalised" + _norm(p)
    elif not _sums_to_one(p):
        words += ", not renormalised"
    if p.per_expert_scale:
        words += ", × per-expert scale"
    if p.routed_scaling_factor != 1.0:
        words += f", × {_number(p.routed_scaling_factor)}"
        words += {0: " left out", 1: "", 2: " twice"}[p.scale_power]
        words += " on the routed output" if p.scale_site == "routed_output" else ""
    return words


def _sums_to_one(p: RouterPolicy) -> bool:
    """Normalised by construction, or weights that nobody would expect to be."""
    after = p.score_order == "topk_then_score" and p.scoring_func == "softmax"
    return (after and p.weights_from == "scores") or p.scoring_func == "sparsemixer"


def _norm(p: RouterPolicy) -> str:
    notes = [] if p.norm_p == 1.0 else [f"{_number(p.norm_p)}-norm"]
    if p.norm_eps_mode == "clamp" and p.norm_eps:
        notes.append(f"sum at least {p.norm_eps:g}")
    elif p.norm_eps > 1e-12:  # smaller ones change no float32 weight
        notes.append(f"sum + {p.norm_eps:g}")
    if p.norm_eps_mode == "uniform":
        notes.append("uniform where the sum is 0")
    return f" ({', '.join(notes)})" if notes else ""


def _around(w: RouterWiring) -> list[str]:
    words = [_INPUTS[w.router_input]]
    words.append("" if w.router_dtype == "model" else f"gate product in {w.router_dtype}")
    words.append("learned gate bias" if w.gate_bias else "")
    if w.shared_experts:
        gate = ", sigmoid gate" if w.shared_expert_gate == "sigmoid" else ""
        how = {
            "add": "",
            "average": ", averaged with the routed",
            "in_router_softmax": ", in the router's softmax",
            "mix_softmax": ", mixed by a softmax of two",
        }[w.shared_combination]
        words.append(f"{w.shared_experts} shared expert{'s' * (w.shared_experts > 1)}{gate}{how}")
    words.append("weights on the experts' input" if w.apply_router_weight_on_input else "")
    words.append("" if w.combine_dtype == "model" else f"weights in {w.combine_dtype}")
    words.append(f"experts {w.moe_latent_size} wide" if w.moe_latent_size else "")
    words.append("norm before each expert" if w.expert_pre_norm else "")
    words.append("norm after each expert" if w.expert_post_norm else "")
    return [word for word in words if word]
