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
 *
 * A row's sum has two accumulators that take blocks in turn, whatever the number of vectors
 * beside it: a lane gets the same bits in every batch.
 */

MK_INLINE TARGET void NAME(row)(const int N, const WEIGHT *w, int cols, const INPUT *const *x,
                                float *const *y, int row) {
    ACC acc[MK_TILE][2];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) acc[n][0] = acc[n][1] = ZERO();
    int i = 0;
    for (; i + 2 * BLOCK <= cols; i += 2 * BLOCK) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            const WEIGHT *p = w + i + h * BLOCK;
            W loaded = LOADW(p);
            if (N > 2) __builtin_prefetch((const char *)p + AHEAD, 0, HINT);
#pragma GCC unroll 4
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
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) acc[n][h] = MAC(loaded, LOADX(x[n] + i), acc[n][h]);
        i += BLOCK;
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) y[n][row] = SUM(ADD(acc[n][0], acc[n][1]));
}

#define EACH_ROW(N_)                                                                         \
    for (int r = first; r < last; r++)                                                       \
        NAME(row)(N_, w + (size_t)r * stride, cols, x, y, r);

/* Rows `first` to `last` times at most MK_TILE vectors, one row after the other, so that memory is
 * read as one stream: that is twice as fast as several rows together. */
static TARGET void NAME(few)(const WEIGHT *w, size_t stride, int first, int last, int cols,
                             const INPUT *const *x, int lanes, float *const *y) {
    switch (lanes) {
    case 1: EACH_ROW(1) break;
    case 2: EACH_ROW(2) break;
    case 3: EACH_ROW(3) break;
    default: EACH_ROW(4) break;
    }
}
#undef EACH_ROW

/* More vectors than MK_TILE read a block of rows again, from L2. */
static TARGET void NAME(rows)(const void *weight, size_t stride, int rows, int cols,
                              const void *const *given, int lanes, float *const *y) {
    const INPUT *const *x = (const INPUT *const *)given;
    int block = lanes <= MK_TILE ? rows : 16;
    for (int first = 0; first < rows; first += block) {
        int last = rows - first < block ? rows : first + block;
        for (int n = 0; n < lanes; n += MK_TILE)
            NAME(few)(weight, stride, first, last, cols, x + n,
                      lanes - n < MK_TILE ? lanes - n : MK_TILE, y + n);
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
