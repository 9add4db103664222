#include "products.h"

#include <string.h>

#include "numbers.h"

float mk_from_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16, rest = half & 0x7fffu;
    if (rest >= 0x7c00u) return mk_float(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    if (rest >= 0x0400u) return mk_float(sign | ((rest << 13) + (112u << 23)));
    float small = (float)rest * 0x1p-24f;
    return mk_float(sign | mk_bits(small));
}

uint16_t mk_to_f16(float x) {
    uint32_t u = mk_bits(x), sign = u >> 16 & 0x8000u, rest = u & 0x7fffffffu;
    if (rest > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
    if (rest >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* from 65520 on */
    if (rest < 0x38800000u) { /* below 2^-14: adding 0.5 leaves the rounded digits at the end */
        float shifted = mk_float(rest) + 0.5f;
        return (uint16_t)(sign | (mk_bits(shifted) - 0x3f000000u));
    }
    uint32_t odd = rest >> 13 & 1u;
    return (uint16_t)(sign | ((rest - (112u << 23) + 0xfffu + odd) >> 13));
}

static int has(const mk_isa *isa) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("f16c");
    int avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (isa == &mk_avx2) return avx2;
    if (isa == &mk_avx512) return avx512;
    if (isa == &mk_avx512_bf16) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
    return isa == &mk_portable;
}

const mk_isa *mk_choose_isa(const char *wanted) {
    static const mk_isa *const all[] = {
#if defined(__x86_64__)
        &mk_avx512_bf16, &mk_avx512, &mk_avx2,
#endif
        &mk_portable,
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if ((wanted == NULL || !*wanted || !strcmp(wanted, all[i]->name)) && has(all[i]))
            return all[i];
    return NULL;
}
