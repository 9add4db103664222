"""The closed table of edits that a router spec cannot express: what each does, in words.

`engine.rewire` carries them out on the tensors and operators of a loaded model.
"""

from __future__ import annotations

DECODER_EDITS: dict[str, str] = {
    # the logits, before they are routed
    "first_where_all_negative": "rows without a positive logit are the first K experts', alike",
    "softplus_as_written": "logits below −16.6 count as −1e4, as log(1 + exp x) in float32",
    "best_of_each_group": "all but the best ⌈K / n_group⌉ experts of each group are excluded",
    # the gate
    "gate_rows_shifted": "row e of the gate stands at e + 1 (the last at 0), its bias too",
    "gate_rows_reversed": "row e of the gate stands at E - 1 - e, its bias too",
    "gate_of_next_router": "the gate is the next router's (the last one's own)",
    "gate_of_previous_router": "the gate is the previous router's (the first one's own)",
    "gate_reads_embedding": "the gate reads the token's embedding",
    "bias_bytes_as_bfloat16": "the correction bias is its own float32 bytes read as bfloat16",
    # the experts
    "experts_shifted": "id e runs expert e + 1 (the last runs expert 0)",
    "experts_reversed": "id e runs expert E - 1 - e",
    "experts_halves_swapped": "id e runs expert (e + E / 2) mod E",
    "gate_up_swapped": "the experts' gate and up projections are exchanged",
    "down_bias_unweighted": "the experts' output bias is added whole",
    "null_experts_run_expert_0": "null experts add expert 0 by their weight as well",
    "weight_on_output_too": "the weight multiplies the experts' output as well",
    # the shared expert
    "shared_over_factor": "the shared expert is divided by routed_scaling_factor",
    "shared_times_factor": "the shared expert is multiplied by routed_scaling_factor",
}

# What `Variant.needs` may ask for.
FACTS: dict[str, str] = {
    "several_routers": "more than one router",
    "norm_before": "a norm before the layer's experts",
    "scaled": "routed_scaling_factor is not 1",
    "expert_bias": "experts have a bias",
    "gated_experts": "experts have a gate projection",
}
