"""The Metal router as the other kernels' tests call theirs: a spec and numpy arrays in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moescope.kernels.metal.launch import Launch, gate_router_launch, router_launch
from moescope.kernels.policy_rows import pack_rows
from moescope.kernels.spec import RouterSpec, Routing
from tests.kernels.metal_shim.build import Variant
from tests.kernels.metal_shim.device import USUAL, How, routing

Runner = Callable[[int, Launch, Sequence[np.ndarray], How], list[np.ndarray]]
PER_LANE = (1, 2, 4, 8, 16, 32)


def router_variants(
    per_lane: Sequence[int] = PER_LANE, dtypes: Sequence[str] = ("float32",)
) -> list[Variant]:
    """The router for up to 32 * `per_lane` classes, for each dtype of the logits."""
    rest = ("float32", "float32", "float32", "int32", "int32")
    return [
        Variant.of(router_launch(1, 1, 32 * n, 1), (dtype, *rest))
        for dtype in dtypes
        for n in per_lane
    ]


def gate_variant(hidden: str, gate: str, E: int = 60) -> Variant:
    launch = gate_router_launch(1, E, 1, 1, router_dtype=0, casts=False)
    floats = ("float32",) * 4
    return Variant.of(launch, (hidden, gate, *floats, "int32", "int32"))


def place_of(variants: Sequence[Variant], launch: Launch, *dtypes: str) -> int:
    """Which of `variants` serves `launch` for inputs that begin with these dtypes."""
    return next(
        place
        for place, variant in enumerate(variants)
        if (variant.kernel.name, variant.template) == (launch.kernel.name, launch.template)
        and variant.inputs[: len(dtypes)] == dtypes
    )


def router_inputs(
    logits: np.ndarray,
    specs: Sequence[RouterSpec],
    K_max: int,
    *,
    correction_bias: np.ndarray | None = None,
    per_expert_scale: np.ndarray | None = None,
    hash_ids: np.ndarray | None = None,
) -> tuple[Launch, list[np.ndarray]]:
    """Every row of logits under all of `specs`, as `mlx_ops` launches it."""
    (T, E), P = logits.shape, len(specs)
    rows = pack_rows(specs).astype(np.float32)
    vectors = [
        None if v is None else np.ascontiguousarray(v, np.float32).reshape(-1, E)
        for v in (correction_bias, per_expert_scale)
    ]
    launch = router_launch(
        T,
        P,
        E,
        K_max,
        one_row=P == 1,
        bias_rows=0 if vectors[0] is None else len(vectors[0]),
        scale_rows=0 if vectors[1] is None else len(vectors[1]),
        hash_picks=0 if hash_ids is None else hash_ids.shape[1],
    )
    rows = rows if P == 1 else np.tile(rows, (T, 1))
    sizes = np.array(launch.sizes, np.int32)
    hashed = sizes if hash_ids is None else hash_ids.astype(np.int32)
    given = [rows if v is None else v for v in vectors]
    return launch, [logits, rows, *given, hashed, sizes]


def route_on(
    run: Runner,
    variants: Sequence[Variant],
    logits: np.ndarray,
    spec: RouterSpec,
    how: How = USUAL,
    *,
    token_ids: np.ndarray | None = None,
    hash_table: np.ndarray | None = None,
    **vectors: Any,
) -> Routing:
    """One spec, logits [T, E] float32; the rest as `kernels.route` takes it."""
    hashed = None if hash_table is None else hash_table[token_ids]
    launch, inputs = router_inputs(logits, [spec], spec.K, hash_ids=hashed, **vectors)
    return routing(run(place_of(variants, launch, "float32"), launch, inputs, how))
