"""A loaded model made to route as a hypothesis says, fed given tokens: what it would have decided.

A hypothesis is a variant expression, decoder edits included. Runs are teacher-forced, and their
routing can be forced too: then every layer is judged on the state that the recorded experts lead
to, and a flip at a near tie does not spoil all that follows. Torch only; large tensors are shared
with the loaded model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis.weighed import weights_at
from moescope.engine.decoder import Branch, DecoderSpec
from moescope.engine.interpreter import Router
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterSpec
from moescope.variants import parse

CHUNK = 128  # tokens fed at once
LANES = 8  # sequences fed beside each other
LOGITS_BYTES = 64 << 20  # of next-token logits held at once


@dataclass(frozen=True, slots=True, eq=False)
class Forced:
    """Experts to execute in place of those decided. `expert_ids` [T, L, K], -1 where a row is to
    go as it decides; `weights` [T, L, K], None: those the hypothesis gives these experts."""

    expert_ids: NDArray[np.integer[Any]]
    weights: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Engine:
    """What an engine computes in, where it is not what the model was loaded in: the dtype that the
    routers' `model` stands for, in all of them or only where the weights are combined."""

    dtype: str | None = None
    combine_only: bool = False


OURS = Engine()


@dataclass(frozen=True, slots=True, eq=False)
class Emulation:
    """What the L routers decided for T tokens; ids -1, weights 0 and logits NaN where unused.

    With forced experts these are still the router's own decisions, on the states they led to.
    """

    hypothesis: str
    routers: tuple[Router, ...]  # specs as the hypothesis has them, and their learned vectors
    token_ids: NDArray[np.int64]  # [T]
    expert_ids: NDArray[np.int16]  # [T, L, K]
    weights: NDArray[np.float32]  # [T, L, K]
    score_sum: NDArray[np.float32]  # [T, L]; NaN where logits were not finite
    margin: NDArray[np.float32]  # [T, L]
    logits: NDArray[np.float32]  # [T, L, E], what the routers chose from
    next_logits: NDArray[np.float32] | None = None  # [T, V], where asked for


def emulate(
    model: Any,
    token_ids: Sequence[int],
    hypothesis: str = "trained",
    *,
    force: Forced | None = None,
    engine: Engine = OURS,
    next_logits: bool = False,
) -> Emulation:
    """Feed `token_ids` to `model` (a `LoadedModel`) under `hypothesis`.

    Raises MoescopeError for a hypothesis that means nothing here, tokens outside the vocabulary,
    and a device without torch.
    """
    return emulate_all(
        model,
        [token_ids],
        hypothesis,
        forced=[force],
        engine=engine,
        next_logits=next_logits,
    )[0]


def emulate_all(
    model: Any,
    sequences: Sequence[Sequence[int]],
    hypothesis: str = "trained",
    *,
    forced: Sequence[Forced | None] = (),
    engine: Engine = OURS,
    next_logits: bool = False,
    first_router: bool = False,
) -> list[Emulation]:
    """`emulate` of several sequences, each from its beginning. `first_router` stops after the first
    layer that has one."""
    decoder = _built(model, hypothesis, engine, first_router)
    runs = _routers_of(decoder)
    routers = tuple(
        replace(router, tensors=_tensors(run.router))
        for router, run in zip(decoder.routers, runs, strict=True)
    )
    found: list[Emulation] = []
    for at in range(0, len(sequences), LANES):
        some = [np.asarray(ids, np.int64) for ids in sequences[at : at + LANES]]
        force = list(forced[at : at + LANES]) if forced else [None] * len(some)
        decoder.open(len(some), max(1, *(len(ids) for ids in some)))
        for index, run in enumerate(runs):
            inner = run.router.inner if isinstance(run.router, _Forcing) else run.router
            forces = any(one is not None for one in force)
            run.router = _Forcing(inner, routers[index], index, force) if forces else inner
        found += _fed(decoder, hypothesis, routers, some, next_logits)
    return found


def _built(model: Any, hypothesis: str, engine: Engine, first_router: bool) -> Any:
    base = model.interpreter
    if not hasattr(base, "operators"):
        raise MoescopeError(
            "emulating a router needs the torch interpreter",
            hint="--device cpu, with torch installed",
            code=ExitCode.RESOURCES,
        )
    from moescope.engine import rewire

    layers = 1 + base.routers[0].layer if first_router else 0
    spec = spec_in(model, engine)
    return rewire.rewired(base, parse(hypothesis), spec=spec, layers=layers)


def spec_in(model: Any, engine: Engine) -> DecoderSpec | None:
    """The model's spec with the dtypes of an engine; None: as it was loaded. What a gate gives is
    rounded as the engine's would be; its product stays ours, because rounding what it reads would
    only add errors to the engine's own."""
    from moescope.engine import families

    loaded: DecoderSpec = model.interpreter.spec
    if engine.dtype in (None, model.interpreter.dtype):
        return None
    assert engine.dtype is not None
    built = families.build(model.checkpoint.config)
    named = {(layer, name): router for layer, name, router in built.routers()}

    def of(layer: int, branch: Branch) -> Branch:
        operator: Any = branch.operator
        if (layer, branch.name) not in named:
            return branch
        router = _rounded(operator.router, named[layer, branch.name], engine)
        return replace(branch, operator=replace(operator, router=router))

    layers = tuple(
        replace(layer, branches=tuple(of(number, branch) for branch in layer.branches))
        for number, layer in enumerate(loaded.layers)
    )
    return replace(loaded, layers=layers)


