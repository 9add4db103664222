"""The columns of a policy row by name, for kernels: `tl.load(policy + at.NORM_EPS)`."""

from __future__ import annotations

import triton.language as tl

from moescope.kernels.policy_rows import COLUMN, WIDTH

ROW = tl.constexpr(WIDTH)

NUM_EXPERTS_PER_TOK = tl.constexpr(COLUMN["num_experts_per_tok"])
LOGITS_DTYPE = tl.constexpr(COLUMN["logits_dtype"])
ROUTER_LOGIT_SCALE = tl.constexpr(COLUMN["router_logit_scale"])
ROUTER_LOGIT_SOFTCAPPING = tl.constexpr(COLUMN["router_logit_softcapping"])
SCORING_FUNC = tl.constexpr(COLUMN["scoring_func"])
SCORE_ORDER = tl.constexpr(COLUMN["score_order"])
SCORE_PASSES = tl.constexpr(COLUMN["score_passes"])
SCORE_DTYPE = tl.constexpr(COLUMN["score_dtype"])
SPARSEMIXER_THRESHOLD = tl.constexpr(COLUMN["sparsemixer_threshold"])
CORRECTION_BIAS = tl.constexpr(COLUMN["correction_bias"])
CORRECTION_BIAS_DTYPE = tl.constexpr(COLUMN["correction_bias_dtype"])
BIASED_DTYPE = tl.constexpr(COLUMN["biased_dtype"])
N_GROUP = tl.constexpr(COLUMN["n_group"])
TOPK_GROUP = tl.constexpr(COLUMN["topk_group"])
GROUP_SCORE = tl.constexpr(COLUMN["group_score"])
GROUP_MASK_FILL = tl.constexpr(COLUMN["group_mask_fill"])
TIE_BREAK = tl.constexpr(COLUMN["tie_break"])
WEIGHTS_FROM = tl.constexpr(COLUMN["weights_from"])
NORM_TOPK_PROB = tl.constexpr(COLUMN["norm_topk_prob"])
NORM_P = tl.constexpr(COLUMN["norm_p"])
NORM_EPS = tl.constexpr(COLUMN["norm_eps"])
NORM_EPS_MODE = tl.constexpr(COLUMN["norm_eps_mode"])
PER_EXPERT_SCALE = tl.constexpr(COLUMN["per_expert_scale"])
WEIGHT_SCALE = tl.constexpr(COLUMN["weight_scale"])
OUTPUT_SCALE = tl.constexpr(COLUMN["output_scale"])
COMBINE_DTYPE = tl.constexpr(COLUMN["combine_dtype"])
WEIGHTLESS_FROM = tl.constexpr(COLUMN["weightless_from"])
HASH_TABLE = tl.constexpr(COLUMN["hash_table"])
GATE = tl.constexpr(COLUMN["gate"])
