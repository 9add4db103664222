"""Which fields of a `DecoderSpec` the MLX interpreter honours, and how others are refused.

Imports no mlx: `inspect` may ask about a device that is not here.
"""

from __future__ import annotations

from moescope.engine.decoder import MLP, Attention, Branch, DecoderSpec, MoE, Norm, Pass
from moescope.engine.limits import Limits
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterWiring

MLX = Limits(
    (Attention, MLP, MoE, Pass),
    {
        Attention: {"shares_kv_of": (), "temperature_kind": (), "gate_bias": ()},
        Norm: {"gate_rank": ()},
        Branch: {"keeps": ()},
        RouterWiring: {
            "router_input": ("normed", "residual", "residual_rms_scaled"),
            "hash_table": (),
            "shared_combination": ("add", "average"),
            "expert_pre_norm": (),
            "expert_post_norm": (),
        },
    },
)


def refuse_unsupported(spec: DecoderSpec) -> None:
    """Raise a MoescopeError for the first thing that the MLX interpreter does not do."""
    if (found := MLX.first(spec)) is not None:
        name, value = found
        raise MoescopeError(
            f"{name} {value}: not implemented by the MLX interpreter of this version",
            hint="--device cpu",
            code=ExitCode.CHECKPOINT,
        )
