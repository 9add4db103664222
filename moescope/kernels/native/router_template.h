/* One row of the router, compiled once for each instruction set: TARGET holds the attribute of its
   functions, NAME their names. Steps are those of reference.py, in its order. What was rounded is a
   float, what was not is a double.

   Vectors over experts are padded to a multiple of LANES with -inf, which is an excluded expert, so
   that loops have no tail: equal logits give equal scores wherever they stand. */

/* --- scores ----------------------------------------------------------------------------------- */

TARGET static void NAME(round_all)(float *x, int n, int dtype) {
    if (dtype == MK_BFLOAT16)
        for (int i = 0; i < n; i++) x[i] = mk_round_bf16(x[i]);
    else if (dtype == MK_FLOAT16)
        for (int i = 0; i < n; i++) x[i] = mk_nearest_f16(x[i]);
}

TARGET static double NAME(sum)(const double *x, int n) {
    double part[LANES] = {0};
    for (int i = 0; i < n; i += LANES)
        for (int j = 0; j < LANES; j++) part[j] += x[i + j];
    for (int half = LANES / 2; half; half /= 2)
        for (int j = 0; j < half; j++) part[j] += part[j + half];
    return part[0];
}

/* One scoring pass over x [n]. Returns what `exact` is yet to be divided by. */
TARGET static double NAME(score)(const float *x, int n, int func, double *exact) {
    if (func == MK_SCORING_FUNC_SIGMOID) {
        for (int i = 0; i < n; i++) {
            double z = x[i], u = mk_exp_double(-fabs(z));
            exact[i] = (z >= 0 ? 1.0 : u) / (1.0 + u);
        }
        return 1.0;
    }
    if (func == MK_SCORING_FUNC_SQRTSOFTPLUS) {
        for (int i = 0; i < n; i++) {
            double z = x[i], u = mk_exp_double(-fabs(z));
            exact[i] = (z > 0 ? z : 0.0) + mk_log1p_double(u);
        }
        for (int i = 0; i < n; i++) exact[i] = sqrt(exact[i]); /* apart: compilers make it a call */
        return 1.0;
    }
    int32_t top = INT32_MIN; /* a NaN may or may not win, and poisons the sum either way */
    for (int i = 0; i < n; i++) top = mk_ordered(x[i]) > top ? mk_ordered(x[i]) : top;
    double peak = mk_from_ordered(top);
    for (int i = 0; i < n; i++) exact[i] = mk_exp_double((double)x[i] - peak);
    return NAME(sum)(exact, n);
}

/* Scores of x [n] after all passes, rounded. No later pass sees what is -inf in `seen`. */
TARGET static void NAME(score_all)(const Policy *p, const float *x, const float *seen, int n,
                                   double *exact, float *rounded) {
    for (int pass = 0; pass < p->passes; pass++) {
        for (int i = 0; pass && i < n; i++)
            rounded[i] = seen[i] == -INFINITY ? -INFINITY : rounded[i];
        double total = NAME(score)(pass ? rounded : x, n, p->func, exact);
        for (int i = 0; i < n; i++) rounded[i] = (float)(exact[i] / total);
        NAME(round_all)(rounded, n, p->score_dtype);
    }
}

/* In nats, of scores that need not sum to 1; consumes them. */
TARGET static double NAME(entropy)(double *exact, int n) {
    double total = NAME(sum)(exact, n);
    for (int i = 0; i < n; i++) {
        double x = exact[i];
        exact[i] = x * mk_log_double(x == 0.0 ? 1.0 : x);
    }
    double entropy = log(total) - NAME(sum)(exact, n) / total;
    return entropy < 0 ? 0.0 : entropy;
}

/* --- from logits to selection values ---------------------------------------------------------- */

/* Logits as scored, in s->z. False for a row that is not to be routed. */
TARGET static int NAME(read_logits)(const Row *row, const Policy *p, const Scratch *s, int n) {
    float *z = s->z;
    memcpy(z, row->logits, (size_t)row->E * sizeof *z);
    for (int i = row->E; i < n; i++) z[i] = -INFINITY;
    NAME(round_all)(z, n, p->logits_dtype);
    if (p->scale != 1.0)
        for (int i = 0; i < n; i++) z[i] = (float)(z[i] * p->scale);
    int poisoned = 0, excluded = row->E - n;
    for (int i = 0; i < n; i++) {
        poisoned |= !(z[i] < INFINITY);
        excluded += z[i] == -INFINITY;
    }
    if (poisoned || excluded > row->E - p->K) return 0;
    if (p->cap != 0.0)
        for (int i = 0; i < row->E; i++)
            z[i] = z[i] == -INFINITY ? z[i] : (float)(p->cap * tanh(z[i] / p->cap));
    return 1;
}

