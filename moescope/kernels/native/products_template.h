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

/* R rows, 1 or 2, times N vectors. Two rows halve the loads of vectors; that memory is read as one
 * stream all the same, the next two rows are fetched in order meanwhile. */
MK_INLINE TARGET void NAME(tile)(const int R, const int N, const WEIGHT *w, size_t stride, int cols,
                                 const INPUT *const *x, float *const *y, int row) {
    ACC acc[2][MK_TILE][2];
#pragma GCC unroll 2
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) acc[r][n][0] = acc[r][n][1] = ZERO();
    const char *ahead = (const char *)(w + 2 * stride);
    int i = 0;
    for (; i + 2 * BLOCK <= cols; i += 2 * BLOCK) {
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            W loaded[2];
#pragma GCC unroll 2
            for (int r = 0; r < R; r++) loaded[r] = LOADW(w + (size_t)r * stride + i + h * BLOCK);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) {
                X given = LOADX(x[n] + i + h * BLOCK);
#pragma GCC unroll 2
                for (int r = 0; r < R; r++) acc[r][n][h] = MAC(loaded[r], given, acc[r][n][h]);
            }
        }
        if (R == 2) {
#pragma GCC unroll 4
            for (size_t line = 0; line < 4 * BLOCK * sizeof(WEIGHT); line += 64)
                __builtin_prefetch(ahead + line, 0, 2);
            ahead += 4 * BLOCK * sizeof(WEIGHT);
        }
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) { /* vectors are padded with zeros, rows are not */
        if (i >= cols) break;
        int left = cols - i < BLOCK ? cols - i : BLOCK;
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) {
            WEIGHT rest[BLOCK];
            memset(rest, 0, sizeof rest);
            memcpy(rest, w + (size_t)r * stride + i, (size_t)left * sizeof(WEIGHT));
            W loaded = LOADW(rest);
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) acc[r][n][h] = MAC(loaded, LOADX(x[n] + i), acc[r][n][h]);
        }
        i += BLOCK;
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
#pragma GCC unroll 2
        for (int r = 0; r < R; r++) y[n][row + r] = SUM(ADD(acc[r][n][0], acc[r][n][1]));
}

#define PAIRS(N_)                                                                             \
    for (; r + 2 <= last; r += 2)                                                             \
        NAME(tile)(2, N_, w + (size_t)r * stride, stride, cols, x, y, r);                     \
    if (r < last) NAME(tile)(1, N_, w + (size_t)r * stride, stride, cols, x, y, r);

#define EACH(N_)                                                                              \
    for (; r < last; r++)                                                                     \
        NAME(tile)(1, N_, w + (size_t)r * stride, stride, cols, x, y, r);

/* Rows `first` to `last` times at most MK_TILE vectors. */
static TARGET void NAME(few)(const WEIGHT *w, size_t stride, int first, int last, int cols,
                             const INPUT *const *x, int lanes, float *const *y) {
    int r = first;
    switch (lanes) {
    /* one row after the other: memory is read as one stream, twice as fast as two */
    case 1: EACH(1) break;
    case 2: EACH(2) break;
    /* three and four vectors of floats leave no room in L1 for rows to pass through: fewer loads */
    case 3:
        if (sizeof(INPUT) == 2) { EACH(3) } else { PAIRS(3) }
        break;
    default:
        if (sizeof(INPUT) == 2) { EACH(4) } else { PAIRS(4) }
        break;
    }
}
#undef PAIRS
#undef EACH

/* More vectors than a tile holds read a block of rows again, from L2. */
static TARGET void NAME(rows)(const void *weight, size_t stride, int rows, int cols,
                              const void *const *given, int lanes, float *const *y) {
    const INPUT *const *x = (const INPUT *const *)given;
    int block = lanes <= MK_TILE ? rows : 32;
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
