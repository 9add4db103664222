"""A decoder under a variant that edits more than router policies, over the same tensors.

The edited spec gets a new interpreter; what a spec cannot say (`variants.DECODER_EDITS`) is put
into its running operators, so that nothing large is copied. What each edit means in words is in
`variants/decoder_edits.py`. Torch only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moescope.engine import parameters
from moescope.engine.decoder import DecoderSpec
from moescope.engine.edited import edited_spec
from moescope.engine.operators import MoE
from moescope.engine.torch_decoder import TorchDecoder
from moescope.engine.torch_operators import Call, TorchMoE
from moescope.errors import MoescopeError
from moescope.kernels.reference import biased_dtype
from moescope.kernels.spec import Routing
from moescope.variants import Edits

FIRST_UNDERFLOW = -16.6  # log(1 + exp x) in float32 is 0 below it
SMALLEST = -1e4  # a logit whose softplus is 0


def _check_tensors(spec: DecoderSpec, weights: Mapping[str, Tensor], edits: Edits) -> None:
    """Refuse an edit that asks for what the checkpoint does not hold."""
    missing = [slot.name for slot in parameters.slots(spec) if slot.name not in weights]
    for layer, branch in spec.operators():
        moe = branch.operator
        if isinstance(moe, MoE) and moe.shared is None and moe.router.wiring.shared_experts:
            missing.append(f"layers.{layer}.{branch.name}.shared_expert")
    if missing:
        raise MoescopeError(f"variant {str(edits)!r}: this model has no tensor {missing[0]}")


def rewired(
    decoder: TorchDecoder, edits: Edits, *, spec: DecoderSpec | None = None, layers: int = 0
) -> TorchDecoder:
    """A decoder that computes as `edits` say, with the tensors of `decoder` and state of its own.

    `spec` is edited in place of the decoder's, where dtypes of its routers are to be others;
    `layers` keeps only so many of the first layers. Takes no fused step.
    """
    spec = edited_spec(spec or decoder.spec, edits)
    _check_tensors(spec, decoder.shared.weights, edits)
    if layers:
        spec = replace(spec, layers=spec.layers[:layers])
    made = TorchDecoder(
        spec,
        _weights(decoder, spec, edits),
        device=decoder.device,
        dtype=decoder.dtype,
        devices=[stage.device for stage in decoder._stages[: len(spec.layers)]],
        fused=False,
    )
    trained = decoder.spec
    for layer, branch, run in made.operators():
        names = edits.decoder_at(layer) if hasattr(run, "router") else ()
        for name in names:
            if name in _ON_OPERATORS:
                old = next(b for b in trained.layers[layer].branches if b.name == branch.name)
                _ON_OPERATORS[name](Place(made, run, old.operator))
    return made


# --- edits of tensors ---------------------------------------------------------------------------

Edited = dict[str, Tensor]
GATE = ("gate.weight", "gate.bias", "gate.correction_bias", "gate.per_expert_scale")


def _weights(decoder: TorchDecoder, spec: DecoderSpec, edits: Edits) -> Mapping[str, Tensor]:
    """The decoder's tensors, small ones replaced or left out where an edit says so."""
    held = decoder.shared.weights
    paths = [f"layers.{layer}.{name}" for layer, name, _ in decoder.spec.routers()]
    changed: Edited = {}
    gone: set[str] = set()
    for number, (layer, _, router) in enumerate(spec.routers()):
        for edit in edits.decoder_at(layer):
            if edit in _ON_TENSORS:
                changed |= _ON_TENSORS[edit](held, paths, number)
        if not router.wiring.gate_bias:
            gone.add(f"{paths[number]}.gate.bias")
        if router.wiring.shared_expert_gate == "none":
            gone.add(f"{paths[number]}.shared_expert_gate.weight")
    if not (changed or gone & held.keys()):
        return held
    return {name: tensor for name, tensor in held.items() if name not in gone} | changed


