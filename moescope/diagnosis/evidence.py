"""What another engine recorded: read from a trace of any form, and fitted to a model's routers.

Tokens and experts of one or more sequences, with combine weights where they were recorded; or, of
some engines, only how often each expert ran. Files are a stranger's: shapes and ranges are checked
before anything is used, and what cannot be used is said in `notes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis import arrays
from moescope.engine.interpreter import Router
from moescope.errors import MoescopeError
from moescope.trace.metadata import router_groups, trace_error

Level = Literal["weights", "order", "sets", "counts"]
LEVELS: dict[str, str] = {
    "weights": "experts and weights",
    "order": "experts in rank order",
    "sets": "experts, in no order",
    "counts": "how often each expert ran",
}
Ids = NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Observed:
    """One sequence of T tokens from its beginning. Rows that were not recorded hold -1 and NaN."""

    token_ids: NDArray[np.int64]  # [T]
    expert_ids: Ids  # [T, L, K]
    weights: NDArray[np.float32] | None = None  # [T, L, K]
    sums: NDArray[np.float32] | None = None  # [T, L] score sums, where recorded without weights


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """Sequences, or `counts` [L, E] of one whose tokens alone are known."""

    sequences: tuple[Observed, ...]
    counts: NDArray[np.int64] | None = None
    ordered: bool | None = None  # ids are in rank order; None: not told
    dtype: str | None = None  # the engine computed in, where told
    notes: tuple[str, ...] = ()

    @property
    def level(self) -> Level:
        if self.counts is not None:
            return "counts"
        if any(one.weights is not None for one in self.sequences):
            return "weights"
        return "sets" if self.ordered is False else "order"

    @property
    def tokens(self) -> int:
        return sum(len(one.token_ids) for one in self.sequences)

    def reduced(self, level: Level) -> Evidence:
        """This evidence without what is above `level`."""
        if level == "weights" or self.counts is not None:
            return self
        bare = tuple(replace(one, weights=None) for one in self.sequences)
        if level == "order":
            return replace(self, sequences=bare)
        bare = tuple(replace(one, sums=None) for one in bare)
        return replace(self, sequences=bare, ordered=False)

    def cut(self, tokens: int) -> Evidence:
        """The first `tokens` tokens of all sequences."""
        kept = []
        for one in self.sequences:
            if tokens <= 0:
                break
            kept.append(
                Observed(
                    *(
                        None if part is None else part[:tokens]
                        for part in (one.token_ids, one.expert_ids, one.weights, one.sums)
                    )  # type: ignore[arg-type]
                )
            )
            tokens -= len(one.token_ids)
        return replace(self, sequences=tuple(kept))


def read(
    path: str | Path,
    routers: Sequence[Router],
    *,
    layers: int,
    vocabulary: int,
    tokens: str | Path | None = None,
    lane: int = 0,
    limit: int = 1 << 30,
) -> Evidence:
    """The evidence in a file, for a model with these routers, layers and size of vocabulary; of a
    trace, its first `limit` tokens.

    Takes a trace (`.moetrace`, the long form as Parquet, CSV or JSONL), or an array of experts
    [tokens, layers, K] or counts [layers, E] (`.npy`, `.npz`, CSV of layer and expert) with the
    file `tokens`. Raises MoescopeError: TRACE for what is wrong with a file, USAGE where `tokens`
    is missing.
    """
    path = Path(path)
    if arrays.is_array(path):
        found = _of_array(path, routers, layers, tokens)
    else:
        found = _of_trace(path, routers, lane, limit)
    for one in found.sequences:
        outside = (one.token_ids < 0) | (one.token_ids >= vocabulary)
        if outside.any():
            bad = int(one.token_ids[outside][0])
            raise trace_error(path, f"token_id: expected 0..{vocabulary - 1}, found {bad}")
    if not found.tokens:
        raise trace_error(path, "expected at least one token, found none")
    return found


# --- traces -------------------------------------------------------------------------------------


def _of_trace(path: Path, routers: Sequence[Router], lane: int, limit: int) -> Evidence:
    from moescope.trace.formats import open_trace

    trace = open_trace(path)
    try:
        found = of_trace(trace, routers, lane=lane, limit=limit, path=path)
        return replace(found, notes=(*trace.problems, *found.notes))
    finally:
        trace.close()


def of_trace(
    trace: Any,
    routers: Sequence[Router],
    *,
    lane: int = 0,
    limit: int = 1 << 30,
    path: object = "trace",
) -> Evidence:
    """The evidence in an open trace (`TraceReader`, `MemoryTrace`): every sequence of one lane, the
    first `limit` tokens."""
    keys = trace.keys()
    if lane not in trace.lanes:
        shown = ", ".join(map(str, trace.lanes[:8]))
        raise trace_error(path, f"lane {lane}: expected one of {shown}")
    notes: list[str] = []
    meta = trace.meta
    columns, missing = _columns(meta, routers, path)
    if missing:
        notes.append(missing)
    found = []
    for sequence in np.unique(keys[keys[:, 1] == lane, 0]).tolist():
        indices = trace.lane_frames(lane, sequence)[:limit]
        if len(indices):
            found.append(_sequence(trace, indices, columns, routers, notes, path))
            limit -= len(indices)
    weighed = meta.weights_kind == "applied"
    if meta.weights_kind == "selection":
        notes.append("weights are selection scores, not what multiplied the experts: left out")
    told = None if meta.engine.get("name") == "import" else meta.rank_ordered
    sequences = tuple(one if weighed else replace(one, weights=None) for one in found)
    return Evidence(sequences, None, told, _dtype_of(meta.engine), tuple(dict.fromkeys(notes)))


def _dtype_of(engine: dict[str, Any]) -> str | None:
    named = engine.get("dtype")
    return named if named in ("float32", "bfloat16", "float16") else None


def _columns(meta: Any, routers: Sequence[Router], path: object) -> tuple[list[int | None], str]:
    """For each router of the model, its place in the trace's frames."""
    groups = [group for group in router_groups(meta) if group]
    if not groups:
        raise trace_error(path, "expected routers, found none")
    held = groups[0]
    places = {(info.layer, info.site): n for n, info in enumerate(held)}
    wanted = [(router.layer, router.site) for router in routers]
    if any(place in places for place in wanted) and set(places) <= set(wanted):
        found: list[int | None] = [places.get(place) for place in wanted]
        absent = [str(layer) for (layer, _), n in zip(wanted, found, strict=True) if n is None]
        lack = f"layers not in the trace: {', '.join(absent)}" if absent else ""
        return found, lack
    if len(held) == len(wanted):
        return list(range(len(held))), "layers are numbered otherwise: taken in their order"
    layers = ", ".join(str(info.layer) for info in held[:12])
    raise trace_error(path, f"layer: expected those of the model's {len(wanted)} routers, {layers}")


