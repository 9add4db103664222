// One row of router logits under one policy, decided by the 32 lanes of one simdgroup.
//
// Steps and rounding points are those of kernels/reference.py, in its order. Lane l holds the classes
// l, l + 32, ...: PER of them, -inf where there is none; and the pick of rank l. A policy is the same
// for all lanes, so all of them take the same branches and meet at every reduction.

namespace moescope {

// Threadgroup memory of one simdgroup: 32 * PER floats each.
struct Shared {
  threadgroup float* z;       // logits as scored
  threadgroup float* scored;  // unbiased scores, rounded
  threadgroup float* biased;  // selection values before groups
  threadgroup float* groups;  // scores of groups
};

// What a lane knows of the decision: its pick, and what is the row's.
struct Decision {
  int id;  // -1 where there is no pick of that rank
  float score, weight;
  float score_sum, mass, entropy, margin;
  int runner_up;
};

inline Decision invalid(Policy p, int lane) {
  Decision d;
  d.id = d.runner_up = -1;
  d.weight = 0.0f;
  d.score = lane < p.K ? not_a_number() : 0.0f;
  d.score_sum = d.mass = d.entropy = d.margin = not_a_number();
  return d;
}

// --- from selection values to experts ------------------------------------------------------------

// The score of group g, as a key.
inline int group_key(threadgroup const float* biased, int size, Policy p) {
  float first = -infinity(), second = -infinity();
  for (int i = 0; i < size; i++) {
    float value = biased[i];
    bool best = ordered(value) > ordered(first);
    float less = best ? first : value;
    first = best ? value : first;
    second = ordered(less) > ordered(second) ? less : second;
  }
  return ordered(p.group_sum ? rounded(added(first, second), p.biased_dtype) : first);
}

// Whether fewer than `keep` groups are better than g; ties go as those of experts do.
inline bool admitted(threadgroup const float* scores, int g, Policy p) {
  int key = ordered(scores[g]), better = 0;
  for (int h = 0; h < p.groups; h++) {
    int other = ordered(scores[h]);
    bool first = p.flip ? h > g : h < g;
    better += (other > key || (other == key && first)) ? 1 : 0;
  }
  return better < p.keep;
}

// Selection values without those of groups that are not admitted.
template <int PER>
inline void limit_groups(thread float (&values)[PER], Policy p, int E, int lane, Shared shared) {
  int size = E / p.groups;
  for (int g = lane; g < p.groups; g += LANES)
    shared.groups[g] = unordered(group_key(shared.biased + g * size, size, p));
  metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);
  float fill = p.fill_0 ? 0.0f : -infinity();
  MOESCOPE_EACH(i) {
    int e = lane + LANES * i;
    if (e < E && values[i] != -infinity() && !admitted(shared.groups, e / size, p)) values[i] = fill;
  }
}

struct Picks {
  int id;         // of this lane's rank
  int count;      // how many there are, at most K + 1
  int runner_up;  // of rank K
  float above, below;
};

// The best K of the classes and whoever comes next; -inf is never picked.
template <int PER>
inline Picks choose(thread const float (&values)[PER], Policy p, int E, int lane) {
  int key[PER];
  MOESCOPE_EACH(i) {
    bool open = lane + LANES * i < E && values[i] != -infinity();
    key[i] = open ? ordered(values[i]) : int(NO_KEY);
  }
  Picks picks;
  picks.id = picks.runner_up = -1;
  picks.count = 0;
  picks.above = picks.below = -infinity();
  for (int k = 0; k <= p.K; k++) {
    int best = NO_KEY;
    MOESCOPE_EACH(i) best = metal::max(best, key[i]);
    int top = metal::simd_max(best);
    if (top == NO_KEY) break;
    int place = INF_KEY;
    MOESCOPE_EACH(i) {
      int e = lane + LANES * i;
      if (key[i] == top) place = metal::min(place, p.flip ? E - 1 - e : e);
    }
    place = metal::simd_min(place);
    int id = p.flip ? E - 1 - place : place;
    MOESCOPE_EACH(i) key[i] = lane + LANES * i == id ? int(NO_KEY) : key[i];
    picks.count = k + 1;
    if (k == lane && k < p.K) picks.id = id;
    if (k == p.K - 1) picks.above = unordered(top);
    if (k == p.K) {
      picks.below = unordered(top);
      picks.runner_up = id;
    }
  }
  return picks;
}

// --- from experts to weights ---------------------------------------------------------------------

