/* Work on short rows in L1, for one instruction set: the compiler vectorises it for TARGET. */

static TARGET void NAME(silu_times)(float *gate, const float *up, int n, int dtype) {
    if (dtype == MK_BFLOAT16) {
        for (int i = 0; i < n; i++) {
            float x = mk_round_bf16(gate[i]);
            float a = mk_round_bf16(x / (1.0f + mk_exp(-x)));
            gate[i] = mk_round_bf16(a * mk_round_bf16(up[i]));
        }
    } else if (dtype == MK_FLOAT32) {
        for (int i = 0; i < n; i++) gate[i] = gate[i] / (1.0f + mk_exp(-gate[i])) * up[i];
    } else {
        for (int i = 0; i < n; i++) {
            float x = mk_round(gate[i], dtype);
            float a = mk_round(x / (1.0f + mk_exp(-x)), dtype);
            gate[i] = mk_round(a * mk_round(up[i], dtype), dtype);
        }
    }
}

MK_INLINE TARGET void NAME(apply)(const int kind, float alpha, float *x, int n, const int dtype) {
    switch (kind) {
    case MK_SILU:
        for (int i = 0; i < n; i++) x[i] = mk_round(x[i] / (1.0f + mk_exp(-x[i])), dtype);
        break;
    case MK_GELU:
        for (int i = 0; i < n; i++)
            x[i] = mk_round(0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678f)), dtype);
        break;
    case MK_GELU_TANH:
        for (int i = 0; i < n; i++) {
            float inner = 0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i]);
            x[i] = mk_round(0.5f * x[i] * (1.0f + mk_tanh(inner)), dtype);
        }
        break;
    case MK_RELU2:
        for (int i = 0; i < n; i++) {
            float positive = x[i] < 0.0f ? 0.0f : x[i]; /* NaN stays */
            x[i] = mk_round(positive * positive, dtype);
        }
        break;
    case MK_SWISH:
        for (int i = 0; i < n; i++) {
            float share = mk_round(1.0f / (1.0f + mk_exp(-mk_round(x[i] * alpha, dtype))), dtype);
            x[i] = mk_round(x[i] * share, dtype);
        }
        break;
    default: break;
    }
}

MK_INLINE TARGET void NAME(activate_in)(const mk_act *act, float *gate, const float *up, int n,
                                        const int dtype) {
    float limit = act->limit > 0.0f ? mk_round(act->limit, dtype) : INFINITY;
    float before = act->after || !act->gated ? INFINITY : limit, after = act->after ? limit : INFINITY;
    for (int i = 0; i < n; i++) {
        float x = mk_round(gate[i], dtype);
        gate[i] = x > before ? before : x;
    }
    NAME(apply)(act->kind, act->alpha, gate, n, dtype);
    if (!act->gated) return;
    for (int i = 0; i < n; i++) {
        float u = mk_round(up[i], dtype), x = gate[i] > after ? after : gate[i];
        u = u > limit ? limit : u;
        u = u < -limit ? -limit : u;
        gate[i] = mk_round(x * mk_round(u + act->shift, dtype), dtype);
    }
}

static TARGET void NAME(activate)(const mk_act *act, float *gate, const float *up, int n,
                                  int dtype) {
    int plain = act->kind == MK_SILU && act->gated && act->limit == 0.0f && act->shift == 0.0f;
    if (plain) NAME(silu_times)(gate, up, n, dtype);
    else if (dtype == MK_BFLOAT16) NAME(activate_in)(act, gate, up, n, MK_BFLOAT16);
    else if (dtype == MK_FLOAT32) NAME(activate_in)(act, gate, up, n, MK_FLOAT32);
    else NAME(activate_in)(act, gate, up, n, MK_FLOAT16);
}

static TARGET void NAME(squash)(float *x, int n, float cap, int dtype) {
    for (int i = 0; i < n; i++) {
        float y = mk_round(mk_tanh(mk_round(x[i] / cap, dtype)), dtype);
        x[i] = mk_round(y * cap, dtype);
    }
}

