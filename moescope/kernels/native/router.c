/* See router.h. Here: what a row of a policy says, what does not depend on the instruction set, and
   the choice among the instruction sets; the router itself is router_template.h. */

/* Whatever else the library is compiled with: loops into vectors, selects without branches. */
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O3", "no-trapping-math", "no-math-errno")
#endif

#include "router.h"

#include <math.h>
#include <string.h>

#include "router_numbers.h"

enum { LANES = 16 };

typedef struct {
    const float *logits;
    int E;
    const float *bias, *per_expert_scale;
    const int32_t *hash_ids;
    int K_max;
    int32_t *expert_ids;
    float *scores, *weights, *scalars;
    int32_t *runner_up;
} Row;

/* A policy's row, decoded. */
typedef struct {
    int K, logits_dtype, func, after, passes, score_dtype, sparse, by_logit;
    int bias_site, bias_dtype, biased_dtype;
    int groups, keep, group_sum, source, normalised, eps_mode, scaled, combine_dtype;
    int weightless_from, hashed;
    double scale, cap, threshold, norm_p, norm_eps, weight_scale;
    float fill;    /* what stands in for the experts of a closed group */
    uint32_t flip; /* see mk_key */
} Policy;

typedef struct {
    double *exact;   /* [n] unrounded scores */
    int64_t *keys;   /* [n] selection values and ids, to be compared as one */
    int64_t *tops;   /* [n / LANES, padded] the greatest key of each block */
    int64_t *best;   /* [n] the greatest keys, in descending order */
    float *z;        /* [n] logits as scored */
    float *rounded;  /* [n] unbiased scores */
    float *biased;   /* [n] selection values before groups; -inf where a class is excluded */
    uint8_t *closed; /* [n] groups that are not admitted */
} Scratch;

typedef int Router(const Row *, const Policy *, const Scratch *);

static int padded(int n) { return (n + LANES - 1) / LANES * LANES; }

MK_EXPORT size_t mk_route_scratch(int E) {
    int n = padded(E < 1 ? 1 : E);
    size_t each = sizeof(double) + 2 * sizeof(int64_t) + 3 * sizeof(float) + sizeof(uint8_t);
    return (size_t)n * each + (size_t)padded(n / LANES) * sizeof(int64_t) + 64;
}

