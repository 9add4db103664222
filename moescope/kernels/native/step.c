/* The executor: memory of a step, and its operators one after the other inside one job of the pool. */
#include "step.h"

#include <stdlib.h>

#include "router.h"

MK_EXPORT int32_t mk_abi(void) { return MK_ABI; }

MK_EXPORT int64_t mk_size_of(int32_t which) {
    static const int64_t sizes[] = {
        sizeof(mk_op), sizeof(mk_record), sizeof(mk_expected), sizeof(mk_logits)};
    return which >= 0 && which < 4 ? sizes[which] : -1;
}

MK_EXPORT const char *mk_isa_name(const char *wanted) {
    const mk_isa *isa = mk_choose_isa(wanted);
    return isa != NULL ? isa->name : NULL;
}

/* --- running --- */

/* Prepares operators until one has chunks: what is small is done here, by one thread. */
static int next_phase(void *job, mk_chunk *chunk) {
    mk_step *s = job;
    for (int chunks = 0; s->place < s->last;) {
        const mk_op *op = s->op = &s->ops[s->place++];
        switch ((mk_kind)op->kind) {
        case MK_OP_EMBED: mk_embed(s, op); break;
        case MK_OP_NORM: mk_norm(s, op); break;
        case MK_OP_CLIP: mk_clip(s, op); break;
        case MK_OP_SCALE: mk_scale(s, op); break;
        case MK_OP_WARM: mk_warm(s, op); break;
        case MK_OP_COPY: mk_copy(s, op); break;
        case MK_OP_GATED: mk_gated(s, op); break;
        case MK_OP_TURN: mk_turn(s, op); break;
        case MK_OP_STORE: mk_remember(s, op); break;
        case MK_OP_MERGE: mk_merge(s, op); break;
        case MK_OP_ADD: mk_add(s, op); break;
        case MK_OP_KEEP: mk_keep(s, op); break;
        case MK_OP_LINEAR: chunks = mk_linear_phase(s, op), *chunk = mk_segment_chunk; break;
        case MK_OP_HEAD: chunks = mk_head_phase(s, op), *chunk = mk_head_chunk; break;
        case MK_OP_EXPECT: chunks = s->N, *chunk = mk_expect_chunk; break;
        case MK_OP_ATTEND: chunks = mk_attend_phase(s, op), *chunk = mk_attend_chunk; break;
        case MK_OP_ABSORB: chunks = mk_latent_phase(s, op), *chunk = mk_absorb_chunk; break;
        case MK_OP_EXPAND: chunks = mk_latent_phase(s, op), *chunk = mk_expand_chunk; break;
        case MK_OP_GATE: chunks = mk_gate_phase(s, op), *chunk = mk_segment_chunk; break;
        case MK_OP_ROUTE: chunks = mk_route_phase(s, op), *chunk = mk_route_chunk; break;
        case MK_OP_EXPERTS: chunks = mk_experts_phase(s, op), *chunk = mk_experts_chunk; break;
        case MK_OP_DOWN: chunks = mk_down_phase(s, op), *chunk = mk_down_chunk; break;
        case MK_OP_COMBINE: chunks = mk_combine_phase(s, op), *chunk = mk_combine_chunk; break;
        }
        if (chunks > 0) return chunks;
    }
    return 0;
}

static int32_t invalid_router(const mk_step *s, const mk_record *record) {
    for (int32_t router = 0; record != NULL && router < record->routers; router++)
        for (int n = 0; n < s->N; n++)
            if (record->expert_ids[mk_routing(record, n, 0, router) * (size_t)record->width] < 0)
                return router;
    return -1;
}

MK_EXPORT float *mk_step_buffer(mk_step *s, int32_t buffer, int64_t *stride) {
    *stride = (int64_t)s->strides[buffer];
    return s->buffers[buffer];
}

MK_EXPORT int32_t mk_step_run(mk_step *s, int32_t first, int32_t last, int32_t count,
                              const int32_t *lanes, const int32_t *starts,
                              const int64_t *token_ids, const mk_record *record, float *logits,
                              const mk_expected *expected) {
    s->N = count;
    s->at = lanes;
    s->starts = starts;
    s->token_ids = token_ids;
    s->record = record;
    s->logits = logits;
    s->expected = expected;
    s->place = first;
    s->last = last < s->count ? last : s->count;
    mk_pool_run(s->pool, next_phase, s);
    return s->last == s->count ? invalid_router(s, record) : -1;
}

/* --- memory --- */

/* Hands out aligned pieces of one block; with no block, only counts. */
typedef struct {
    char *base;
    size_t used;
} arena;

static void *take(arena *a, size_t items, size_t size) {
    void *at = a->base != NULL ? a->base + a->used : NULL;
    a->used += (items * size + 127) / 128 * 128;
    return at;
}

