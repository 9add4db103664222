/* Attention of one query row a lane over its cached keys and values.
 *
 * A chunk is one key head of one lane with a block of keys: scores of all the query heads that
 * share it, their softmax within the block, and the block's mix of values. Blocks are merged in
 * order, so the sum does not depend on the number of threads.
 */
#include <math.h>

#include "step.h"

static int first_key(const mk_op *op, int start) {
    if (op->chunk > 0) return start / op->chunk * op->chunk;
    return op->window > 0 && start + 1 > op->window ? start + 1 - op->window : 0;
}

static int blocks_of(const mk_op *op, int start) {
    return (start + 1 - first_key(op, start) + MK_KEYS - 1) / MK_KEYS;
}

static float *partial_of(const mk_step *s, const mk_op *op, int n, int head, int block) {
    size_t row = (size_t)n * (size_t)op->heads + (size_t)head;
    return s->partial + (row * (size_t)s->blocks + (size_t)block) * s->partial_stride;
}

/* Chunks of `groups` query heads, so that one key head of many is work for several threads. */
int mk_attend_phase(mk_step *s, const mk_op *op) {
    int chunks = 0;
    for (int n = 0; n < s->N; n++) {
        chunks += blocks_of(op, s->starts[n]) * (op->heads / op->groups);
        for (int head = 0; head < op->heads; head++) {
            size_t row = (size_t)n * (size_t)op->heads + (size_t)head;
            mk_pack_row(s, mk_row(s, op->x, n) + (size_t)head * (size_t)op->head_dim,
                        s->queries + row * s->query_stride, op->head_dim);
        }
    }
    return chunks;
}

static void weigh(const mk_step *s, const mk_op *op, float *scores, int keys) {
    int dtype = op->flags & MK_ROUNDED ? s->dtype : MK_FLOAT32;
    mk_round_row(scores, keys, dtype);
    for (int k = 0; k < keys; k++) scores[k] *= op->number;
    mk_round_row(scores, keys, dtype);
    if (op->cap > 0.0f) s->isa->squash(scores, keys, op->cap, dtype);
}

/* Products of a query and a block's keys into what their values are mixed with; `partial`: the
 * largest score, and the sum. Alone in its block, a row is finished here: largest 0, sum 1. */
static void share(const mk_step *s, const mk_op *op, int head, float *scores, int keys, bool alone,
                  float *partial) {
    float most = -INFINITY;
    weigh(s, op, scores, keys);
    for (int k = 0; k < keys; k++) most = scores[k] > most ? scores[k] : most;
    alone = alone && op->flags & MK_SHARES;
    if (alone && op->sinks != NULL) most = fmaxf(most, op->sinks[head]);
    partial[0] = most;
    partial[1] = s->isa->exp_sum(scores, keys, most);
    if (alone) {
        float sum = partial[1] + (op->sinks != NULL ? mk_exp(op->sinks[head] - most) : 0.0f);
        for (int k = 0; k < keys; k++) scores[k] /= sum;
        partial[0] = 0.0f, partial[1] = 1.0f;
    }
    mk_round_row(scores, keys, s->dtype); /* as every framework does before the mix */
}

void mk_attend_chunk(void *step, int index, int thread) {
    mk_step *s = step;
    const mk_op *op = s->op;
    const mk_scratch *scratch = &s->scratch[thread];
    int n = 0, here, parts = op->heads / op->groups;
    for (; index >= (here = blocks_of(op, s->starts[n]) * parts); n++) index -= here;
    int blocks = here / parts, first = index / blocks * op->groups, block = index % blocks;
    int head = first / (op->heads / op->kv_heads), group = op->groups, width = op->v_dim;
    int from = first_key(op, s->starts[n]) + block * MK_KEYS, left = s->starts[n] + 1 - from;
    int keys = left < MK_KEYS ? left : MK_KEYS;
    for (int g = 0; g < group; g++) {
        size_t row = (size_t)n * (size_t)op->heads + (size_t)(first + g);
        scratch->x[g] = s->queries + row * s->query_stride;
        scratch->y[g] = scratch->scores + (size_t)g * MK_KEYS;
        scratch->rows[g] = scratch->y[g];
        scratch->other[g] = partial_of(s, op, n, first + g, block) + MK_PAD;
    }
    size_t keys_at = mk_cached(s, op, op->key_step, s->at[n], head, from);
    size_t values_at = mk_cached(s, op, op->value_step, s->at[n], head, from);
    s->isa->rows[s->dtype]((const char *)op->keys + keys_at * s->item, (size_t)op->key_step, keys,
                           op->head_dim, scratch->x, group, scratch->y);
    for (int g = 0; g < group; g++) {
        share(s, op, first + g, scratch->y[g], keys, blocks == 1, scratch->other[g] - MK_PAD);
        memset(scratch->other[g], 0, (size_t)width * sizeof(float));
    }
    s->isa->mix[s->dtype]((const char *)op->values + values_at * s->item, (size_t)op->value_step,
                          keys, width, scratch->rows, group, scratch->other);
}

