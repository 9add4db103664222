/* What one thread does to the rows of all lanes between two phases. A microsecond each. */
#include <math.h>

#include "step.h"

void mk_round_row(float *x, int n, int dtype) {
    if (dtype == MK_BFLOAT16)
        for (int i = 0; i < n; i++) x[i] = mk_round_bf16(x[i]);
    else if (dtype == MK_FLOAT16)
        for (int i = 0; i < n; i++) x[i] = mk_round_f16(x[i]);
}

/* Values are of the model's dtype already, so packing rounds nothing. */
void mk_pack_row(const mk_step *s, const float *from, void *to, int cols) {
    size_t padded = mk_padded((size_t)cols);
    if (s->isa->input[s->dtype] == MK_BFLOAT16) {
        uint16_t *out = to;
        for (int i = 0; i < cols; i++) out[i] = (uint16_t)(mk_bits(from[i]) >> 16);
        memset(out + cols, 0, (padded - (size_t)cols) * sizeof *out);
    } else {
        float *out = to;
        memcpy(out, from, (size_t)cols * sizeof *out);
        memset(out + cols, 0, (padded - (size_t)cols) * sizeof *out);
    }
}

const void *const *mk_pack(mk_step *s, int which, const float *rows, size_t stride, int cols) {
    for (int n = 0; n < s->N; n++) {
        void *to = s->packed[which] + (size_t)n * s->packed_stride;
        mk_pack_row(s, rows + (size_t)n * stride, to, cols);
        s->vectors[which][n] = to;
    }
    return s->vectors[which];
}

void mk_add_row(float *y, const float *x, int n) {
    for (int i = 0; i < n; i++) y[i] += x[i];
}

static void times(float *x, int n, float number, int dtype) {
    if (number == 1.0f) return;
    for (int i = 0; i < n; i++) x[i] *= number;
    mk_round_row(x, n, dtype);
}

void mk_embed(mk_step *s, const mk_op *op) {
    for (int n = 0; n < s->N; n++) {
        float *y = mk_row(s, op->y, n);
        size_t first = (size_t)s->token_ids[n] * (size_t)op->cols;
        for (int i = 0; i < op->cols; i++) y[i] = mk_load(op->weight, first + i, s->dtype);
        times(y, op->cols, op->number, s->dtype);
    }
}

static float mean_square(const float *x, int n) {
    float sums[16] = {0};
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) sums[j] += x[i + j] * x[i + j];
    double total = 0.0;
    for (int j = 0; j < 16; j++) total += sums[j];
    for (; i < n; i++) total += x[i] * x[i];
    return (float)(total / n);
}

static void norm_row(const float *x, float *y, const mk_op *op, int dtype) {
    const float *weight = op->weight;
    int n = op->cols;
    if (op->flags & MK_CENTRED) {
        double total = 0.0;
        for (int i = 0; i < n; i++) total += x[i];
        float mean = (float)(total / n);
        for (int i = 0; i < n; i++) y[i] = x[i] - mean;
        x = y;
    }
    float scale = 1.0f / sqrtf(mean_square(x, n) + op->eps);
    for (int i = 0; i < n; i++) y[i] = x[i] * scale;
    if (!(op->flags & MK_WIDE)) mk_round_row(y, n, dtype);
    if (weight != NULL)
        for (int i = 0; i < n; i++) y[i] *= weight[i];
    if (op->bias != NULL) mk_add_row(y, op->bias, n);
    mk_round_row(y, n, dtype);
}

void mk_norm(mk_step *s, const mk_op *op) {
    for (int n = 0; n < s->N; n++)
        for (int group = 0; group < op->groups; group++) {
            int at = op->at + group * op->step;
            norm_row(mk_row(s, op->x, n) + at, mk_row(s, op->y, n) + at, op, s->dtype);
        }
}

void mk_clip(mk_step *s, const mk_op *op) {
    for (int n = 0; n < s->N; n++) {
        float *x = mk_row(s, op->x, n) + op->at;
        for (int i = 0; i < op->cols; i++) {
            float low = x[i] < -op->number ? -op->number : x[i]; /* NaN stays */
            x[i] = low > op->number ? op->number : low;
        }
        mk_round_row(x, op->cols, s->dtype);
    }
}

void mk_scale(mk_step *s, const mk_op *op) {
    const float *weight = op->weight;
    int dtype = op->flags & MK_WIDE ? MK_FLOAT32 : s->dtype;
    for (int n = 0; n < s->N; n++) {
        float *x = mk_row(s, op->x, n) + op->at;
        if (op->bias != NULL) {
            mk_add_row(x, op->bias, op->cols);
            mk_round_row(x, op->cols, dtype);
        }
        if (weight != NULL) {
            for (int i = 0; i < op->cols; i++) x[i] *= weight[i];
            mk_round_row(x, op->cols, dtype);
        }
        times(x, op->cols, op->number, dtype);
    }
}

void mk_copy(mk_step *s, const mk_op *op) {
    for (int n = 0; n < s->N; n++)
        for (int group = 0; group < op->groups; group++) {
            float *y = mk_row(s, op->y, n) + op->to + group * op->to_step;
            memcpy(y, mk_row(s, op->x, n) + op->at + group * op->step,
                   (size_t)op->cols * sizeof *y);
            if (op->flags & MK_ROUNDED) mk_round_row(y, op->cols, s->dtype);
        }
}

/* Gates may be one for several columns, and biases one for several gates. */
void mk_gated(mk_step *s, const mk_op *op) {
    int each = op->cols / op->groups, shared = op->heads > 0 ? op->groups / op->heads : 1;
    for (int n = 0; n < s->N; n++) {
        float *x = mk_row(s, op->x, n) + op->at, *y = mk_row(s, op->y, n) + op->to;
        for (int i = 0; i < op->groups; i++, y += each) {
            float gate = x[i];
            if (op->bias != NULL) gate = mk_round(gate + op->bias[i / shared], s->dtype);
            if (!(op->flags & MK_SOFTPLUS)) gate = 1.0f / (1.0f + mk_exp(-gate));
            else if (gate <= 20.0f) gate = log1pf(mk_exp(gate)); /* as torch has it */
            if (!(op->flags & MK_WIDE)) gate = mk_round(gate, s->dtype);
            for (int c = 0; c < each; c++) y[c] *= gate;
            mk_round_row(y, each, s->dtype);
        }
    }
}

void mk_add(mk_step *s, const mk_op *op) {
    int dtype = op->flags & MK_WIDE ? MK_FLOAT32 : s->dtype;
    for (int n = 0; n < s->N; n++) {
        float *x = mk_row(s, op->x, n), *y = mk_row(s, op->y, n);
        times(x, op->cols, op->number, s->dtype);
        if (op->flags & MK_FIRST) {
            memcpy(y, x, (size_t)op->cols * sizeof *y);
            continue;
        }
        times(y, op->cols, op->keeps, dtype);
        mk_add_row(y, x, op->cols);
        mk_round_row(y, op->cols, dtype);
    }
}
