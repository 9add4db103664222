"""What balance is computed from: a lane of a trace read block by block and added up.

Nothing larger than a block of frames is held, but for the pair counts. Letters: T tokens of a
block, L routers, E expert classes, K picked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis import balance
from moescope.kernels.spec import RouterSpec
from moescope.trace import measures
from moescope.trace.frames import DECODE, PREFILL, Frame, RouterInfo, TraceEvent, TraceMeta

BLOCK = 256  # frames read at once
PAIR_BYTES = 512 << 20  # of pair counts; beyond that none are counted
PHASES = {"prefill": PREFILL, "decode": DECODE}

Array = NDArray[Any]


class Trace(Protocol):
    """What is asked of a trace: a reader of a file, or one in memory."""

    meta: TraceMeta

    @property
    def count(self) -> int: ...
    def keys(self) -> NDArray[np.int64]: ...
    def column(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]: ...
    def lane_frames(self, lane: int, sequence: int | None = None) -> NDArray[np.int64]: ...
    def placed_events(self) -> list[tuple[TraceEvent, int]]: ...
    def frame(self, index: int) -> Frame: ...


@dataclass(slots=True, eq=False)
class Sums:
    """What is added up over tokens: [L, E] or [L]."""

    load: Array  # [2, L, E] by phase
    rows: Array  # [2, L]
    softmax_picks: Array  # of the top K of the softmax, as transformers counts
    softmax: Array
    scores: Array  # normalised, of the router's own scoring function
    score_picks: Array
    z: Array  # [L]
    scored: Array  # [L] tokens with logits
    pairs: list[Array]  # per router [E, E]; empty: not counted
    sequence_losses: Array  # [L] the layer loss of each sequence, added up
    sequences: Array  # [L] how many were


def counted(
    trace: Trace,
    keys: Array,
    lane: int,
    routers: Sequence[RouterInfo],
    padding: Sequence[int],
) -> tuple[Sums, dict[str, Any]]:
    L, E = len(routers), max(map(classes, routers))
    sums = _empty(L, E)
    specs = [_spec_of(router) for router in routers]
    tokens, left_out = np.zeros(2, np.int64), 0
    E_of = np.array([classes(router) for router in routers])
    count = 0
    for indices in _sequences(trace, keys, lane):
        count += 1
        before = sums.score_picks.copy(), sums.scores.copy(), sums.scored.copy()
        for block in _blocks(trace, indices, L):
            wanted = ~np.isin(block["token_id"], padding)
            left_out += int((~wanted).sum())
            block = {name: column[wanted] for name, column in block.items()}
            tokens += np.bincount(block["phase"] == DECODE, minlength=2)
            _add_load(sums, block, routers)
            _add_scores(sums, block, routers, specs)
        now = sums.score_picks, sums.scores, sums.scored
        loss = balance.layer_loss(*(b - a for a, b in zip(before, now, strict=True))) * (E_of / E)
        sums.sequence_losses += np.nan_to_num(loss)
        sums.sequences += np.isfinite(loss)
    variants: dict[str, None] = {}
    for event, _ in trace.placed_events():
        if event.kind in ("variant", "fork") and event.lane == lane:
            variants[str(event.data.get("expression", ""))] = None
    return sums, {
        "variants": tuple(name for name in variants if name),
        "sequences": count,
        "tokens": int(tokens.sum()),
        "prefill": int(tokens[0]),
        "decode": int(tokens[1]),
        "padding": left_out,
    }


def _empty(L: int, E: int) -> Sums:
    paired = 8 * L * E * E <= PAIR_BYTES
    return Sums(
        load=np.zeros((2, L, E), np.int64),
        rows=np.zeros((2, L), np.int64),
        softmax_picks=np.zeros((L, E)),
        softmax=np.zeros((L, E)),
        scores=np.zeros((L, E)),
        score_picks=np.zeros((L, E)),
        z=np.zeros(L),
        scored=np.zeros(L),
        pairs=[np.zeros((E, E), np.int64) for _ in range(L)] if paired else [],
        sequence_losses=np.zeros(L),
        sequences=np.zeros(L),
    )


def _sequences(trace: Trace, keys: NDArray[np.int64], lane: int) -> Iterator[Array]:
    """The frames of each sequence of a lane, ascending. Of a position that came twice, the newer;
    of a fork, what it shares too."""
    events = trace.placed_events()
    mine = np.flatnonzero((keys[:, 1] == lane) & (keys[:, 0] >= 0))
    if any(event.kind == "fork" and event.lane == lane for event, _ in events):
        for sequence in np.unique(keys[mine, 0]):
            yield np.sort(trace.lane_frames(lane, int(sequence)))
        return
    order = mine[np.lexsort((mine, keys[mine, 2], keys[mine, 0]))]
    places = keys[order][:, (0, 2)]
    last = np.append((places[1:] != places[:-1]).any(axis=1), [True] * bool(len(order)))
    newest = order[last.astype(np.bool_)]
    for part in np.split(newest, np.flatnonzero(np.diff(keys[newest, 0])) + 1):
        if len(part):
            yield np.sort(part)


def _blocks(trace: Trace, indices: Array, routers: int) -> Iterator[dict[str, Array]]:
    """Columns of frames, some at a time."""
    names = ("token_id", "phase", "expert_ids", "logits")
    for number in np.unique(indices // BLOCK).tolist():
        start = number * BLOCK
        here = indices[indices // BLOCK == number] - start
        block = {name: trace.column(name, start, start + BLOCK)[here] for name in names}
        yield {name: _of_routers(name, column, routers) for name, column in block.items()}


def _of_routers(name: str, column: Array, routers: int) -> Array:
    """A column with exactly as many routers as the lane's model; what is missing is unused."""
    if column.ndim == 1 or column.shape[1] == routers:
        return column
    if column.shape[1] > routers:
        return column[:, :routers]
    more = [(0, 0), (0, routers - column.shape[1]), *[(0, 0)] * (column.ndim - 2)]
    return np.pad(column, more, constant_values=-1 if name == "expert_ids" else np.nan)


