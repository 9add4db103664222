/* AVX2 with FMA and F16C: all dtypes widened to float32. */
#if defined(__x86_64__)
#include <immintrin.h>

#include <math.h>

#include "numbers.h"
#include "products.h"

#define TARGET __attribute__((target("avx2,fma,f16c")))
#define ACC __m256
#define ZERO() _mm256_setzero_ps()
#define ADD(a, b) _mm256_add_ps(a, b)
#define SUM(a) sum(a)
#define VALUES __m256
#define VWIDTH 8
#define VLOADF(p) _mm256_loadu_ps(p)
#define VSET(f) _mm256_set1_ps(f)
#define VFMA(v, s, acc) _mm256_fmadd_ps(v, s, acc)
#define VSTORE(p, v) _mm256_storeu_ps(p, v)

MK_INLINE TARGET float sum(__m256 a) {
    __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    b = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(b, _mm_movehdup_ps(b)));
}

MK_INLINE TARGET __m256 widened_bf16(const void *p) {
    __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i *)p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}

MK_INLINE TARGET __m256 widened_f16(const void *p) {
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)p));
}

#define NAME(x) f32_##x
#define DTYPE MK_FLOAT32
#define WEIGHT float
#define INPUT float
#define BLOCK 8
#define W __m256
#define X __m256
#define LOADW(p) _mm256_loadu_ps(p)
#define LOADX(p) _mm256_loadu_ps(p)
#define MAC(w, x, acc) _mm256_fmadd_ps(w, x, acc)
#define VLOAD(p) _mm256_loadu_ps(p)
#include "products_template.h"

#define NAME(x) f16_##x
#define DTYPE MK_FLOAT16
#define WEIGHT uint16_t
#define INPUT float
#define BLOCK 8
#define W __m256
#define X __m256
#define LOADW(p) widened_f16(p)
#define LOADX(p) _mm256_loadu_ps(p)
#define MAC(w, x, acc) _mm256_fmadd_ps(w, x, acc)
#define VLOAD(p) widened_f16(p)
#include "products_template.h"

#define NAME(x) bf16_##x
#define DTYPE MK_BFLOAT16
#define WEIGHT uint16_t
#define INPUT float
#define BLOCK 8
#define W __m256
#define X __m256
#define LOADW(p) widened_bf16(p)
#define LOADX(p) _mm256_loadu_ps(p)
#define MAC(w, x, acc) _mm256_fmadd_ps(w, x, acc)
#define VLOAD(p) widened_bf16(p)
#include "products_template.h"

#define NAME(x) plain_##x
#include "rows_template.h"

const mk_isa mk_avx2 = {
    "avx2",
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
#endif
