"""Faults around a router, done to transformers' modules and weights in place."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from tests.families import READ
from tests.families.kit import TOP_K

Around = Callable[[Any, str], None]  # (model, family)
BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
SHARED = ("shared_experts", "shared_expert", "shared_mlp")


def routers_of(model: Any, family: str) -> list[Any]:
    """In the order in which they are asked: of a layer, those in its attention first."""
    pattern = READ.get(family, TOP_K).modules
    named = [(n, m) for n, m in model.named_modules() if re.search(pattern, type(m).__name__)]

    def place(pair: tuple[str, Any]) -> tuple[int, bool]:
        layer = re.search(r"\.(\d+)\.", pair[0])
        assert layer is not None
        return int(layer[1]), "attention" not in pair[0]

    return [module for _, module in sorted(named, key=place)]


def blocks_of(model: Any, family: str) -> list[Any]:
    """The modules that hold a router and experts, in the order of `routers_of`."""
    routers = routers_of(model, family)
    if all(hasattr(router, "experts") for router in routers):
        return routers  # the block decides by itself
    return [parent_of(model, router) for router in routers]


def parent_of(model: Any, module: Any) -> Any:
    return next(m for m in model.modules() if any(child is module for child in m.children()))


def experts_of(block: Any) -> list[Any]:
    """The tensors of a block's experts, [E, ...] each; of routed attention none."""
    if hasattr(block, "input_linear"):  # JetMoE
        linears = (block.input_linear, block.output_linear) if hasattr(block, "activation") else ()
        return [linear.weight.data for linear in linears]
    experts = block.experts
    if hasattr(experts, "mlp"):  # DBRX: all experts' rows one after the other
        return [t.data.view(experts.num_experts, -1, t.shape[1]) for t in experts.parameters()]
    return [tensor.data for tensor in experts.parameters()]


def _pairs(model: Any, family: str) -> Iterator[tuple[Any, Any]]:
    yield from zip(routers_of(model, family), blocks_of(model, family), strict=True)


def _own(router: Any) -> dict[str, Any]:
    held = dict([*router.named_parameters(), *router.named_buffers()])
    return {name: tensor for name, tensor in held.items() if not name.startswith("experts.")}


def _gate(router: Any) -> Any:
    """The gate's weight [E, H]."""
    if hasattr(router, "router_mlp"):
        return router.router_mlp.out_proj.weight
    return max((t for t in _own(router).values() if t.ndim == 2), key=lambda t: t.numel())


def _of_rows(router: Any, block: Any) -> dict[str, Any]:
    """Every tensor with a place for each row of the gate; the row's dimension comes first."""
    classes = len(_gate(router))
    held = _own(router)
    held |= {n: t for n in BIASES if (t := getattr(block, n, None)) is not None}
    found = {}
    for name, tensor in held.items():
        if tensor.ndim == 2 and tensor.shape[0] == 1 and tensor.shape[1] == classes:
            found[name] = tensor.data[0]
        elif tensor.ndim and len(tensor) == classes:
            found[name] = tensor.data
    return found


def _move_rows(order: Callable[[Any], Any]) -> Around:
    def change(model: Any, family: str) -> None:
        for router, block in _pairs(model, family):
            for rows in _of_rows(router, block).values():
                rows.copy_(order(rows.clone()))

    return change


def _gate_of(offset: int) -> Around:
    def change(model: Any, family: str) -> None:
        held = [_of_rows(router, block) for router, block in _pairs(model, family)]
        before = copy.deepcopy(held)
        for number, mine in enumerate(held):
            theirs = before[min(max(number + offset, 0), len(held) - 1)]
            for name, rows in mine.items():
                if theirs[name].shape == rows.shape:
                    rows.copy_(theirs[name])

    return change


def _move_experts(order: Callable[[Any], Any]) -> Around:
    def change(model: Any, family: str) -> None:
        for block in blocks_of(model, family):
            tensors = experts_of(block)
            count = min(map(len, tensors), default=0)  # null experts have no output
            for tensor in tensors:
                tensor[:count] = order(tensor[:count].clone())

    return change