// The score of this lane's pick: a softmax over the logits near its own (arXiv 2409.12136).
template <int PER>
inline float sparsemixer(thread const float (&z)[PER], int id, Policy p, int lane, Shared shared) {
  float mine = 0.0f;
  int first = metal::simd_broadcast(id, ushort(0));
  for (int k = 0; k < 2; k++) {
    float top = shared.z[metal::simd_broadcast(id, ushort(k))];
    Pair total = pair(0.0f, 0.0f);
    MOESCOPE_EACH(i) {
      float size = metal::abs(z[i]), gap = rounded(top - z[i], p.score_dtype);
      float distance = rounded(gap / (size > top ? size : top), p.score_dtype);
      bool kept = !(distance > p.threshold) && z[i] != -infinity();  // NaN, 0 / 0, is kept
      if (k == 1 && lane + LANES * i == first) kept = false;  // above `top`, or tied with it
      if (kept) total = add(total, fixed(exponential_of_difference(z[i], top)));
    }
    total = simd_total(total);
    float share = rounded(divide(pair(1.0f, 0.0f), total).hi, p.score_dtype);
    if (lane == k) mine = share;
  }
  return mine;
}

// This lane's weight over the sum or the p-norm of all; what is unused is 0. Everything is scaled so
// that the greatest is between 1 and 2: logits may be huge, scores denormal, and sums may cancel.
inline float normalised(float w, bool used, Policy p) {
  int size = metal::simd_max(as_type<int>(metal::abs(w)));
  if (size >= INF_KEY) {
    float all = metal::simd_sum(p.norm_p == 1.0f ? w : metal::abs(w));
    if (p.eps_mode == CLAMP && all < p.norm_eps) all = p.norm_eps;
    return used ? w / all : 0.0f;
  }
  int n = size >> 23;
  if (n == 0) n = size == 0 ? 127 : 9 - int(metal::clz(uint(size)));
  n = 127 - metal::min(n, 254);
  float x = scaled(w, n), eps = scaled(p.norm_eps, n);
  Pair total = simd_total(pair(x, 0.0f));
  if (p.norm_p == 2.0f) {
    total = root(simd_total(product(x, x)));
  } else if (p.norm_p != 1.0f) {
    float power = x == 0.0f ? 0.0f : metal::precise::pow(metal::abs(x), p.norm_p);
    power = metal::simd_sum(power);
    total = pair(power > 0.0f ? metal::precise::pow(power, 1.0f / p.norm_p) : power, 0.0f);
  }
  if (p.eps_mode == UNIFORM && total.hi == 0.0f) return used ? 1.0f / float(p.K) : 0.0f;
  if (p.eps_mode == CLAMP) {
    if (total.hi < eps) total = pair(eps, 0.0f);
  } else {
    total = eps < infinity() ? add(total, pair(eps, 0.0f)) : pair(eps, 0.0f);
  }
  return used ? divide(pair(x, 0.0f), total).hi : 0.0f;
}

// --- the row -------------------------------------------------------------------------------------

// Whether nothing a policy asks for is missing, and its numbers are within bounds.
template <typename Hashed>
inline bool fits(
    Policy p, int E, int K_max, bool has_bias, bool has_scale, Hashed hashed, int picks, int lane) {
  bool good = p.K >= 1 && p.K <= E && p.K <= K_max && p.passes >= 1 && p.passes <= 2;
  good = good && p.groups >= 1 && p.groups <= E && p.keep >= 1 && p.keep <= p.groups;
  good = good && E % metal::max(p.groups, 1) == 0 && (!p.sparse || p.K == 2);
  good = good && (p.bias_site == 0 || has_bias) && (!p.scaled || has_scale);
  if (!good || !p.hashed) return good;
  if (p.K > picks) return false;
  bool wrong = lane < p.K && (hashed[lane] < 0 || hashed[lane] >= E);
  return !any(wrong);
}

