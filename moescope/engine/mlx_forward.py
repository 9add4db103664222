"""One pass through a `DecoderSpec` on MLX arrays: from token ids to logits and routings.

A pure function of its inputs, so that it can be compiled: state comes in and goes out. Lanes,
policies and lengths are `mlx_decoder`'s; operators are in `mlx_operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from moescope.engine import mlx_operators as ops
from moescope.engine.decoder import RESIDUAL, Branch, DecoderSpec
from moescope.engine.interpreter import Router
from moescope.engine.mlx_operators.record import stacked
from moescope.engine.mlx_states import States
from moescope.engine.operators import MoE, Rope, RoutedAttention, rotary_embeddings

Tables = dict[int, tuple[mx.array, mx.array]]  # by the id of a rope: cos, signed sin
Normalise = Callable[[mx.array], mx.array] | None
# pre-norm, operator, post-norm, the sum
Branching = tuple[Normalise, ops.MLXOperator, Normalise, Branch, ops.Adds]


@dataclass(frozen=True, slots=True)
class Stage:
    """One layer."""

    branches: list[Branching]
    scale: mx.array | None  # of the residual after the layer
    dtype: mx.Dtype  # that operators read the residual in


class Forward:
    """`spec` over `weights`. `tables` hold the rotary embeddings of `capacity` positions."""

    def __init__(
        self, spec: DecoderSpec, weights: ops.Weights, routers: Sequence[Router], dtype: str
    ) -> None:
        self.spec, self.dtype = spec, dtype
        self.embed = ops.matrix(weights["embed.weight"])
        self.head = self.embed if spec.tied_head else ops.matrix(weights["head.weight"])
        if spec.norm_head:
            self.head = ops.matrix(ops.with_unit_columns(self.head.whole()))
        self.head_bias = ops.array(weights["head.bias"]) if spec.head_bias else None
        self.final = ops.load_norm(spec.final_norm, weights, "final_norm")
        self.starts = ops.load_embedding(spec, weights)
        self.stages = self._build(weights, routers)
        self.operators = [run for stage in self.stages for _, run, *_ in stage.branches]
        self.ropes = {
            id(rope): rope
            for _, branch in spec.operators()
            for rope in rotary_embeddings(branch.operator)
        }
        self.tables: Tables = {}
        self.capacity = 0

    def _build(self, weights: ops.Weights, specs: Sequence[Router]) -> list[Stage]:
        routers = 0
        stages: list[Stage] = []
        for number, layer in enumerate(self.spec.layers):
            branches: list[Branching] = []
            for branch in layer.branches:
                path, operator = f"layers.{number}.{branch.name}", branch.operator
                if isinstance(operator, MoE | RoutedAttention):
                    operator = replace(operator, router=specs[routers].spec)
                run = ops.OPERATORS[type(operator)](operator, weights, path, self.dtype, routers)
                routers += isinstance(operator, MoE | RoutedAttention)
                pre = ops.load_norm(branch.pre_norm, weights, f"{path}.pre_norm")
                post = ops.load_norm(branch.post_norm, weights, f"{path}.post_norm")
                branches.append((pre, run, post, branch, ops.load_adds(branch, weights, path)))
            scale = ops.array(weights[f"layers.{number}.scale"]) if layer.learned_scale else None
            stages.append(Stage(branches, scale, ops.DTYPES[self.dtype]))
        return stages

    def rotate(self, capacity: int) -> None:
        """Make the tables for `capacity` positions."""
        self.tables = {key: self._table(rope, capacity) for key, rope in self.ropes.items()}
        self.capacity = capacity

    def _table(self, rope: Rope, capacity: int) -> tuple[mx.array, mx.array]:
        dtype = mx.float32 if rope.applies == "float32" else ops.DTYPES[self.dtype]
        cos, sin = (mx.array(a).astype(dtype) for a in ops.rotary_table(rope, capacity))
        return cos, sin

    def __call__(
        self,
        static: ops.Static,
        ids: mx.array,
        positions: mx.array,
        rows: mx.array,
        states: States,
        **watched: Any,
    ) -> tuple[list[mx.array], States]:
        """ids, positions [R], rows [L, R, P, WIDTH] -> next-token logits, what the routers decided
        and, where their slow twin did, the kernel beside it; and the state after it. `watched`:
        `intervene` and `starts` of the `Call`."""
        spec, state = self.spec, iter(states)
        call = ops.Call(static, ids, positions, rows, self._rotations(static, positions), **watched)
        x = self.embed.take(ids)  # [R, H]
        if spec.embedding_scale != 1.0:
            x = x * mx.array(spec.embedding_scale, x.dtype)
        taps = {RESIDUAL: self.starts(x)}
        after: States = []
        for stage in self.stages:
            taps = _run_layer(stage, taps, call, spec.carried, state, after)
        x = taps[RESIDUAL].astype(ops.DTYPES[self.dtype])
        if static.tokens > 1 and not static.all_logits:
            x = x[-1:]
        logits = self.head(x if self.final is None else self.final(x), self.head_bias)
        beside = stacked(call.beside)[:2] if static.slow_router else []
        return [self._scaled(logits), *stacked(call.routings), *beside], after

    def _scaled(self, logits: mx.array) -> mx.array:
        spec = self.spec
        if spec.logit_scale != 1.0:
            logits = logits * spec.logit_scale
        if spec.logit_softcap:
            logits = mx.tanh(logits / spec.logit_softcap) * spec.logit_softcap
        return logits

    def _rotations(
        self, static: ops.Static, positions: mx.array
    ) -> dict[int, tuple[mx.array, mx.array]]:
        """cos and signed sin of every row [R, 1, dims], by the id of a rope."""
        found = {}
        for key, rope in self.ropes.items():
            at, (cos, sin) = positions, self.tables[key]
            if ops.switches(rope):
                assert rope.scaling is not None
                length = positions + 1 if static.tokens == 1 else static.start + static.tokens
                at = positions + (length > rope.scaling.original_context) * self.capacity
            found[key] = cos[at][:, None], sin[at][:, None]
        return found


def _run_layer(
    stage: Stage,
    taps: dict[str, mx.array],
    call: ops.Call,
    carried: tuple[str, ...],
    states: Iterator[list[mx.array]],
    after: States,
) -> dict[str, mx.array]:
    """The taps after a layer: the residual, and those that live on. Every operator takes its state
    from `states`, and what it is afterwards goes to `after`."""
    call.taps = taps = dict(taps)
    for pre, run, post, branch, adds in stage.branches:
        call.read, call.state = taps[branch.reads].astype(stage.dtype), next(states)
        y = run(call.read if pre is None else pre(call.read), call)
        after.append(call.state)
        if post is not None:
            y = post(y)
        taps[branch.adds_to] = adds(y, taps.get(branch.adds_to))
    if stage.scale is not None:
        taps[RESIDUAL] = taps[RESIDUAL] * stage.scale
    return {name: value for name, value in taps.items() if name in (RESIDUAL, *carried)}
