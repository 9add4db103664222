/* The experts of many rows (a prompt) in bfloat16: rows sorted by expert, products in tiles.
 *
 * A tile is 4 rows of weights times up to 6 rows of input, 24 sums in registers. Inputs are packed
 * so that a tile reads them in one run; weights are read where they are, a block of rows from the
 * cache for all inputs of an expert. Rounding points are those of `TorchExperts._many`. Only for
 * AVX512-BF16: elsewhere torch does the same.
 */
#include <math.h>
#include <stdlib.h>

#include "numbers.h"
#include "pool.h"
#include "products.h"

#if defined(__x86_64__)
#include <immintrin.h>

enum { DEEP = 32, ACROSS = 6, DOWN = 4, ROWS = 32, TOKENS = 8, MOST_CHUNKS = 65535 };

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,avx512bf16")))

typedef enum { PACK, GATE_UP, DOWN_PARTS, SUM } stage;

typedef struct {
    mk_experts a;
    const mk_isa *isa;
    stage at;
    int *order;  /* sorted row -> pick (t * K + k) */
    int *places; /* [T, K]: the sorted rows of a token, ascending; -1: none */
    int *begin;  /* [E + 1]: where an expert's sorted rows start */
    int *busy;   /* experts somebody chose */
    int busy_experts;
    uint16_t *x, *inner, *parts; /* packed [rows, H]; packed [rows, I]; [rows, H] */
} job;

/* y[n * stride + r] = row r of w times row n of x, packed [cols / 32][N][32]. `next` is the part of
 * memory that is wanted soon. */
#define TILE(N)                                                                                  \
    static TARGET void tile_##N(const uint16_t *w, size_t width, const uint16_t *x, int cols,      \
                                float *y, size_t stride, const char *next) {                      \
        __m512 sums[DOWN][N];                                                                      \
        _Pragma("GCC unroll 4") for (int r = 0; r < DOWN; r++)                                    \
            _Pragma("GCC unroll 6") for (int n = 0; n < N; n++) sums[r][n] = _mm512_setzero_ps(); \
        for (int c = 0; c < cols; c += DEEP, x += (N) * DEEP) {                                    \
            __m512bh rows[DOWN];                                                                   \
            _Pragma("GCC unroll 4") for (int r = 0; r < DOWN; r++) {                              \
                rows[r] = (__m512bh)_mm512_loadu_si512(w + (size_t)r * width + c);                 \
                __builtin_prefetch(next + ((size_t)r * width + (size_t)c) * 2, 0, 2);              \
            }                                                                                      \
            _Pragma("GCC unroll 6") for (int n = 0; n < N; n++) {                                 \
                __m512bh column = (__m512bh)_mm512_loadu_si512(x + n * DEEP);                      \
                _Pragma("GCC unroll 4") for (int r = 0; r < DOWN; r++)                            \
                    sums[r][n] = _mm512_dpbf16_ps(sums[r][n], rows[r], column);                    \
            }                                                                                      \
        }                                                                                          \
        _Pragma("GCC unroll 4") for (int r = 0; r < DOWN; r++)                                    \
            _Pragma("GCC unroll 6") for (int n = 0; n < N; n++)                                   \
                y[(size_t)n * stride + (size_t)r] = _mm512_reduce_add_ps(sums[r][n]);              \
    }
TILE(1)
TILE(2)
TILE(3)
TILE(4)
TILE(5)
TILE(6)

typedef void (*tile)(const uint16_t *, size_t, const uint16_t *, int, float *, size_t,
                     const char *);
static const tile tiles[] = {NULL, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6};

/* Rows of a tile that starts at sorted row `from` of an expert whose rows end at `end`. */
static int across(int from, int end) { return end - from < ACROSS ? end - from : ACROSS; }

