/* Attention of one query row a lane over its cached keys and values.
 *
 * A chunk is one key head of one lane with a block of keys: scores of all the query heads that
 * share it, their softmax within the block, and the block's mix of values. Blocks are merged in
 * order, so the sum does not depend on the number of threads.
 */
#include <math.h>

#include "step.h"

/* [2, lanes, kv_heads, capacity, head_dim]: where a head's row of a position is, in elements. */
static size_t cached(const mk_step *s, const mk_op *op, int which, int lane, int head, int at) {
    size_t row = (size_t)which * (size_t)s->lanes + (size_t)lane;
    row = (row * (size_t)op->kv_heads + (size_t)head) * (size_t)s->capacity + (size_t)at;
    return row * (size_t)op->head_dim;
}

static void rotate(float *x, const float *cos, const float *sin, int D, int wide, int dtype) {
    int half = D / 2;
    for (int d = 0; d < half; d++) {
        float a = x[d], b = x[d + half];
        float a_cos = a * cos[d], b_sin = b * sin[d];
        float b_cos = b * cos[d + half], a_sin = a * sin[d + half];
        if (!wide) {
            a_cos = mk_round(a_cos, dtype), b_sin = mk_round(b_sin, dtype);
            b_cos = mk_round(b_cos, dtype), a_sin = mk_round(a_sin, dtype);
        }
        x[d] = mk_round(a_cos + b_sin, dtype);
        x[d + half] = mk_round(b_cos + a_sin, dtype);
    }
}

static void rotate_heads(mk_step *s, const mk_op *op, float *row, int position) {
    int D = op->head_dim, wide = op->flags & MK_WIDE_ROPE;
    int stored = wide ? MK_FLOAT32 : s->dtype;
    float *cos = s->rotation, *sin = s->rotation + D;
    for (int d = 0; d < D; d++) {
        cos[d] = mk_load(op->cos, (size_t)position * (size_t)D + (size_t)d, stored);
        sin[d] = mk_load(op->sin, (size_t)position * (size_t)D + (size_t)d, stored);
    }
    for (int head = 0; head < op->heads + op->kv_heads; head++) {
        float *x = row + (size_t)head * (size_t)D;
        if (s->dtype == MK_BFLOAT16) rotate(x, cos, sin, D, wide, MK_BFLOAT16);
        else if (s->dtype == MK_FLOAT32) rotate(x, cos, sin, D, wide, MK_FLOAT32);
        else rotate(x, cos, sin, D, wide, MK_FLOAT16);
    }
}

void mk_place(mk_step *s, const mk_op *op) {
    int D = op->head_dim;
    for (int n = 0; n < s->N; n++) {
        float *row = mk_row(s, op->x, n);
        if (op->cos != NULL) rotate_heads(s, op, row, s->starts[n]);
        for (int which = 0; which < 2; which++)
            for (int head = 0; head < op->kv_heads; head++) {
                const float *x = row + (size_t)(op->heads + which * op->kv_heads + head) * D;
                size_t to = cached(s, op, which, s->at[n], head, s->starts[n]);
                for (int d = 0; d < D; d++) mk_store(op->cache, to + d, x[d], s->dtype);
            }
    }
}

static int first_key(const mk_op *op, int start) {
    int end = start + 1;
    return op->window > 0 && end > op->window ? end - op->window : 0;
}

static int blocks_of(const mk_op *op, int start) {
    return (start + 1 - first_key(op, start) + MK_KEYS - 1) / MK_KEYS;
}

static float *partial_of(const mk_step *s, const mk_op *op, int n, int head, int block) {
    size_t row = (size_t)n * (size_t)op->heads + (size_t)head;
    return s->partial + (row * (size_t)s->blocks + (size_t)block) * s->partial_stride;
}

int mk_attend_phase(mk_step *s, const mk_op *op) {
    int chunks = 0;
    for (int n = 0; n < s->N; n++) {
        chunks += blocks_of(op, s->starts[n]) * op->kv_heads;
        for (int head = 0; head < op->heads; head++) {
            size_t row = (size_t)n * (size_t)op->heads + (size_t)head;
            mk_pack_row(s, mk_row(s, op->x, n) + (size_t)head * op->head_dim,
                        s->queries + row * s->query_stride, op->head_dim);
        }
    }
    return chunks;
}

void mk_attend_chunk(void *step, int index, int thread) {
    mk_step *s = step;
    const mk_op *op = s->op;
    const mk_scratch *scratch = &s->scratch[thread];
    int n = 0, here;
    for (; index >= (here = blocks_of(op, s->starts[n]) * op->kv_heads); n++) index -= here;
    int blocks = here / op->kv_heads, head = index / blocks, block = index % blocks;
    int group = op->heads / op->kv_heads, D = op->head_dim;
    int from = first_key(op, s->starts[n]) + block * MK_KEYS, left = s->starts[n] + 1 - from;
    int keys = left < MK_KEYS ? left : MK_KEYS;
    for (int g = 0; g < group; g++) {
        size_t row = (size_t)n * (size_t)op->heads + (size_t)(head * group + g);
        scratch->x[g] = s->queries + row * s->query_stride;
        scratch->y[g] = scratch->scores + (size_t)g * MK_KEYS;
        scratch->rows[g] = scratch->y[g];
        scratch->other[g] = partial_of(s, op, n, head * group + g, block) + MK_PAD;
    }
    const char *cache = op->cache;
    size_t keys_at = cached(s, op, 0, s->at[n], head, from);
    size_t values_at = cached(s, op, 1, s->at[n], head, from);
    s->isa->rows[s->dtype](cache + keys_at * s->item, (size_t)D, keys, D, scratch->x, group,
                           scratch->y);
    for (int g = 0; g < group; g++) {
        float *scores = scratch->y[g], most = -INFINITY;
        for (int k = 0; k < keys; k++) {
            scores[k] *= op->number;
            most = scores[k] > most ? scores[k] : most;
        }
        float *partial = scratch->other[g] - MK_PAD;
        partial[0] = most;
        partial[1] = s->isa->exp_sum(scores, keys, most);
        mk_round_row(scores, keys, s->dtype); /* as every framework does before the mix */
        memset(scratch->other[g], 0, (size_t)D * sizeof(float));
    }
    s->isa->mix[s->dtype](cache + values_at * s->item, (size_t)D, keys, D, scratch->rows, group,
                          scratch->other);
}

void mk_merge(mk_step *s, const mk_op *op) {
    int D = op->head_dim;
    for (int n = 0; n < s->N; n++)
        for (int head = 0; head < op->heads; head++) {
            float *y = mk_row(s, op->y, n) + (size_t)head * (size_t)D;
            float most = -INFINITY, total = 0.0f;
            int blocks = blocks_of(op, s->starts[n]);
            for (int b = 0; b < blocks; b++) most = fmaxf(most, partial_of(s, op, n, head, b)[0]);
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
