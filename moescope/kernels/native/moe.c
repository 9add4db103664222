/* The router and its experts: logits, routing, hidden rows, and the weighted sum.
 *
 * Each distinct expert's weights are read once for all lanes that chose it, in long runs. Weighted
 * outputs are kept apart and added up afterwards, in ascending order of expert ids.
 */
#include <math.h>

#include "router.h"
#include "step.h"

static const double *policy_of(const mk_step *s, const mk_op *op, int n, int place) {
    const mk_record *r = s->record;
    size_t row = ((size_t)s->at[n] * (size_t)r->places + (size_t)place) * (size_t)r->routers;
    return r->policies + (row + (size_t)op->router) * MK_POLICY_WIDTH;
}

static float *logits_of(const mk_step *s, int gate, int n) {
    return s->gate_logits + ((size_t)gate * (size_t)s->lanes + (size_t)n) * s->classes_stride;
}

int mk_gate_phase(mk_step *s, const mk_op *op) {
    bool wanted[MK_GATES] = {false};
    for (int n = 0; n < s->N; n++)
        for (int place = 0; place < s->record->places; place++)
            wanted[(int)policy_of(s, op, n, place)[MK_COL_GATE]] = true;
    mk_segment segment = {
        .bias = op->bias,
        .rows = op->classes,
        .cols = op->cols,
        .x = mk_pack(s, 0, s->buffers[op->x], s->strides[op->x], op->cols),
        .stride = s->classes_stride,
        .round = op->logits_dtype,
    };
    s->segment_count = 0;
    for (int gate = 0; gate < MK_GATES; gate++) {
        if (!wanted[gate]) continue;
        segment.weight = op->gates[gate];
        segment.y = logits_of(s, gate, 0);
        mk_add_segment(s, segment);
    }
    if (op->shared_width > 0) {
        segment.x = mk_pack(s, 1, s->buffers[op->z], s->strides[op->z], op->cols);
        segment.round = s->dtype;
        segment.rows = op->shared_width;
        segment.weight = op->shared_up;
        segment.bias = op->shared_up_bias;
        segment.y = s->shared;
        segment.stride = s->shared_stride;
        segment.act = &op->shared_act;
        mk_add_segment(s, segment);
        if (op->shared_gate != NULL) {
            segment.rows = 1;
            segment.weight = op->shared_gate;
            segment.bias = NULL;
            segment.y = s->shared_gate;
            segment.stride = MK_PAD;
            segment.act = NULL;
            mk_add_segment(s, segment);
        }
    }
    return mk_segments(s);
}

/* One chunk for each lane and place: shadow variants cost their lane no time of its own. */
int mk_route_phase(mk_step *s, const mk_op *op) {
    (void)op;
    return s->N * s->record->places;
}

/* What was decided for a lane, once more as a trace keeps it. */
static void keep(const mk_step *s, const mk_op *op, int n, const float *logits) {
    const mk_record *r = s->record;
    size_t from = mk_routing(r, n, 0, op->router), width = (size_t)r->width;
    size_t L = (size_t)r->routers, K = (size_t)r->picks, E = (size_t)r->logits_width;
    size_t l = (size_t)op->router, classes = (size_t)op->classes;
    int16_t *ints = r->ints + (size_t)n * L * (K + 1);
    size_t each = 4 + (r->level > 0 ? 2 * K : 0) + (r->level > 1 ? E : 0);
    float *floats = r->floats + (size_t)n * L * each;
    for (size_t k = 0; k < K; k++) ints[l * K + k] = (int16_t)r->expert_ids[from * width + k];
    ints[L * K + l] = (int16_t)r->runner_up[from];
    for (size_t i = 0; i < MK_SCALARS; i++) floats[i * L + l] = r->scalars[from * MK_SCALARS + i];
    floats += MK_SCALARS * L;
    if (r->level < 1) return;
    memcpy(floats + l * K, r->weights + from * width, K * sizeof *floats);
    memcpy(floats + (L + l) * K, r->scores + from * width, K * sizeof *floats);
    if (r->level < 2) return;
    floats += 2 * L * K + l * E;
    memcpy(floats, logits, classes * sizeof *floats);
    for (size_t e = classes; e < E; e++) floats[e] = NAN;
}

void mk_route_chunk(void *step, int index, int thread) {
    mk_step *s = step;
    const mk_op *op = s->op;
    const mk_record *r = s->record;
    int n = index / r->places, place = index % r->places;
    const double *policy = policy_of(s, op, n, place);
    const float *logits = logits_of(s, (int)policy[MK_COL_GATE], n);
    size_t row = mk_routing(r, n, place, op->router), picks = row * (size_t)r->width;
    mk_route(logits, op->classes, policy, op->correction_bias, op->per_expert_scale, NULL, r->width,
             r->expert_ids + picks, r->scores + picks, r->weights + picks,
             r->scalars + row * MK_SCALARS, r->runner_up + row, s->scratch[thread].route);
    if (place == 0) keep(s, op, n, logits);
}

void mk_keep(mk_step *s, const mk_op *op) {
    for (int n = 0; n < s->N; n++) keep(s, op, n, mk_row(s, op->x, n));
}