typedef struct {
    size_t widest, heads, head_dim, v_dim, turned, inner, outer, classes, shared, vocabulary;
} sizes;

static size_t larger(size_t a, int b) { return b > 0 && (size_t)b > a ? (size_t)b : a; }

static sizes sizes_of(const mk_op *ops, int count, const int32_t *widths, int buffers) {
    sizes z = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    for (int i = 0; i < buffers; i++) z.widest = larger(z.widest, widths[i]);
    for (int i = 0; i < count; i++) {
        const mk_op *op = &ops[i];
        z.widest = larger(z.widest, op->cols);
        if (op->kind == MK_OP_ATTEND) {
            z.heads = larger(z.heads, op->heads);
            z.head_dim = larger(z.head_dim, op->head_dim);
            z.v_dim = larger(z.v_dim, op->v_dim);
        }
        z.turned = larger(z.turned, op->turned);
        z.classes = larger(z.classes, op->classes);
        z.shared = larger(z.shared, op->shared_width);
        if (op->kind == MK_OP_EXPERTS) z.inner = larger(z.inner, op->rows);
        if (op->kind == MK_OP_DOWN) z.outer = larger(larger(z.outer, op->rows), op->shared_rows);
        if (op->kind == MK_OP_HEAD) z.vocabulary = larger(z.vocabulary, op->rows);
    }
    z.widest = larger(larger(z.widest, (int)z.inner), (int)z.shared);
    return z;
}

static void lay_out_plan(mk_plan *plan, arena *a, size_t entries, size_t classes) {
    plan->expert = take(a, entries + 1, sizeof(int));
    plan->first = take(a, entries + 1, sizeof(int));
    plan->lane = take(a, entries, sizeof(int));
    plan->weight = take(a, entries, sizeof(float));
    plan->x = take(a, entries, sizeof(void *));
    plan->inner = take(a, entries, sizeof(float *));
    plan->packed = take(a, entries, sizeof(void *));
    plan->place = take(a, classes, sizeof(int));
}

static void lay_out_scratch(mk_scratch *scratch, arena *a, size_t lanes, const sizes *z) {
    size_t rows = lanes > z->heads ? lanes : z->heads;
    float *first = take(a, lanes * MK_MOST_ROWS, sizeof(float));
    float *second = take(a, lanes * MK_MOST_ROWS, sizeof(float));
    float **y = take(a, rows, sizeof(float *)), **other = take(a, rows, sizeof(float *));
    const void **x = take(a, rows, sizeof(void *));
    float *scores = take(a, z->heads * MK_KEYS, sizeof(float));
    const float **seen = take(a, rows, sizeof(float *));
    float *scaled = take(a, mk_padded(z->widest), sizeof(float));
    void *route = take(a, mk_route_scratch((int)z->classes), 1);
    if (a->base == NULL) return;
    *scratch = (mk_scratch){first, second, y, other, x, scores, seen, scaled, route};
}

/* Places everything; called once to count and once to do it. */
static void lay_out(mk_step *s, arena *a, const sizes *z, const int32_t *widths, int buffers) {
    size_t lanes = (size_t)s->lanes, entries = lanes * (size_t)s->width;
    /* the rows of lanes are read side by side: they shall not fall on the same lines of L1 */
    s->packed_stride = mk_padded(z->widest) * sizeof(float) + 13 * 64;
    s->inner_stride = mk_padded(z->inner);
    s->part_stride = mk_padded(z->outer);
    s->classes_stride = mk_padded(z->classes);
    s->shared_stride = mk_padded(z->shared);
    s->query_stride = mk_padded(z->head_dim) * sizeof(float); /* of what heads ask, or found */
    s->partial_stride = MK_PAD + mk_padded(z->v_dim);
    s->blocks = (s->capacity + MK_KEYS - 1) / MK_KEYS;

    float **rows = take(a, (size_t)buffers, sizeof(float *));
    size_t *strides = take(a, (size_t)buffers, sizeof(size_t));
    for (int i = 0; i < buffers; i++) {
        size_t stride = mk_padded((size_t)widths[i]);
        float *buffer = take(a, lanes * stride, sizeof(float));
        if (a->base != NULL) rows[i] = buffer, strides[i] = stride;
    }
    s->buffers = rows;
    s->strides = strides;
    s->ops = take(a, (size_t)s->count, sizeof(mk_op));
    for (int i = 0; i < 2; i++) {
        s->packed[i] = take(a, lanes, s->packed_stride);
        s->vectors[i] = take(a, lanes, sizeof(void *));
    }
    lay_out_plan(&s->plan, a, entries, z->classes);
    s->entry_x = take(a, entries, s->packed_stride);
    s->entry_packed = take(a, entries, s->packed_stride);
    s->inner = take(a, entries * s->inner_stride, sizeof(float));
    s->parts = take(a, entries * s->part_stride, sizeof(float));
    s->shared_part = take(a, lanes * s->part_stride, sizeof(float));
    s->gate_logits = take(a, MK_GATES * lanes * s->classes_stride, sizeof(float));
    s->shared = take(a, lanes * s->shared_stride, sizeof(float));
    s->shared_gate = take(a, lanes * MK_PAD, sizeof(float));
    s->queries = take(a, lanes * z->heads, s->query_stride);
    s->partial = take(a, lanes * z->heads * (size_t)s->blocks * s->partial_stride, sizeof(float));
    s->rotation = take(a, 2 * z->turned, sizeof(float));
    s->block_stride = mk_padded(z->vocabulary) / MK_BLOCK;
    s->block_most = take(a, lanes * s->block_stride, sizeof(float));
    s->block_sum = take(a, lanes * s->block_stride, sizeof(float));
    s->scratch = take(a, (size_t)s->threads, sizeof(mk_scratch));
    for (int t = 0; t < s->threads; t++)
        lay_out_scratch(a->base != NULL ? &s->scratch[t] : NULL, a, lanes, z);
}

