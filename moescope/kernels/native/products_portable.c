/* Any CPU: vectors of four floats, which compilers make of what there is (SSE2, NEON). */
#include <math.h>
#include <string.h>

#include "numbers.h"
#include "products.h"

typedef float four __attribute__((vector_size(16)));
typedef uint32_t words __attribute__((vector_size(16)));
typedef uint16_t halves __attribute__((vector_size(8)));

#define TARGET
#define ACC four
#define ZERO() ((four){0.0f, 0.0f, 0.0f, 0.0f})
#define ADD(a, b) ((a) + (b))
#define SUM(a) sum(a)
#define VALUES four
#define VWIDTH 4
#define VLOADF(p) from_f32(p)
#define VSET(f) spread(f)
#define VFMA(v, s, acc) ((acc) + (v) * (s))
#define VSTORE(p, v) store(p, v)

MK_INLINE float sum(four a) { return (a[0] + a[2]) + (a[1] + a[3]); }

MK_INLINE four spread(float f) { return (four){f, f, f, f}; }

MK_INLINE void store(float *p, four v) { memcpy(p, &v, sizeof v); }

MK_INLINE four from_f32(const void *p) {
    four v;
    memcpy(&v, p, sizeof v);
    return v;
}

MK_INLINE four from_bf16(const void *p) {
    halves h;
    memcpy(&h, p, sizeof h);
    return (four)(__builtin_convertvector(h, words) << 16);
}

MK_INLINE four from_f16(const void *p) {
    uint16_t h[4];
    memcpy(h, p, sizeof h);
    return (four){mk_from_f16(h[0]), mk_from_f16(h[1]), mk_from_f16(h[2]), mk_from_f16(h[3])};
}

#define NAME(x) f32_##x
#define DTYPE MK_FLOAT32
#define WEIGHT float
#define INPUT float
#define BLOCK 4
#define W four
#define X four
#define LOADW(p) from_f32(p)
#define LOADX(p) from_f32(p)
#define MAC(w, x, acc) ((acc) + (w) * (x))
#define VLOAD(p) from_f32(p)
#include "products_template.h"

#define NAME(x) f16_##x
#define DTYPE MK_FLOAT16
#define WEIGHT uint16_t
#define INPUT float
#define BLOCK 4
#define W four
#define X four
#define LOADW(p) from_f16(p)
#define LOADX(p) from_f32(p)
#define MAC(w, x, acc) ((acc) + (w) * (x))
#define VLOAD(p) from_f16(p)
#include "products_template.h"

#define NAME(x) bf16_##x
#define DTYPE MK_BFLOAT16
#define WEIGHT uint16_t
#define INPUT float
#define BLOCK 4
#define W four
#define X four
#define LOADW(p) from_bf16(p)
#define LOADX(p) from_f32(p)
#define MAC(w, x, acc) ((acc) + (w) * (x))
#define VLOAD(p) from_bf16(p)
#include "products_template.h"

#define NAME(x) plain_##x
#include "rows_template.h"

const mk_isa mk_portable = {
    "portable",
    {f32_rows, bf16_rows, f16_rows},
    {MK_FLOAT32, MK_FLOAT32, MK_FLOAT32},
    {f32_mix, bf16_mix, f16_mix},
    plain_silu_times,
    plain_activate,
    plain_squash,
    plain_exp_sum,
    plain_sum_up,
    plain_diverge,
    plain_ahead,
    plain_read,
};