/* Sorts the picks in force by expert, then lane; null experts and unused places are left out. */
static void make_plan(mk_step *s, const mk_op *op) {
    mk_plan *plan = &s->plan;
    const mk_record *r = s->record;
    int *place = plan->place;
    memset(place, 0, (size_t)op->experts * sizeof *place);
    for (int n = 0; n < s->N; n++) {
        const int32_t *ids = r->expert_ids + mk_routing(r, n, 0, op->router) * (size_t)r->width;
        for (int k = 0; k < r->width; k++)
            if (ids[k] >= 0 && ids[k] < op->experts) place[ids[k]]++;
    }
    plan->experts = plan->entries = 0;
    for (int e = 0; e < op->experts; e++) {
        if (place[e] == 0) continue;
        plan->expert[plan->experts] = e;
        plan->first[plan->experts++] = plan->entries;
        int entries = place[e];
        place[e] = plan->entries;
        plan->entries += entries;
    }
    plan->first[plan->experts] = plan->entries;
    for (int n = 0; n < s->N; n++) {
        size_t picks = mk_routing(r, n, 0, op->router) * (size_t)r->width;
        for (int k = 0; k < r->width; k++) {
            int e = r->expert_ids[picks + k];
            if (e < 0 || e >= op->experts) continue;
            int entry = place[e]++;
            plan->lane[entry] = n;
            plan->weight[entry] = r->weights[picks + k];
            plan->inner[entry] = s->inner + (size_t)entry * s->inner_stride;
        }
    }
}

int mk_experts_phase(mk_step *s, const mk_op *op) {
    make_plan(s, op);
    mk_plan *plan = &s->plan;
    const void *const *x = mk_pack(s, 0, s->buffers[op->x], s->strides[op->x], op->cols);
    for (int i = 0; i < plan->entries; i++) {
        plan->x[i] = x[plan->lane[i]];
        if (!(op->flags & MK_WEIGHT_FIRST)) continue;
        const float *row = mk_row(s, op->x, plan->lane[i]);
        float *scaled = s->scratch[0].scaled;
        for (int c = 0; c < op->cols; c++) scaled[c] = row[c] * plan->weight[i];
        mk_round_row(scaled, op->cols, s->dtype);
        char *to = s->entry_x + (size_t)i * s->packed_stride;
        mk_pack_row(s, scaled, to, op->cols);
        plan->x[i] = to;
        plan->weight[i] = 1.0f;
    }
    size_t matrices = op->act.gated ? 2 : 1;
    s->per = mk_rows_per_chunk(s, op->rows, matrices * (size_t)op->cols * s->item);
    s->blocks_each = (op->rows + s->per - 1) / s->per;
    return plan->experts * s->blocks_each;
}

void mk_experts_chunk(void *step, int index, int thread) {
    mk_step *s = step;
    const mk_op *op = s->op;
    const mk_scratch *scratch = &s->scratch[thread];
    const mk_plan *plan = &s->plan;
    int which = index / s->blocks_each, from = index % s->blocks_each * s->per;
    int rows = op->rows - from < s->per ? op->rows - from : s->per;
    int first = plan->first[which], entries = plan->first[which + 1] - first;
    size_t row_bytes = (size_t)op->cols * s->item, matrices = op->act.gated ? 2 : 1;
    size_t row = (size_t)plan->expert[which] * matrices * (size_t)op->rows + (size_t)from;
    const char *gate = (const char *)op->weight + row * row_bytes;
    const float *bias = op->bias != NULL ? op->bias + row : NULL;
    for (int i = 0; i < entries; i++) {
        scratch->y[i] = plan->inner[first + i] + from;
        scratch->other[i] = scratch->second + (size_t)i * MK_MOST_ROWS;
    }
    mk_rows product = s->isa->rows[s->dtype];
    const void *const *x = plan->x + first;
    product(gate, (size_t)op->cols, rows, op->cols, x, entries, scratch->y);
    if (op->act.gated)
        product(gate + (size_t)op->rows * row_bytes, (size_t)op->cols, rows, op->cols, x, entries,
                scratch->other);
    for (int i = 0; i < entries; i++) {
        if (bias != NULL) mk_add_row(scratch->y[i], bias, rows);
        if (bias != NULL && op->act.gated) mk_add_row(scratch->other[i], bias + op->rows, rows);
        s->isa->activate(&op->act, scratch->y[i], scratch->other[i], rows, s->dtype);
    }
}

/* Items are rows of `down` of each chosen expert, then those of the shared one. */
int mk_down_phase(mk_step *s, const mk_op *op) {
    mk_plan *plan = &s->plan;
    for (int i = 0; i < plan->entries; i++) {
        char *to = s->entry_packed + (size_t)i * s->packed_stride;
        mk_pack_row(s, plan->inner[i], to, op->cols);
        plan->packed[i] = to;
    }
    s->per = mk_rows_per_chunk(s, op->rows, (size_t)op->cols * s->item);
    s->blocks_each = (op->rows + s->per - 1) / s->per;
    s->segment_count = 0;
    if (op->shared_width > 0)
        mk_add_segment(s, (mk_segment){
            .weight = op->shared_down,
            .bias = op->shared_down_bias,
            .rows = op->shared_rows,
            .cols = op->shared_width,
            .x = mk_pack(s, 1, s->shared, s->shared_stride, op->shared_width),
            .y = s->shared_part,
            .stride = s->part_stride,
            .round = s->dtype,
        });
    return plan->experts * s->blocks_each + mk_segments(s);
}