// `z` holds the row's logits. `bias`, `scale` and `hashed` point at the row's own [E], [E] and
// [picks]; they are read where `has_bias`, `has_scale` and the policy say so.
template <int PER, typename Bias, typename Scale, typename Hashed>
inline Decision decide(
    thread float (&z)[PER],
    Policy p,
    int E,
    int K_max,
    int lane,
    Bias bias,
    bool has_bias,
    Scale scale,
    bool has_scale,
    Hashed hashed,
    int picks_max,
    Shared shared) {
  if (!fits(p, E, K_max, has_bias, has_scale, hashed, picks_max, lane)) return invalid(p, lane);

  // logits as scored
  bool bad = false;
  float finite = 0.0f;
  MOESCOPE_EACH(i) {
    float x = rounded(z[i], p.logits_dtype);
    if (p.scale != 1.0f) x *= p.scale;
    bad = bad || !(x < infinity());
    if (x != -infinity()) finite += 1.0f;
    z[i] = p.cap != 0.0f ? soft_cap(x, p.cap) : x;
  }
  if (any(bad) || metal::simd_sum(finite) < float(p.K)) return invalid(p, lane);

  // scores, and what selection is made by
  float scored[PER], last[PER], values[PER];
  MOESCOPE_EACH(i) scored[i] = z[i];
  score_all<PER>(scored, z, p, last);
  float entropy = entropy_of<PER>(last, p.func);
  MOESCOPE_EACH(i) values[i] = p.by_logit ? z[i] : scored[i];
  if (p.bias_site != 0) {
    MOESCOPE_EACH(i) {
      int e = lane + LANES * i;
      float b = e < E ? rounded(float(bias[e]), p.bias_dtype) : 0.0f;
      if (p.bias_site == ON_SCORE)
        values[i] = rounded(added(scored[i], b), p.biased_dtype);
      else
        values[i] = e < E ? added(z[i], b) : -infinity();
    }
    if (p.bias_site == ON_LOGIT && !p.by_logit) score_all<PER>(values, z, p, last);
  }
  bool wrong = false;
  MOESCOPE_EACH(i) {
    int e = lane + LANES * i;
    if (z[i] == -infinity()) values[i] = -infinity();
    wrong = wrong || !(values[i] < infinity());
    shared.z[e] = z[i];
    shared.scored[e] = scored[i];
    shared.biased[e] = values[i];
  }
  metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);

  // experts
  Picks picks;
  picks.above = picks.below = not_a_number();
  picks.id = picks.runner_up = -1;
  picks.count = p.K;
  if (p.hashed) {
    if (lane < p.K) picks.id = int(hashed[lane]);
  } else {
    if (any(wrong)) return invalid(p, lane);
    if (p.groups > 1 && p.keep < p.groups) limit_groups<PER>(values, p, E, lane, shared);
    picks = choose<PER>(values, p, E, lane);
    if (picks.count < p.K) return invalid(p, lane);
  }
  bool used = lane < p.K;
  int id = used ? picks.id : 0;

  // scores and weights of the picks
  float z_picked = used ? shared.z[id] : -infinity();
  float score = used ? shared.scored[id] : 0.0f;
  if (p.sparse)
    score = sparsemixer<PER>(z, id, p, lane, shared);
  else if (p.after)
    score = score_picks(z_picked, p);
  float w = score;
  if (p.source == FROM_LOGITS) {
    w = z_picked;
  } else if (p.source != FROM_SCORES) {
    w = used ? shared.biased[id] : -infinity();
    if (p.after) w = score_picks(w, p);
    if (p.source == FROM_BIASED_MINUS_BIAS) {
      float b = rounded(float(bias[id]), p.bias_dtype);
      w = rounded(added(w, -b), p.biased_dtype);
    }
  }
  score = used ? score : 0.0f;
  w = used ? w : 0.0f;
  if (p.norm) w = normalised(w, used, p);
  float factor = p.weight_scale;
  if (p.scaled) factor *= float(scale[id]);
  if (p.scaled || p.weight_scale != 1.0f) w *= factor;
  w = rounded(id >= p.weightless_from ? 0.0f : w, p.combine_dtype);

  Decision d;
  d.id = used ? id : -1;
  d.score = score;
  d.weight = used ? w : 0.0f;
  d.score_sum = 128.0f * metal::simd_sum(d.weight * 0.0078125f);  // 32 huge ones do not overflow
  d.mass = metal::simd_sum(score);
  d.entropy = entropy;
  bool next = !p.hashed && picks.count > p.K;
  d.margin = next ? picks.above - picks.below : not_a_number();
  d.runner_up = next ? picks.runner_up : -1;
  return d;
}

// Write what was decided for row `at`.
inline void store(
    Decision d,
    int lane,
    int K_max,
    ulong at,
    device int* ids,
    device float* scores,
    device float* weights,
    device float* score_sum,
    device float* mass,
    device float* entropy,
    device float* margin,
    device int* runner_up) {
  if (lane < K_max) {
    ulong cell = at * ulong(K_max) + ulong(lane);
    ids[cell] = d.id;
    scores[cell] = d.score;
    weights[cell] = d.weight;
  }
  if (lane != 0) return;
  score_sum[at] = d.score_sum;
  mass[at] = d.mass;
  entropy[at] = d.entropy;
  margin[at] = d.margin;
  runner_up[at] = d.runner_up;
}

}  // namespace moescope
