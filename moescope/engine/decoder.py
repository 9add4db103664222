"""`DecoderSpec`: a whole decoder as data. No torch, no model types, no tensors.

A layer is an ordered list of branches. A branch reads the residual or a named tap, normalises it,
applies one operator of a closed table, normalises and scales the result, and adds it to the
residual or to a tap. Taps start empty in every layer. Interpreters run this; `families` writes it;
`parameters.py` says which tensors each operator holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from moescope.engine.operator_sizes import check_sizes
from moescope.engine.operators import MoE, Norm, Operator, RoutedAttention
from moescope.kernels.spec import RouterSpec

RESIDUAL = "residual"


@dataclass(frozen=True, slots=True)
class Branch:
    """`adds_to` = keeps * `adds_to` + multiplier * post_norm(operator(pre_norm(`reads`))).

    A router whose input is the residual reads what the branch read, before `pre_norm`. With
    `learned_sum` each of the two that are added has a learned vector added to it, and is then
    multiplied by another.
    """

    name: str  # its tensors are `layers.N.<name>.*`
    operator: Operator
    pre_norm: Norm | None = None
    post_norm: Norm | None = None
    multiplier: float = 1.0
    reads: str = RESIDUAL
    adds_to: str = RESIDUAL
    keeps: float = 1.0
    learned_sum: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    branches: tuple[Branch, ...]
    learned_scale: bool = False  # a scalar tensor that multiplies the residual after the layer


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """A decoder from token ids to logits. `carried` names taps that live on from layer to layer.

    What reads a residual in float32 reads it rounded to the model's dtype.
    """

    vocab_size: int
    hidden: int
    context: int
    layers: tuple[Layer, ...]
    final_norm: Norm | None
    tied_head: bool = False
    head_bias: bool = False
    norm_head: bool = False  # the head's columns are divided by their lengths
    embedding_scale: float = 1.0
    learned_embedding: bool = False  # a learned vector is added, and another multiplies the sum
    residual_dtype: Literal["model", "float32"] = "model"
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    carried: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for number, layer in enumerate(self.layers):
            _check_layer(self, number, layer)
        _check_networks(self)

    def operators(self) -> Iterator[tuple[int, Branch]]:
        """Every branch with its layer number, in execution order."""
        for number, layer in enumerate(self.layers):
            for branch in layer.branches:
                yield number, branch

    def routers(self) -> tuple[tuple[int, str, RouterSpec], ...]:
        """(layer, branch name, spec) of the L routers, in execution order."""
        return tuple(
            (number, branch.name, branch.operator.router)
            for number, branch in self.operators()
            if isinstance(branch.operator, MoE | RoutedAttention)
        )


def state_bytes(spec: DecoderSpec, tokens: int, element_size: int) -> int:
    """Bytes one lane keeps for `tokens` tokens; windows are kept whole (a full cache, masked)."""
    total = 0
    for _, branch in spec.operators():
        for state in branch.operator.state():
            size = 4 if state.dtype == "float32" else element_size
            total += size * state.elements * (tokens if state.growth == "per_token" else 1)
    return total


def _check_networks(spec: DecoderSpec) -> None:
    """The gates' networks read what one before them wrote, in taps that no branch adds to."""
    widths: dict[str, int] = {}
    branches = {RESIDUAL} | {b.reads for _, b in spec.operators()}
    branches |= {b.adds_to for _, b in spec.operators()}
    for number, branch in spec.operators():
        network = branch.operator.gate_network if isinstance(branch.operator, MoE) else None
        if network is None:
            continue
        where = f"layer {number} branch {branch.name!r}"
        if network.reads and widths.get(network.reads) != network.width:
            raise ValueError(
                f"{where}: its gate reads {network.reads!r}, which nothing has written"
            )
        if network.writes and (network.writes in branches or network.writes not in spec.carried):
            raise ValueError(f"{where}: its gate writes {network.writes!r}, no tap of its own")
        widths[network.writes] = network.width


def _check_layer(spec: DecoderSpec, number: int, layer: Layer) -> None:
    """Wiring mistakes are ours (a family's), so they raise ValueError."""
    filled = {RESIDUAL, *spec.carried}
    names: set[str] = set()
    for branch in layer.branches:
        where = f"layer {number} branch {branch.name!r}"
        if branch.name in names:
            raise ValueError(f"{where}: the name is used twice")
        if branch.reads not in filled:
            raise ValueError(f"{where}: reads {branch.reads!r}, which nothing has written yet")
        hidden = getattr(branch.operator, "hidden", spec.hidden)
        if hidden != spec.hidden:
            raise ValueError(f"{where}: hidden {hidden}, the decoder has {spec.hidden}")
        for norm in (branch.pre_norm, branch.post_norm):
            if norm is not None and norm.width != spec.hidden:
                raise ValueError(f"{where}: norm of width {norm.width}, hidden is {spec.hidden}")
        check_sizes(branch.operator, where)
        names.add(branch.name)
        filled.add(branch.adds_to)
    if layer.branches and RESIDUAL not in {branch.adds_to for branch in layer.branches}:
        raise ValueError(f"layer {number}: no branch adds to the residual")