def _rows_moved(order: Callable[[Tensor], Tensor]) -> Any:
    def edit(weights: Mapping[str, Tensor], paths: list[str], number: int) -> Edited:
        names = [f"{paths[number]}.{name}" for name in GATE]
        return {name: order(weights[name]) for name in names if name in weights}

    return edit


def _gate_of(offset: int) -> Any:
    def edit(weights: Mapping[str, Tensor], paths: list[str], number: int) -> Edited:
        other = min(max(number + offset, 0), len(paths) - 1)
        found = {}
        for name in GATE:
            mine, theirs = f"{paths[number]}.{name}", f"{paths[other]}.{name}"
            if mine in weights and theirs in weights and _alike(weights[mine], weights[theirs]):
                found[mine] = weights[theirs]
        return found

    return edit


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.device == b.device


def _bytes_as_bfloat16(weights: Mapping[str, Tensor], paths: list[str], number: int) -> Edited:
    name = f"{paths[number]}.gate.correction_bias"
    bias = weights[name]
    read = bias.float().contiguous().view(torch.bfloat16).flatten()[: bias.numel()]
    return {name: read.to(bias.dtype).view(bias.shape)}


_ON_TENSORS: dict[str, Callable[[Mapping[str, Tensor], list[str], int], Edited]] = {
    "gate_rows_shifted": _rows_moved(lambda rows: rows.roll(1, 0)),
    "gate_rows_reversed": _rows_moved(lambda rows: rows.flip(0)),
    "gate_of_next_router": _gate_of(+1),
    "gate_of_previous_router": _gate_of(-1),
    "bias_bytes_as_bfloat16": _bytes_as_bfloat16,
}


# --- edits of running operators -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """Where an edit is put: the new decoder, the running operator, and what it was trained as."""

    decoder: TorchDecoder
    run: Any  # a TorchMoE, or another operator with a router
    trained: Any  # MoE or RoutedAttention

    @property
    def factor(self) -> float:
        return float(self.trained.router.policy.routed_scaling_factor)


def _altered(change: Callable[[Tensor, Place], Tensor]) -> Callable[[Place], None]:
    """The logits [R, E] before they are routed."""

    def put(place: Place) -> None:
        before = place.run.router.alter
        place.run.router.alter = lambda logits: change(
            logits if before is None else before(logits), place
        )

    return put


def _first_where_all_negative(logits: Tensor, place: Place) -> Tensor:
    """The first K, alike, and no others."""
    first = torch.full_like(logits, -torch.inf)
    first[:, : place.trained.router.policy.num_experts_per_tok] = 0.0
    return torch.where((logits < 0).all(-1, keepdim=True), first, logits)


def _softplus_as_written(logits: Tensor, place: Place) -> Tensor:
    return torch.where(logits < FIRST_UNDERFLOW, torch.full_like(logits, SMALLEST), logits)


def _best_of_each_group(logits: Tensor, place: Place) -> Tensor:
    """ceil(K / n_group) of each group stay, by score + bias; the others are −inf."""
    policy, groups = place.trained.router.policy, place.trained.router.policy.n_group
    wide = logits.float()
    scores = wide.sigmoid() if policy.scoring_func == "sigmoid" else F.softplus(wide).sqrt()
    if policy.correction_bias != "none":
        bias = place.run.router.correction_bias
        dtype = biased_dtype(policy)
        scores = (scores + bias.float()).to(getattr(torch, dtype)).float()
    each = -(-policy.num_experts_per_tok // groups)
    grouped = scores.view(len(scores), groups, -1)
    best = grouped.topk(min(each, grouped.shape[-1]), -1).indices
    kept = torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, best, True).view_as(scores)
    return logits.masked_fill(~kept, -torch.inf)


class _ReadsEmbedding:
    """A router whose input is the token's embedding."""

    def __init__(self, place: Place) -> None:
        self.inner, self.decoder = place.run.router, place.decoder
        self.index = self.inner.index
        self.input: Tensor | None = None
        self.inner.seen = lambda h, read: self.input

    def __call__(self, h: Tensor, call: Call) -> Routing:
        table = self.decoder.shared.weights["embed.weight"]
        rows = F.embedding(call.token_ids.to(table.device), table).to(h.device)
        self.input = rows * self.decoder.spec.embedding_scale
        routing: Routing = self.inner(h, call)
        return routing

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _reads_embedding(place: Place) -> None:
    place.run.router = _ReadsEmbedding(place)


