"""The Metal kernels on the hardware: against their twin in plain operators, against the definition
in numpy, and their functions against float64.

The twin and the definition share no code with the kernels. Without Metal the plain operators are
compared with the definition, so that this program is tried; it says so.
"""

from __future__ import annotations

import sys
from typing import Any

import mlx.core as mx
import numpy as np
from metal_steps import Figures, begin

from moescope.kernels import RouterPolicy, RouterSpec, RouterWiring, compare, route
from moescope.kernels.metal.launch import covers, router_kernel
from moescope.kernels.mlx_ops import gate_and_route_mlx, route_mlx
from moescope.kernels.policy_rows import pack
from moescope.kernels.reference import gate_logits
from moescope.kernels.spec import Routing
from moescope.kernels.twins import Difference, difference

BIASED: dict[str, Any] = {"scoring_func": "sigmoid", "correction_bias": "score"}
V3 = {**BIASED, "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "norm_eps": 1e-20}
# name: (E, K, policy), after families whose routers differ most
SPECS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "olmoe": (64, 8, {}),
    "qwen3_moe": (128, 8, {"norm_topk_prob": True, "logits_dtype": "bfloat16"}),
    "mixtral": (8, 2, {"score_order": "topk_then_score"}),
    "gpt_oss": (32, 4, {"score_order": "topk_then_score", "score_dtype": "bfloat16"}),
    "deepseek_v2": (160, 6, {"n_group": 8, "topk_group": 3, "group_score": "max"}),
    "deepseek_v3": (256, 8, {**V3, "routed_scaling_factor": 2.5}),
    "minimax": (256, 8, {**BIASED, "norm_topk_prob": True}),
    "sqrtsoftplus": (384, 6, {"scoring_func": "sqrtsoftplus", "norm_topk_prob": True}),
    "phimoe": (16, 2, {"scoring_func": "sparsemixer", "router_jitter_noise": 0.01}),
    "capped": (60, 4, {"router_logit_softcapping": 30.0, "per_expert_scale": True}),
    "twice": (60, 4, {"score_passes": 2, "norm_p": 2.0, "norm_topk_prob": True}),
    "one expert": (1, 1, {}),
    "every expert": (32, 32, {"norm_topk_prob": True}),
    "not a multiple of 32": (1000, 10, {"weights_from": "logits", "norm_topk_prob": True}),
    "the largest": (1024, 32, {}),
}


def main() -> int:
    asked, put = begin(__doc__)
    on = mx.metal.is_available()
    print(f"parity: {'Metal' if on else 'not Metal: plain operators on the CPU'}", flush=True)
    names = ("mixtral", "phimoe") if asked.tiny else tuple(SPECS)
    figures: Figures = {
        "on": "metal" if on else "cpu",
        "routers": {},
        "wrong_rows": 0,
        "weight": 0.0,
    }
    for name in names:
        found = parity(name, 4 if asked.tiny else 64, use_metal=on)
        figures["routers"][name] = found
        figures["wrong_rows"] += found["wrong_rows"]
        figures["weight"] = max(figures["weight"], found["weight"])
        put(figures)
        print(f"{name}: {found}", flush=True)
    figures["gate"] = [gate(*case, use_metal=on) for case in GATES[: 1 if asked.tiny else None]]
    figures["gate_wrong_rows"] = sum(case["wrong_rows"] for case in figures["gate"])
    put(figures)
    if on:
        figures |= functions()
        put(figures)
    print({key: value for key, value in figures.items() if key not in ("routers", "gate")})
    return int(figures["wrong_rows"] + figures["gate_wrong_rows"] > 0)


def spec_of(name: str) -> RouterSpec:
    E, K, policy = SPECS[name]
    return RouterSpec(RouterPolicy(K, **policy), RouterWiring(E)).resolved("float32")