static TARGET float NAME(exp_sum)(float *x, int n, float most) {
    float sums[16] = {0};
    int i = 0;
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j++) {
            x[i + j] = mk_exp(x[i + j] - most);
            sums[j] += x[i + j];
        }
    float sum = 0.0f;
    for (int j = 0; j < 16; j++) sum += sums[j];
    for (; i < n; i++) {
        x[i] = mk_exp(x[i] - most);
        sum += x[i];
    }
    return sum;
}

static TARGET void NAME(sum_up)(const float *x, int64_t n, float *most, float *sum) {
    for (; n > 0; x += MK_BLOCK, n -= MK_BLOCK, most++, sum++) {
        float held[MK_BLOCK], top[16], sums[16] = {0};
        int32_t odd[16] = {0};
        for (int i = 0; i < MK_BLOCK && n < MK_BLOCK; i++) held[i] = -INFINITY;
        memcpy(held, x, (size_t)(n < MK_BLOCK ? n : MK_BLOCK) * sizeof *held);
        for (int j = 0; j < 16; j++) top[j] = -INFINITY;
        for (int i = 0; i < MK_BLOCK; i += 16)
#pragma GCC unroll 1 /* or it is taken apart before it is vectorised */
            for (int j = 0; j < 16; j++) {
                top[j] = held[i + j] > top[j] ? held[i + j] : top[j];
                odd[j] |= held[i + j] != held[i + j];
            }
#pragma GCC unroll 4
        for (int half = 8; half > 0; half /= 2)
            for (int j = 0; j < half; j++) {
                top[j] = top[j + half] > top[j] ? top[j + half] : top[j];
                odd[j] |= odd[j + half];
            }
        *most = odd[0] ? NAN : top[0];
        *sum = 0.0f;
        if (!(top[0] > -INFINITY)) continue;
        for (int i = 0; i < MK_BLOCK; i += 16)
            for (int j = 0; j < 16; j++) sums[j] += mk_exp(held[i + j] - top[0]);
#pragma GCC unroll 4
        for (int half = 8; half > 0; half /= 2)
            for (int j = 0; j < half; j++) sums[j] += sums[j + half];
        *sum = sums[0];
    }
}

static TARGET double NAME(diverge)(const float *p, const float *q, int64_t n, float log_sum_p,
                                   float apart) {
    double sum = 0.0;
    for (int64_t begin = 0; begin < n; begin += 1024) {
        int64_t end = begin + 1024 < n ? begin + 1024 : n, i = begin;
        float sums[16] = {0};
        for (; i + 16 <= end; i += 16)
            for (int j = 0; j < 16; j++) {
                float share = mk_exp(p[i + j] - log_sum_p);
                float term = share * (p[i + j] - q[i + j] + apart);
                sums[j] += share > 0.0f ? term : 0.0f;
            }
        for (; i < end; i++) {
            float share = mk_exp(p[i] - log_sum_p);
            if (share > 0.0f) sums[0] += share * (p[i] - q[i] + apart);
        }
        for (int j = 0; j < 16; j++) sum += sums[j];
    }
    return sum;
}

static TARGET int64_t NAME(ahead)(const float *x, int64_t n, float value, int64_t at) {
    int32_t count = 0;
    for (int64_t i = 0; i < at; i++) count += x[i] >= value;
    for (int64_t i = at; i < n; i++) count += x[i] > value;
    return count;
}

static TARGET uint64_t NAME(read)(const void *from, size_t bytes) {
    const uint64_t *p = from;
    uint64_t sums[32] = {0};
    for (size_t i = 0; i + 32 <= bytes / 8; i += 32) {
#pragma GCC unroll 32
        for (int j = 0; j < 32; j++) sums[j] ^= p[i + j];
    }
    uint64_t sum = 0;
    for (int j = 0; j < 32; j++) sum ^= sums[j];
    return sum;
}
