// Body of the router: one simdgroup a row of policies, which is one of P for its row of logits.

threadgroup float memory[4 * 32 * PER];
moescope::Shared shared;
shared.z = memory;
shared.scored = memory + 32 * PER;
shared.biased = memory + 64 * PER;
shared.groups = memory + 96 * PER;

int lane = int(thread_index_in_simdgroup);
int E = sizes[moescope::EXPERTS], K_max = sizes[moescope::MOST_PICKS];
ulong at = threadgroup_position_in_grid.y;
ulong t = at / ulong(sizes[moescope::POLICIES]);

float z[PER];
MOESCOPE_EACH(i) {
  int e = lane + moescope::LANES * i;
  z[i] = e < E ? float(logits[t * ulong(E) + ulong(e)]) : -moescope::infinity();
}
moescope::Policy policy = moescope::policy_of(rows + at * ulong(sizes[moescope::ROW_STEP]));
moescope::Decision decision = moescope::decide<PER>(
    z, policy, E, K_max, lane,
    bias + t * ulong(sizes[moescope::BIAS_STEP]), sizes[moescope::HAS_BIAS] != 0,
    scale + t * ulong(sizes[moescope::SCALE_STEP]), sizes[moescope::HAS_SCALE] != 0,
    hashed + t * ulong(sizes[moescope::HASH_STEP]), sizes[moescope::HASH_PICKS], shared);
moescope::store(
    decision, lane, K_max, at,
    ids, scores, weights, score_sum, mass, entropy, margin, runner_up);
