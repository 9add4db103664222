/* What a row of next-token logits says: its log partition sum and its likeliest tokens. */
#include <math.h>

#include "numbers.h"
#include "products.h"

enum { BLOCK = 64, PIECE = 1024 };

/* The maximum of a row; NaN where it holds one, which no comparison would tell. */
static float largest(const float *x, int64_t n) {
    float most[16], odd[16] = {0};
    for (int j = 0; j < 16; j++) most[j] = -INFINITY;
    int64_t i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) {
            most[j] = x[i + j] > most[j] ? x[i + j] : most[j];
            odd[j] = x[i + j] == x[i + j] ? odd[j] : NAN;
        }
    for (; i < n; i++) {
        most[0] = x[i] > most[0] ? x[i] : most[0];
        odd[0] = x[i] == x[i] ? odd[0] : NAN;
    }
    for (int j = 1; j < 16; j++) {
        most[0] = most[j] > most[0] ? most[j] : most[0];
        odd[0] += odd[j];
    }
    return most[0] + odd[0];
}

/* ids [count]: descending values, equal ones by id; count <= n. */
static void likeliest(const float *x, int64_t n, int count, int32_t *ids) {
    int held = 0;
    for (int64_t start = 0; start < n; start += BLOCK) {
        int64_t end = start + BLOCK < n ? start + BLOCK : n;
        if (held == count) {
            float bar = x[ids[count - 1]];
            int any = 0;
            for (int64_t i = start; i < end; i++) any |= x[i] > bar;
            if (!any) continue;
        }
        for (int64_t i = start; i < end; i++) {
            if (held == count && !(x[i] > x[ids[count - 1]])) continue;
            int at = held < count ? held++ : count - 1;
            for (; at > 0 && x[i] > x[ids[at - 1]]; at--) ids[at] = ids[at - 1];
            ids[at] = (int32_t)i;
        }
    }
}

int32_t mk_expect(const char *isa, const float *logits, int64_t rows, int64_t n, int32_t count,
                  double *log_sum, int32_t *ids) {
    const mk_isa *set = mk_choose_isa(isa);
    if (set == NULL) return -1;
    for (int64_t r = 0; r < rows; r++, logits += n) {
        float most = largest(logits, n);
        log_sum[r] = NAN;
        if (!isfinite(most)) continue;
        double sum = 0.0;
        for (int64_t i = 0; i < n; i += PIECE) {
            float piece[PIECE];
            int size = (int)(n - i < PIECE ? n - i : PIECE);
            memcpy(piece, logits + i, (size_t)size * sizeof *piece);
            sum += set->exp_sum(piece, size, most);
        }
        log_sum[r] = most + log(sum);
        likeliest(logits, n, count, ids + r * count);
    }
    return 0;
}

double mk_divergence(const char *isa, const float *p, const float *q, int64_t n, double log_sum_p,
                     double log_sum_q) {
    const mk_isa *set = mk_choose_isa(isa);
    if (set == NULL) return NAN;
    float apart = (float)(log_sum_q - log_sum_p);
    double sum = 0.0;
    for (int64_t i = 0; i < n; i += PIECE) {
        float share[PIECE], sums[16] = {0};
        int size = (int)(n - i < PIECE ? n - i : PIECE), j = 0;
        memcpy(share, p + i, (size_t)size * sizeof *share);
        set->exp_sum(share, size, (float)log_sum_p);
        for (; j + 16 <= size; j += 16)
            for (int k = 0; k < 16; k++) {
                float term = share[j + k] * (p[i + j + k] - q[i + j + k] + apart);
                sums[k] += share[j + k] > 0.0f ? term : 0.0f;
            }
        for (; j < size; j++)
            if (share[j] > 0.0f) sums[0] += share[j] * (p[i + j] - q[i + j] + apart);
        for (int k = 0; k < 16; k++) sum += sums[k];
    }
    return sum;
}
