"""The Metal kernels under sanitisers, with 32 threads a row; and faults planted in their text, each
of which must be seen: by the comparison, by a sanitiser, or because lanes part company."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.kernels import RouterPolicy, RouterSpec, RouterWiring, compare, route
from moescope.kernels.metal.launch import Launch, gate_router_launch
from moescope.kernels.policy_rows import pack_rows
from moescope.kernels.reference import gate_logits
from moescope.kernels.spec import Routing
from tests.kernels.metal_shim.build import text
from tests.kernels.metal_shim.device import USUAL, How, routing, run_program
from tests.kernels.metal_shim.routers import Runner, gate_variant, route_on, router_variants
from tests.kernels.strategies import KINDS, rows_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, on NaN and infinity
Compiled = Callable[..., Path]
E = 60
VARIANTS = [*router_variants((2,)), gate_variant("float32", "float32", E)]
SANITISERS = {
    "thread": ("-fsanitize=thread",),
    "address and undefined": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
}


def spec_of(K: int, *, hash_table: bool = False, **policy: Any) -> RouterSpec:
    wiring = RouterWiring(E, hash_table=hash_table, gate_bias=True)
    return RouterSpec(RouterPolicy(K, **policy), wiring).resolved("float32")


BIASED: dict[str, Any] = {"scoring_func": "sigmoid", "correction_bias": "score"}
# Between them they take every branch of the text.
SPECS = {
    "softmax": spec_of(8, norm_topk_prob=True, logits_dtype="bfloat16", score_dtype="float16"),
    "grouped": spec_of(
        *(6,), **BIASED, n_group=4, topk_group=2, norm_p=2.0, weights_from="biased_minus_bias"
    ),
    "twice, capped": spec_of(
        4, score_passes=2, router_logit_softcapping=5.0, per_expert_scale=True, norm_p=3.0
    ),
    "sqrtsoftplus": spec_of(32, scoring_func="sqrtsoftplus", norm_topk_prob=True),
    "after": spec_of(4, score_order="topk_then_score", correction_bias="logit"),
    "bias before scores": spec_of(3, correction_bias="logit", weights_from="biased_scores"),
    "sparse": spec_of(2, scoring_func="sparsemixer", router_jitter_noise=0.01),
    "hashed": spec_of(5, hash_table=True, weights_from="logits", norm_topk_prob=True),
    "higher ids": spec_of(7, tie_break="higher_id", norm_eps_mode="clamp", norm_eps=1e-6),
}


def telling(spec: RouterSpec) -> tuple[np.ndarray, dict[str, Any]]:
    """Rows of every kind, and what the spec needs."""
    rng = np.random.default_rng(11)
    x = np.concatenate([rows_of(kind, 1, E, rng) for kind in KINDS[:4] * 2 + KINDS])
    x[4, 40], x[5, 41] = np.nan, np.inf
    inputs: dict[str, Any] = {}
    if spec.policy.correction_bias != "none":
        inputs["correction_bias"] = np.round(4 * rng.normal(size=E)).astype(np.float32) / 4
    if spec.policy.per_expert_scale:
        inputs["per_expert_scale"] = rng.uniform(0.5, 2, E).astype(np.float32)
    if spec.wiring.hash_table:
        inputs["token_ids"] = np.arange(len(x))
        inputs["hash_table"] = np.stack([rng.permutation(E)[: spec.K] for _ in x])
    return x, inputs


def wrong(found: Routing, x: np.ndarray, spec: RouterSpec, inputs: dict[str, Any]) -> bool:
    """Otherwise than the reference; where all logits are equal, any other id is wrong."""
    expected, bias = route(x, spec, **inputs), inputs.get("correction_bias")
    tied = (x == x[:, :1]).all(1) & (bias is None)
    other = (found.expert_ids[tied] != expected.expert_ids[tied]).any()
    return bool(other or compare(expected, found, spec, x, correction_bias=bias))


def program(path: Path) -> Runner:
    def run(
        variant: int, launch: Launch, inputs: Sequence[np.ndarray], how: How = USUAL
    ) -> list[np.ndarray]:
        return run_program(path, variant, launch, inputs, how)

    return run


def gated(dtype: int) -> tuple[Launch, list[np.ndarray], np.ndarray, np.ndarray]:
    """A launch of gate and router under two policies, its inputs, the exact logits and the bias."""
    H = 150
    rng = np.random.default_rng(1)
    hidden, gate, gate_bias, bias = (
        rng.normal(size=s).astype(np.float32) for s in ((H,), (E, H), (E,), (E,))
    )
    launch = gate_router_launch(
        *(2, E, H, 8),
        router_dtype=dtype,
        casts=dtype > 0,
        has_gate_bias=True,
        has_bias=True,
        simdgroups=2,
    )
    rows = pack_rows([SPECS["grouped"], SPECS["softmax"]]).astype(np.float32)
    sizes = np.array(launch.sizes, np.int32)
    spec = SPECS["grouped"].with_wiring(router_dtype=("float32", "bfloat16")[dtype])
    exact = gate_logits(hidden[None], gate, spec, gate_bias=gate_bias)
    return launch, [hidden, gate, gate_bias, rows, bias, rows, sizes, sizes], exact, bias


# --- what is planted ------------------------------------------------------------------------------

BARRIER = "metal::simdgroup_barrier(metal::mem_flags::mem_threadgroup);"
GROUPS = "group_key(shared.biased + g * size, size, p));"
WRITTEN = "    shared.biased[e] = values[i];\n  }\n  "
SHOW = {
    "groups that tie": spec_of(4, n_group=4, topk_group=2, group_score="max"),
    "one group": spec_of(15, n_group=4, topk_group=1, group_score="max"),
    **SPECS,
}
# name: (the text, what stands in its place, the spec that shows it)
WRONG = {
    "a sum without the farthest lanes": (
        "step < LANES; step *= 2",
        "step < LANES / 2; step *= 2",
        "softmax",
    ),
    "the least instead of the greatest": (
        "int top = metal::simd_max(best);",
        "int top = metal::simd_min(best);",
        "softmax",
    ),
    "a sum of one lane": ("product = metal::simd_sum(product);", "", "after"),
    "ties to the higher id": (
        "place = metal::min(place, p.flip ? E - 1 - e : e);",
        "place = metal::min(place, p.flip ? e : E - 1 - e);",
        "softmax",
    ),
    "ties to the higher lane": (
        "place = metal::simd_min(place);",
        "place = -metal::simd_min(-place);",
        "after",
    ),
    "ties to the higher group": (
        "bool first = p.flip ? h > g : h < g;",
        "bool first = h > g;",
        "groups that tie",
    ),
    "no barrier before groups are ranked": (f"{GROUPS}\n  {BARRIER}", GROUPS, "grouped"),
    "+inf is a number": ("bad = bad || !(x < infinity());", "bad = bad || is_nan(x);", "hashed"),
    "NaN is a number": (
        "bad = bad || !(x < infinity());",
        "bad = bad || x == infinity();",
        "hashed",
    ),
    "-inf may be picked": (
        "bool open = lane + LANES * i < E && values[i] != -infinity();",
        "bool open = lane + LANES * i < E;",
        "one group",
    ),
    "a column read for another": (
        "p.norm = row[NORM_TOPK_PROB]",
        "p.norm = row[TIE_BREAK]",
        "softmax",
    ),
}
# name: (which kernel, the text, what stands in its place)
RACES = {
    # a reduction stands between these writes and reads, and orders nothing
    "no barrier before picks are looked up": (0, f"{WRITTEN}{BARRIER}", WRITTEN),
    "a barrier that orders no memory": (
        0,
        f"{WRITTEN}{BARRIER}",
        f"{WRITTEN}metal::simdgroup_barrier(metal::mem_flags::mem_none);",
    ),
    "every lane writes the row's numbers": (0, "if (lane != 0) return;", ""),
    "no barrier between two policies": (1, f"{BARRIER}  // before the next policy's numbers", ""),
    "no barrier before the products are read": (
        1,
        "metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);",
        "",
    ),
}
STRAYS = {
    "a lane that goes home early": (
        "Picks picks;\n  picks.id",
        "if (lane == 5) return Picks();\n  Picks picks;\n  picks.id",
    ),
    "a lane that picks once more": ("k <= p.K; k++", "k <= p.K + (lane == 7 ? 1 : 0); k++"),
    "a lane that takes the other branch": ("if (p.norm) w =", "if (p.norm && lane != 9) w ="),
}
BEYOND = {
    "scores of groups": ("shared.groups[g] =", "shared.groups[g + 32 * PER] ="),
    "a pick of no rank": ("if (lane < K_max) {", "if (lane <= K_max) {"),
}
# One program each for the faults of a kind: the text as it stands first, then each fault.
FAULTY = [VARIANTS[0].changed(old, new) for old, new, _ in WRONG.values()]
STRAYING = [VARIANTS[0].changed(old, new) for old, new in STRAYS.values()]
RACING = [VARIANTS[kernel].changed(old, new) for kernel, old, new in RACES.values()]
EXCEEDING = [VARIANTS[0].changed(old, new) for old, new in BEYOND.values()]
TRIED = {"thread": RACING, "address and undefined": EXCEEDING}


def sanitised(compiled: Compiled, sanitiser: str) -> Runner:
    """Of `VARIANTS`, then what is planted for this sanitiser."""
    flags = ("-DTHREADS", *SANITISERS[sanitiser])
    source = text([*VARIANTS, *TRIED[sanitiser]])
    return program(compiled(source, *flags, optimised="-O0", program=True))


# --- nothing is found in the text as it stands ----------------------------------------------------


@pytest.mark.parametrize("sanitiser", SANITISERS)
def test_a_sanitiser_finds_nothing(compiled: Compiled, sanitiser: str) -> None:
    run = sanitised(compiled, sanitiser)
    for number, (name, spec) in enumerate(SPECS.items()):
        x, inputs = telling(spec)
        x = x[number % 3 :: 3]
        if "token_ids" in inputs:
            inputs["token_ids"] = inputs["token_ids"][: len(x)]
        found = route_on(run, VARIANTS, x, spec, How(flush=True), **inputs)
        assert not wrong(found, x, spec, inputs), name


@pytest.mark.parametrize("sanitiser", SANITISERS)
@pytest.mark.parametrize("dtype", [0, 1])
def test_a_sanitiser_finds_nothing_in_the_gate(
    compiled: Compiled, sanitiser: str, dtype: int
) -> None:
    run = sanitised(compiled, sanitiser)
    launch, inputs, exact, bias = gated(dtype)
    found = run(1, launch, inputs)
    np.testing.assert_allclose(found[-1][None], exact, rtol=2.0**-7, atol=2.0**-7)
    spec, logits = SPECS["grouped"], found[-1][None]
    first = routing([a[:1, : spec.K] if a.ndim == 2 else a[:1] for a in found[:8]])
    assert not wrong(first, logits, spec, {"correction_bias": bias})


# --- what is planted is found ---------------------------------------------------------------------


def route_variant(run: Runner, place: int, spec: RouterSpec) -> bool:
    """Whether variant `place` of a program routes otherwise than the reference does."""
    x, inputs = telling(spec)
    return wrong(
        route_on(lambda _, *job: run(place, *job), VARIANTS, x, spec, **inputs), x, spec, inputs
    )


@pytest.mark.parametrize("name", WRONG)
def test_a_planted_fault_shows(compiled: Compiled, name: str) -> None:
    """In the comparison; or the program does not survive it."""
    variants = [VARIANTS[0], *FAULTY, *STRAYING]
    run = program(compiled(text(variants), optimised="-O0", program=True))
    place, spec = 1 + list(WRONG).index(name), SHOW[WRONG[name][2]]
    assert not route_variant(run, 0, spec)
    try:
        assert route_variant(run, place, spec)
    except RuntimeError:
        return


@pytest.mark.parametrize("name", STRAYS)
def test_a_lane_that_strays_is_an_error(compiled: Compiled, name: str) -> None:
    variants = [VARIANTS[0], *FAULTY, *STRAYING]
    run = program(compiled(text(variants), optimised="-O0", program=True))
    place = 1 + len(FAULTY) + list(STRAYS).index(name)
    with pytest.raises(RuntimeError, match="lanes"):
        route_variant(run, place, SPECS["softmax"])


@pytest.mark.parametrize("name", RACES)
def test_a_planted_race_is_seen_by_the_thread_sanitiser(compiled: Compiled, name: str) -> None:
    run = sanitised(compiled, "thread")
    place = len(VARIANTS) + list(RACES).index(name)
    with pytest.raises(RuntimeError, match="ThreadSanitizer: data race"):
        if RACES[name][0] == 0:
            route_variant(run, place, SPECS["softmax"])
        else:
            run(place, *gated(0)[:2])


@pytest.mark.parametrize("name", BEYOND)
def test_a_write_out_of_bounds_is_seen_by_the_address_sanitiser(
    compiled: Compiled, name: str
) -> None:
    run = sanitised(compiled, "address and undefined")
    with pytest.raises(RuntimeError, match=r"AddressSanitizer: .*overflow"):
        route_variant(run, len(VARIANTS) + list(BEYOND).index(name), SPECS["grouped"])