def _halves(rows: Any) -> Any:
    return rows.roll(-(len(rows) // 2), 0)


def _swap_gate_up(model: Any, family: str) -> None:
    for block in blocks_of(model, family):
        if family == "dbrx":
            mlp = block.experts.mlp
            mlp.w1.data, mlp.v1.data = mlp.v1.data, mlp.w1.data
            continue
        for name, tensor in getattr(block, "experts", block).named_parameters():
            if "gate_up" not in name and not (name == "input_linear.weight" and experts_of(block)):
                continue
            if family == "gpt_oss":  # interleaved, in the last dimension
                swapped = tensor.data.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
            else:
                halves = tensor.data.chunk(2, 2 if family == "llama4_text" else 1)
                swapped = torch.cat(halves[::-1], 2 if family == "llama4_text" else 1)
            tensor.data.copy_(swapped)


# --- the shared expert ----------------------------------------------------------------------------


def _shared_of(model: Any, block: Any) -> Any:
    owners = (block, parent_of(model, block))
    held = (getattr(owner, name, None) for owner in owners for name in SHARED)
    return next(module for module in held if module is not None)


def _last_linear(module: Any) -> Any:
    names = ("down_proj", "output_linear")
    return next(m for name in names if (m := getattr(module, name, None)) is not None)


def _factor(router: Any, block: Any) -> float:
    names = ("routed_scaling_factor", "router_scaling_factor", "route_scale")
    held = (getattr(owner, name, None) for owner in (router, block) for name in names)
    return float(next(value for value in held if value is not None))


def _scale_shared(power: int | None) -> Around:
    """Multiply the shared expert by the factor to this power; None: by 0."""

    def change(model: Any, family: str) -> None:
        for router, block in _pairs(model, family):
            by = 0.0 if power is None else _factor(router, block) ** power
            last = _last_linear(_shared_of(model, block))
            for tensor in last.parameters():
                tensor.data.mul_(by)
            if power is None and hasattr(block, "shared_expert_combination_strategy"):
                block.shared_expert_combination_strategy = "sum"  # no mean of one (Cohere)

    return change


def _open_shared_gate(model: Any, family: str) -> None:
    for block in blocks_of(model, family):
        block.shared_expert_gate.forward = lambda x: x.new_full((*x.shape[:-1], 1), torch.inf)


# --- what the router reads ------------------------------------------------------------------------


def _reads_residual(model: Any, family: str) -> None:
    """What the norm before the experts was given, whichever norm that is."""
    given: dict[int, Any] = {}  # by address: views of what a norm gave have it too

    def remember(module: Any, inputs: Any, output: Any) -> None:
        if inputs and isinstance(output, torch.Tensor):  # a norm, not a block that holds some
            given[output.data_ptr()] = (output, inputs[0])

    for module in model.modules():
        if "Norm" in type(module).__name__ or "norm" in type(module).__name__:
            module.register_forward_hook(remember)
    for router in routers_of(model, family):
        seen: list[Any] = []

        def look(m: Any, inputs: Any, named: Any, seen: list[Any] = seen) -> None:
            x = inputs[0] if inputs else named["hidden_states"]
            seen[:] = [given[x.data_ptr()][1]]
            given.clear()

        _reads(router).register_forward_pre_hook(look, with_kwargs=True)
        _read_instead(router, seen)


def _reads_embedding(model: Any, family: str) -> None:
    seen: list[Any] = []
    embed = model.get_input_embeddings()
    by = getattr(model.config, "embedding_multiplier", None) or 1.0
    embed.register_forward_hook(lambda m, i, out: seen.__setitem__(slice(None), [out * by]))
    for router in routers_of(model, family):
        _read_instead(router, seen)


def _reads(router: Any) -> Any:
    """The module that is given the hidden state: the router, or its gate."""
    return router.router if hasattr(router, "experts") else router


def _read_instead(router: Any, seen: list[Any]) -> None:
    router = _reads(router)
    inner = router.forward

    def forward(x: Any, *rest: Any, **named: Any) -> Any:
        return inner(seen[0].reshape(x.shape).to(x.dtype), *rest, **named)

    router.forward = forward


# --- the gate's numbers ---------------------------------------------------------------------------


def _quantise_gate(bits: int) -> Around:
    def change(model: Any, family: str) -> None:
        for router in routers_of(model, family):
            gate = _gate(router)
            wide = gate.data.double()
            step = wide.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
            gate.data.copy_((wide / step).round() * step)

    return change


def _no_gate_bias(model: Any, family: str) -> None:
    for router in routers_of(model, family):
        router.bias.data.zero_()


def _bias_bytes(model: Any, family: str) -> None:
    for router, block in _pairs(model, family):
        rows = _of_rows(router, block)
        for name in rows:
            if name.endswith(BIASES):
                bias = rows[name]
                read = bias.float().contiguous().view(torch.bfloat16)[: bias.numel()]
                bias.copy_(read.float())


# --- how experts are called -----------------------------------------------------------------------


def _unweighted_bias(model: Any, family: str) -> None:
    for block in blocks_of(model, family):
        experts, inner = block.experts, block.experts.forward

        def forward(x: Any, ids: Any, weights: Any, e: Any = experts, inner: Any = inner) -> Any:
            out = inner(x, ids, weights)
            missing = (1.0 - weights.float())[..., None] * e.down_proj_bias[ids].float()
            return out + missing.sum(-2).view_as(out).to(out.dtype)

        experts.forward = forward


def _null_experts_twice(model: Any, family: str) -> None:
    for block in blocks_of(model, family):
        experts, inner = block.experts, block.experts.forward
        real = experts.num_routed_experts

        def forward(x: Any, ids: Any, weights: Any, inner: Any = inner, real: int = real) -> Any:
            share = torch.where(ids >= real, weights, 0.0).sum(-1, keepdim=True)
            once = torch.nn.functional.pad(share, (0, 1)).to(weights.dtype)  # it takes no K of 1
            return inner(x, ids, weights) + inner(x, torch.zeros_like(ids[:, :2]), once)

        experts.forward = forward


def _weight_on_output(both: bool) -> Around:
    """Llama 4: the block multiplies the input of all experts by their scores."""

    def change(model: Any, family: str) -> None:
        for router, block in _pairs(model, family):
            inner, run, held = router.forward, block.experts.forward, []

            def forward(x: Any, r: Any = router, inner: Any = inner, held: Any = held) -> Any:
                scores, logits = inner(x)
                held[:] = [scores]
                r.decided = scores.topk(r.top_k, -1)
                return (scores if both else (scores != 0).to(scores.dtype)), logits

            def experts(x: Any, run: Any = run, held: list[Any] = held) -> Any:
                return run(x) * held[0].transpose(0, 1).reshape(-1, 1)

            router.forward, block.experts.forward = forward, experts

    return change


AROUND: dict[str, Around] = {
    "gate_rows_shifted": _move_rows(lambda rows: rows.roll(1, 0)),
    "gate_rows_reversed": _move_rows(lambda rows: rows.flip(0)),
    "gate_of_next_layer": _gate_of(+1),
    "gate_of_previous_layer": _gate_of(-1),
    "experts_shifted": _move_experts(lambda rows: rows.roll(-1, 0)),
    "experts_reversed": _move_experts(lambda rows: rows.flip(0)),
    "experts_halves_swapped": _move_experts(_halves),
    "gate_up_swapped": _swap_gate_up,
    "shared_dropped": _scale_shared(None),
    "shared_gate_missing": _open_shared_gate,
    "shared_scaled": _scale_shared(-1),
    "shared_scaled_up": _scale_shared(+1),
    "router_reads_residual": _reads_residual,
    "router_reads_embedding": _reads_embedding,
    "router_quantised": _quantise_gate(8),
    "router_quantised_4_bits": _quantise_gate(4),
    "router_linear_bias_missing": _no_gate_bias,
    "bias_fp32_where_bf16_expected": _bias_bytes,
    "expert_bias_unweighted": _unweighted_bias,
    "zero_expert_double": _null_experts_twice,
    "gate_on_output": _weight_on_output(both=False),
    "gate_on_both": _weight_on_output(both=True),
}
