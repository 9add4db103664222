// Numbers whose rounding is part of the contract, without float64, which Metal has not: a pair of
// float32 holds 48 bits, so that what is rounded once more to float32 is rounded as the reference
// rounds it, but for one value in many thousands that lies next to a boundary.
//
// GPUs of Apple take denormal float32 for zero. So numbers that may be denormal are compared,
// rounded and scaled as integers, and arithmetic keeps to a mantissa and an exponent.

#pragma METAL fp contract(off)

#define MOESCOPE_EACH(i) _Pragma("clang loop unroll(full)") for (int i = 0; i < PER; i++)

namespace moescope {

// Lanes of a simdgroup, on every GPU of Apple; also the most picks a row may have, one for each.
enum : int { LANES = 32 };

// Places in `policy_rows.DTYPES`.
enum : int { FLOAT32, BFLOAT16, FLOAT16 };

enum : int { INF_KEY = 0x7F800000, NO_KEY = -0x7FFFFFFF - 1 };

// --- float32 as integers -------------------------------------------------------------------------

inline float infinity() { return as_type<float>(0x7F800000u); }
inline float not_a_number() { return as_type<float>(0x7FC00000u); }
inline bool is_nan(float x) { return (as_type<uint>(x) & 0x7FFFFFFFu) > 0x7F800000u; }
inline bool is_zero(float x) { return (as_type<uint>(x) & 0x7FFFFFFFu) == 0u; }

// An integer in the order of the floats; both zeros are one number, NaN is above or below all.
inline int ordered(float x) {
  int bits = is_zero(x) ? 0 : as_type<int>(x);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

inline float unordered(int key) { return as_type<float>(key ^ ((key >> 31) & 0x7FFFFFFF)); }

// x * 2^n, to nearest even where the result is denormal.
inline float scaled(float x, int n) {
  uint bits = as_type<uint>(x), sign = bits & 0x80000000u, size = bits ^ sign;
  if (size == 0u || size >= 0x7F800000u) return x;
  int exponent = int(size >> 23);
  uint digits = size & 0x7FFFFFu;
  if (exponent == 0) {
    int shift = int(metal::clz(digits)) - 8;
    digits <<= uint(shift);
    exponent = 1 - shift;
  } else {
    digits |= 0x800000u;
  }
  exponent += n;
  if (exponent >= 255) return as_type<float>(sign | 0x7F800000u);
  if (exponent > 0) return as_type<float>(sign | (uint(exponent - 1) << 23) + digits);
  uint shift = uint(1 - exponent);
  if (shift > 25u) return as_type<float>(sign);
  uint half_less = (1u << (shift - 1u)) - 1u;
  digits = (digits + half_less + ((digits >> shift) & 1u)) >> shift;
  return as_type<float>(sign | digits);
}

// 2^n for a normal result.
inline float power_of_two(int n) { return as_type<float>(uint(n + 127) << 23); }

inline float to_bfloat16(float x) {
  uint bits = as_type<uint>(x);
  uint nearest = (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
  return is_nan(x) ? x : as_type<float>(nearest);
}

inline float to_float16(float x) {
  uint bits = as_type<uint>(x), sign = bits & 0x80000000u, size = bits ^ sign;
  uint normal = (size + 0xFFFu + ((size >> 13) & 1u)) & 0xFFFFE000u;
  normal = normal > 0x477FE000u ? 0x7F800000u : normal;  // past 65504
  // below 2^-14 numbers are 2^-24 apart, as floats from 0.5 to 1 are
  uint small = as_type<uint>((as_type<float>(size) + 0.5f) - 0.5f);
  uint nearest = size < 0x38800000u ? small : normal;
  return is_nan(x) ? x : as_type<float>(nearest | sign);
}

inline float rounded(float x, int dtype) {
  if (dtype == BFLOAT16) return to_bfloat16(x);
  return dtype == FLOAT16 ? to_float16(x) : x;
}

// a + b, of denormals too.
inline float added(float a, float b) {
  uint size = metal::max(as_type<uint>(a) & 0x7FFFFFFFu, as_type<uint>(b) & 0x7FFFFFFFu);
  if (size >= 0x0D800000u) return a + b;  // from 2^-100 on
  return scaled(scaled(a, 80) + scaled(b, 80), -80);
}

// --- pairs ---------------------------------------------------------------------------------------

// The sum of both; |lo| is at most half an ulp of hi.
struct Pair {
  float hi, lo;
};

inline Pair pair(float hi, float lo) {
  Pair x;
  x.hi = hi;
  x.lo = lo;
  return x;
}

// a + b for |a| >= |b|.
inline Pair normal(float a, float b) {
  float s = a + b;
  float back = s - a;
  return pair(s, b - back);
}

inline Pair sum(float a, float b) {
  float s = a + b;
  float back = s - a;
  float rest = s - back;
  return pair(s, (a - rest) + (b - back));
}

inline Pair product(float a, float b) {
  float p = a * b;
  return pair(p, metal::fma(a, b, -p));
}

inline Pair add(Pair a, Pair b) {
  Pair s = sum(a.hi, b.hi), t = sum(a.lo, b.lo);
  s = normal(s.hi, s.lo + t.hi);
  return normal(s.hi, s.lo + t.lo);
}

inline Pair multiply(Pair a, Pair b) {
  Pair p = product(a.hi, b.hi);
  return normal(p.hi, metal::fma(a.hi, b.lo, metal::fma(a.lo, b.hi, p.lo)));
}

// What is not finite has no second part.
inline Pair divide(Pair a, Pair b) {
  float q = a.hi / b.hi;
  if (!(metal::abs(q) < infinity())) return pair(q, 0.0f);
  float rest = metal::fma(-q, b.hi, a.hi) + metal::fma(-q, b.lo, a.lo);
  return normal(q, rest / b.hi);
}

inline Pair root(Pair x) {
  float s = metal::precise::sqrt(x.hi);
  if (!(s > 0.0f)) return pair(s, 0.0f);
  return normal(s, (metal::fma(-s, s, x.hi) + x.lo) / (2.0f * s));
}

inline Pair times(Pair x, float power) { return pair(x.hi * power, x.lo * power); }

// --- functions of pairs --------------------------------------------------------------------------

// e^r - 1 for |r| <= 0.35: the series, in pairs where its terms count.
inline Pair exponential_less_one(Pair r) {
  float tail = 2.50521084e-8f;
  tail = metal::fma(tail, r.hi, 2.75573192e-7f);
  tail = metal::fma(tail, r.hi, 2.75573192e-6f);
  tail = metal::fma(tail, r.hi, 2.48015873e-5f);
  tail = metal::fma(tail, r.hi, 1.98412698e-4f);
  tail = metal::fma(tail, r.hi, 1.38888889e-3f);
  Pair series = add(multiply(r, pair(tail, 0.0f)), pair(8.33333377e-3f, -4.34617203e-10f));
  series = add(multiply(r, series), pair(4.16666679e-2f, -1.24176347e-9f));
  series = add(multiply(r, series), pair(1.66666672e-1f, -4.96705388e-9f));
  series = add(multiply(r, series), pair(0.5f, 0.0f));
  series = add(multiply(r, series), pair(1.0f, 0.0f));
  return multiply(r, series);
}

// value * 2^exponent
struct Power {
  Pair value;
  int exponent;
};

// x less the multiple of ln 2 next to it, and the multiple, for x of at most a few hundred.
inline Power reduced(Pair x) {
  float n = metal::rint(x.hi * 1.44269504f);
  Pair r = add(pair(metal::fma(-n, 0.693359375f, x.hi), 0.0f), product(n, 2.12194440e-4f));
  r = add(r, pair(metal::fma(n, -1.64659503e-12f, x.lo), 0.0f));
  Power out;
  out.value = r;
  out.exponent = int(n);
  return out;
}

// e^x for x <= 0. What float32 cannot hold, nor the root of it, is 0; so is e^-inf, and e^NaN.
inline Power exponential(Pair x) {
  Power out;
  out.value = pair(0.0f, 0.0f);
  out.exponent = 0;
  if (!(x.hi > -230.0f)) return out;
  out = reduced(x);
  out.value = add(exponential_less_one(out.value), pair(1.0f, 0.0f));
  return out;
}

// x as a pair of normal numbers, 0 where it is less than 2^-100.
inline Pair fixed(Power x) {
  if (x.exponent < -100) return pair(0.0f, 0.0f);
  return times(x.value, power_of_two(x.exponent));
}

// e^(a - b) for a <= b, neither +inf nor NaN.
inline Power exponential_of_difference(float a, float b) {
  if (a == -infinity()) return exponential(pair(a, 0.0f));
  return exponential(sum(a, -b));
}

// log(1 + u) for u from 0 to 1: twice the series of artanh.
inline Pair log_of_one_more(Pair u) {
  Pair s = divide(u, add(pair(2.0f, 0.0f), u));
  Pair q = multiply(s, s);
  float tail = 1.0f / 29.0f;
  tail = metal::fma(tail, q.hi, 1.0f / 27.0f);
  tail = metal::fma(tail, q.hi, 1.0f / 25.0f);
  tail = metal::fma(tail, q.hi, 1.0f / 23.0f);
  tail = metal::fma(tail, q.hi, 1.0f / 21.0f);
  tail = metal::fma(tail, q.hi, 1.0f / 19.0f);
  tail = metal::fma(tail, q.hi, 1.0f / 17.0f);
  tail = metal::fma(tail, q.hi, 1.0f / 15.0f);
  tail = metal::fma(tail, q.hi, 1.0f / 13.0f);
  Pair series = add(multiply(q, pair(tail, 0.0f)), pair(9.09090936e-2f, -2.70930212e-9f));
  series = add(multiply(q, series), pair(1.11111112e-1f, -8.27842295e-10f));
  series = add(multiply(q, series), pair(1.42857149e-1f, -6.38621200e-9f));
  series = add(multiply(q, series), pair(2.00000003e-1f, -2.98023228e-9f));
  series = add(multiply(q, series), pair(3.33333343e-1f, -9.93410776e-9f));
  series = add(multiply(q, series), pair(1.0f, 0.0f));
  return times(multiply(s, series), 2.0f);
}

// cap * tanh(x / cap), rounded to float32 once; infinities and zeros stay.
inline float soft_cap(float x, float cap) {
  if (is_zero(x) || !(metal::abs(x) < infinity())) return x;
  Pair y = divide(pair(metal::abs(x), 0.0f), pair(cap, 0.0f));
  Pair less = pair(-1.0f, 0.0f);  // e^-2y - 1
  if (y.hi < 20.0f) {
    Power r = reduced(times(y, -2.0f));
    less = exponential_less_one(r.value);
    if (r.exponent != 0)
      less = add(times(add(less, pair(1.0f, 0.0f)), power_of_two(r.exponent)), pair(-1.0f, 0.0f));
  }
  Pair tanh = divide(times(less, -1.0f), add(less, pair(2.0f, 0.0f)));
  float capped = multiply(pair(cap, 0.0f), tanh).hi;
  return x < 0.0f ? -capped : capped;
}

// --- sums over a simdgroup -----------------------------------------------------------------------

inline Pair simd_total(Pair x) {
  for (ushort step = 1; step < LANES; step *= 2)
    x = add(x, pair(metal::simd_shuffle_xor(x.hi, step), metal::simd_shuffle_xor(x.lo, step)));
  return x;
}

inline bool any(bool here) { return metal::simd_max(here ? 1 : 0) > 0; }

}  // namespace moescope
