"""The router on MLX arrays as the other kernels' tests call theirs: a spec and numpy arrays in."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np

from moescope.kernels.mlx_ops import fields_of, route_mlx
from moescope.kernels.policy_rows import pack
from moescope.kernels.spec import RouterSpec, Routing


def on_mlx(
    logits: np.ndarray,
    spec: RouterSpec,
    *,
    correction_bias: np.ndarray | None = None,
    per_expert_scale: np.ndarray | None = None,
    token_ids: np.ndarray | None = None,
    hash_table: np.ndarray | None = None,
    short: bool = False,
    **options: Any,
) -> Routing:
    """`short` leaves out of the plain form what the spec does not ask for."""
    rows = pack(spec)[None].astype(np.float32)
    hashed = None if hash_table is None else hash_table[token_ids].astype(np.int32)
    if short:
        options["fields"] = fields_of(rows, spec.E)
    arrays = [
        None if a is None else mx.array(a) for a in (correction_bias, per_expert_scale, hashed)
    ]
    found = route_mlx(
        mx.array(logits),
        mx.array(rows),
        spec.K,
        correction_bias=arrays[0],
        per_expert_scale=arrays[1],
        hash_ids=arrays[2],
        **options,
    )
    return to_numpy(found)


def to_numpy(found: Routing) -> Routing:
    values = {name: getattr(found, name) for name in Routing.__slots__}
    return Routing(**{k: None if v is None else np.array(v) for k, v in values.items()})
