/* The router on one row of logits: what kernels/reference.py defines, in C.

   A policy is a row of numbers, packed by kernels/policy_rows.py; the enums below name its columns
   and words in the same order. No allocation, no state: safe from any number of threads. */

#ifndef MOESCOPE_ROUTER_H
#define MOESCOPE_ROUTER_H

#include <stddef.h>
#include <stdint.h>

#include "moescope_kernels.h"

enum { MK_POLICY_WIDTH = 32, MK_EXPERTS_MAX = 4096, MK_PICKS_MAX = 64 };

enum mk_column {
    MK_COL_NUM_EXPERTS_PER_TOK,
    MK_COL_LOGITS_DTYPE,
    MK_COL_ROUTER_LOGIT_SCALE,
    MK_COL_ROUTER_LOGIT_SOFTCAPPING,
    MK_COL_SCORING_FUNC,
    MK_COL_SCORE_ORDER,
    MK_COL_SCORE_PASSES,
    MK_COL_SCORE_DTYPE,
    MK_COL_SPARSEMIXER_THRESHOLD,
    MK_COL_CORRECTION_BIAS,
    MK_COL_CORRECTION_BIAS_DTYPE,
    MK_COL_BIASED_DTYPE,
    MK_COL_N_GROUP,
    MK_COL_TOPK_GROUP,
    MK_COL_GROUP_SCORE,
    MK_COL_GROUP_MASK_FILL,
    MK_COL_TIE_BREAK,
    MK_COL_WEIGHTS_FROM,
    MK_COL_NORM_TOPK_PROB,
    MK_COL_NORM_P,
    MK_COL_NORM_EPS,
    MK_COL_NORM_EPS_MODE,
    MK_COL_PER_EXPERT_SCALE,
    MK_COL_WEIGHT_SCALE,
    MK_COL_OUTPUT_SCALE,
    MK_COL_COMBINE_DTYPE,
    MK_COL_WEIGHTLESS_FROM,
    MK_COL_HASH_TABLE,
    MK_COL_GATE,
    MK_COLS,
};

/* Dtypes are those of moescope_kernels.h. */
enum mk_scoring_func {
    MK_SCORING_FUNC_SOFTMAX,
    MK_SCORING_FUNC_SIGMOID,
    MK_SCORING_FUNC_SQRTSOFTPLUS,
    MK_SCORING_FUNC_SPARSEMIXER,
};
enum mk_score_order { MK_SCORE_ORDER_SCORE_THEN_TOPK, MK_SCORE_ORDER_TOPK_THEN_SCORE };
enum mk_correction_bias {
    MK_CORRECTION_BIAS_NONE,
    MK_CORRECTION_BIAS_SCORE,
    MK_CORRECTION_BIAS_LOGIT,
};
enum mk_group_score { MK_GROUP_SCORE_MAX, MK_GROUP_SCORE_TOP2_SUM };
enum mk_group_mask_fill { MK_GROUP_MASK_FILL_MINUS_INF, MK_GROUP_MASK_FILL_0 };
enum mk_tie_break { MK_TIE_BREAK_LOWER_ID, MK_TIE_BREAK_HIGHER_ID };
enum mk_weights_from {
    MK_WEIGHTS_FROM_SCORES,
    MK_WEIGHTS_FROM_BIASED_SCORES,
    MK_WEIGHTS_FROM_BIASED_MINUS_BIAS,
    MK_WEIGHTS_FROM_LOGITS,
};
enum mk_norm_eps_mode { MK_NORM_EPS_MODE_ADD, MK_NORM_EPS_MODE_CLAMP, MK_NORM_EPS_MODE_UNIFORM };

/* Where the four sums of a row stand. */
enum mk_scalar { MK_SCALAR_SCORE_SUM, MK_SCALAR_MASS, MK_SCALAR_ENTROPY, MK_SCALAR_MARGIN, MK_SCALARS };

/* Bytes of scratch that one thread needs for rows of E logits. */
MK_EXPORT size_t mk_route_scratch(int E);

/* Route one row: logits, bias, scale [E]; policy [MK_POLICY_WIDTH]; hash ids [K]; results [K_max]
   and scalars [MK_SCALARS]. Bias, scale and hash ids may be NULL where the policy has none. Places
   from the policy's K on hold id -1, score 0 and weight 0. An invalid row (see reference.py; also a
   policy that does not fit E or K_max, an input that it needs and that is NULL, a hash id out of
   range) holds ids -1, weights 0, and NaN elsewhere. */
MK_EXPORT void mk_route(const float *logits, int E, const double *policy, const float *bias,
                        const float *per_expert_scale, const int32_t *hash_ids, int K_max,
                        int32_t *expert_ids, float *scores, float *weights, float *scalars,
                        int32_t *runner_up, void *scratch);

/* How many instruction sets of portable, AVX2 and AVX-512, in this order, this machine has. */
MK_EXPORT int mk_route_isas(void);

/* Route T rows, each under P of the policies `policies` [R, MK_POLICY_WIDTH]: `row_of` [T, P] says
   which; -1: none, whose place holds ids -1 and zeros. Strides are in elements from one row of T to
   the next (0: one vector for all); outputs are [T, P, ...] without gaps. `isa` -1 is the widest
   instruction set there is, which `mk_route` takes; tests ask for each. */
MK_EXPORT void mk_route_rows(int isa, const float *logits, ptrdiff_t logits_stride, int T, int E,
                             const double *policies, int R, const int32_t *row_of, int P,
                             const float *bias, ptrdiff_t bias_stride,
                             const float *per_expert_scale, ptrdiff_t scale_stride,
                             const int32_t *hash_ids, ptrdiff_t hash_stride, int K_max,
                             int32_t *expert_ids, float *scores, float *weights, float *scalars,
                             int32_t *runner_up, void *scratch);

#endif