static void pack(void *given, int chunk, int thread) {
    (void)thread;
    job *j = given;
    int expert = j->busy[chunk], K = j->a.picks, H = j->a.hidden;
    for (int from = j->begin[expert]; from < j->begin[expert + 1]; from += ACROSS) {
        int N = across(from, j->begin[expert + 1]);
        uint16_t *out = j->x + (size_t)from * (size_t)H;
        for (int n = 0; n < N; n++) {
            int pick = j->order[from + n];
            const uint16_t *row = (const uint16_t *)j->a.h + (size_t)(pick / K) * (size_t)H;
            float scale = j->a.weight_first ? j->a.weights[pick] : 1.0f;
            for (int c = 0; c < H; c += DEEP) {
                uint16_t *to = out + (size_t)c * (size_t)N + (size_t)n * DEEP;
                if (!j->a.weight_first) memcpy(to, row + c, DEEP * sizeof *to);
                else
                    for (int i = 0; i < DEEP; i++)
                        to[i] = mk_to_bf16(mk_from_bf16(row[c + i]) * scale);
            }
        }
    }
}

static void gate_up(void *given, int chunk, int thread) {
    (void)thread;
    job *j = given;
    int H = j->a.hidden, I = j->a.width, blocks = I / ROWS;
    int expert = j->busy[chunk / blocks], row = chunk % blocks * ROWS;
    const uint16_t *gates = (const uint16_t *)j->a.gate_up +
                            ((size_t)expert * 2 * (size_t)I + (size_t)row) * (size_t)H;
    const uint16_t *ups = gates + (size_t)I * (size_t)H;
    float gate[ACROSS][ROWS], up[ACROSS][ROWS];
    for (int from = j->begin[expert]; from < j->begin[expert + 1]; from += ACROSS) {
        int N = across(from, j->begin[expert + 1]);
        const uint16_t *x = j->x + (size_t)from * (size_t)H;
        for (int r = 0; r < ROWS; r += DOWN) {
            const uint16_t *g = gates + (size_t)r * (size_t)H, *u = ups + (size_t)r * (size_t)H;
            tiles[N](g, (size_t)H, x, H, &gate[0][r], ROWS, (const char *)u);
            tiles[N](u, (size_t)H, x, H, &up[0][r], ROWS, (const char *)(g + DOWN * (size_t)H));
        }
        uint16_t *out = j->inner + (size_t)from * (size_t)I + (size_t)row * (size_t)N;
        for (int n = 0; n < N; n++) {
            j->isa->silu_times(gate[n], up[n], ROWS, MK_BFLOAT16);
            for (int i = 0; i < ROWS; i++) out[n * ROWS + i] = mk_to_bf16(gate[n][i]);
        }
    }
}

static void down(void *given, int chunk, int thread) {
    (void)thread;
    job *j = given;
    int H = j->a.hidden, I = j->a.width, blocks = H / ROWS;
    int expert = j->busy[chunk / blocks], row = chunk % blocks * ROWS;
    const uint16_t *w =
        (const uint16_t *)j->a.down + ((size_t)expert * (size_t)H + (size_t)row) * (size_t)I;
    float y[ACROSS][ROWS];
    for (int from = j->begin[expert]; from < j->begin[expert + 1]; from += ACROSS) {
        int N = across(from, j->begin[expert + 1]);
        const uint16_t *x = j->inner + (size_t)from * (size_t)I;
        for (int r = 0; r < ROWS; r += DOWN) {
            const uint16_t *at = w + (size_t)r * (size_t)I;
            tiles[N](at, (size_t)I, x, I, &y[0][r], ROWS, (const char *)(at + DOWN * (size_t)I));
        }
        for (int n = 0; n < N; n++) {
            float scale = j->a.weight_first ? 1.0f : j->a.weights[j->order[from + n]];
            uint16_t *out = j->parts + (size_t)(from + n) * (size_t)H + (size_t)row;
            for (int i = 0; i < ROWS; i++) out[i] = mk_to_bf16(mk_round_bf16(y[n][i]) * scale);
        }
    }
}