/* Selection values before groups, in s->biased; scores in s->rounded. False where one is NaN or
   +inf. */
TARGET static int NAME(read_values)(const Row *row, const Policy *p, const Scratch *s, int n) {
    float *values = s->biased;
    if (p->bias_site == MK_CORRECTION_BIAS_NONE) {
        memcpy(values, p->by_logit ? s->z : s->rounded, (size_t)n * sizeof *values);
    } else {
        const float *base = p->bias_site == MK_CORRECTION_BIAS_SCORE ? s->rounded : s->z;
        memcpy(values, row->bias, (size_t)row->E * sizeof *values);
        for (int i = row->E; i < n; i++) values[i] = 0.0f;
        NAME(round_all)(values, n, p->bias_dtype);
        for (int i = 0; i < n; i++) values[i] = (float)((double)base[i] + values[i]);
        if (p->bias_site == MK_CORRECTION_BIAS_SCORE)
            NAME(round_all)(values, n, p->biased_dtype);
        else if (!p->by_logit)
            NAME(score_all)(p, values, s->z, n, s->exact, values);
    }
    int poisoned = 0;
    for (int i = 0; i < n; i++) {
        values[i] = s->z[i] == -INFINITY ? -INFINITY : values[i];
        poisoned |= !(values[i] < INFINITY);
    }
    return !poisoned;
}

/* --- from selection values to experts --------------------------------------------------------- */

TARGET static int64_t NAME(top)(const int64_t *keys) {
    int64_t top = keys[0];
    for (int j = 1; j < LANES; j++) top = keys[j] > top ? keys[j] : top;
    return top;
}

/* The best `count` of s->keys [n, padded with INT64_MIN], in descending order; consumes them. */
TARGET static void NAME(rank)(const Scratch *s, int n, int count, uint32_t flip) {
    int blocks = n / LANES, wide = padded(blocks);
    for (int b = 0; b < wide; b++) s->tops[b] = INT64_MIN;
    for (int b = 0; b < blocks; b++) s->tops[b] = NAME(top)(s->keys + b * LANES);
    for (int k = 0; k < count; k++) {
        int64_t top = NAME(top)(s->tops);
        for (int b = LANES; b < wide; b += LANES) {
            int64_t next = NAME(top)(s->tops + b);
            top = next > top ? next : top;
        }
        s->best[k] = top;
        int id = mk_key_id(top, flip), block = id / LANES;
        s->keys[id] = INT64_MIN;
        s->tops[block] = NAME(top)(s->keys + block * LANES);
    }
}

/* Which groups are not admitted: s->closed [n_group]. Ties go as those of experts do. */
TARGET static void NAME(close_groups)(const Policy *p, const Scratch *s, int size) {
    int n = padded(p->groups);
    for (int g = 0; g < n; g++) s->keys[g] = INT64_MIN;
    for (int g = 0; g < p->groups; g++) {
        const float *values = s->biased + g * size;
        float first = -INFINITY, second = -INFINITY;
        for (int i = 0; i < size; i++) {
            float low = values[i] < first ? values[i] : first;
            first = values[i] > first ? values[i] : first;
            second = low > second ? low : second;
        }
        if (p->group_sum) first = mk_to_dtype((double)first + second, p->biased_dtype);
        s->keys[g] = mk_key(first, (uint32_t)g, p->flip);
        s->closed[g] = 1;
    }
    NAME(rank)(s, n, p->keep, p->flip);
    for (int k = 0; k < p->keep; k++) s->closed[mk_key_id(s->best[k], p->flip)] = 0;
}

/* The best K of the experts, and whoever comes next, in s->best [K + 1 or E]. */
TARGET static void NAME(choose)(const Policy *p, const Scratch *s, int E, int n) {
    int size = E / p->groups;
    if (p->groups > 1) NAME(close_groups)(p, s, size);
    for (int i = 0; i < n; i++) s->keys[i] = mk_key(s->biased[i], (uint32_t)i, p->flip);
    for (int i = E; i < n; i++) s->keys[i] = INT64_MIN;
    for (int g = 0; p->groups > 1 && g < p->groups; g++)
        for (int i = g * size; s->closed[g] && i < (g + 1) * size; i++)
            if (s->biased[i] != -INFINITY) s->keys[i] = mk_key(p->fill, (uint32_t)i, p->flip);
    NAME(rank)(s, n, p->K + (p->K < E), p->flip);
}

/* --- from experts to weights ------------------------------------------------------------------ */

