/* Products of matrices in memory with a few vectors in L1, for one instruction set and one dtype.
 *
 * Included several times. The includer defines
 *   NAME(x)      names of this inclusion
 *   TARGET       attributes of its functions
 *   WEIGHT       the stored type;  INPUT the type vectors are given in
 *   BLOCK        elements of one multiply-accumulate
 *   ACC ZERO()   an accumulator of floats; ADD(a, b), SUM(a) its sum in a fixed order
 *   W LOADW(p), X LOADX(p), MAC(w, x, acc)
 *   VALUES, VWIDTH, VLOAD(p), VLOADF(p), VSET(f), VFMA(v, s, acc), VSTORE(p, v): rows of the
 *                cache, widened to float32;  DTYPE
 *   MOST         vectors one pass over a row serves: 4 or 8
 *
 * A row's sum has two accumulators that take blocks in turn, whatever the number of vectors
 * beside it: a lane gets the same bits in every batch.
 */

MK_INLINE TARGET void NAME(row)(const int N, const WEIGHT *w, int cols, const INPUT *const *x,
                                float *const *y, int row) {
    ACC acc[MOST][2];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) acc[n][0] = acc[n][1] = ZERO();
    int i = 0;
    for (; i + 2 * BLOCK <= cols; i += 2 * BLOCK) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const WEIGHT *p = w + i + h * BLOCK;
            W loaded = LOADW(p);
#pragma GCC unroll 8
            for (int n = 0; n < N; n++)
                acc[n][h] = MAC(loaded, LOADX(x[n] + i + h * BLOCK), acc[n][h]);
        }
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) { /* vectors are padded with zeros, rows are not */
        if (i >= cols) break;
        int left = cols - i < BLOCK ? cols - i : BLOCK;
        WEIGHT rest[BLOCK];
        memset(rest, 0, sizeof rest);
        memcpy(rest, w + i, (size_t)left * sizeof(WEIGHT));
        W loaded = LOADW(rest);
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) acc[n][h] = MAC(loaded, LOADX(x[n] + i), acc[n][h]);
        i += BLOCK;
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) y[n][row] = SUM(ADD(acc[n][0], acc[n][1]));
}

/* One row after the other, so that memory is read as one stream: that is twice as fast as several
 * rows together. Vectors beyond MOST read the row again, from L1. */
static TARGET void NAME(rows)(const void *weight, size_t stride, int rows, int cols,
                              const void *const *given, int lanes, float *const *y) {
    const WEIGHT *w = weight;
    const INPUT *const *x = (const INPUT *const *)given;
    if (lanes == 1) {
        for (int r = 0; r < rows; r++, w += stride) NAME(row)(1, w, cols, x, y, r);
        return;
    }
    for (int r = 0; r < rows; r++, w += stride) {
        int n = 0;
        for (; n + MOST <= lanes; n += MOST) NAME(row)(MOST, w, cols, x + n, y + n, r);
        if (lanes - n >= 4 && MOST > 4) {
            NAME(row)(4, w, cols, x + n, y + n, r);
            n += 4;
        }
        switch (lanes - n) {
        case 3: NAME(row)(3, w, cols, x + n, y + n, r); break;
        case 2: NAME(row)(2, w, cols, x + n, y + n, r); break;
        case 1: NAME(row)(1, w, cols, x + n, y + n, r); break;
        default: break;
        }
    }
}

MK_INLINE TARGET void NAME(mix_tile)(const int D, const int N, const WEIGHT *v, size_t stride,
                                     int rows, const float *const *p, float *const *y, int at) {
    VALUES acc[MK_TILE][MK_TILE];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int d = 0; d < D; d++) acc[n][d] = VLOADF(y[n] + at + d * VWIDTH);
    for (int s = 0; s < rows; s++) {
        VALUES loaded[MK_TILE];
#pragma GCC unroll 4
        for (int d = 0; d < D; d++) loaded[d] = VLOAD(v + (size_t)s * stride + at + d * VWIDTH);
#pragma GCC unroll 4
        for (int n = 0; n < N; n++)
#pragma GCC unroll 4
            for (int d = 0; d < D; d++) acc[n][d] = VFMA(loaded[d], VSET(p[n][s]), acc[n][d]);
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
#pragma GCC unroll 4
        for (int d = 0; d < D; d++) VSTORE(y[n] + at + d * VWIDTH, acc[n][d]);
}

static TARGET void NAME(mix)(const void *values, size_t stride, int rows, int width,
                             const float *const *p, int lanes, float *const *y) {
    const WEIGHT *v = values;
    int d = 0;
    for (; d + 4 * VWIDTH <= width; d += 4 * VWIDTH) {
        int n = 0;
        for (; n + 2 <= lanes; n += 2) NAME(mix_tile)(4, 2, v, stride, rows, p + n, y + n, d);
        for (; n < lanes; n++) NAME(mix_tile)(4, 1, v, stride, rows, p + n, y + n, d);
    }
    for (; d + VWIDTH <= width; d += VWIDTH)
        for (int n = 0; n < lanes; n++) NAME(mix_tile)(1, 1, v, stride, rows, p + n, y + n, d);
    for (int n = 0; n < lanes; n++)
        for (int c = d; c < width; c++) {
            float sum = y[n][c];
            for (int s = 0; s < rows; s++) sum += p[n][s] * mk_load(v, (size_t)s * stride + c, DTYPE);
            y[n][c] = sum;
        }
}

#undef NAME
#undef WEIGHT
#undef INPUT
#undef DTYPE
#undef BLOCK
#undef W
#undef X
#undef LOADW
#undef LOADX
#undef MAC
#undef VLOAD
