/* What a row of next-token logits says: its log partition sum and its likeliest tokens.
 *
 * A row is looked at once, in blocks of MK_BLOCK logits, by whoever has them in L1; the rest is done
 * with what was found of the blocks. Blocks begin at multiples of MK_BLOCK whoever computed them, so
 * that a row gives the same bits wherever it came from.
 */
#include "expect.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>

#include "pool.h"

/* Keeps the `count` largest, descending, equal ones by id. */
static void likeliest(const float *x, int64_t n, const float *most, int count, int32_t *ids,
                      float *values) {
    int held = 0;
    for (int64_t block = 0, start = 0; start < n; block++, start += MK_BLOCK) {
        if (held == count && !(most[block] > values[count - 1])) continue;
        int64_t end = start + MK_BLOCK < n ? start + MK_BLOCK : n;
        for (int64_t i = start; i < end; i++) {
            if (held == count && !(x[i] > values[count - 1])) continue;
            int at = held < count ? held++ : count - 1;
            for (; at > 0 && x[i] > values[at - 1]; at--) {
                ids[at] = ids[at - 1];
                values[at] = values[at - 1];
            }
            ids[at] = (int32_t)i;
            values[at] = x[i];
        }
    }
}

void mk_conclude(const mk_isa *isa, const float *x, int64_t n, const float *most,
                 const float *sum, const mk_expected *out, int64_t row) {
    size_t blocks = mk_blocks(n);
    float top = -INFINITY;
    bool odd = false;
    for (size_t b = 0; b < blocks; b++) {
        odd |= most[b] != most[b];
        top = most[b] > top ? most[b] : top;
    }
    out->log_sum[row] = NAN;
    if (odd || !isfinite(top)) return;
    double total = 0.0;
    for (size_t b = 0; b < blocks; b++)
        if (sum[b] > 0.0f) total += (double)sum[b] * (double)mk_exp(most[b] - top);
    out->log_sum[row] = top + log(total);
    int64_t first = row * out->count;
    likeliest(x, n, most, out->count, out->ids + first, out->values + first);
    if (out->next == NULL || out->next[row] < 0) return;
    int64_t next = out->next[row];
    out->told[row] = x[next];
    out->rank[row] = (int32_t)(1 + isa->ahead(x, n, x[next], next));
}

typedef struct {
    const mk_isa *isa;
    const mk_logits *in;
    const mk_expected *out;
    size_t blocks, room; /* floats of a thread: most, sum, and a row where it must be widened */
    float *scratch;
    bool begun;
} job;

static void expect_row(void *given, int row, int thread) {
    const job *j = given;
    const mk_logits *in = j->in;
    float *most = j->scratch + (size_t)thread * j->room, *sum = most + j->blocks;
    size_t first = (size_t)row * (size_t)in->stride;
    const float *x = (const float *)in->from + first;
    if (in->dtype != MK_FLOAT32) {
        float *wide = sum + j->blocks;
        const uint16_t *halves = (const uint16_t *)in->from + first;
        if (in->dtype == MK_BFLOAT16)
            for (int64_t i = 0; i < in->n; i++) wide[i] = mk_from_bf16(halves[i]);
        else
            for (int64_t i = 0; i < in->n; i++) wide[i] = mk_from_f16(halves[i]);
        x = wide;
    }
    j->isa->sum_up(x, in->n, most, sum);
    mk_conclude(j->isa, x, in->n, most, sum, j->out, row);
}

static int next(void *given, mk_chunk *chunk) {
    job *j = given;
    if (j->begun) return 0;
    j->begun = true;
    *chunk = expect_row;
    return (int)j->in->rows;
}

int32_t mk_expect(mk_pool *pool, const char *isa, const mk_logits *in, const mk_expected *out) {
    job j = {.isa = mk_choose_isa(isa), .in = in, .out = out, .blocks = mk_blocks(in->n)};
    if (j.isa == NULL || in->rows > MK_MOST_CHUNKS) return -1;
    size_t wide = in->dtype == MK_FLOAT32 ? 0 : (size_t)in->n;
    j.room = (2 * j.blocks + wide + MK_PAD) / MK_PAD * MK_PAD;
    size_t threads = pool != NULL ? (size_t)mk_pool_threads(pool) : 1;
    j.scratch = malloc(threads * j.room * sizeof *j.scratch);
    if (j.scratch == NULL) return -1;
    if (pool != NULL) mk_pool_run(pool, next, &j);
    else
        for (int row = 0; row < in->rows; row++) expect_row(&j, row, 0);
    free(j.scratch);
    return 0;
}

double mk_divergence(const char *isa, const float *p, const float *q, int64_t n, double log_sum_p,
                     double log_sum_q) {
    const mk_isa *set = mk_choose_isa(isa);
    if (set == NULL) return NAN;
    return set->diverge(p, q, n, (float)log_sum_p, (float)(log_sum_q - log_sum_p));
}
