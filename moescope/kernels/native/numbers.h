/* Rounding to the dtypes of a model, and the exponential. Everything here vectorises. */
#ifndef MOESCOPE_NUMBERS_H
#define MOESCOPE_NUMBERS_H

#include <stdint.h>
#include <string.h>

#include "moescope_kernels.h"

#define MK_INLINE static inline __attribute__((always_inline))

MK_INLINE uint32_t mk_bits(float x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return u;
}

MK_INLINE float mk_float(uint32_t u) {
    float x;
    memcpy(&x, &u, 4);
    return x;
}

MK_INLINE float mk_from_bf16(uint16_t b) { return mk_float((uint32_t)b << 16); }

/* To nearest, ties to even; NaN stays NaN. */
MK_INLINE float mk_round_bf16(float x) {
    uint32_t u = mk_bits(x);
    uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
    uint32_t quiet = (u & 0xffff0000u) | 0x00400000u;
    return mk_float((u & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

MK_INLINE uint16_t mk_to_bf16(float x) { return (uint16_t)(mk_bits(mk_round_bf16(x)) >> 16); }

float mk_from_f16(uint16_t half);
uint16_t mk_to_f16(float x);

MK_INLINE float mk_round_f16(float x) { return mk_from_f16(mk_to_f16(x)); }

MK_INLINE float mk_round(float x, int dtype) {
    if (dtype == MK_BFLOAT16) return mk_round_bf16(x);
    if (dtype == MK_FLOAT16) return mk_round_f16(x);
    return x;
}

MK_INLINE float mk_load(const void *from, size_t i, int dtype) {
    if (dtype == MK_BFLOAT16) return mk_from_bf16(((const uint16_t *)from)[i]);
    if (dtype == MK_FLOAT16) return mk_from_f16(((const uint16_t *)from)[i]);
    return ((const float *)from)[i];
}

MK_INLINE void mk_store(void *to, size_t i, float x, int dtype) {
    if (dtype == MK_BFLOAT16) ((uint16_t *)to)[i] = mk_to_bf16(x);
    else if (dtype == MK_FLOAT16) ((uint16_t *)to)[i] = mk_to_f16(x);
    else ((float *)to)[i] = x;
}

/* e^x within 2 ulp (Cephes' polynomial), without a branch; NaN stays NaN. */
MK_INLINE float mk_exp(float x) {
    float bounded = x < -87.3f ? -87.3f : x;
    bounded = bounded > 88.7f ? 88.7f : bounded;
    float shifted = bounded * 1.44269504f + 12582912.0f; /* 1.5 * 2^23: rounds to an integer */
    float n = shifted - 12582912.0f;
    float r = bounded - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    /* 2^n in two steps, so that n = 128 does not overflow on the way */
    int32_t k = (int32_t)n, half = k >> 1;
    float y = p * mk_float((uint32_t)(half + 127) << 23);
    y = y * mk_float((uint32_t)(k - half + 127) << 23);
    y = x > 88.72283f ? mk_float(0x7f800000u) : y;
    y = x < -87.3f ? 0.0f : y;
    return x != x ? x : y;
}

/* tanh within 2 ulp (Cephes' polynomial near 0, else by the exponential); NaN stays NaN. */
MK_INLINE float mk_tanh(float x) {
    float square = x * x, p = -5.70498872745e-3f;
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    float near = p * square * x + x;
    float size = x < 0.0f ? -x : x;
    float far = 1.0f - 2.0f / (mk_exp(size + size) + 1.0f);
    far = x < 0.0f ? -far : far;
    return size < 0.625f ? near : far;
}

#endif
