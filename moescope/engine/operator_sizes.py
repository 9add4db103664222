"""Whether the sizes in an operator go together: what a family could get wrong."""

from __future__ import annotations

from moescope.engine.operators import (
    MLA,
    Attention,
    ConvolvedAttention,
    LinearAttention,
    MoE,
    Operator,
    RoutedAttention,
    StateSpace,
)


def check_sizes(operator: Operator, where: str) -> None:
    """Raise ValueError, naming `where`, for sizes that do not go together: a family's mistake."""
    match operator:
        case Attention() | ConvolvedAttention():
            if operator.heads % operator.kv_heads:
                raise ValueError(
                    f"{where}: {operator.heads} heads do not divide over {operator.kv_heads}"
                )
            if isinstance(operator, Attention) and operator.window and operator.chunk:
                raise ValueError(f"{where}: window and chunk exclude each other")
        case MLA():
            if operator.rope is not None and operator.rope.dims != operator.rope_dim:
                raise ValueError(f"{where}: rope over {operator.rope.dims} dims of the rope part")
            if not operator.q_lora_rank and (operator.indexer or operator.q_reads_raw):
                raise ValueError(f"{where}: needs a latent of the queries")
        case LinearAttention():
            if operator.value_heads % operator.key_heads:
                raise ValueError(f"{where}: value heads do not divide over key heads")
        case StateSpace() if operator.kind == "mamba2":
            if operator.heads * operator.head_dim != operator.inner:
                raise ValueError(f"{where}: heads × head_dim is not the inner width")
        case MoE() | RoutedAttention():
            classes = operator.router.wiring.num_experts + operator.router.wiring.num_null_experts
            if not 1 <= operator.router.policy.num_experts_per_tok <= classes:
                raise ValueError(f"{where}: num_experts_per_tok is not in 1..{classes}")
            network = getattr(operator, "gate_network", None)
            if network is None and operator.router.wiring.router_input == "carried_mlp":
                raise ValueError(f"{where}: router_input carried_mlp without a gate_network")
            if network is not None and network.norm.width != network.width:
                raise ValueError(f"{where}: norm of width {network.norm.width} in the gate_network")
        case _:
            pass
    rope = getattr(operator, "rope", None)
    if rope is not None and (rope.dims % 2 or rope.dims <= 0):
        raise ValueError(f"{where}: rope over {rope.dims} dims")
