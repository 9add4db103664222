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
