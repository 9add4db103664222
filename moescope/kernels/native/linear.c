/* Phases made of matrix-vector products: segments, each cut into chunks of rows. */
#include "expect.h"
#include "step.h"

enum { CHUNK_BYTES = 256 << 10, LEAST_BYTES = 16 << 10 };

/* Chunks large enough to read memory in long runs, and small enough that threads end together. */
int mk_rows_per_chunk(const mk_step *s, int rows, size_t row_bytes) {
    size_t share = row_bytes * (size_t)rows / (size_t)(4 * s->threads);
    size_t bytes = share < CHUNK_BYTES ? share : CHUNK_BYTES;
    if (bytes < LEAST_BYTES) bytes = LEAST_BYTES;
    size_t per = bytes / row_bytes;
    if (per < 1) per = 1;
    if (per > MK_MOST_ROWS) per = MK_MOST_ROWS;
    while (((size_t)rows + per - 1) / per > MK_MOST_CHUNKS / 2) per++;
    return (int)per;
}

void mk_add_segment(mk_step *s, mk_segment segment) {
    size_t row_bytes = (size_t)segment.cols * s->item * (segment.act != NULL && segment.act->gated ? 2 : 1);
    segment.per = mk_rows_per_chunk(s, segment.rows, row_bytes);
    segment.chunks = (segment.rows + segment.per - 1) / segment.per;
    s->segments[s->segment_count++] = segment;
}

int mk_segments(mk_step *s) {
    int chunks = 0;
    for (int i = 0; i < s->segment_count; i++) chunks += s->segments[i].chunks;
    return chunks;
}

static mk_segment whole(mk_step *s, const mk_op *op, float *y, size_t stride) {
    return (mk_segment){
        .weight = op->weight,
        .bias = op->bias,
        .rows = op->rows,
        .cols = op->cols,
        .x = mk_pack(s, 0, s->buffers[op->x], s->strides[op->x], op->cols),
        .y = y,
        .stride = stride,
        .act = op->act.kind != MK_NONE ? &op->act : NULL,
        .round = s->dtype,
    };
}

int mk_linear_phase(mk_step *s, const mk_op *op) {
    s->segment_count = 0;
    mk_add_segment(s, whole(s, op, s->buffers[op->y], s->strides[op->y]));
    return mk_segments(s);
}

/* Chunks of whole blocks, because sums over logits are taken block by block. */
int mk_head_phase(mk_step *s, const mk_op *op) {
    s->segment_count = 0;
    mk_add_segment(s, whole(s, op, s->logits, (size_t)op->rows));
    mk_segment *head = s->segments;
    head->per = (head->per + MK_BLOCK - 1) / MK_BLOCK * MK_BLOCK;
    head->chunks = (head->rows + head->per - 1) / head->per;
    return head->chunks;
}

static const char *row_of(const mk_step *s, const mk_segment *g, int row) {
    return (const char *)g->weight + (size_t)row * (size_t)g->cols * s->item;
}

void mk_segment_chunk(void *step, int index, int thread) {
    mk_step *s = step;
    const mk_scratch *scratch = &s->scratch[thread];
    const mk_segment *g = s->segments;
    for (; index >= g->chunks; g++) index -= g->chunks;
    int from = index * g->per, rows = g->rows - from < g->per ? g->rows - from : g->per;
    mk_rows product = s->isa->rows[s->dtype];
    for (int n = 0; n < s->N; n++) {
        scratch->y[n] = g->y + (size_t)n * g->stride + from;
        scratch->other[n] = scratch->second + (size_t)n * MK_MOST_ROWS;
    }
    bool gated = g->act != NULL && g->act->gated;
    product(row_of(s, g, from), (size_t)g->cols, rows, g->cols, g->x, s->N, scratch->y);
    if (gated)
        product(row_of(s, g, g->rows + from), (size_t)g->cols, rows, g->cols, g->x, s->N,
                scratch->other);
    for (int n = 0; n < s->N; n++) {
        float *y = scratch->y[n], *up = gated ? scratch->other[n] : NULL;
        if (g->bias != NULL) {
            mk_add_row(y, g->bias + from, rows);
            if (gated) mk_add_row(up, g->bias + g->rows + from, rows);
        }
        if (g->act != NULL) s->isa->activate(g->act, y, up, rows, g->round);
        else mk_round_row(y, rows, g->round);
    }
}

/* Logits times a number, then between +-cap. */
static void bound(const mk_step *s, float *x, int n) {
    if (s->op->number != 1.0f) {
        for (int i = 0; i < n; i++) x[i] *= s->op->number;
        mk_round_row(x, n, s->dtype);
    }
    if (s->op->cap > 0.0f) s->isa->squash(x, n, s->op->cap, s->dtype);
}

void mk_head_chunk(void *step, int index, int thread) {
    mk_step *s = step;
    mk_segment_chunk(step, index, thread);
    int from = index * s->segments->per, rows = s->segments->rows - from;
    if (rows > s->segments->per) rows = s->segments->per;
    for (int n = 0; n < s->N; n++) {
        float *most = s->block_most + (size_t)n * s->block_stride + from / MK_BLOCK;
        float *sum = s->block_sum + (size_t)n * s->block_stride + from / MK_BLOCK;
        bound(s, s->scratch[thread].y[n], rows);
        s->isa->sum_up(s->scratch[thread].y[n], rows, most, sum);
    }
}

void mk_expect_chunk(void *step, int n, int thread) {
    (void)thread;
    mk_step *s = step;
    size_t first = (size_t)n * s->block_stride;
    const float *logits = s->logits + (size_t)n * (size_t)s->op->rows;
    mk_conclude(s->isa, logits, s->op->rows, s->block_most + first, s->block_sum + first,
                s->expected, n);
}