/* A sink is one more logit, which takes its share and gives nothing. */
void mk_merge(mk_step *s, const mk_op *op) {
    int D = op->v_dim;
    for (int n = 0; n < s->N; n++)
        for (int head = 0; head < op->heads; head++) {
            float *y = mk_row(s, op->y, n) + (size_t)head * (size_t)D;
            int blocks = blocks_of(op, s->starts[n]);
            bool finished = blocks == 1 && op->flags & MK_SHARES;
            bool sink = op->sinks != NULL && !finished;
            float most = sink ? op->sinks[head] : -INFINITY;
            for (int b = 0; b < blocks; b++) most = fmaxf(most, partial_of(s, op, n, head, b)[0]);
            float total = sink ? mk_exp(op->sinks[head] - most) : 0.0f;
            memset(y, 0, (size_t)D * sizeof *y);
            for (int b = 0; b < blocks; b++) {
                const float *partial = partial_of(s, op, n, head, b);
                float share = mk_exp(partial[0] - most);
                total += partial[1] * share;
                for (int d = 0; d < D; d++) y[d] += partial[MK_PAD + d] * share;
            }
            for (int d = 0; d < D; d++) y[d] /= total;
            mk_round_row(y, D, s->dtype);
        }
}

/* --- latent attention ---
 *
 * The expansion's matrix has, for each head, `rows` rows that make a key of a latent of `cols`
 * numbers, then `v_dim` rows that make a value. No key is made: a query is brought into the space of
 * the latent by the first, and what was read there becomes a value by the second. */

static const char *head_rows(const mk_step *s, const mk_op *op, int head, int skipped) {
    size_t row = (size_t)head * (size_t)(op->rows + op->v_dim) + (size_t)skipped;
    return (const char *)op->weight + row * (size_t)op->cols * s->item;
}

static char *found_by(const mk_step *s, const mk_op *op, int n, int head) {
    return s->queries + ((size_t)n * (size_t)op->heads + (size_t)head) * s->query_stride;
}

int mk_latent_phase(mk_step *s, const mk_op *op) {
    if (op->kind == MK_OP_EXPAND)
        for (int n = 0; n < s->N; n++)
            for (int head = 0; head < op->heads; head++)
                mk_pack_row(s, mk_row(s, op->x, n) + (size_t)head * (size_t)op->cols,
                            found_by(s, op, n, head), op->cols);
    return op->heads;
}

/* A head of x is `rows` numbers to be absorbed and `turned` that stand for themselves. */
void mk_absorb_chunk(void *step, int head, int thread) {
    mk_step *s = step;
    const mk_op *op = s->op;
    const mk_scratch *scratch = &s->scratch[thread];
    size_t from = (size_t)head * (size_t)(op->rows + op->turned);
    size_t to = (size_t)head * (size_t)(op->cols + op->turned);
    for (int n = 0; n < s->N; n++) {
        scratch->rows[n] = mk_row(s, op->x, n) + from;
        scratch->y[n] = mk_row(s, op->y, n) + to;
        memset(scratch->y[n], 0, (size_t)op->cols * sizeof(float));
        memcpy(scratch->y[n] + op->cols, scratch->rows[n] + op->rows,
               (size_t)op->turned * sizeof(float));
    }
    s->isa->mix[s->dtype](head_rows(s, op, head, 0), (size_t)op->cols, op->rows, op->cols,
                          scratch->rows, s->N, scratch->y);
    for (int n = 0; n < s->N; n++) mk_round_row(scratch->y[n], op->cols, s->dtype);
}

void mk_expand_chunk(void *step, int head, int thread) {
    mk_step *s = step;
    const mk_op *op = s->op;
    const mk_scratch *scratch = &s->scratch[thread];
    for (int n = 0; n < s->N; n++) {
        scratch->x[n] = found_by(s, op, n, head);
        scratch->y[n] = mk_row(s, op->y, n) + (size_t)head * (size_t)op->v_dim;
    }
    s->isa->rows[s->dtype](head_rows(s, op, head, op->rows), (size_t)op->cols, op->v_dim, op->cols,
                           scratch->x, s->N, scratch->y);
    for (int n = 0; n < s->N; n++) mk_round_row(scratch->y[n], op->v_dim, s->dtype);
}
