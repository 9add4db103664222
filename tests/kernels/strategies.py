"""Random router specs and random rows of logits, for property tests of kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 32, 60, 64, 96, 128, 256, 384, 1024)
DTYPES = ("float32", "float32", "bfloat16", "float16")
KINDS = ("normal", "narrow", "wide", "ties", "equal", "negative", "holes", "poisoned", "huge")


@dataclass(frozen=True)
class Case:
    """One call of a kernel, arrays in numpy."""

    spec: RouterSpec
    logits: np.ndarray
    bias: np.ndarray | None
    scales: np.ndarray | None
    tokens: np.ndarray | None
    table: np.ndarray | None

    @property
    def inputs(self) -> dict[str, Any]:
        return {
            "correction_bias": self.bias,
            "per_expert_scale": self.scales,
            "token_ids": self.tokens,
            "hash_table": self.table,
        }


@st.composite
def specs(draw: st.DrawFn, sizes: tuple[int, ...] = SIZES) -> RouterSpec:
    """Any spec that a kernel takes: one flavour of selection, every other field free."""
    E = draw(st.sampled_from(sizes))
    flavour = draw(st.sampled_from(["plain", "plain", "biased", "grouped", "sparse", "hashed"]))
    if flavour == "sparse" and E < 2:
        flavour = "plain"
    nulls = draw(st.sampled_from([0, 0, E // 4])) if E > 4 else 0
    kind = draw(st.sampled_from(["identity", "skip"])) if nulls else "none"
    wiring = RouterWiring(
        E - nulls,
        num_null_experts=nulls,
        null_expert_kind=kind,
        hash_table=flavour == "hashed",
        combine_dtype=draw(st.sampled_from(DTYPES)),
    )
    func = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]))
    order = draw(st.sampled_from(["score_then_topk", "topk_then_score"]))
    passes, site, groups = draw(st.sampled_from([1, 1, 1, 2])), "none", (1, 1, "top2_sum")
    most = min(E, 32)
    if flavour == "sparse":
        func, order, passes = "sparsemixer", "score_then_topk", 1
    if flavour in ("biased", "grouped"):
        site = draw(st.sampled_from(["score", "logit"]))
        order = "score_then_topk" if site == "score" else order
    if flavour == "grouped":
        n = draw(st.sampled_from([g for g in (1, 2, 3, 4, 8) if E % g == 0]))
        top = draw(st.integers(1, n))
        rule = draw(st.sampled_from(["max", "top2_sum"])) if n < E else "max"
        groups, most = (n, top, rule), min(most, top * E // n)
    K = 2 if flavour == "sparse" else draw(st.integers(1, most))
    sources = ["scores", "scores", "logits"]
    sources += ["biased_scores"] if site != "none" else []
    sources += ["biased_minus_bias"] if site == "score" else []
    policy = RouterPolicy(
        K,
        logits_dtype=draw(st.sampled_from(DTYPES)),
        router_logit_scale=draw(st.sampled_from([1.0, 1.0, 0.125, 3.0])),
        router_logit_softcapping=draw(st.sampled_from([0.0, 0.0, 5.0])),
        scoring_func=func,
        score_order=order,
        score_passes=passes,
        score_dtype=draw(st.sampled_from(DTYPES)),
        router_jitter_noise=draw(st.sampled_from([0.0, 0.01, 0.3])),
        correction_bias=site,
        correction_bias_dtype=draw(st.sampled_from(DTYPES)),
        n_group=groups[0],
        topk_group=groups[1],
        group_score=groups[2],
        group_mask_fill=draw(st.sampled_from(["-inf", "0"])),
        tie_break=draw(st.sampled_from(["lower_id", "lower_id", "higher_id"])),
        weights_from=draw(st.sampled_from(sources)),
        norm_topk_prob=draw(st.booleans()),
        norm_p=draw(st.sampled_from([1.0, 1.0, 2.0])),
        norm_eps=draw(st.sampled_from([0.0, 1e-20, 1e-6, 1e-2])),
        norm_eps_mode=draw(st.sampled_from(["add", "clamp", "uniform"])),
        per_expert_scale=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5, 16.0])),
        scale_power=draw(st.sampled_from([0, 1, 2])),
        scale_site=draw(st.sampled_from(["weights", "routed_output"])),
    )
    return RouterSpec(policy, wiring)


def rows_of(kind: str, T: int, E: int, rng: np.random.Generator) -> np.ndarray:
    """Logits [T, E] float32 of one kind; poisoned rows hold NaN, +inf, or too few finite ones."""
    x = rng.normal(size=(T, E))
    if kind == "narrow":
        x = 1 + x * 1e-6
    elif kind == "wide":
        x = x * 40
    elif kind == "ties":
        x = np.round(x * 2) / 2
    elif kind == "equal":
        x = np.repeat(x[:, :1], E, axis=1)
    elif kind == "negative":
        x = x * 3 - rng.choice([10, 30, 90, 150], size=(T, 1))
    elif kind == "holes":
        x = np.where(rng.random((T, E)) < 0.3, -np.inf, np.round(x * 4) / 4)
    elif kind == "poisoned":
        x[rng.random((T, E)) < 1 / E] = rng.choice([np.nan, np.inf, -np.inf])
        x[0, :] = -np.inf
    elif kind == "huge":
        x = x * 10.0 ** rng.integers(3, 39, size=(T, 1))
    with np.errstate(over="ignore"):
        return x.astype(np.float32)


@st.composite
def cases(draw: st.DrawFn, sizes: tuple[int, ...] = SIZES) -> Case:
    spec = draw(specs(sizes))
    kind, T = draw(st.sampled_from(KINDS)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    E, K = spec.E, spec.K
    offset = draw(st.sampled_from([0.0, 0.0, 7.0, -1.0]))
    bias = (offset + 0.3 * rng.normal(size=E)).astype(np.float32)
    if draw(st.booleans()):
        bias = np.round(bias * 4) / 4
    if draw(st.integers(0, 9)) == 0:  # a bias that was never loaded, or that bars an expert
        bars = spec.policy.correction_bias == "score" and draw(st.booleans())
        bias[rng.integers(0, E)] = -np.inf if bars else np.nan
    table = np.stack([rng.permutation(E)[:K] for _ in range(7)])
    return Case(
        spec,
        rows_of(kind, T, E, rng),
        bias if spec.policy.correction_bias != "none" else None,
        rng.uniform(0.5, 2, E).astype(np.float32) if spec.policy.per_expert_scale else None,
        rng.integers(0, 7, T) if spec.wiring.hash_table else None,
        table if spec.wiring.hash_table else None,
    )
