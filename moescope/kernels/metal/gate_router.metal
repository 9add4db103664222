// Body of gate and router together, for one token: one threadgroup, whose simdgroups share the experts
// of the gate among themselves; the first of them then routes under each of P policies.

threadgroup float memory[5 * 32 * PER];
moescope::Shared shared;
shared.z = memory;
shared.scored = memory + 32 * PER;
shared.biased = memory + 64 * PER;
shared.groups = memory + 96 * PER;
threadgroup float* products = memory + 128 * PER;

int lane = int(thread_index_in_simdgroup);
int E = sizes[moescope::EXPERTS], K_max = sizes[moescope::MOST_PICKS];
int H = sizes[moescope::WIDTH], dtype = sizes[moescope::GATE_DTYPE];
bool cast = sizes[moescope::GATE_CASTS] != 0;

for (int e = int(simdgroup_index_in_threadgroup); e < E; e += int(simdgroups_per_threadgroup)) {
  float product = moescope::dot(hidden, gate + ulong(e) * ulong(H), H, cast ? dtype : 0, lane);
  if (lane == 0) {
    if (sizes[moescope::HAS_GATE_BIAS] != 0)
      product += moescope::rounded(float(gate_bias[e]), dtype);
    products[e] = moescope::rounded(product, dtype);
  }
}
metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
if (simdgroup_index_in_threadgroup != 0) return;

for (int place = 0; place < sizes[moescope::POLICIES]; place++) {
  float z[PER];
  MOESCOPE_EACH(i) {
    int e = lane + moescope::LANES * i;
    z[i] = e < E ? products[e] : -moescope::infinity();
    if (place == 0 && e < E) logits[e] = z[i];
  }
  ulong at = ulong(place);
  moescope::Policy policy = moescope::policy_of(rows + at * ulong(sizes[moescope::ROW_STEP]));
  moescope::Decision decision = moescope::decide<PER>(
      z, policy, E, K_max, lane,
      bias, sizes[moescope::HAS_BIAS] != 0,
      scale, sizes[moescope::HAS_SCALE] != 0,
      hashed, sizes[moescope::HASH_PICKS], shared);
  moescope::store(
      decision, lane, K_max, at,
      ids, scores, weights, score_sum, mass, entropy, margin, runner_up);
  metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);  // before the next policy's numbers
}