def _add_load(sums: Sums, block: dict[str, Array], routers: Sequence[RouterInfo]) -> None:
    E = sums.load.shape[2]
    ids: Array = block["expert_ids"].astype(np.int64)
    decided = np.asarray((ids >= 0).any(axis=2))  # [T, L]
    for phase in PHASES.values():
        here = block["phase"] == phase
        sums.load[phase] += measures.expert_load(ids[here], E)
        sums.rows[phase] += decided[here].sum(axis=0)
    for router in range(len(routers) if sums.pairs else 0):
        sums.pairs[router] += balance.pair_counts(ids[:, router], E)


def _add_scores(
    sums: Sums,
    block: dict[str, Array],
    routers: Sequence[RouterInfo],
    specs: Sequence[RouterSpec | None],
) -> None:
    """Probabilities of the rows whose logits were recorded and whose router decided."""
    logits, ids = block["logits"], block["expert_ids"]
    if logits.ndim != 3 or not logits.shape[2]:
        return
    for at, router in enumerate(routers):
        E = classes(router)
        rows = logits[:, at, :E]
        usable = np.isfinite(rows) | np.isneginf(rows)
        good = np.asarray((ids[:, at] >= 0).any(axis=1) & usable.all(axis=1))
        good = np.asarray(good & np.isfinite(rows).any(axis=1))
        if rows.shape[1] < E or not good.any():
            continue
        rows, picked = rows[good], ids[good, at]
        probability = balance.softmax(rows)
        scores = _scores(rows, specs[at], probability)
        k = min(router.num_experts_per_tok or picked.shape[1], E)
        top = np.argsort(-probability, axis=1, kind="stable")[:, :k]
        sums.softmax_picks[at] += np.bincount(top.ravel(), minlength=sums.load.shape[2])
        sums.softmax[at, :E] += probability.sum(axis=0)
        sums.score_picks[at] += measures.expert_load(picked[:, None], sums.load.shape[2])[0]
        sums.scores[at, :E] += scores.sum(axis=0)
        sums.z[at] += balance.z_terms(rows.astype(np.float64)).sum()
        sums.scored[at] += len(rows)


def _scores(logits: Array, spec: RouterSpec | None, probability: Array) -> Array:
    """Scores of all experts, divided by their sum: what DeepSeek's loss averages. [T, E]."""
    if spec is None or spec.policy.scoring_func in ("softmax", "sparsemixer"):
        return probability
    wide = logits.astype(np.float64)
    small = np.exp(-np.abs(wide))
    if spec.policy.scoring_func == "sigmoid":
        scores = np.where(wide >= 0, 1.0, small) / (1 + small)
    else:
        scores = np.sqrt(np.maximum(wide, 0) + np.log1p(small))
    total = scores.sum(axis=1, keepdims=True)
    return np.asarray(
        np.where(total > 0, scores / np.where(total > 0, total, 1), 1 / wide.shape[1])
    )


def _spec_of(router: RouterInfo) -> RouterSpec | None:
    """None where the trace does not tell: an import."""
    try:
        return RouterSpec.from_json(router.spec)
    except ValueError:
        return None


def classes(router: RouterInfo) -> int:
    return router.num_experts + router.num_null_experts
