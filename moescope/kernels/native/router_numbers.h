/* Numbers as the router needs them, so that loops over experts vectorise: no branch, no call. */
#ifndef MOESCOPE_ROUTER_NUMBERS_H
#define MOESCOPE_ROUTER_NUMBERS_H

#include "numbers.h"

MK_INLINE uint64_t mk_bits_of_double(double x) {
    uint64_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

MK_INLINE double mk_double(uint64_t bits) {
    double x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* To nearest, ties to even; NaN stays NaN. */
MK_INLINE float mk_nearest_f16(float x) {
    uint32_t bits = mk_bits(x), sign = bits & 0x80000000u, size = bits ^ sign;
    uint32_t normal = (size + 0xFFFu + ((size >> 13) & 1u)) & 0xFFFFE000u;
    normal = normal > 0x477FE000u ? 0x7F800000u : normal; /* past 65504 */
    /* below 2^-14 numbers are 2^-24 apart, as floats from 0.5 to 1 are */
    uint32_t small = mk_bits((mk_float(size) + 0.5f) - 0.5f);
    uint32_t rounded = size < 0x38800000u ? small : normal;
    return mk_float(x != x ? bits : rounded | sign);
}

/* Through float32 first, as frameworks do. */
MK_INLINE float mk_to_dtype(double x, int dtype) {
    float single = (float)x;
    if (dtype == MK_BFLOAT16) return mk_round_bf16(single);
    return dtype == MK_FLOAT16 ? mk_nearest_f16(single) : single;
}

/* exp(x) for x <= 0, -inf and NaN included, within an ulp or so: 2^n times a Taylor series. */
MK_INLINE double mk_exp_double(double x) {
    const double shift = 0x1.8p52; /* adding it rounds to an integer, in the low bits */
    x = x < -1000.0 ? -1000.0 : x;
    double n = (x * 0x1.71547652b82fep0 + shift) - shift;
    double r = (x - n * 0x1.62e42fefap-1) - n * 0x1.cf79abc9e3b3ap-40;
    double y = 1.0 / 6227020800.0;
    y = y * r + 1.0 / 479001600.0;
    y = y * r + 1.0 / 39916800.0;
    y = y * r + 1.0 / 3628800.0;
    y = y * r + 1.0 / 362880.0;
    y = y * r + 1.0 / 40320.0;
    y = y * r + 1.0 / 5040.0;
    y = y * r + 1.0 / 720.0;
    y = y * r + 1.0 / 120.0;
    y = y * r + 1.0 / 24.0;
    y = y * r + 1.0 / 6.0;
    y = y * r + 0.5;
    y = y * r * r + r;
    /* in two factors, because 2^n itself may be too small for a normal number */
    double within = n < -1000.0 ? n + 600.0 : n, rest = n < -1000.0 ? 0x1p-600 : 1.0;
    uint64_t power = mk_bits_of_double(within + (shift + 1023.0)) << 52;
    return (1.0 + y) * mk_double(power) * rest;
}

/* log(x) for finite x > 0 and NaN, within an ulp or so: exponent and 2 atanh((m - 1) / (m + 1)). */
MK_INLINE double mk_log_double(double x) {
    double lifted = x < 0x1p-1000 ? x * 0x1p200 : x, lift = x < 0x1p-1000 ? 200.0 : 0.0;
    uint64_t bits = mk_bits_of_double(lifted);
    bits += 0x3FF0000000000000u - 0x3FE6A09E667F3BCDu; /* m from sqrt(1/2) to sqrt(2) */
    double e = mk_double((bits >> 52) | 0x4330000000000000u) - (0x1p52 + 1023.0);
    double m = mk_double((bits & 0x000FFFFFFFFFFFFFu) + 0x3FE6A09E667F3BCDu);
    double s = (m - 1.0) / (m + 1.0), q = s * s;
    double y = 1.0 / 21.0;
    y = y * q + 1.0 / 19.0;
    y = y * q + 1.0 / 17.0;
    y = y * q + 1.0 / 15.0;
    y = y * q + 1.0 / 13.0;
    y = y * q + 1.0 / 11.0;
    y = y * q + 1.0 / 9.0;
    y = y * q + 1.0 / 7.0;
    y = y * q + 1.0 / 5.0;
    y = y * q + 1.0 / 3.0;
    y = (e - lift) * 0x1.62e42fefa39efp-1 + (2.0 * s + 2.0 * s * q * y);
    return x != x ? x : y;
}

/* log(1 + u) for u from 0 to 1, relative to u however small. */
MK_INLINE double mk_log1p_double(double u) {
    double w = 1.0 + u, d = w - 1.0;
    return d == 0.0 ? u : mk_log_double(w) * (u / (d == 0.0 ? 1.0 : d));
}

/* Integers that compare as the floats do; -0 is 0. */
MK_INLINE int32_t mk_ordered(float x) {
    int32_t bits = (int32_t)mk_bits(x + 0.0f);
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

MK_INLINE float mk_from_ordered(int32_t order) {
    return mk_float((uint32_t)(order ^ ((order >> 31) & 0x7FFFFFFF)));
}

/* A value above its id, so that the greatest key is the best value of the best id: the lower one
   where `flip` is all ones, the higher one where it is 0. */
MK_INLINE int64_t mk_key(float value, uint32_t id, uint32_t flip) {
    return (int64_t)((uint64_t)(int64_t)mk_ordered(value) << 32 | (id ^ flip));
}

MK_INLINE float mk_key_value(int64_t key) { return mk_from_ordered((int32_t)(key >> 32)); }

MK_INLINE int32_t mk_key_id(int64_t key, uint32_t flip) { return (int32_t)((uint32_t)key ^ flip); }

#endif
