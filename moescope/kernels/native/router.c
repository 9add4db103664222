/* See router.h. One pass over the policy's fields in the order of reference.py, float64 between the
   rounding points. Whatever was rounded is a float32, so only unrounded scores are double.

   Vectors are padded to BLOCK with -inf, which is an excluded expert; loops over them have no tail
   and the compiler vectorises them, once for each instruction set (see the end of the file). */

#include "router.h"

#include <math.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 16 };

typedef struct {
    float *z;        /* [n] logits as scored */
    float *rounded;  /* [n] unbiased scores, rounded */
    float *biased;   /* [n] selection values before groups */
    double *exact;   /* [n] scores not yet normalised or rounded */
    int64_t *keys;   /* [n] selection values and ids, in one number to compare */
    int64_t *tops;   /* [n / BLOCK] the greatest key of each block */
    uint8_t *closed; /* [n] groups that are not admitted */
} Scratch;

INLINE int padded(int E) { return (E + BLOCK - 1) / BLOCK * BLOCK; }

size_t mk_route_scratch(int E) {
    size_t n = (size_t)padded(E < 1 ? 1 : E);
    size_t each = 3 * sizeof(float) + sizeof(double) + sizeof(int64_t) + sizeof(uint8_t);
    return n * each + padded((int)n / BLOCK) * sizeof(int64_t) + 64;
}

