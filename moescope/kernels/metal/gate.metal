// The gate's product for one token.

namespace moescope {

// hidden . gate over H, each rounded to `dtype` first; every lane has the sum. A lane reads four
// neighbours at a time, whose loads may then be one.
template <typename Hidden, typename Gate>
inline float dot(Hidden hidden, Gate gate, int H, int dtype, int lane) {
  float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  int whole = H - H % (4 * LANES);
  for (int h = 4 * lane; h < whole; h += 4 * LANES) {
    for (int i = 0; i < 4; i++) {
      float x = float(hidden[h + i]), w = float(gate[h + i]);
      part[i] = metal::fma(rounded(x, dtype), rounded(w, dtype), part[i]);
    }
  }
  for (int h = whole + lane; h < H; h += LANES) {
    float x = float(hidden[h]), w = float(gate[h]);
    part[0] = metal::fma(rounded(x, dtype), rounded(w, dtype), part[0]);
  }
  return metal::simd_sum((part[0] + part[1]) + (part[2] + part[3]));
}

}  // namespace moescope
