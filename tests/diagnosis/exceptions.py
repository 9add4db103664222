"""The misses among the committed results, by name, and why each is one.

A test holds that these are missed and nothing else is; so what is repaired must leave the list.
"""

from __future__ import annotations

Key = tuple[str, str, str, str]  # family, fault, dtype, level of evidence

ROUNDED = (
    "it rounds where the engine rounds as much: routing is called correct, and the fault is not "
    "listed as one that would look the same, because small differences speak against it together"
)
SPARSE = (
    "SparseMixer's threshold: rounding moves whole weights there, so that a fault of rounding is "
    "seen in a few rows, or is named beside the right fault"
)
PAIRED = (
    "logits of bfloat16 are numbers of bfloat16, cast or not: the fault is named, and a cast of "
    "the weights beside it"
)
ONE_ROW = "a single row shows it, which an engine of bfloat16 may get wrong by itself"
HUGE = (
    "misread biases reach 5e36 there, beside which scores vanish; a third of the decisions is left "
    "unexplained, and why is not found yet"
)

EXCEPTIONS: dict[Key, str] = {
    ("deepseek_v2", "logits_bf16", "bfloat16", "weights"): ROUNDED,
    ("ernie4_5_moe", "logits_bf16", "bfloat16", "weights"): ROUNDED,
    ("gemma4_text", "scores_bf16", "bfloat16", "weights"): ROUNDED,
    ("glm_moe_dsa", "bias_fp32_where_bf16_expected", "float32", "weights"): HUGE,
    ("glm_moe_dsa", "bias_fp32_where_bf16_expected", "float32", "order"): HUGE,
    ("glm_moe_dsa", "bias_fp32_where_bf16_expected", "bfloat16", "weights"): HUGE,
    ("glm_moe_dsa", "bias_fp32_where_bf16_expected", "bfloat16", "order"): HUGE,
    ("granitemoe_swa", "all_negative_logits", "bfloat16", "weights"): ONE_ROW,
    ("granitemoe_swa", "all_negative_logits", "bfloat16", "order"): ONE_ROW,
    ("hunyuan_v1_moe", "logits_bf16", "bfloat16", "weights"): ROUNDED,
    ("jetmoe", "router_quantised", "bfloat16", "order"): ROUNDED,
    ("laguna", "scores_bf16", "bfloat16", "weights"): ROUNDED,
    ("qwen3_moe", "scores_bf16", "bfloat16", "weights"): ROUNDED,
    ("zaya", "router_quantised", "bfloat16", "weights"): ROUNDED,
    ("phimoe", "gate_rows_reversed", "bfloat16", "weights"): SPARSE,
    ("phimoe", "logits_bf16", "bfloat16", "weights"): SPARSE,
    ("phimoe", "router_quantised", "bfloat16", "order"): SPARSE,
    ("phimoe", "scores_bf16", "bfloat16", "weights"): SPARSE,
    ("afmoe", "all_negative_logits", "bfloat16", "weights"): ONE_ROW,
    ("afmoe", "raw_logits_as_weights", "bfloat16", "weights"): PAIRED,
    ("mixtral", "raw_logits_as_weights", "bfloat16", "weights"): PAIRED,
}