MK_EXPORT mk_step *mk_step_create(mk_pool *pool, const char *isa, int32_t dtype, const mk_op *ops,
                                  int32_t count, const int32_t *widths, int32_t buffers,
                                  int32_t lanes, int32_t capacity, int32_t width) {
    mk_step *s = calloc(1, sizeof *s);
    if (s == NULL) return NULL;
    s->pool = pool;
    s->isa = mk_choose_isa(isa);
    s->dtype = dtype;
    s->item = dtype == MK_FLOAT32 ? 4 : 2;
    s->threads = mk_pool_threads(pool);
    s->lanes = lanes;
    s->capacity = capacity;
    s->width = width;
    s->count = count;
    sizes z = sizes_of(ops, count, widths, buffers);
    arena a = {NULL, 0};
    lay_out(s, &a, &z, widths, buffers);
    a = (arena){aligned_alloc(128, a.used), 0};
    if (s->isa == NULL || a.base == NULL) {
        free(a.base);
        free(s);
        return NULL;
    }
    s->memory = a.base;
    lay_out(s, &a, &z, widths, buffers);
    memcpy(s->ops, ops, (size_t)count * sizeof *ops);
    return s;
}

MK_EXPORT void mk_step_destroy(mk_step *s) {
    if (s == NULL) return;
    free(s->memory);
    free(s);
}

/* --- for tests and measurements --- */

MK_EXPORT int32_t mk_linear(mk_pool *pool, const char *isa, int32_t dtype, const void *weight,
                            int32_t rows, int32_t cols, const float *x, int32_t count, float *y) {
    mk_op op = {
        .kind = MK_OP_HEAD, .weight = weight, .rows = rows, .cols = cols, .number = 1.0f};
    mk_step *s = mk_step_create(pool, isa, dtype, &op, 1, &cols, 1, count, 1, 1);
    if (s == NULL) return -1;
    for (int n = 0; n < count; n++)
        memcpy(mk_row(s, 0, n), x + (size_t)n * (size_t)cols, (size_t)cols * sizeof *x);
    mk_step_run(s, 0, 1, count, NULL, NULL, NULL, NULL, y, NULL);
    mk_step_destroy(s);
    return 0;
}

typedef struct {
    const mk_isa *isa;
    const char *from;
    int64_t bytes, each;
    bool begun;
    uint64_t *found;
} reading;

static void read_chunk(void *job, int index, int thread) {
    reading *r = job;
    int64_t at = index * r->each, left = r->bytes - at;
    r->found[thread * 16] ^= r->isa->read(r->from + at, (size_t)(left < r->each ? left : r->each));
}

static int read_once(void *job, mk_chunk *chunk) {
    reading *r = job;
    if (r->begun) return 0;
    r->begun = true;
    *chunk = read_chunk;
    return (int)((r->bytes + r->each - 1) / r->each);
}

MK_EXPORT uint64_t mk_read(mk_pool *pool, const char *isa, const void *from, int64_t bytes) {
    uint64_t found[MK_MOST_THREADS * 16] = {0}, all = 0;
    int64_t each = 128 << 10;
    while (bytes / each >= MK_MOST_CHUNKS) each *= 2;
    reading r = {mk_choose_isa(isa), from, bytes, each, false, found};
    if (r.isa == NULL) return 0;
    mk_pool_run(pool, read_once, &r);
    for (int i = 0; i < MK_MOST_THREADS; i++) all ^= found[i * 16];
    return all;
}
