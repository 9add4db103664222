// From logits to scores, for the 32 lanes of one simdgroup: lane l holds the classes l, l + 32, ...,
// PER of them, -inf where there is none. What a policy says is the same for all lanes, so all of them
// take the same branches and meet at every reduction.

namespace moescope {

// What a row of policies says. The columns' names are made from policy_rows.COLUMNS.
struct Policy {
  int K, logits_dtype, func, passes, score_dtype, bias_site, bias_dtype, biased_dtype;
  int groups, keep, source, eps_mode, combine_dtype, weightless_from;
  bool after, sparse, by_logit, group_sum, fill_0, flip, norm, scaled, hashed;
  float scale, cap, threshold, norm_p, norm_eps, weight_scale;
};

template <typename Row>
inline Policy policy_of(Row row) {
  Policy p;
  p.K = int(row[NUM_EXPERTS_PER_TOK]);
  p.logits_dtype = int(row[LOGITS_DTYPE]);
  p.scale = row[ROUTER_LOGIT_SCALE];
  p.cap = row[ROUTER_LOGIT_SOFTCAPPING];
  p.func = int(row[SCORING_FUNC]);
  p.after = row[SCORE_ORDER] == 1.0f;
  p.passes = int(row[SCORE_PASSES]);
  p.score_dtype = int(row[SCORE_DTYPE]);
  p.threshold = row[SPARSEMIXER_THRESHOLD];
  p.bias_site = int(row[CORRECTION_BIAS]);
  p.bias_dtype = int(row[CORRECTION_BIAS_DTYPE]);
  p.biased_dtype = int(row[BIASED_DTYPE]);
  p.groups = int(row[N_GROUP]);
  p.keep = int(row[TOPK_GROUP]);
  p.group_sum = row[GROUP_SCORE] == 1.0f;
  p.fill_0 = row[GROUP_MASK_FILL] == 1.0f;
  p.flip = row[TIE_BREAK] == 1.0f;
  p.source = int(row[WEIGHTS_FROM]);
  p.norm = row[NORM_TOPK_PROB] != 0.0f;
  p.norm_p = row[NORM_P];
  p.norm_eps = row[NORM_EPS];
  p.eps_mode = int(row[NORM_EPS_MODE]);
  p.scaled = row[PER_EXPERT_SCALE] != 0.0f;
  p.weight_scale = row[WEIGHT_SCALE];
  p.combine_dtype = int(row[COMBINE_DTYPE]);
  p.weightless_from = int(row[WEIGHTLESS_FROM]);
  p.hashed = row[HASH_TABLE] != 0.0f;
  p.sparse = p.func == SPARSEMIXER;
  p.by_logit = p.after || p.sparse;
  return p;
}

// --- scores --------------------------------------------------------------------------------------

template <int PER>
inline float largest(thread const float (&x)[PER]) {
  int top = NO_KEY;
  MOESCOPE_EACH(i) top = metal::max(top, ordered(x[i]));
  return unordered(metal::simd_max(top));
}

inline Power sigmoid(float x) {
  Power small = exponential(pair(-metal::abs(x), 0.0f)), out;
  Pair below = add(pair(1.0f, 0.0f), fixed(small));
  out.value = divide(x < 0.0f ? small.value : pair(1.0f, 0.0f), below);
  out.exponent = x < 0.0f ? small.exponent : 0;
  return out;
}

// The root of log(1 + e^x), for which e^x itself will do where it is small.
inline Power root_of_softplus(float x) {
  Power small = exponential(pair(-metal::abs(x), 0.0f)), out;
  if (x < -42.0f) {
    int odd = small.exponent & 1;
    out.value = root(times(small.value, odd != 0 ? 2.0f : 1.0f));
    out.exponent = (small.exponent - odd) / 2;
    return out;
  }
  Pair soft = add(log_of_one_more(fixed(small)), pair(metal::max(x, 0.0f), 0.0f));
  out.value = root(soft);
  out.exponent = 0;
  return out;
}

// One scoring pass over x, in place; every lane's NaN or +inf is every score of a softmax.
template <int PER>
inline void score(thread float (&x)[PER], int func, int dtype) {
  if (func == SIGMOID || func == SQRTSOFTPLUS) {
    MOESCOPE_EACH(i) {
      float z = x[i];
      if (is_nan(z)) continue;
      Power s = func == SIGMOID ? sigmoid(z) : root_of_softplus(z);
      x[i] = rounded(scaled(s.value.hi, s.exponent), dtype);
      if (z == infinity()) x[i] = func == SIGMOID ? 1.0f : z;
    }
    return;
  }
  bool bad = false;
  MOESCOPE_EACH(i) bad = bad || !(x[i] < infinity());
  float top = largest<PER>(x);
  if (any(bad) || top == -infinity()) {
    MOESCOPE_EACH(i) x[i] = not_a_number();
    return;
  }
  Power w[PER];
  Pair total = pair(0.0f, 0.0f);
  MOESCOPE_EACH(i) {
    w[i] = exponential_of_difference(x[i], top);
    total = add(total, fixed(w[i]));
  }
  total = simd_total(total);
  MOESCOPE_EACH(i) {
    Pair share = divide(w[i].value, total);
    x[i] = rounded(scaled(share.hi, w[i].exponent), dtype);
  }
}

// All scoring passes over x, in place; no later pass sees what is -inf in `seen`. `last` is what the
// last pass read.
template <int PER>
inline void score_all(
    thread float (&x)[PER],
    thread const float (&seen)[PER],
    Policy p,
    thread float (&last)[PER]) {
  for (int pass = 0; pass < p.passes; pass++) {
    MOESCOPE_EACH(i) {
      if (pass != 0 && seen[i] == -infinity()) x[i] = seen[i];
      last[i] = x[i];
    }
    score<PER>(x, p.func, p.score_dtype);
  }
}

// Scores of the picks, one a lane, -inf where there is none.
inline float score_picks(float x, Policy p) {
  float value[1] = {x}, seen[1] = {x}, last[1];
  score_all<1>(value, seen, p, last);
  return value[0];
}

// Nats. Of scores other than a softmax it is the entropy of the softmax of their logarithms, which
// do not underflow.
template <int PER>
inline float entropy_of(thread const float (&last)[PER], int func) {
  float x[PER], floor = -infinity();
  MOESCOPE_EACH(i) {
    float z = last[i];
    x[i] = z;
    if (func != SIGMOID && func != SQRTSOFTPLUS) continue;
    Pair small = fixed(exponential(pair(-metal::abs(z), 0.0f)));
    float more = log_of_one_more(small).hi;
    if (z == -infinity()) {
      x[i] = z;
    } else if (func == SIGMOID) {
      x[i] = metal::min(z, 0.0f) - more;
    } else {
      x[i] = 0.5f * (z < -12.0f ? z - 0.5f * small.hi : metal::precise::log(metal::max(z, 0.0f) + more));
    }
  }
  // below these float64 has no such scores, and the definition no entropy
  if (func == SIGMOID) floor = -745.1f;
  if (func == SQRTSOFTPLUS) floor = -372.5f;
  float top = largest<PER>(x);
  if (!(top >= floor && top > -infinity())) return not_a_number();
  float total = 0.0f, product = 0.0f;
  MOESCOPE_EACH(i) {
    float d = x[i] - top;
    if (!(d > -80.0f)) continue;
    float w = fixed(exponential(pair(d, 0.0f))).hi;
    total += w;
    product += w * d;
  }
  total = metal::simd_sum(total);
  product = metal::simd_sum(product);
  return metal::max(0.0f, metal::precise::log(total) - product / total);
}

}  // namespace moescope
