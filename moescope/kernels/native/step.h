/* The state of a decode step, shared by the files that implement its operators. */
#ifndef MOESCOPE_STEP_H
#define MOESCOPE_STEP_H

#include <stdbool.h>
#include <stddef.h>

#include "moescope_kernels.h"
#include "numbers.h"
#include "pool.h"
#include "products.h"

enum {
    MK_SEGMENTS = MK_GATES + 2,
    MK_KEYS = 256,   /* keys that a chunk of attention looks at */
    MK_MOST_ROWS = 512, /* rows of a chunk */
};

/* Rows of a matrix to be multiplied with one vector of each lane, as part of a phase. */
typedef struct {
    const void *weight;
    const float *bias;
    int rows, cols;
    const void *const *x; /* [N] */
    float *y;             /* [N, stride] */
    size_t stride;
    const mk_act *act;    /* NULL: none; gated: `weight` has 2 * rows rows */
    int round;            /* the dtype of y */
    int per, chunks;
} mk_segment;

/* Who chose which expert. Entries of one expert stand together; experts ascend. */
typedef struct {
    int experts, entries;
    int *expert, *first;    /* [lanes * width + 1]: ids, and where each one's entries begin */
    int *lane;              /* [lanes * width] */
    float *weight;          /* [lanes * width] */
    const void **x;         /* [lanes * width]: what gate_up multiplies */
    float **inner;          /* [lanes * width]: act(gate) * up */
    const void **packed;    /* [lanes * width]: the same, as `down` wants it */
    int *place;             /* [classes] */
} mk_plan;

typedef struct {
    float *first, *second;  /* [lanes, MK_MOST_ROWS] */
    float **y, **other;     /* [lanes or heads] */
    const void **x;         /* [lanes or heads] */
    float *scores;          /* [heads, MK_KEYS] */
    const float **rows;     /* [lanes or heads] */
    float *scaled;          /* [widest row] */
    void *route;
} mk_scratch;

struct mk_step {
    mk_pool *pool;
    const mk_isa *isa;
    int dtype, threads, lanes, capacity, width;
    size_t item; /* bytes of an element */
    mk_op *ops;
    int count, place, last; /* operators, the one that runs next, and where this call ends */
    float **buffers;
    size_t *strides;

    /* the present call */
    int N;
    const int32_t *at, *starts; /* lanes, and the position of each one's token */
    const int64_t *token_ids;
    const mk_record *record;
    float *logits;
    const mk_expected *expected;

    /* the present phase */
    const mk_op *op;
    mk_segment segments[MK_SEGMENTS];
    int segment_count, per, blocks_each;
    int blocks; /* blocks of keys `partial` has room for */

    /* rows packed as products want them: of the operator's input, and of a second one */
    char *packed[2];
    const void **vectors[2];
    size_t packed_stride;

    mk_plan plan;
    char *entry_x, *entry_packed; /* [lanes * width] rows of packed_stride */
    float *inner;                 /* [lanes * width, inner_stride] */
    size_t inner_stride;
    float *parts, *shared_part;   /* [lanes * width], [lanes] rows of outputs, weighted */
    size_t part_stride;
    float *gate_logits;           /* [MK_GATES, lanes, classes_stride] */
    size_t classes_stride;
    float *shared;                /* [lanes, shared_stride] */
    size_t shared_stride;
    float *shared_gate;           /* [lanes, MK_PAD] */

    char *queries;                /* [lanes * heads] rows of query_stride bytes */
    size_t query_stride;
    float *partial;               /* [lanes, heads, blocks, partial_stride]: most, sum, and the mix */
    size_t partial_stride;
    float *rotation;              /* [2, dims that are turned] */
    float *block_most, *block_sum; /* [lanes, block_stride], of the logits */
    size_t block_stride;
    mk_scratch *scratch;          /* [threads] */
    void *memory;                 /* holds all of it */
};

MK_INLINE size_t mk_padded(size_t elements) { return (elements + MK_PAD - 1) / MK_PAD * MK_PAD; }
MK_INLINE float *mk_row(const mk_step *s, int buffer, int n) {
    return s->buffers[buffer] + (size_t)n * s->strides[buffer];
}

/* Where the routing of a lane, place and router stands among all of them. */
MK_INLINE size_t mk_routing(const mk_record *r, int n, int place, int router) {
    return ((size_t)n * (size_t)r->places + (size_t)place) * (size_t)r->routers + (size_t)router;
}

/* rows.c: work on single rows, and packing. */
void mk_round_row(float *x, int n, int dtype);
void mk_add_row(float *y, const float *x, int n);
void mk_pack_row(const mk_step *s, const float *from, void *to, int cols);
const void *const *mk_pack(mk_step *s, int which, const float *rows, size_t stride, int cols);
void mk_embed(mk_step *s, const mk_op *op);
void mk_norm(mk_step *s, const mk_op *op);
void mk_clip(mk_step *s, const mk_op *op);
void mk_scale(mk_step *s, const mk_op *op);
void mk_copy(mk_step *s, const mk_op *op);
void mk_gated(mk_step *s, const mk_op *op);
void mk_add(mk_step *s, const mk_op *op);

/* places.c: what depends on a token's position, and the caches. */
void mk_warm(mk_step *s, const mk_op *op);
void mk_turn(mk_step *s, const mk_op *op);
void mk_remember(mk_step *s, const mk_op *op);
size_t mk_cached(const mk_step *s, const mk_op *op, int step, int lane, int head, int at);

/* What follows returns the number of chunks of a phase. */

/* linear.c */
int mk_rows_per_chunk(const mk_step *s, int rows, size_t row_bytes);
void mk_add_segment(mk_step *s, mk_segment segment);
int mk_linear_phase(mk_step *s, const mk_op *op);
int mk_head_phase(mk_step *s, const mk_op *op);
int mk_segments(mk_step *s);
void mk_segment_chunk(void *step, int index, int thread);
void mk_head_chunk(void *step, int index, int thread);
void mk_expect_chunk(void *step, int n, int thread);

/* attention.c */
int mk_attend_phase(mk_step *s, const mk_op *op);
void mk_attend_chunk(void *step, int index, int thread);
void mk_merge(mk_step *s, const mk_op *op);
int mk_latent_phase(mk_step *s, const mk_op *op);
void mk_absorb_chunk(void *step, int index, int thread);
void mk_expand_chunk(void *step, int index, int thread);

/* moe.c */
int mk_gate_phase(mk_step *s, const mk_op *op);
int mk_route_phase(mk_step *s, const mk_op *op);
void mk_route_chunk(void *step, int index, int thread);
void mk_keep(mk_step *s, const mk_op *op);
int mk_experts_phase(mk_step *s, const mk_op *op);
void mk_experts_chunk(void *step, int index, int thread);
int mk_down_phase(mk_step *s, const mk_op *op);
void mk_down_chunk(void *step, int index, int thread);
int mk_combine_phase(mk_step *s, const mk_op *op);
void mk_combine_chunk(void *step, int index, int thread);

#endif