void mk_down_chunk(void *step, int index, int thread) {
    mk_step *s = step;
    const mk_op *op = s->op;
    const mk_scratch *scratch = &s->scratch[thread];
    const mk_plan *plan = &s->plan;
    int which = index / s->blocks_each, from = index % s->blocks_each * s->per;
    if (which >= plan->experts) {
        mk_segment_chunk(s, index - plan->experts * s->blocks_each, thread);
        return;
    }
    int rows = op->rows - from < s->per ? op->rows - from : s->per;
    int first = plan->first[which], entries = plan->first[which + 1] - first;
    for (int i = 0; i < entries; i++)
        scratch->y[i] = s->parts + (size_t)(first + i) * s->part_stride + from;
    size_t row = (size_t)plan->expert[which] * (size_t)op->rows + (size_t)from;
    s->isa->rows[s->dtype]((const char *)op->weight + row * (size_t)op->cols * s->item,
                           (size_t)op->cols, rows, op->cols, plan->packed + first, entries,
                           scratch->y);
    for (int i = 0; i < entries; i++) {
        float *part = scratch->y[i], weight = plan->weight[first + i];
        if (op->bias != NULL) mk_add_row(part, op->bias + row, rows);
        mk_round_row(part, rows, s->dtype);
        for (int r = 0; r < rows; r++) part[r] *= weight;
        mk_round_row(part, rows, s->dtype);
    }
}

int mk_combine_phase(mk_step *s, const mk_op *op) {
    s->blocks_each = (op->rows + MK_MOST_ROWS - 1) / MK_MOST_ROWS;
    return s->N * s->blocks_each;
}

/* What null experts give: the share of their weights of what was asked. */
static void add_null(const mk_step *s, const mk_op *op, int n, int from, int rows, float *y) {
    const mk_record *r = s->record;
    size_t picks = mk_routing(r, n, 0, op->router) * (size_t)r->width;
    const float *z = mk_row(s, op->z, n) + from;
    float share = 0.0f;
    for (int k = 0; k < r->width; k++)
        if (r->expert_ids[picks + (size_t)k] >= op->experts) share += r->weights[picks + (size_t)k];
    for (int i = 0; i < rows; i++) y[i] += mk_round(share * z[i], s->dtype);
    mk_round_row(y, rows, s->dtype);
}

static void add_up(const mk_step *s, const mk_op *op, int n, int from, int rows, float *y) {
    const mk_plan *plan = &s->plan;
    memset(y, 0, (size_t)rows * sizeof *y);
    for (int i = 0; i < plan->entries; i++) {
        if (plan->lane[i] != n) continue;
        mk_add_row(y, s->parts + (size_t)i * s->part_stride + from, rows);
        mk_round_row(y, rows, s->dtype);
    }
    if (op->flags & MK_NULL) add_null(s, op, n, from, rows, y);
}

static void add_shared(const mk_step *s, const mk_op *op, int n, int from, int rows, float *y) {
    float *part = s->shared_part + (size_t)n * s->part_stride + from;
    if (op->shared_gate != NULL) {
        float gate = s->shared_gate[(size_t)n * MK_PAD];
        gate = mk_round(1.0f / (1.0f + mk_exp(-gate)), s->dtype);
        for (int r = 0; r < rows; r++) part[r] *= gate;
        mk_round_row(part, rows, s->dtype);
    }
    mk_add_row(y, part, rows);
    mk_round_row(y, rows, s->dtype);
    if (!(op->flags & MK_AVERAGE)) return;
    for (int r = 0; r < rows; r++) y[r] *= 0.5f;
    mk_round_row(y, rows, s->dtype);
}

void mk_combine_chunk(void *step, int index, int thread) {
    (void)thread;
    mk_step *s = step;
    const mk_op *op = s->op;
    int n = index / s->blocks_each, from = index % s->blocks_each * MK_MOST_ROWS;
    int rows = op->rows - from < MK_MOST_ROWS ? op->rows - from : MK_MOST_ROWS;
    float *y = mk_row(s, op->y, n) + from;
    if (op->flags & MK_SUM) add_up(s, op, n, from, rows, y);
    if (!(op->flags & MK_FINISH)) return;
    float scale = (float)policy_of(s, op, n, 0)[MK_COL_OUTPUT_SCALE];
    if (scale != 1.0f) {
        for (int r = 0; r < rows; r++) y[r] *= scale;
        mk_round_row(y, rows, s->dtype);
    }
    if (op->bias != NULL) {
        mk_add_row(y, op->bias + from, rows);
        mk_round_row(y, rows, s->dtype);
    }
    if (op->shared_width > 0) add_shared(s, op, n, from, rows, y);
}
