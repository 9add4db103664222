"""A resolved `RouterSpec` as a row of numbers, which is what fused kernels read at run time.

One layout for every device: C reads float64, Triton and Metal float32 (all values are small
integers, or fit). Words of a spec become their place in the annotation of the field; dtypes become
their place in `DTYPES`. A toggle writes a row; nothing is compiled or captured again.

Kernels route rows of logits under rows of policies: `row_of [T, P]` says which P of them each of
the T rows is routed under. The first is the one in force, the others are shadow variants.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args, get_type_hints

import numpy as np
from numpy.typing import NDArray

from moescope.kernels.reference import biased_dtype, check_spec, round_to
from moescope.kernels.spec import MODEL_DTYPES as DTYPES
from moescope.kernels.spec import RouterPolicy, RouterSpec

# What stands in which column. `native/router.h` and `triton_ops/columns.py` name the same ones.
COLUMNS = (
    "num_experts_per_tok",
    "logits_dtype",
    "router_logit_scale",
    "router_logit_softcapping",  # 0: none
    "scoring_func",  # softmax, sigmoid, sqrtsoftplus, sparsemixer
    "score_order",  # score_then_topk, topk_then_score
    "score_passes",
    "score_dtype",
    "sparsemixer_threshold",  # rounded to score_dtype
    "correction_bias",  # none, score, logit
    "correction_bias_dtype",
    "biased_dtype",  # of score + bias, and of group scores
    "n_group",
    "topk_group",  # equal to n_group where groups do not limit the choice
    "group_score",  # max, top2_sum
    "group_mask_fill",  # -inf, 0
    "tie_break",  # lower_id, higher_id
    "weights_from",  # scores, biased_scores, biased_minus_bias, logits
    "norm_topk_prob",
    "norm_p",
    "norm_eps",
    "norm_eps_mode",  # add, clamp, uniform
    "per_expert_scale",
    "weight_scale",  # the constant factor in the combine weights
    "output_scale",  # the constant factor on the routed output
    "combine_dtype",
    "weightless_from",  # classes from this id on get weight 0 (null experts that are skipped)
    "hash_table",  # ids come from a table
    "gate",  # which of the router's gate weights (0: as stored), where the gate is fused
)
WIDTH = 32
COLUMN = {name: place for place, name in enumerate(COLUMNS)}


def pack(spec: RouterSpec, *, gate: int = 0) -> NDArray[np.float64]:
    """`spec` as a row [WIDTH]. ValueError for a spec no kernel takes (unresolved dtypes, sizes)."""
    check_spec(spec)
    p, w = spec.policy, spec.wiring
    ungrouped = p.n_group == 1 or p.topk_group == p.n_group
    threshold = round_to(np.array([2 * p.router_jitter_noise]), p.score_dtype)
    derived: dict[str, Any] = {
        "sparsemixer_threshold": threshold[0],
        "biased_dtype": DTYPES.index(biased_dtype(p)),
        "n_group": 1 if ungrouped else p.n_group,
        "topk_group": 1 if ungrouped else p.topk_group,
        "weight_scale": spec.weight_scale,
        "output_scale": spec.output_scale,
        "combine_dtype": DTYPES.index(w.combine_dtype),
        "weightless_from": w.num_experts if w.null_expert_kind == "skip" else spec.E,
        "hash_table": w.hash_table,
        "gate": gate,
    }
    row = np.zeros(WIDTH)
    for place, name in enumerate(COLUMNS):
        row[place] = derived[name] if name in derived else _number(name, getattr(p, name))
    return row


def pack_rows(specs: Sequence[RouterSpec]) -> NDArray[np.float64]:
    """Several specs as rows [R, WIDTH]."""
    return np.stack([pack(spec) for spec in specs])


def _number(name: str, value: Any) -> float:
    if name.endswith("_dtype"):
        return DTYPES.index(value)
    if isinstance(value, str):
        return _WORDS[name].index(value)
    return float(value)


_WORDS = {
    name: get_args(hint)
    for name, hint in get_type_hints(RouterPolicy).items()
    if get_args(hint) and isinstance(get_args(hint)[0], str)
}