static Scratch scratch_of(void *memory, int E) {
    size_t n = (size_t)padded(E), tops = (size_t)padded((int)n / BLOCK);
    char *at = (char *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    Scratch s;
    s.exact = (double *)at, at += n * sizeof(double);
    s.keys = (int64_t *)at, at += n * sizeof(int64_t);
    s.tops = (int64_t *)at, at += tops * sizeof(int64_t);
    s.z = (float *)at, at += n * sizeof(float);
    s.rounded = (float *)at, at += n * sizeof(float);
    s.biased = (float *)at, at += n * sizeof(float);
    s.closed = (uint8_t *)at;
    return s;
}

/* --- numbers ---------------------------------------------------------------------------------- */

INLINE uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE uint64_t bits_of_double(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

INLINE double double_of(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

INLINE float to_bfloat16(float x) {
    uint32_t bits = bits_of(x);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000;
    return float_of(x != x ? bits : rounded);
}

INLINE float to_float16(float x) {
    uint32_t bits = bits_of(x), sign = bits & 0x80000000, size = bits ^ sign;
    uint32_t normal = (size + 0xFFF + ((size >> 13) & 1)) & 0xFFFFE000;
    normal = normal > 0x477FE000 ? 0x7F800000 : normal; /* past 65504 */
    /* below 2^-14 numbers are 2^-24 apart, as floats from 0.5 to 1 are */
    uint32_t small = bits_of((float_of(size) + 0.5f) - 0.5f);
    uint32_t rounded = size < 0x38800000 ? small : normal;
    return float_of(x != x ? bits : rounded | sign);
}

INLINE float to_dtype(double x, int dtype) {
    float single = (float)x;
    if (dtype == MK_DTYPE_BFLOAT16) return to_bfloat16(single);
    return dtype == MK_DTYPE_FLOAT16 ? to_float16(single) : single;
}

INLINE void round_all(float *x, int n, int dtype) {
    if (dtype == MK_DTYPE_BFLOAT16)
        for (int i = 0; i < n; i++) x[i] = to_bfloat16(x[i]);
    else if (dtype == MK_DTYPE_FLOAT16)
        for (int i = 0; i < n; i++) x[i] = to_float16(x[i]);
}

/* exp(x) for x <= 0, -inf and NaN included, within an ulp or so: 2^n times a Taylor series. */
INLINE double exp_of(double x) {
    const double shift = 0x1.8p52; /* adding it rounds to an integer, in the low bits */
    x = x < -1000.0 ? -1000.0 : x;
    double n = (x * 0x1.71547652b82fep0 + shift) - shift;
    double r = (x - n * 0x1.62e42fefap-1) - n * 0x1.cf79abc9e3b3ap-40;
    double y = 1.0 / 6227020800.0;
    y = y * r + 1.0 / 479001600.0;
    y = y * r + 1.0 / 39916800.0;
    y = y * r + 1.0 / 3628800.0;
    y = y * r + 1.0 / 362880.0;
    y = y * r + 1.0 / 40320.0;
    y = y * r + 1.0 / 5040.0;
    y = y * r + 1.0 / 720.0;
    y = y * r + 1.0 / 120.0;
    y = y * r + 1.0 / 24.0;
    y = y * r + 1.0 / 6.0;
    y = y * r + 0.5;
    y = y * r * r + r;
    /* in two factors, because 2^n itself may be too small for a normal number */
    int tiny = n < -1000.0;
    uint64_t power = bits_of_double((tiny ? n + 600.0 : n) + (shift + 1023.0)) << 52;
    return (1.0 + y) * double_of(power) * (tiny ? 0x1p-600 : 1.0);
}

/* log(x) for x > 0, within an ulp or so: exponent and 2 atanh((m - 1) / (m + 1)). */
INLINE double log_of(double x) {
    int tiny = x < 0x1p-1000;
    uint64_t bits = bits_of_double(tiny ? x * 0x1p200 : x);
    bits += 0x3FF0000000000000 - 0x3FE6A09E667F3BCD; /* m from sqrt(1/2) to sqrt(2) */
    double e = double_of((bits >> 52) | 0x4330000000000000) - (0x1p52 + 1023.0);
    double m = double_of((bits & 0x000FFFFFFFFFFFFF) + 0x3FE6A09E667F3BCD);
    double f = m - 1.0, s = f / (m + 1.0), q = s * s;
    double y = 1.0 / 21.0;
    y = y * q + 1.0 / 19.0;
    y = y * q + 1.0 / 17.0;
    y = y * q + 1.0 / 15.0;
    y = y * q + 1.0 / 13.0;
    y = y * q + 1.0 / 11.0;
    y = y * q + 1.0 / 9.0;
    y = y * q + 1.0 / 7.0;
    y = y * q + 1.0 / 5.0;
    y = y * q + 1.0 / 3.0;
    y = (tiny ? e - 200.0 : e) * 0x1.62e42fefa39efp-1 + (2.0 * s + 2.0 * s * q * y);
    return x != x ? x : y;
}

INLINE double log1p_of(double u) { /* u from 0 to 1 */
    double w = 1.0 + u, d = w - 1.0;
    return d == 0.0 ? u : log_of(w) * (u / (d == 0.0 ? 1.0 : d));
}

/* Numbers that compare as the floats do; -0 is 0. */
INLINE int32_t ordered(float x) {
    int32_t bits = (int32_t)bits_of(x + 0.0f);
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

INLINE float from_ordered(int32_t order) {
    return float_of((uint32_t)(order ^ ((order >> 31) & 0x7FFFFFFF)));
}

INLINE float greatest(const float *x, int n) { /* NaN where there is one of positive sign */
    int32_t top = INT32_MIN;
    for (int i = 0; i < n; i++) {
        int32_t next = ordered(x[i]);
        top = next > top ? next : top;
    }
    return from_ordered(top);
}

INLINE double sum_of(const double *x, int n) {
    double part[BLOCK] = {0};
    for (int i = 0; i < n; i += BLOCK)
        for (int j = 0; j < BLOCK; j++) part[j] += x[i + j];
    for (int half = BLOCK / 2; half; half /= 2)
        for (int j = 0; j < half; j++) part[j] += part[j + half];
    return part[0];
}

/* --- scores ----------------------------------------------------------------------------------- */

/* One scoring pass over x [n]: scores that are yet to be divided by what is returned. */
INLINE double score(const float *x, int n, int func, double *exact) {
    if (func == MK_SCORING_FUNC_SIGMOID) {
        for (int i = 0; i < n; i++) {
            double z = x[i], u = exp_of(-fabs(z));
            exact[i] = (z >= 0 ? 1.0 : u) / (1.0 + u);
        }
        return 1.0;
    }
    if (func == MK_SCORING_FUNC_SQRTSOFTPLUS) {
        for (int i = 0; i < n; i++) {
            double z = x[i], u = exp_of(-fabs(z));
            exact[i] = sqrt((z > 0 ? z : 0.0) + log1p_of(u));
        }
        return 1.0;
    }
    double peak = greatest(x, n);
    for (int i = 0; i < n; i++) exact[i] = exp_of((double)x[i] - peak);
    return sum_of(exact, n);
}

/* Scores of x [n], rounded; `left_out` says which classes no later pass may see: those where it
   holds -inf. Returns what the scores in `exact` are yet to be divided by. */
INLINE double score_all(const float *x, const float *left_out, int n, int func, int passes,
                        int dtype, double *exact, float *rounded) {
    double total = 0.0;
    for (int pass = 0; pass < passes; pass++) {
        if (pass)
            for (int i = 0; i < n; i++) rounded[i] = left_out[i] == -INFINITY ? -INFINITY : rounded[i];
        total = score(pass ? rounded : x, n, func, exact);
        for (int i = 0; i < n; i++) rounded[i] = (float)(exact[i] / total);
        round_all(rounded, n, dtype);
    }
    return total;
}

/* In nats, of scores that need not sum to 1; consumes them. */
INLINE double entropy_of(double *exact, int n) {
    double total = sum_of(exact, n);
    for (int i = 0; i < n; i++) {
        double x = exact[i], y = x * log_of(x > 0 ? x : 1.0);
        exact[i] = x != x ? x : y;
    }
    double entropy = log(total) - sum_of(exact, n) / total;
    return entropy < 0 ? 0.0 : entropy;
}

/* --- selection -------------------------------------------------------------------------------- */

INLINE int64_t top_of(const int64_t *keys) {
    int64_t top = keys[0];
    for (int j = 1; j < BLOCK; j++) top = keys[j] > top ? keys[j] : top;
    return top;
}

/* The value above the id, so that the greatest key is the best value of the best id. */
INLINE int64_t key_of(float value, uint32_t id, uint32_t flip) {
    return (int64_t)((uint64_t)(int64_t)ordered(value) << 32 | (id ^ flip));
}

INLINE float value_of(int64_t key) { return from_ordered((int32_t)(key >> 32)); }

/* Take the best of `keys` [n], n a multiple of BLOCK, in descending order. */
INLINE void rank(int64_t *keys, int64_t *tops, int n, int count, int64_t *best, uint32_t flip) {
    int blocks = n / BLOCK, wide = padded(blocks);
    for (int b = 0; b < blocks; b++) tops[b] = top_of(keys + b * BLOCK);
    for (int b = blocks; b < wide; b++) tops[b] = INT64_MIN;
    for (int k = 0; k < count; k++) {
        int64_t top = top_of(tops);
        for (int b = BLOCK; b < wide; b += BLOCK) {
            int64_t next = top_of(tops + b);
            top = next > top ? next : top;
        }
        best[k] = top;
        uint32_t id = (uint32_t)top ^ flip, block = id / BLOCK;
        keys[id] = INT64_MIN;
        tops[block] = top_of(keys + block * BLOCK);
    }
}

/* Close all groups but the best; the sum of two is rounded as score + bias is. */
INLINE void close_groups(const Scratch *s, int E, int groups, int keep, int by_sum, int dtype,
                         uint32_t flip) {
    int size = E / groups, wide = padded(groups);
    for (int g = 0; g < groups; g++) {
        const float *x = s->biased + g * size;
        float first = -INFINITY, second = -INFINITY;
        for (int i = 0; i < size; i++) {
            float v = x[i];
            float low = v < first ? v : first;
            first = v > first ? v : first;
            second = low > second ? low : second;
        }
        float value = by_sum ? to_dtype((double)first + second, dtype) : first;
        s->keys[g] = key_of(value, (uint32_t)g, flip);
        s->closed[g] = 1;
    }
    for (int g = groups; g < wide; g++) s->keys[g] = INT64_MIN;
    for (int k = 0; k < keep; k++) {
        int64_t best;
        rank(s->keys, s->tops, wide, 1, &best, flip);
        s->closed[(uint32_t)best ^ flip] = 0;
    }
}

/* --- one row ---------------------------------------------------------------------------------- */

static void fill(int32_t *ids, float *scores, float *weights, int from, int to, float score) {
    for (int k = from; k < to; k++) ids[k] = -1, scores[k] = score, weights[k] = 0.0f;
}

static void invalid(int K, int K_max, int32_t *ids, float *scores, float *weights, float *scalars,
                    int32_t *runner_up) {
    K = K < 0 ? 0 : K > K_max ? K_max : K;
    fill(ids, scores, weights, 0, K, NAN);
    fill(ids, scores, weights, K, K_max, 0.0f);
    for (int i = 0; i < MK_SCALARS; i++) scalars[i] = NAN;
    *runner_up = -1;
}

/* Scores of the two selected: each a softmax over the logits near its own. */
INLINE void sparsemixer(Scratch *s, int n, const int32_t *ids, double threshold, int dtype,
                        float *scores) {
    for (int k = 0; k < 2; k++) {
        double top = s->z[ids[k]];
        for (int i = 0; i < n; i++) {
            double z = s->z[i], size = fabs(z);
            double gap = to_dtype(top - z, dtype);
            double distance = to_dtype(gap / (size > top ? size : top), dtype);
            int dropped = distance > threshold || z == -INFINITY;
            s->exact[i] = dropped ? -INFINITY : z - top;
        }
        if (k) s->exact[ids[0]] = -INFINITY;
        for (int i = 0; i < n; i++) s->exact[i] = exp_of(s->exact[i] > 0 ? 0.0 : s->exact[i]);
        scores[k] = to_dtype(1.0 / sum_of(s->exact, n), dtype);
    }
}

INLINE void normalise(double *w, int K, const double *policy) {
    double p = policy[MK_NORM_P], eps = policy[MK_NORM_EPS], total = 0.0;
    int mode = (int)policy[MK_NORM_EPS_MODE];
    for (int k = 0; k < K; k++) total += p == 1.0 ? w[k] : pow(fabs(w[k]), p);
    if (p != 1.0) total = pow(total, 1.0 / p);
    double below = total + eps;
    if (mode == MK_NORM_EPS_MODE_CLAMP) below = total < eps ? eps : total;
    for (int k = 0; k < K; k++) w[k] /= below;
    if (mode == MK_NORM_EPS_MODE_UNIFORM && total == 0.0)
        for (int k = 0; k < K; k++) w[k] = 1.0 / K;
}

INLINE void route_row(const float *logits, int E, const double *policy, const float *bias,
                      const float *per_expert_scale, const int32_t *hash_ids, int K_max,
                      int32_t *expert_ids, float *scores, float *weights, float *scalars,
                      int32_t *runner_up, void *memory) {
    const int K = (int)policy[MK_NUM_EXPERTS_PER_TOK];
    const int func = (int)policy[MK_SCORING_FUNC], passes = (int)policy[MK_SCORE_PASSES];
    const int score_dtype = (int)policy[MK_SCORE_DTYPE];
    const int after = (int)policy[MK_SCORE_ORDER] == MK_SCORE_ORDER_TOPK_THEN_SCORE;
    const int sparse = func == MK_SCORING_FUNC_SPARSEMIXER, by_logit = after || sparse;
    const int site = (int)policy[MK_CORRECTION_BIAS];
    const int bias_dtype = (int)policy[MK_CORRECTION_BIAS_DTYPE];
    const int biased_dtype = (int)policy[MK_BIASED_DTYPE];
    const int groups = (int)policy[MK_N_GROUP], keep = (int)policy[MK_TOPK_GROUP];
    const int hashed = policy[MK_HASH_TABLE] != 0;
    const int source = (int)policy[MK_WEIGHTS_FROM];
    const int scaled = policy[MK_PER_EXPERT_SCALE] != 0;
    const uint32_t flip = (int)policy[MK_TIE_BREAK] == MK_TIE_BREAK_HIGHER_ID ? 0 : UINT32_MAX;

    int usable = E >= 1 && E <= MK_EXPERTS_MAX && K >= 1 && K <= E && K <= K_max;
    usable = usable && K <= MK_PICKS_MAX && groups >= 1 && E % groups == 0 && keep <= groups;
    usable = usable && !(sparse && K != 2) && !(site && !bias) && !(scaled && !per_expert_scale);
    if (hashed)
        for (int k = 0; usable && k < K; k++)
            usable = hash_ids && hash_ids[k] >= 0 && hash_ids[k] < E;
    if (!usable) {
        invalid(K, K_max, expert_ids, scores, weights, scalars, runner_up);
        return;
    }

    Scratch s = scratch_of(memory, E);
    const int n = padded(E);
    float *z = s.z;
    memcpy(z, logits, (size_t)E * sizeof *z);
    for (int i = E; i < n; i++) z[i] = -INFINITY;
    round_all(z, n, (int)policy[MK_LOGITS_DTYPE]);
    const double scale = policy[MK_ROUTER_LOGIT_SCALE], cap = policy[MK_ROUTER_LOGIT_SOFTCAPPING];
    if (scale != 1.0)
        for (int i = 0; i < n; i++) z[i] = (float)(z[i] * scale);
    int poisoned = 0, excluded = E - n;
    for (int i = 0; i < n; i++) {
        poisoned |= !(z[i] < INFINITY);
        excluded += z[i] == -INFINITY;
    }
    if (poisoned || excluded > E - K) {
        invalid(K, K_max, expert_ids, scores, weights, scalars, runner_up);
        return;
    }
    if (cap != 0.0)
        for (int i = 0; i < E; i++)
            if (z[i] != -INFINITY) z[i] = (float)(cap * tanh(z[i] / cap));

    /* selection values */
    score_all(z, z, n, func, passes, score_dtype, s.exact, s.rounded);
    const double entropy = entropy_of(s.exact, n);
    float *biased = by_logit ? z : s.rounded;
    if (site != MK_CORRECTION_BIAS_NONE) {
        biased = s.biased;
        memcpy(biased, bias, (size_t)E * sizeof *biased);
        for (int i = E; i < n; i++) biased[i] = 0.0f;
        round_all(biased, n, bias_dtype);
        const float *base = site == MK_CORRECTION_BIAS_SCORE ? s.rounded : z;
        for (int i = 0; i < n; i++) biased[i] = (float)((double)base[i] + biased[i]);
        if (site == MK_CORRECTION_BIAS_SCORE)
            round_all(biased, n, biased_dtype);
        else if (!by_logit)
            score_all(biased, z, n, func, passes, score_dtype, s.exact, biased);
    }
    if (biased != z) {
        for (int i = 0; i < n; i++) s.biased[i] = z[i] == -INFINITY ? -INFINITY : biased[i];
        biased = s.biased;
    }
    s.biased = biased;

    /* experts */
    int32_t ids[MK_PICKS_MAX];
    double margin = NAN;
    *runner_up = -1;
    if (hashed) {
        memcpy(ids, hash_ids, (size_t)K * sizeof *ids);
    } else {
        for (int i = 0; i < n; i++) poisoned |= !(biased[i] < INFINITY);
        if (poisoned) {
            invalid(K, K_max, expert_ids, scores, weights, scalars, runner_up);
            return;
        }
        if (groups > 1)
            close_groups(&s, E, groups, keep, (int)policy[MK_GROUP_SCORE], biased_dtype, flip);
        for (int i = 0; i < n; i++) s.keys[i] = key_of(biased[i], (uint32_t)i, flip);
        if (groups > 1) {
            float masked = (int)policy[MK_GROUP_MASK_FILL] == MK_GROUP_MASK_FILL_0 ? 0 : -INFINITY;
            for (int g = 0, size = E / groups; g < groups; g++)
                for (int i = g * size; s.closed[g] && i < (g + 1) * size; i++)
                    if (biased[i] != -INFINITY) s.keys[i] = key_of(masked, (uint32_t)i, flip);
        }
        int64_t best[MK_PICKS_MAX + 1];
        for (int i = E; i < n; i++) s.keys[i] = INT64_MIN;
        rank(s.keys, s.tops, n, K + (K < E), best, flip);
        for (int k = 0; k < K; k++) ids[k] = (int32_t)((uint32_t)best[k] ^ flip);
        if (value_of(best[K - 1]) == -INFINITY) {
            invalid(K, K_max, expert_ids, scores, weights, scalars, runner_up);
            return;
        }
        if (K < E && value_of(best[K]) != -INFINITY) {
            *runner_up = (int32_t)((uint32_t)best[K] ^ flip);
            margin = (double)value_of(best[K - 1]) - value_of(best[K]);
        }
    }

    /* scores and weights of the selected */
    float picked[MK_PICKS_MAX], chosen[MK_PICKS_MAX];
    double w[MK_PICKS_MAX];
    const int few = padded(K);
    for (int k = 0; k < few; k++) picked[k] = k < K ? z[ids[k]] : -INFINITY;
    if (sparse)
        sparsemixer(&s, n, ids, policy[MK_SPARSEMIXER_THRESHOLD], score_dtype, chosen);
    else if (after)
        score_all(picked, picked, few, func, passes, score_dtype, s.exact, chosen);
    else
        for (int k = 0; k < K; k++) chosen[k] = s.rounded[ids[k]];
    if (source == MK_WEIGHTS_FROM_SCORES) {
        for (int k = 0; k < K; k++) w[k] = chosen[k];
    } else if (source == MK_WEIGHTS_FROM_LOGITS) {
        for (int k = 0; k < K; k++) w[k] = picked[k];
    } else {
        for (int k = 0; k < few; k++) picked[k] = k < K ? biased[ids[k]] : -INFINITY;
        if (after) {
            float rounded[MK_PICKS_MAX];
            score_all(picked, picked, few, func, passes, score_dtype, s.exact, rounded);
            memcpy(picked, rounded, sizeof picked);
        }
        for (int k = 0; k < K; k++) {
            w[k] = picked[k];
            if (source == MK_WEIGHTS_FROM_BIASED_MINUS_BIAS)
                w[k] = to_dtype(w[k] - to_dtype(bias[ids[k]], bias_dtype), biased_dtype);
        }
    }
    if (policy[MK_NORM_TOPK_PROB] != 0) normalise(w, K, policy);
    double sum = 0.0, mass = 0.0;
    for (int k = 0; k < K; k++) {
        double weight = w[k] * (scaled ? per_expert_scale[ids[k]] : 1.0);
        weight *= policy[MK_WEIGHT_SCALE];
        if (ids[k] >= policy[MK_WEIGHTLESS_FROM]) weight = 0.0;
        expert_ids[k] = ids[k];
        scores[k] = chosen[k];
        weights[k] = to_dtype(weight, (int)policy[MK_COMBINE_DTYPE]);
        sum += weights[k];
        mass += chosen[k];
    }
    fill(expert_ids, scores, weights, K, K_max, 0.0f);
    scalars[MK_SCORE_SUM] = (float)sum;
    scalars[MK_MASS] = (float)mass;
    scalars[MK_ENTROPY] = (float)entropy;
    scalars[MK_MARGIN] = (float)margin;
}

void mk_route(const float *logits, int E, const double *policy, const float *bias,
              const float *per_expert_scale, const int32_t *hash_ids, int K_max,
              int32_t *expert_ids, float *scores, float *weights, float *scalars,
              int32_t *runner_up, void *scratch) {
    route_row(logits, E, policy, bias, per_expert_scale, hash_ids, K_max, expert_ids, scores,
              weights, scalars, runner_up, scratch);
}

void mk_route_rows(const float *logits, ptrdiff_t logits_stride, int T, int E,
                   const double *policies, int R, const int32_t *row_of, int P, const float *bias,
                   ptrdiff_t bias_stride, const float *per_expert_scale, ptrdiff_t scale_stride,
                   const int32_t *hash_ids, ptrdiff_t hash_stride, int K_max, int32_t *expert_ids,
                   float *scores, float *weights, float *scalars, int32_t *runner_up,
                   void *scratch) {
    for (ptrdiff_t at = 0; at < (ptrdiff_t)T * P; at++) {
        ptrdiff_t t = at / P, place = at * K_max;
        int row = row_of[at];
        if (row < 0 || row >= R) {
            fill(expert_ids + place, scores + place, weights + place, 0, K_max, 0.0f);
            memset(scalars + at * MK_SCALARS, 0, MK_SCALARS * sizeof *scalars);
            runner_up[at] = -1;
            continue;
        }
        mk_route(logits + t * logits_stride, E, policies + (ptrdiff_t)row * MK_POLICY_WIDTH,
                 bias ? bias + t * bias_stride : NULL,
                 per_expert_scale ? per_expert_scale + t * scale_stride : NULL,
                 hash_ids ? hash_ids + t * hash_stride : NULL, K_max, expert_ids + place,
                 scores + place, weights + place, scalars + at * MK_SCALARS, runner_up + at,
                 scratch);
    }
}
