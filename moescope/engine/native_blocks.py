"""Feed-forward blocks as operators of a C program: dense, and routed with what stands beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moescope.engine.operators import MLP, Experts, MoE
from moescope.kernels import native_ops as native

if TYPE_CHECKING:
    from moescope.engine.native_program import Place, Program


def activation(block: MLP | Experts) -> tuple[Any, ...]:
    """As a `native_ops.ACT`. Only gated blocks are clamped and shifted."""
    kind = native.ACTIVATIONS.index(block.activation)
    if not block.glu:
        return (kind, 0, 0, 0.0, block.alpha, 0.0)
    return (kind, 1, block.limit_site == "after", block.limit, block.alpha, block.up_shift)


def plain_mlp(program: Program, m: MLP, place: Place) -> None:
    inner = program.buffer("inner", m.width)
    act = activation(m)
    program.linear(f"{place.path}.gate_up", place.h, inner, m.width, m.hidden, act)
    program.linear(f"{place.path}.down_proj", inner, place.y, m.hidden, m.width)


def moe(program: Program, m: MoE, place: Place) -> None:
    """Logits and the shared expert's hidden row; routing; experts; the sum and what comes after."""
    path, router = place.path, place.router
    spec, experts = program.shared.routers[router].spec, m.experts
    wiring, hidden = spec.wiring, experts.hidden or m.hidden
    beside = _shared_expert(program, m, f"{path}.shared_expert", router)
    gate = program.kept[router, 0] = program.shared.weights[f"{path}.gate.weight"]
    program.gates[router, 0] = gate.data_ptr()
    program.add(
        "gate",
        **{"x": _seen(program, m, place), "z": place.h, "cols": m.hidden, "classes": spec.E},
        bias=program.wide(f"{path}.gate.bias"),
        logits_dtype=native.DTYPES.index(wiring.router_dtype),
        gates=program.gates[router].ctypes.data,
        **beside,
    )
    learned = ("correction_bias", "per_expert_scale")
    vectors = {name: program.wide(f"{path}.gate.{name}") for name in learned}
    program.add("route", router=router, classes=spec.E, **vectors)
    x = place.h
    if hidden != m.hidden:
        x = program.buffer("latent", hidden)
        program.linear(f"{path}.latent_down", place.h, x, hidden, m.hidden)
    program.add(
        "experts",
        **{"x": x, "rows": experts.width, "cols": hidden, "experts": wiring.num_experts},
        weight=program.address(f"{path}.experts.gate_up"),
        bias=program.wide(f"{path}.experts.gate_up_bias"),
        act=activation(experts),
        flags=native.WEIGHT_FIRST * wiring.apply_router_weight_on_input,
        router=router,
    )
    program.add(
        "down",
        **{"rows": hidden, "cols": experts.width},
        weight=program.address(f"{path}.experts.down"),
        bias=program.wide(f"{path}.experts.down_bias"),
        **beside,
    )
    _combine(program, m, place, hidden, beside)


def _combine(program: Program, m: MoE, place: Place, hidden: int, beside: dict[str, Any]) -> None:
    """Experts that work on a narrower row are summed up there, and the sum is brought back."""
    wiring = program.shared.routers[place.router].spec.wiring
    average = wiring.shared_combination == "average"
    if m.sums_in_float32 and wiring.combine_dtype == "float32":
        average = False
    finish = native.FINISH | native.AVERAGE * average
    null = native.NULL * (wiring.null_expert_kind == "identity")
    common = {"experts": wiring.num_experts, "z": place.h, **beside}
    bias = program.wide(f"{place.path}.output_bias")
    if hidden == m.hidden:
        flags = native.SUM | null | finish
        program.add("combine", y=place.y, rows=hidden, bias=bias, flags=flags, **common)
        return
    narrow = program.buffer("latent", hidden)
    program.add("combine", y=narrow, rows=hidden, flags=native.SUM, **common)
    program.linear(f"{place.path}.latent_up", narrow, place.y, m.hidden, hidden)
    program.add("combine", y=place.y, rows=m.hidden, bias=bias, flags=finish, **common)


def _shared_expert(program: Program, m: MoE, path: str, router: int) -> dict[str, Any]:
    if m.shared is None:
        return {"router": router}
    return {
        "router": router,
        "shared_width": m.shared.width,
        "shared_rows": m.hidden,
        "shared_act": activation(m.shared),
        "shared_up": program.address(f"{path}.gate_up.weight"),
        "shared_down": program.address(f"{path}.down_proj.weight"),
        "shared_up_bias": program.wide(f"{path}.gate_up.bias"),
        "shared_down_bias": program.wide(f"{path}.down_proj.bias"),
        "shared_gate": program.address(f"{path}_gate.weight"),
    }


def _seen(program: Program, m: MoE, place: Place) -> int:
    """The buffer a router reads."""
    asked = m.router.wiring.router_input
    if asked != "residual_rms_scaled":
        return place.read if asked == "residual" else place.h
    assert m.router_norm is not None
    seen = program.buffer("seen", m.hidden)
    program.norm(m.router_norm, "", place.read, seen)
    weight = program.wide(f"{place.path}.gate.scale")
    program.scale(seen, m.hidden, m.hidden**-0.5, weight=weight)
    return seen