static Scratch scratch_of(void *memory, int E) {
    size_t n = (size_t)padded(E), tops = (size_t)padded((int)n / LANES);
    Scratch s;
    s.exact = (double *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    s.keys = (int64_t *)(s.exact + n);
    s.best = s.keys + n;
    s.tops = s.best + n;
    s.z = (float *)(s.tops + tops);
    s.rounded = s.z + n;
    s.biased = s.rounded + n;
    s.closed = (uint8_t *)(s.biased + n);
    return s;
}

static Policy policy_of(const double *row) {
    Policy p = {
        .K = (int)row[MK_COL_NUM_EXPERTS_PER_TOK],
        .logits_dtype = (int)row[MK_COL_LOGITS_DTYPE],
        .scale = row[MK_COL_ROUTER_LOGIT_SCALE],
        .cap = row[MK_COL_ROUTER_LOGIT_SOFTCAPPING],
        .func = (int)row[MK_COL_SCORING_FUNC],
        .after = (int)row[MK_COL_SCORE_ORDER] == MK_SCORE_ORDER_TOPK_THEN_SCORE,
        .passes = (int)row[MK_COL_SCORE_PASSES],
        .score_dtype = (int)row[MK_COL_SCORE_DTYPE],
        .threshold = row[MK_COL_SPARSEMIXER_THRESHOLD],
        .bias_site = (int)row[MK_COL_CORRECTION_BIAS],
        .bias_dtype = (int)row[MK_COL_CORRECTION_BIAS_DTYPE],
        .biased_dtype = (int)row[MK_COL_BIASED_DTYPE],
        .groups = (int)row[MK_COL_N_GROUP],
        .keep = (int)row[MK_COL_TOPK_GROUP],
        .group_sum = (int)row[MK_COL_GROUP_SCORE] == MK_GROUP_SCORE_TOP2_SUM,
        .fill = (int)row[MK_COL_GROUP_MASK_FILL] == MK_GROUP_MASK_FILL_0 ? 0.0f : -INFINITY,
        .flip = (int)row[MK_COL_TIE_BREAK] == MK_TIE_BREAK_HIGHER_ID ? 0 : UINT32_MAX,
        .source = (int)row[MK_COL_WEIGHTS_FROM],
        .normalised = row[MK_COL_NORM_TOPK_PROB] != 0.0,
        .norm_p = row[MK_COL_NORM_P],
        .norm_eps = row[MK_COL_NORM_EPS],
        .eps_mode = (int)row[MK_COL_NORM_EPS_MODE],
        .scaled = row[MK_COL_PER_EXPERT_SCALE] != 0.0,
        .weight_scale = row[MK_COL_WEIGHT_SCALE],
        .combine_dtype = (int)row[MK_COL_COMBINE_DTYPE],
        .weightless_from = (int)row[MK_COL_WEIGHTLESS_FROM],
        .hashed = row[MK_COL_HASH_TABLE] != 0.0,
    };
    p.sparse = p.func == MK_SCORING_FUNC_SPARSEMIXER;
    p.by_logit = p.after || p.sparse;
    return p;
}

/* Whether nothing is read or written out of bounds under `p`. */
static int fits(const Row *row, const Policy *p) {
    if (row->E < 1 || row->E > MK_EXPERTS_MAX || p->passes < 1) return 0;
    if (p->K < 1 || p->K > row->E || p->K > row->K_max || p->K > MK_PICKS_MAX) return 0;
    if (p->groups < 1 || row->E % p->groups || p->keep < 1 || p->keep > p->groups) return 0;
    if (p->sparse && p->K != 2) return 0;
    if (p->bias_site != MK_CORRECTION_BIAS_NONE && !row->bias) return 0;
    if (p->scaled && !row->per_expert_scale) return 0;
    if (p->hashed && !row->hash_ids) return 0;
    for (int k = 0; p->hashed && k < p->K; k++)
        if (row->hash_ids[k] < 0 || row->hash_ids[k] >= row->E) return 0;
    return 1;
}

static void blank(const Row *row, int from, int to, float score) {
    for (int k = from; k < to; k++) {
        row->expert_ids[k] = -1;
        row->scores[k] = score;
        row->weights[k] = 0.0f;
    }
}

static void invalid(const Row *row, int K) {
    K = K < 0 ? 0 : K > row->K_max ? row->K_max : K;
    blank(row, 0, K, NAN);
    blank(row, K, row->K_max, 0.0f);
    for (int i = 0; i < MK_SCALARS; i++) row->scalars[i] = NAN;
    *row->runner_up = -1;
}

static void normalise(const Policy *p, double *weights) {
    double total = 0.0;
    for (int k = 0; k < p->K; k++)
        total += p->norm_p == 1.0 ? weights[k] : pow(fabs(weights[k]), p->norm_p);
    if (p->norm_p != 1.0) total = pow(total, 1.0 / p->norm_p);
    double below = total + p->norm_eps;
    if (p->eps_mode == MK_NORM_EPS_MODE_CLAMP) below = total < p->norm_eps ? p->norm_eps : total;
    int uniform = p->eps_mode == MK_NORM_EPS_MODE_UNIFORM && total == 0.0;
    for (int k = 0; k < p->K; k++) weights[k] = uniform ? 1.0 / p->K : weights[k] / below;
}

/* The combine weights, from what `weights_from` names, and all results. */
static void write(const Row *row, const Policy *p, const int32_t *ids, const float *scores,
                  double *weights, double entropy, double margin, int32_t runner_up) {
    if (p->normalised) normalise(p, weights);
    double score_sum = 0.0, mass = 0.0;
    for (int k = 0; k < p->K; k++) {
        double weight = weights[k];
        if (p->scaled) weight *= row->per_expert_scale[ids[k]];
        weight *= p->weight_scale;
        if (ids[k] >= p->weightless_from) weight = 0.0;
        row->expert_ids[k] = ids[k];
        row->scores[k] = scores[k];
        row->weights[k] = mk_to_dtype(weight, p->combine_dtype);
        score_sum += row->weights[k];
        mass += scores[k];
    }
    blank(row, p->K, row->K_max, 0.0f);
    row->scalars[MK_SCALAR_SCORE_SUM] = (float)score_sum;
    row->scalars[MK_SCALAR_MASS] = (float)mass;
    row->scalars[MK_SCALAR_ENTROPY] = (float)entropy;
    row->scalars[MK_SCALAR_MARGIN] = (float)margin;
    *row->runner_up = runner_up;
}

/* --- one router for each instruction set ------------------------------------------------------ */

#define NAME(x) x##_portable
#define TARGET
#include "router_template.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define NAME(x) x##_avx2
#define TARGET __attribute__((target("avx2,fma")))
#include "router_template.h"

#define NAME(x) x##_avx512
#define TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#include "router_template.h"

static Router *const ROUTERS[] = {route_portable, route_avx2, route_avx512};

MK_EXPORT int mk_route_isas(void) {
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 1;
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return wide ? 3 : 2;
}
#else
static Router *const ROUTERS[] = {route_portable};

MK_EXPORT int mk_route_isas(void) { return 1; }
#endif

static void route(int isa, const Row *row, const double *policy, void *scratch) {
    Policy p = policy_of(policy);
    Scratch s = {0};
    int good = fits(row, &p);
    if (good) s = scratch_of(scratch, row->E);
    if (!good || !ROUTERS[isa](row, &p, &s)) invalid(row, p.K);
}

MK_EXPORT void mk_route(const float *logits, int E, const double *policy, const float *bias,
                        const float *per_expert_scale, const int32_t *hash_ids, int K_max,
                        int32_t *expert_ids, float *scores, float *weights, float *scalars,
                        int32_t *runner_up, void *scratch) {
    Row row = {logits, E,          bias,   per_expert_scale, hash_ids, K_max,
               expert_ids, scores, weights, scalars,         runner_up};
    route(mk_route_isas() - 1, &row, policy, scratch);
}

MK_EXPORT void mk_route_rows(int isa, const float *logits, ptrdiff_t logits_stride, int T, int E,
                             const double *policies, int R, const int32_t *row_of, int P,
                             const float *bias, ptrdiff_t bias_stride,
                             const float *per_expert_scale, ptrdiff_t scale_stride,
                             const int32_t *hash_ids, ptrdiff_t hash_stride, int K_max,
                             int32_t *expert_ids, float *scores, float *weights, float *scalars,
                             int32_t *runner_up, void *scratch) {
    int most = mk_route_isas() - 1;
    isa = isa < 0 || isa > most ? most : isa;
    for (ptrdiff_t at = 0; at < (ptrdiff_t)T * P; at++) {
        ptrdiff_t t = at / P, place = at * K_max;
        Row row = {
            .logits = logits + t * logits_stride,
            .E = E,
            .bias = bias ? bias + t * bias_stride : NULL,
            .per_expert_scale = per_expert_scale ? per_expert_scale + t * scale_stride : NULL,
            .hash_ids = hash_ids ? hash_ids + t * hash_stride : NULL,
            .K_max = K_max,
            .expert_ids = expert_ids + place,
            .scores = scores + place,
            .weights = weights + place,
            .scalars = scalars + at * MK_SCALARS,
            .runner_up = runner_up + at,
        };
        if (row_of[at] >= 0 && row_of[at] < R) {
            route(isa, &row, policies + (ptrdiff_t)row_of[at] * MK_POLICY_WIDTH, scratch);
            continue;
        }
        blank(&row, 0, K_max, 0.0f);
        memset(row.scalars, 0, MK_SCALARS * sizeof *row.scalars);
        *row.runner_up = -1;
    }
}