def _rounded(loaded: RouterSpec, built: RouterSpec, engine: Engine) -> RouterSpec:
    """`loaded` with what `built` calls `model` rounded as an engine does."""
    assert engine.dtype is not None
    theirs = built.resolved(engine.dtype)
    combined = loaded.with_wiring(combine_dtype=theirs.wiring.combine_dtype)
    if engine.combine_only:
        return combined
    policy = {
        name: getattr(theirs.policy, name)
        for name in ("score_dtype", "correction_bias_dtype", "logits_dtype")
    }
    if built.wiring.router_dtype == "model":
        policy["logits_dtype"] = engine.dtype
    return combined.with_policy(**policy)


def _routers_of(decoder: Any) -> list[Any]:
    """The running operators that have a router, in the order of `decoder.routers`."""
    return [run for _, _, run in decoder.operators() if hasattr(run, "router")]


def _tensors(router: Any) -> dict[str, NDArray[Any]]:
    names = ("correction_bias", "per_expert_scale", "hash_table")
    held = {name: getattr(router, name, None) for name in names}
    return {
        name: (t.float() if t.is_floating_point() else t).cpu().numpy()
        for name, t in held.items()
        if t is not None
    }


def _fed(
    decoder: Any,
    hypothesis: str,
    routers: tuple[Router, ...],
    sequences: list[NDArray[np.int64]],
    wanted: bool,
) -> list[Emulation]:
    """All sequences beside each other; those that are over are fed zeros, which nobody sees."""
    lanes = list(range(len(sequences)))
    longest = max(len(ids) for ids in sequences)
    tokens = np.zeros((len(lanes), longest), np.int64)
    for lane, ids in enumerate(sequences):
        tokens[lane, : len(ids)] = ids
        decoder.truncate(lane, 0)
    room = LOGITS_BYTES // (4 * decoder.vocab_size * len(lanes)) if wanted else CHUNK
    size = max(1, min(CHUNK, room))
    outs = [
        decoder.run(
            lanes,
            tokens[:, at : at + size],
            all_logits=wanted,
            record="logits",
            **({"together": True} if len(lanes) > 1 else {}),
        )
        for at in range(0, longest, size)
    ]
    names = ("expert_ids", "weights", "score_sum", "margin", "router_logits")
    whole = {name: np.concatenate([getattr(out, name) for out in outs], 1) for name in names}
    whole["logits"] = whole.pop("router_logits")
    after = np.concatenate([out.logits for out in outs], 1) if wanted else None
    return [
        Emulation(
            hypothesis,
            routers,
            ids,
            **{name: array[lane, : len(ids)] for name, array in whole.items()},
            next_logits=None if after is None else after[lane, : len(ids)],
        )
        for lane, ids in enumerate(sequences)
    ]


class _Forcing:
    """A router whose decisions are recorded, while given experts are executed."""

    def __init__(
        self, inner: Any, router: Router, index: int, forced: Sequence[Forced | None]
    ) -> None:
        self.inner, self.router = inner, router
        self.ids = [None if f is None else f.expert_ids[:, index] for f in forced]  # [T, K]
        self.weights = [
            None if f is None or f.weights is None else f.weights[:, index] for f in forced
        ]
        self.K = max(ids.shape[1] for ids in self.ids if ids is not None)

    def __call__(self, h: Any, call: Any) -> Any:
        import torch

        routing = self.inner(h, call)
        ids = self._rows(self.ids, call, -1).astype(np.int64)
        given = (ids >= 0).any(1, keepdims=True)
        if not given.any():
            return routing
        logits = routing.logits.cpu().numpy()
        weights = weights_at(logits, ids, self.router.spec, self.router.tensors)
        if any(rows is not None for rows in self.weights):
            told = self._rows(self.weights, call, np.nan)
            weights = np.where(np.isnan(told), weights, told)
        device, width = routing.expert_ids.device, max(ids.shape[1], routing.expert_ids.shape[1])

        def chosen(mine: NDArray[Any], own: Any, fill: float) -> Any:
            pair = (_wide(rows, width, fill) for rows in (mine, own.cpu().numpy()))
            return torch.from_numpy(np.where(given, *pair)).to(device, own.dtype)

        return replace(
            routing,
            expert_ids=chosen(ids, routing.expert_ids, -1),
            weights=chosen(weights, routing.weights, 0.0),
        )

    def _rows(self, held: Sequence[Any], call: Any, fill: float) -> NDArray[Any]:
        """The rows [R, K] of a call: what is held for its lanes and positions."""
        whole = np.full((len(call.lanes), call.tokens, self.K), fill, np.float64)
        for n, (lane, start) in enumerate(zip(call.lanes, call.starts, strict=True)):
            if lane < len(held) and held[lane] is not None:
                part = held[lane][start : start + call.tokens]
                whole[n, : len(part), : part.shape[1]] = part
        return whole.reshape(-1, self.K)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def _wide(rows: NDArray[Any], width: int, fill: float) -> NDArray[Any]:
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])), constant_values=fill)