Run = Callable[[Tensor, Tensor, Tensor], Tensor]  # h [R, H], ids and weights [R, K] -> [R, H]


def _around_experts(change: Callable[[Run, Place], Run]) -> Callable[[Place], None]:
    def put(place: Place) -> None:
        if isinstance(place.run, TorchMoE):
            run: Any = place.run
            run.experts = _Experts(run.experts, change(run.experts, place))

    return put


class _Experts:
    """Experts that are called otherwise; everything else is theirs."""

    def __init__(self, inner: Any, run: Run) -> None:
        self.inner, self.run = inner, run

    def __call__(self, h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self.run(h, ids, weights)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _relocated(where: Callable[[Tensor, int], Tensor]) -> Callable[[Run, Place], Run]:
    """Ids of real experts run others; unused and null ones stay."""

    def change(run: Run, place: Place) -> Run:
        count = place.trained.router.wiring.num_experts

        def moved(h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
            real = (ids >= 0) & (ids < count)
            return run(h, torch.where(real, where(ids, count), ids), weights)

        return moved

    return change


def _bias_unweighted(run: Run, place: Place) -> Run:
    """The experts' own output has w × bias in it; this adds (1 - w) × bias."""
    biases = torch.stack(place.run.experts.down_bias)

    def whole(h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        real = (ids >= 0) & (ids < len(biases))
        missing = torch.where(real, 1.0 - weights, 0.0)
        each = biases[ids.clamp(0, len(biases) - 1).long()].float()
        return run(h, ids, weights) + (missing.unsqueeze(-1) * each).sum(1).to(h.dtype)

    return whole


def _null_experts_run_expert_0(run: Run, place: Place) -> Run:
    count = place.trained.router.wiring.num_experts

    def doubled(h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        share = torch.where(ids >= count, weights, 0.0).sum(-1, keepdim=True)
        first = torch.zeros_like(ids[:, :1])
        return run(h, ids, weights) + run(h, first, share)

    return doubled


def _weight_on_output_too(run: Run, place: Place) -> Run:
    def twice(h: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return (run(h, ids, weights) * weights.sum(-1, keepdim=True)).to(h.dtype)

    return twice


def _swap_gate_and_up(place: Place) -> None:
    if not isinstance(place.run, TorchMoE):  # routed attention has no gate projection
        return
    experts = place.run.experts
    inner = experts.activation
    experts.grouped = None

    def exchanged(gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return inner(torch.cat((up, gate), -1))

    experts.activation = exchanged


def _scale_shared(power: int) -> Callable[[Place], None]:
    def put(place: Place) -> None:
        inner, factor = place.run.shared, place.factor**power
        place.run.shared = lambda h, *rest: inner(h, *rest) * factor

    return put


_ON_OPERATORS: dict[str, Callable[[Place], None]] = {
    "first_where_all_negative": _altered(_first_where_all_negative),
    "softplus_as_written": _altered(_softplus_as_written),
    "best_of_each_group": _altered(_best_of_each_group),
    "gate_reads_embedding": _reads_embedding,
    "experts_shifted": _around_experts(_relocated(lambda ids, count: (ids + 1) % count)),
    "experts_reversed": _around_experts(_relocated(lambda ids, count: count - 1 - ids)),
    "experts_halves_swapped": _around_experts(
        _relocated(lambda ids, count: (ids + count // 2) % count)
    ),
    "gate_up_swapped": _swap_gate_and_up,
    "down_bias_unweighted": _around_experts(_bias_unweighted),
    "null_experts_run_expert_0": _around_experts(_null_experts_run_expert_0),
    "weight_on_output_too": _around_experts(_weight_on_output_too),
    "shared_over_factor": _scale_shared(-1),
    "shared_times_factor": _scale_shared(+1),
}