def rows_of(spec: RouterSpec, T: int, seed: int) -> np.ndarray:
    """Logits [T, E]: wide and narrow, ties, holes, small ones, NaN and infinity."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(T, spec.E)) * np.exp(rng.uniform(-12, 5, size=(T, 1)))
    x[1::4] = np.round(2 * rng.normal(size=(len(x[1::4]), spec.E))) / 2
    x[2::4] = x[2::4] - rng.choice([10, 90, 150], size=(len(x[2::4]), 1))
    holes = rng.random((len(x[3::4]), spec.E)) < 0.3
    x[3::4] = np.where(holes, -np.inf, np.round(4 * x[3::4]) / 4)
    if T > 8:
        x[4, -1], x[5, 0], x[6] = np.nan, np.inf, 0.25
    return x.astype(np.float32)


def parity(name: str, T: int, *, use_metal: bool) -> Figures:
    """Rows that differ from the definition by more than the rule allows, and how far the twins are
    apart, over three dtypes of logits."""
    spec = spec_of(name)
    rng = np.random.default_rng(1)
    inputs: dict[str, Any] = {}
    if spec.policy.correction_bias != "none":
        inputs["correction_bias"] = np.round(8 * rng.normal(size=spec.E)).astype(np.float32) / 8
    if spec.policy.per_expert_scale:
        inputs["per_expert_scale"] = rng.uniform(0.5, 2, spec.E).astype(np.float32)
    wrong, apart = 0, Difference()
    rows = mx.array(pack(spec)[None].astype(np.float32))
    assert not covers(spec.E, spec.K)
    for seed, dtype in enumerate((mx.float32, mx.bfloat16, mx.float16)):
        with np.errstate(all="ignore"):
            logits = mx.array(rows_of(spec, T, seed)).astype(dtype)
        x = np.array(logits.astype(mx.float32))
        vectors = {key: mx.array(value) for key, value in inputs.items()}
        ours, plain = (
            to_numpy(route_mlx(logits, rows, spec.K, use_metal=on, **vectors))
            for on in (use_metal, False)
        )
        expected = route(x, spec, **inputs)
        bias = inputs.get("correction_bias")
        wrong += len({d.row for d in compare(expected, ours, spec, x, correction_bias=bias)})
        apart += difference(ours, plain)
    return {"rows": apart.rows, "wrong_rows": wrong, "weight": apart.weight}


GATES = ((2048, 64, 8), (2048, 128, 8), (7168, 256, 8), (300, 60, 4))  # H, E, K


def gate(H: int, E: int, K: int, *, use_metal: bool) -> Figures:
    """Gate and router in one launch: its logits against float64, its routing against that of its
    own logits."""
    wiring = RouterWiring(E, router_dtype="bfloat16")
    spec = RouterSpec(RouterPolicy(K, norm_topk_prob=True), wiring).resolved("float32")
    rng = np.random.default_rng(H)
    hidden, weight = (
        mx.array(rng.normal(size=s).astype(np.float32) / H**0.25).astype(mx.bfloat16)
        for s in ((1, H), (E, H))
    )
    rows = mx.array(pack(spec)[None].astype(np.float32))
    options: dict[str, Any] = {"router_dtype": "bfloat16", "keep_logits": True}
    found = to_numpy(gate_and_route_mlx(hidden, weight, rows, K, use_metal=use_metal, **options))
    exact = gate_logits(*(np.array(a.astype(mx.float32)) for a in (hidden, weight)), spec)
    off = float(np.abs(found.logits - exact).max() / np.abs(exact).max())
    wrong = compare(route(found.logits, spec), found, spec, found.logits)
    return {"shape": [H, E, K], "wrong_rows": len(wrong) + (off > 2**-7), "logits_off": off}


# name: (the expression, numpy's, the least and greatest x)
FUNCTIONS: dict[str, tuple[str, Any, float, float]] = {
    "exponential": ("moescope::scaled(power.value.hi, power.exponent)", np.exp, -104.0, 0.0),
    "log_of_one_more": (
        "moescope::log_of_one_more(moescope::pair(x, 0.0f)).hi",
        np.log1p,
        1e-6,
        1.0,
    ),
    "soft_cap": ("moescope::soft_cap(x, 30.0f)", lambda x: 30 * np.tanh(x / 30), -90.0, 90.0),
}


def functions() -> Figures:
    """How many ulp the kernels' functions are off on this GPU, and whether it keeps denormals."""
    worst = {}
    for name, (expression, exact, low, high) in FUNCTIONS.items():
        x = np.random.default_rng(3).uniform(low, high, 1 << 16).astype(np.float32)
        found, wanted = applied(name, expression, x), exact(x.astype(np.float64))
        step = np.spacing(np.abs(wanted).astype(np.float32)).astype(np.float64)
        worst[name] = float((np.abs(found - wanted) / step).max())
    kept = applied("denormal", "x * 0.5f", np.full(32, 2.0**-126, np.float32))[0] != 0
    return {"ulp": max(worst.values()), "functions": worst, "denormals_kept": bool(kept)}


def applied(name: str, expression: str, x: np.ndarray) -> np.ndarray:
    """`expression` of every number, on the GPU, in float64."""
    before = "moescope::Power power = moescope::exponential(moescope::pair(x, 0.0f));\n"
    kernel = mx.fast.metal_kernel(
        name=f"function_{name}",
        input_names=["numbers"],
        output_names=["out"],
        header=router_kernel().header,
        source="uint i = thread_position_in_grid.x;\nfloat x = numbers[i];\n"
        + (before if "power" in expression else "")
        + f"out[i] = {expression};\n",
    )
    (out,) = kernel(
        inputs=[mx.array(x)],
        grid=(len(x), 1, 1),
        threadgroup=(32, 1, 1),
        output_shapes=[x.shape],
        output_dtypes=[mx.float32],
    )
    return np.array(out).astype(np.float64)


def to_numpy(found: Routing) -> Routing:
    values = {name: getattr(found, name) for name in Routing.__slots__}
    return Routing(**{k: None if v is None else np.array(v) for k, v in values.items()})


if __name__ == "__main__":
    sys.exit(main())
