/* What reads weights: one table of functions per instruction set.
 *
 * Vectors are padded with zeros to a multiple of MK_PAD elements; rows of weights are not padded.
 */
#ifndef MOESCOPE_PRODUCTS_H
#define MOESCOPE_PRODUCTS_H

#include <stddef.h>
#include <stdint.h>

#include "moescope_kernels.h"

enum { MK_PAD = 64, MK_TILE = 4, MK_BLOCK = 64 };

/* y[n][r] = sum over c of weight[r * stride + c] * x[n][c], for 1 or more vectors x[n]. Each row is
 * read once from memory. `stride` in elements; sums in float32; a vector's sums do not depend on
 * the others. */
typedef void (*mk_rows)(const void *weight, size_t stride, int rows, int cols,
                        const void *const *x, int lanes, float *const *y);

/* y[n][d] += sum over r of p[n][r] * values[r * stride + d], for d < width. */
typedef void (*mk_mix)(const void *values, size_t stride, int rows, int width,
                       const float *const *p, int lanes, float *const *y);

typedef struct {
    const char *name;
    mk_rows rows[MK_DTYPES];     /* by the dtype of the weights */
    int input[MK_DTYPES];        /* the dtype `rows` wants its vectors in */
    mk_mix mix[MK_DTYPES];
    /* gate[i] = silu(gate[i]) * up[i], each step rounded to dtype; and the same of any activation,
     * where `up` may be NULL */
    void (*silu_times)(float *gate, const float *up, int n, int dtype);
    void (*activate)(const mk_act *act, float *gate, const float *up, int n, int dtype);
    /* x[i] = cap * tanh(x[i] / cap), each step rounded to dtype */
    void (*squash)(float *x, int n, float cap, int dtype);
    /* x[i] = exp(x[i] - most); returns the sum */
    float (*exp_sum)(float *x, int n, float most);
    /* of every MK_BLOCK logits: the largest, NaN where one is NaN, and the sum of exp(x - it) */
    void (*sum_up)(const float *x, int64_t n, float *most, float *sum);
    /* sum of P (log P - log Q) over n pairs of logits, P = exp(p - log_sum_p); `apart` is
     * log_sum_q - log_sum_p */
    double (*diverge)(const float *p, const float *q, int64_t n, float log_sum_p, float apart);
    /* how many of x[0 .. at - 1] are `value` or more, and of x[at .. n - 1] more */
    int64_t (*ahead)(const float *x, int64_t n, float value, int64_t at);
    /* touches every line and does nothing with it */
    uint64_t (*read)(const void *from, size_t bytes);
} mk_isa;

/* The best set this CPU has, or the one `wanted` names if the CPU has it ("" or NULL: the best). */
const mk_isa *mk_choose_isa(const char *wanted);

extern const mk_isa mk_portable;
#if defined(__x86_64__)
extern const mk_isa mk_avx2, mk_avx512, mk_avx512_bf16;
#endif

#endif