/* Scores of the two selected: each a softmax over the logits near its own (PhiMoE). */
TARGET static void NAME(sparsemixer)(const Policy *p, const Scratch *s, int n, const int32_t *ids,
                                     float *scores) {
    for (int k = 0; k < 2; k++) {
        double top = s->z[ids[k]];
        for (int i = 0; i < n; i++) {
            double z = s->z[i], size = fabs(z), gap = mk_to_dtype(top - z, p->score_dtype);
            double distance = mk_to_dtype(gap / (size > top ? size : top), p->score_dtype);
            int dropped = distance > p->threshold || z == -INFINITY;
            s->exact[i] = dropped ? -INFINITY : z - top; /* NaN, 0 / 0, is kept */
        }
        if (k) s->exact[ids[0]] = -INFINITY; /* above `top`, or tied with it */
        for (int i = 0; i < n; i++) s->exact[i] = mk_exp_double(s->exact[i]);
        scores[k] = mk_to_dtype(1.0 / NAME(sum)(s->exact, n), p->score_dtype);
    }
}

/* Unbiased scores of the selected [K]. */
TARGET static void NAME(selected_scores)(const Policy *p, const Scratch *s, int n,
                                         const int32_t *ids, float *scores) {
    float z[MK_PICKS_MAX];
    int few = padded(p->K);
    if (p->sparse) {
        NAME(sparsemixer)(p, s, n, ids, scores);
    } else if (p->after) {
        for (int k = 0; k < few; k++) z[k] = k < p->K ? s->z[ids[k]] : -INFINITY;
        NAME(score_all)(p, z, z, few, s->exact, scores);
    } else {
        for (int k = 0; k < p->K; k++) scores[k] = s->rounded[ids[k]];
    }
}

/* What `weights_from` names, for the selected [K]. */
TARGET static void NAME(unnormalised)(const Row *row, const Policy *p, const Scratch *s,
                                      const int32_t *ids, const float *scores, double *weights) {
    float picked[MK_PICKS_MAX], rounded[MK_PICKS_MAX];
    const float *from = p->source == MK_WEIGHTS_FROM_LOGITS ? s->z : s->biased;
    int few = padded(p->K);
    for (int k = 0; k < few; k++) picked[k] = k < p->K ? from[ids[k]] : -INFINITY;
    if (p->source == MK_WEIGHTS_FROM_SCORES) {
        memcpy(picked, scores, (size_t)p->K * sizeof *picked);
    } else if (p->source != MK_WEIGHTS_FROM_LOGITS && p->after) {
        NAME(score_all)(p, picked, picked, few, s->exact, rounded);
        memcpy(picked, rounded, (size_t)p->K * sizeof *picked);
    }
    for (int k = 0; k < p->K; k++) {
        weights[k] = picked[k];
        if (p->source != MK_WEIGHTS_FROM_BIASED_MINUS_BIAS) continue;
        double bias = mk_to_dtype(row->bias[ids[k]], p->bias_dtype);
        weights[k] = mk_to_dtype(weights[k] - bias, p->biased_dtype);
    }
}

/* False for an invalid row, of which nothing is written. */
TARGET static int NAME(route)(const Row *row, const Policy *p, const Scratch *s) {
    int E = row->E, K = p->K, n = padded(E);
    if (!NAME(read_logits)(row, p, s, n)) return 0;
    NAME(score_all)(p, s->z, s->z, n, s->exact, s->rounded);
    double entropy = NAME(entropy)(s->exact, n), margin = NAN;
    int usable = NAME(read_values)(row, p, s, n);

    int32_t ids[MK_PICKS_MAX], runner_up = -1;
    if (p->hashed) {
        memcpy(ids, row->hash_ids, (size_t)K * sizeof *ids);
    } else {
        if (!usable) return 0;
        NAME(choose)(p, s, E, n);
        float last = mk_key_value(s->best[K - 1]);
        float next = K < E ? mk_key_value(s->best[K]) : -INFINITY;
        if (last == -INFINITY) return 0;
        for (int k = 0; k < K; k++) ids[k] = mk_key_id(s->best[k], p->flip);
        if (next != -INFINITY) {
            runner_up = mk_key_id(s->best[K], p->flip);
            margin = (double)last - next;
        }
    }
    float scores[MK_PICKS_MAX];
    double weights[MK_PICKS_MAX];
    NAME(selected_scores)(p, s, n, ids, scores);
    NAME(unnormalised)(row, p, s, ids, scores, weights);
    write(row, p, ids, scores, weights, entropy, margin, runner_up);
    return 1;
}

#undef TARGET
#undef NAME
