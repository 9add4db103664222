/* What depends on where a token stands: rope, factors of queries, and the caches. */
#include <math.h>

#include "step.h"

/* The row of a cache where a head's keys or values of position `at` are, in elements. */
size_t mk_cached(const mk_step *s, const mk_op *op, int step, int lane, int head, int at) {
    size_t row = (size_t)lane * (size_t)op->kv_heads + (size_t)head;
    return (row * (size_t)s->capacity + (size_t)at) * (size_t)step;
}

static void store(mk_step *s, const mk_op *op, int n, const float *x, void *cache, int step) {
    for (int head = 0; head < op->kv_heads; head++, x += step) {
        size_t to = mk_cached(s, op, step, s->at[n], head, s->starts[n]);
        for (int d = 0; d < step; d++) mk_store(cache, to + (size_t)d, x[d], s->dtype);
    }
}

void mk_remember(mk_step *s, const mk_op *op) {
    for (int n = 0; n < s->N; n++) {
        const float *x = mk_row(s, op->x, n) + op->at;
        store(s, op, n, x, op->keys, op->key_step);
        if (op->values == NULL) continue;
        store(s, op, n, x + op->kv_heads * op->key_step, op->values, op->value_step);
    }
}

/* a and b are turned against each other: b lies `apart` columns further. */
MK_INLINE void turn_two(float *x, int a, int b, const float *cos, const float *sin,
                        const int wide, const int dtype) {
    float a_cos = x[a] * cos[a], b_sin = x[b] * sin[a];
    float b_cos = x[b] * cos[b], a_sin = x[a] * sin[b];
    if (!wide) {
        a_cos = mk_round(a_cos, dtype), b_sin = mk_round(b_sin, dtype);
        b_cos = mk_round(b_cos, dtype), a_sin = mk_round(a_sin, dtype);
    }
    x[a] = mk_round(a_cos + b_sin, dtype);
    x[b] = mk_round(b_cos + a_sin, dtype);
}

MK_INLINE void turn(float *x, const float *cos, const float *sin, const mk_op *op,
                    const int dtype) {
    int half = op->turned / 2, wide = op->flags & MK_WIDE;
    if (op->flags & MK_PAIRS)
        for (int d = 0; d < half; d++) turn_two(x, 2 * d, 2 * d + 1, cos, sin, wide, dtype);
    else
        for (int d = 0; d < half; d++) turn_two(x, d, d + half, cos, sin, wide, dtype);
}

void mk_turn(mk_step *s, const mk_op *op) {
    int dims = op->turned, stored = op->flags & MK_WIDE ? MK_FLOAT32 : s->dtype;
    float *cos = s->rotation, *sin = s->rotation + dims;
    for (int n = 0; n < s->N; n++) {
        size_t position = (size_t)s->starts[n];
        if (op->switch_at > 0 && s->starts[n] >= op->switch_at) position += (size_t)s->capacity;
        for (int d = 0; d < dims; d++) {
            cos[d] = mk_load(op->cos, position * (size_t)dims + (size_t)d, stored);
            sin[d] = mk_load(op->sin, position * (size_t)dims + (size_t)d, stored);
        }
        float *x = mk_row(s, op->x, n) + op->at;
        for (int head = 0; head < op->heads; head++, x += op->step) {
            if (s->dtype == MK_BFLOAT16) turn(x, cos, sin, op, MK_BFLOAT16);
            else if (s->dtype == MK_FLOAT32) turn(x, cos, sin, op, MK_FLOAT32);
            else turn(x, cos, sin, op, MK_FLOAT16);
        }
    }
}

/* Factors of queries that grow with the position (Llama 4, Mistral 4, Beam). */
static float warmth(const mk_op *op, int start) {
    float at = (float)(op->flags & MK_ONE_LESS ? start : start + 1);
    if (op->flags & MK_POWER) return expf(op->number * log1pf(at / op->floor));
    return log1pf(floorf(at / op->floor)) * op->number + 1.0f;
}

void mk_warm(mk_step *s, const mk_op *op) {
    for (int n = 0; n < s->N; n++) {
        float *x = mk_row(s, op->x, n) + op->at, factor = warmth(op, s->starts[n]);
        if (!(op->flags & MK_WIDE)) factor = mk_round(factor, s->dtype);
        for (int i = 0; i < op->cols; i++) x[i] *= factor;
        mk_round_row(x, op->cols, s->dtype);
    }
}
