/* AVX-512: all dtypes widened to float32; with AVX512-BF16, bfloat16 multiplied in pairs. */
#if defined(__x86_64__)
#include <immintrin.h>

#include <math.h>

#include "numbers.h"
#include "products.h"

#define AVX512 "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"
#define ACC __m512
#define ZERO() _mm512_setzero_ps()
#define ADD(a, b) _mm512_add_ps(a, b)
#define SUM(a) _mm512_reduce_add_ps(a)
#define VALUES __m512
#define VWIDTH 16
#define VLOADF(p) _mm512_loadu_ps(p)
#define VSET(f) _mm512_set1_ps(f)
#define VFMA(v, s, acc) _mm512_fmadd_ps(v, s, acc)
#define VSTORE(p, v) _mm512_storeu_ps(p, v)
#define TARGET __attribute__((target(AVX512)))

MK_INLINE TARGET __m512 widened_bf16(const void *p) {
    __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

MK_INLINE TARGET __m512 widened_f16(const void *p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p));
}

#define NAME(x) f32_##x
#define DTYPE MK_FLOAT32
#define WEIGHT float
#define INPUT float
#define BLOCK 16
#define W __m512
#define X __m512
#define LOADW(p) _mm512_loadu_ps(p)
#define LOADX(p) _mm512_loadu_ps(p)
#define MAC(w, x, acc) _mm512_fmadd_ps(w, x, acc)
#define VLOAD(p) _mm512_loadu_ps(p)
#include "products_template.h"

#define NAME(x) f16_##x
#define DTYPE MK_FLOAT16
#define WEIGHT uint16_t
#define INPUT float
#define BLOCK 16
#define W __m512
#define X __m512
#define LOADW(p) widened_f16(p)
#define LOADX(p) _mm512_loadu_ps(p)
#define MAC(w, x, acc) _mm512_fmadd_ps(w, x, acc)
#define VLOAD(p) widened_f16(p)
#include "products_template.h"

#define NAME(x) bf16_##x
#define DTYPE MK_BFLOAT16
#define WEIGHT uint16_t
#define INPUT float
#define BLOCK 16
#define W __m512
#define X __m512
#define LOADW(p) widened_bf16(p)
#define LOADX(p) _mm512_loadu_ps(p)
#define MAC(w, x, acc) _mm512_fmadd_ps(w, x, acc)
#define VLOAD(p) widened_bf16(p)
#include "products_template.h"

#define NAME(x) plain_##x
#include "rows_template.h"
#undef NAME
#undef TARGET

#define TARGET __attribute__((target(AVX512 ",avx512bf16")))
#define NAME(x) pairs_##x
#define DTYPE MK_BFLOAT16
#define WEIGHT uint16_t
#define INPUT uint16_t
#define BLOCK 32
#define W __m512bh
#define X __m512bh
#define LOADW(p) ((__m512bh)_mm512_loadu_si512(p))
#define LOADX(p) ((__m512bh)_mm512_loadu_si512(p))
#define MAC(w, x, acc) _mm512_dpbf16_ps(acc, w, x)
#define VLOAD(p) widened_bf16(p)
#include "products_template.h"

const mk_isa mk_avx512 = {
    "avx512",
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

const mk_isa mk_avx512_bf16 = {
    "avx512-bf16",
    {f32_rows, pairs_rows, f16_rows},
    {MK_FLOAT32, MK_BFLOAT16, MK_FLOAT32},
    {f32_mix, pairs_mix, f16_mix},
    plain_silu_times,
    plain_activate,
    plain_squash,
    plain_exp_sum,
    plain_sum_up,
    plain_diverge,
    plain_ahead,
    plain_read,
};
#endif
