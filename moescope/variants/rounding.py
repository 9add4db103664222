"""Faults of precision: dtypes and bits of the gate, its logits, scores, biases and weights."""

from __future__ import annotations

from moescope.variants.entry import Signature, Variant
from moescope.variants.weighing import BIASED

_NEAR = Signature("near ties", "near ties", "off by rounding", "off by rounding")

VARIANTS = (
    Variant(
        "logits_bf16",
        "logits in bfloat16",
        "Rounds the gate's output to bfloat16: near ties flip.",
        {"logits_dtype": "bfloat16"},
        evidence="vLLM #14027, #41332, #42501 (MiniMax), SGLang #38695, #29892 (GLM-5.2), "
        "NeMo Automodel #3650",
        signature=_NEAR,
        fix="Keep the gate's product in float32.",
    ),
    Variant(
        "scores_bf16",
        "scores in bfloat16",
        "Rounds the scores to bfloat16: many exact ties, weights off in the third digit.",
        {"score_dtype": "bfloat16"},
        evidence="transformers dbrx and gpt_oss; mlx-lm kimi_linear, gemma4",
        signature=_NEAR,
        fix="Score in float32 and cast the weights last.",
    ),
    Variant(
        "bias_bf16",
        "correction bias in bfloat16",
        "Rounds the correction bias: biases far from 0 collapse onto a few values.",
        {"correction_bias_dtype": "bfloat16"},
        evidence="SGLang #8729 (GLM-4.5), #31213, #37133 (GLM-5.2), transformers #42580, "
        "Megatron-LM #1482",
        requires=BIASED,
        signature=Signature("near ties", "near ties", "of other experts", "same if renormalised"),
        fix="Load and keep the correction bias in float32.",
    ),
    Variant(
        "bias_fp32_where_bf16_expected",
        "float32 bias read as bfloat16",
        "Reads the bytes of a float32 bias as bfloat16: two values for each, the first half of "
        "the experts' only.",
        decoder=("bias_bytes_as_bfloat16",),
        evidence="SGLang #31001, #30989, flashinfer #2889",
        requires=BIASED,
        signature=Signature("other", "other", "of other experts, or NaN", "same if renormalised"),
        fix="Convert the bias to the dtype that the kernel reads.",
    ),
    Variant(
        "router_quantised",
        "gate in 8 bits",
        "Quantises the gate's weight like any other: near ties flip.",
        {"gate_quant_bits": 8},
        evidence="axolotl #3791, vllm-omni #5573; mlx-lm quant_predicate",
        signature=_NEAR,
        fix="Leave the gate out of the quantisation.",
    ),
    Variant(
        "router_quantised_4_bits",
        "gate in 4 bits",
        "Quantises the gate's weight to 4 bits: a seventh of the experts are others.",
        {"gate_quant_bits": 4},
        evidence="transformers #48801 (Gemma 4)",
        fault="router_quantised",
        signature=Signature("other where close", "other where close", "off", "off"),
        fix="Leave the gate out of the quantisation.",
    ),
    Variant(
        "combine_low_precision",
        "combine weights in bfloat16",
        "Casts the weights to bfloat16 before the experts are summed: late divergence.",
        wiring={"combine_dtype": "bfloat16"},
        evidence="mlx-lm #938",
        signature=Signature(weights="off by rounding", score_sum="off by rounding"),
        fix="Keep the combine weights in float32 until the experts are summed.",
    ),
)