def _sequence(
    trace: Any,
    indices: NDArray[np.int64],
    columns: list[int | None],
    routers: Sequence[Router],
    notes: list[str],
    path: object,
) -> Observed:
    frames = [trace.frame(int(index)) for index in indices]
    positions = [frame.position for frame in frames]
    if positions != list(range(len(frames))):
        gap = next(n for n, position in enumerate(positions) if position != n)
        why = trace.problems[0] if trace.problems else "every token is needed"
        raise trace_error(
            path,
            f"position {gap} of sequence {frames[0].sequence} is missing: {why}",
            "record the prompt's tokens too",
        )
    tokens = np.array([frame.token_id for frame in frames], np.int64)
    if (tokens < 0).any():
        raise trace_error(path, "token ids were redacted: a diagnosis needs them")
    k = max(1, *(frame.expert_ids.shape[1] for frame in frames))
    shape = (len(frames), len(columns), k)
    ids = np.full(shape, -1, np.int32)
    weights = np.full(shape, np.nan, np.float32)
    sums = np.full(shape[:2], np.nan, np.float32)
    for t, frame in enumerate(frames):
        for router, place in enumerate(columns):
            if place is None or place >= len(frame.expert_ids):
                continue
            row = frame.expert_ids[place]
            ids[t, router, : len(row)] = row
            sums[t, router] = frame.score_sum[place]
            if frame.weights is not None:
                weights[t, router, : len(row)] = frame.weights[place]
    ids = _usable(ids, routers, notes)
    weights[ids < 0] = np.nan
    sums[(ids < 0).all(2)] = np.nan
    recorded = bool(np.isfinite(weights).any())
    told = bool(np.isfinite(sums).any()) and not recorded
    return Observed(tokens, ids, weights if recorded else None, sums if told else None)