static TARGET void sum(void *given, int chunk, int thread) {
    (void)thread;
    job *j = given;
    int H = j->a.hidden, K = j->a.picks, end = (chunk + 1) * TOKENS;
    for (int t = chunk * TOKENS; t < end && t < j->a.tokens; t++) {
        uint16_t *out = (uint16_t *)j->a.out + (size_t)t * (size_t)H;
        memset(out, 0, (size_t)H * sizeof *out);
        for (int k = 0, held = 0; k < K; k++) {
            int place = j->places[t * K + k];
            if (place < 0) continue;
            const uint16_t *part = j->parts + (size_t)place * (size_t)H;
            if (!held++) memcpy(out, part, (size_t)H * sizeof *out);
            else
                for (int i = 0; i < H; i++)
                    out[i] = mk_to_bf16(mk_from_bf16(out[i]) + mk_from_bf16(part[i]));
        }
    }
}

static int next(void *given, mk_chunk *chunk) {
    job *j = given;
    switch (j->at++) {
    case PACK: *chunk = pack; return j->busy_experts;
    case GATE_UP: *chunk = gate_up; return j->busy_experts * (j->a.width / ROWS);
    case DOWN_PARTS: *chunk = down; return j->busy_experts * (j->a.hidden / ROWS);
    case SUM: *chunk = sum; return (j->a.tokens + TOKENS - 1) / TOKENS;
    default: return 0;
    }
}

/* Sorts the picks by expert; a token's own are then in the order of experts too. */
static int sort(job *j) {
    int picks = j->a.tokens * j->a.picks, E = j->a.experts;
    memset(j->begin, 0, ((size_t)E + 1) * sizeof *j->begin);
    for (int i = 0; i < picks; i++)
        if (j->a.expert_ids[i] >= 0 && j->a.expert_ids[i] < E) j->begin[j->a.expert_ids[i] + 1]++;
    for (int e = 0; e < E; e++) {
        if (j->begin[e + 1]) j->busy[j->busy_experts++] = e;
        j->begin[e + 1] += j->begin[e];
    }
    int rows = j->begin[E];
    for (int i = 0; i < picks; i++) {
        j->places[i] = -1;
        int e = j->a.expert_ids[i];
        if (e >= 0 && e < E) j->order[j->begin[e]++] = i;
    }
    for (int e = E; e > 0; e--) j->begin[e] = j->begin[e - 1];
    j->begin[0] = 0;
    int *filled = j->busy + E; /* [T], how many of a token's places are known */
    memset(filled, 0, (size_t)j->a.tokens * sizeof *filled);
    for (int row = 0; row < rows; row++) {
        int t = j->order[row] / j->a.picks;
        j->places[t * j->a.picks + filled[t]++] = row;
    }
    return rows;
}

int32_t mk_experts_run(mk_pool *pool, const char *isa, const mk_experts *given) {
    job j = {.a = *given, .isa = mk_choose_isa(isa)};
    size_t picks = (size_t)given->tokens * (size_t)given->picks, E = (size_t)given->experts;
    size_t H = (size_t)given->hidden, I = (size_t)given->width;
    if (j.isa != &mk_avx512_bf16 || H % ROWS || I % ROWS) return -1;
    if (E * (H > I ? H : I) / ROWS > MOST_CHUNKS || picks > INT32_MAX) return -1;
    int32_t failed = -1;
    j.order = malloc(picks * sizeof(int));
    j.places = malloc(picks * sizeof(int));
    j.begin = malloc((E + 1) * sizeof(int));
    j.busy = malloc((E + (size_t)given->tokens) * sizeof(int));
    if (j.order && j.places && j.begin && j.busy) {
        size_t rows = (size_t)sort(&j);
        j.x = aligned_alloc(64, (rows + 1) * H * sizeof *j.x);
        j.inner = aligned_alloc(64, (rows + 1) * I * sizeof *j.inner);
        j.parts = aligned_alloc(64, (rows + 1) * H * sizeof *j.parts);
        if (j.x && j.inner && j.parts) {
            if (rows == 0) j.at = SUM;
            mk_pool_run(pool, next, &j);
            failed = 0;
        }
    }
    free(j.order), free(j.places), free(j.begin), free(j.busy);
    free(j.x), free(j.inner), free(j.parts);
    return failed;
}

#else

int32_t mk_experts_run(mk_pool *pool, const char *isa, const mk_experts *given) {
    (void)pool, (void)isa, (void)given;
    return -1;
}

#endif
