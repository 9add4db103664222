"""The policies that a step's lanes route under: numbers it reads, and what of them decides shapes.

A step is compiled for the shapes; what else a policy says is data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from moescope.engine.interpreter import Router
from moescope.kernels.mlx_ops import fields_of
from moescope.kernels.policy_rows import COLUMN


@dataclass(frozen=True, slots=True, eq=False)
class InForce:
    """Of N lanes; P policies each, the one in force and then the shadows."""

    rows: mx.array  # [L, N, P, WIDTH] float32
    picks: tuple[int, ...]  # per router, the most experts any lane executes
    recorded: tuple[int, ...]  # per router, the most any policy picks
    gate_bits: tuple[int, ...]  # roundings of the gates in force
    fields: frozenset[str]  # of policies, those in use (`mlx_ops.fields_of`)
    scales_output: bool  # whether any policy in force multiplies the routed output
    shadow_K: int  # the most any shadow picks; 0 where there are none


def in_force(rows: NDArray[np.float64], routers: Sequence[Router]) -> InForce:
    """From rows [N, P, L, WIDTH] (`steps.Policies`)."""
    rows = rows.transpose(2, 0, 1, 3)
    K = rows[..., COLUMN["num_experts_per_tok"]].astype(int)  # [L, N, P]
    used = [fields_of(r, router.spec.E) for r, router in zip(rows, routers, strict=True)]
    return InForce(
        rows=mx.array(rows.astype(np.float32)),
        picks=tuple(K[:, :, 0].max(1).tolist()),
        recorded=tuple(K.max((1, 2)).tolist()),
        gate_bits=tuple(np.unique(rows[..., COLUMN["gate"]]).astype(int).tolist()),
        fields=frozenset[str]().union(*used),
        scales_output=bool((rows[:, :, 0, COLUMN["output_scale"]] != 1).any()),
        shadow_K=int(K[:, :, 1:].max(initial=0)),
    )