def _usable(ids: Ids, routers: Sequence[Router], notes: list[str]) -> Ids:
    """Ids beyond a router's classes, and rows with an expert twice, are as good as not recorded."""
    classes = np.array([router.spec.E for router in routers])
    beyond = ids >= classes[None, :, None]
    if beyond.any():
        notes.append(f"{int(beyond.sum()):,} ids are of no expert that the model has: left out")
        ids = np.where(beyond, -1, ids)
    ranked = np.sort(ids, axis=2)
    twice = ((ranked[:, :, 1:] == ranked[:, :, :-1]) & (ranked[:, :, 1:] >= 0)).any(2)
    if twice.any():
        notes.append(
            f"{int(twice.sum()):,} rows name an expert twice, or were not filled: left out"
        )
        ids = np.where(twice[:, :, None], -1, ids)
    return ids.astype(np.int32)


# --- arrays -------------------------------------------------------------------------------------


def _of_array(
    path: Path, routers: Sequence[Router], layers: int, tokens: str | Path | None
) -> Evidence:
    held = arrays.read(path)
    given = held.token_ids
    if given is None and tokens is None:
        raise MoescopeError(
            f"{path.name}: holds no token ids", hint="--tokens FILE, with the ids that were fed"
        )
    ids = arrays.read_tokens(tokens) if given is None else given
    assert ids is not None
    places = _places(held.values.shape, held.counts, routers, layers, path)
    if held.counts:
        counts = np.stack([held.values[place] for place in places])
        E = max(router.spec.E for router in routers)
        if counts[:, E:].any():
            raise trace_error(path, f"expected counts of at most {E} experts")
        wide = np.zeros((len(counts), E), np.int64)
        wide[:, : counts.shape[1]] = counts[:, :E]
        empty = np.full((len(ids), len(routers), 1), -1, np.int32)
        return Evidence((Observed(ids, empty),), wide)
    notes: list[str] = []
    at = _first_row(len(held.values), len(ids), notes, path)
    k = held.values.shape[2]
    whole = np.full((len(ids), len(routers), k), -1, np.int32)
    whole[at : at + len(held.values)] = held.values[:, places]
    whole = _usable(whole, routers, notes)
    weights = None
    if held.weights is not None:
        weights = np.full(whole.shape, np.nan, np.float32)
        weights[at : at + len(held.values)] = held.weights[:, places]
        weights[whole < 0] = np.nan
    return Evidence((Observed(ids, whole, weights),), notes=tuple(notes))


def _places(
    shape: tuple[int, ...], counts: bool, routers: Sequence[Router], layers: int, path: Path
) -> list[int]:
    """Where each router's rows are along the axis of layers: MoE layers only, or all of them."""
    found = shape[0] if counts else shape[1]
    numbers = [router.layer for router in routers]
    if found == len(routers):
        return list(range(found))
    if found == layers and len(set(numbers)) == len(numbers):
        return numbers
    expected = f"{len(routers)} routers or {layers} layers"
    raise trace_error(path, f"expected {expected}, found {found}", "is the order of axes right?")


def _first_row(rows: int, tokens: int, notes: list[str], path: Path) -> int:
    """The token that the first row is of."""
    if rows > tokens:
        raise trace_error(path, f"{rows} rows: expected at most one for each of {tokens} tokens")
    if rows == tokens:
        return 0
    at = tokens - 1 - rows
    if at:
        notes.append(f"rows are taken for those of tokens {at} to {tokens - 2}")
    return at
