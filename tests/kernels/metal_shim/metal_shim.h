/* The names of the Metal Shading Language that the kernels use, in C++14, so that their very text
   compiles and runs here. What a function may not do on the device it does not do here either:
   logarithms and powers are as coarse as the language allows, and a lane may reach a reduction only
   together with the other lanes of its simdgroup.

   Two engines run the lanes of a threadgroup. Fibers take turns in a given order, and a lane that
   meets another operation than its neighbours is an error. Threads (-DTHREADS) really run at once,
   for the sanitisers: reductions order nothing there, so that a barrier that is missing is a race
   even where a reduction stands beside it. */
#ifndef MOESCOPE_METAL_SHIM_H
#define MOESCOPE_METAL_SHIM_H

#include <cmath>
#include <cstdint>
#include <cstring>

typedef uint32_t uint;
typedef uint16_t ushort;
typedef uint64_t ulong;

struct uint3 {
    uint x, y, z;
};

template <typename To, typename From>
inline To as_type(From from) {
    static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

struct float16_t {
    uint16_t bits;
    explicit operator float() const;
};

struct bfloat16_t {
    uint16_t bits;
    explicit operator float() const { return as_type<float>(uint(bits) << 16); }
};

inline float16_t::operator float() const {
    uint sign = uint(bits & 0x8000u) << 16, size = bits & 0x7FFFu;
    if (size >= 0x7C00u) return as_type<float>(sign | 0x7F800000u | (size & 0x3FFu) << 13);
    float value = size < 0x400u ? float(size) * 5.9604644775390625e-8f
                                : as_type<float>((size << 13) + 0x38000000u);
    return as_type<float>(as_type<uint>(value) | sign);
}

/* --- what the engines offer ------------------------------------------------------------------- */

enum class Meeting { reduction, simdgroup, threadgroup };

/* Posts `mine` and waits for the other 31 lanes; their values. `line` is where in the text. */
const uint *meet(Meeting meeting, int kind, int line, uint mine);

/* --- metal ------------------------------------------------------------------------------------ */

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

inline int clz(uint x) { return x == 0 ? 32 : __builtin_clz(x); }
inline float abs(float x) { return as_type<float>(as_type<uint>(x) & 0x7FFFFFFFu); }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline float rint(float x) { return __builtin_rintf(x); }

template <typename T>
inline T max(T a, T b) {
    return a > b ? a : b;
}

template <typename T>
inline T min(T a, T b) {
    return a < b ? a : b;
}

inline float coarse(float x, int ulps) {
    for (int i = 0; i < ulps; i++) x = std::nextafter(x, INFINITY);
    return x;
}

namespace precise {
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline float log(float x) { return coarse(std::log(x), 3); }
inline float pow(float x, float y) { return coarse(std::pow(x, y), 16); }
}  // namespace precise

#define LINE int line = __builtin_LINE()

inline float simd_sum(float x, LINE) {
    const uint *all = meet(Meeting::reduction, 'sum', line, as_type<uint>(x));
    float part[32];
    for (int i = 0; i < 32; i++) part[i] = as_type<float>(all[i]);
    for (int half = 16; half > 0; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
}

inline int simd_max(int x, LINE) {
    const uint *all = meet(Meeting::reduction, 'max', line, as_type<uint>(x));
    int top = as_type<int>(all[0]);
    for (int i = 1; i < 32; i++) top = max(top, as_type<int>(all[i]));
    return top;
}

inline int simd_min(int x, LINE) {
    const uint *all = meet(Meeting::reduction, 'min', line, as_type<uint>(x));
    int least = as_type<int>(all[0]);
    for (int i = 1; i < 32; i++) least = min(least, as_type<int>(all[i]));
    return least;
}

inline float simd_shuffle_xor(float x, ushort mask, LINE);
inline int simd_broadcast(int x, ushort lane, LINE) {
    return as_type<int>(meet(Meeting::reduction, 'give', line, as_type<uint>(x))[lane]);
}

inline void simdgroup_barrier(mem_flags flags, LINE) {
    bool orders = flags == mem_flags::mem_threadgroup;
    meet(orders ? Meeting::simdgroup : Meeting::reduction, 'simd', line, 0);
}

inline void threadgroup_barrier(mem_flags, LINE) { meet(Meeting::threadgroup, 'grup', line, 0); }

}  // namespace metal

uint lane_index();

inline float metal::simd_shuffle_xor(float x, ushort mask, int line) {
    const uint *all = meet(Meeting::reduction, 'xor', line, as_type<uint>(x));
    return as_type<float>(all[lane_index() ^ mask]);
}

#endif
