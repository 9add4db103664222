"""Frames as columns, one `Lane` for each lane of each sequence: what the panels are computed from.

Read from a trace (live or closed) through its reader, or added one by one where none is written.
Everything but router logits is kept; logits are kept for the newest tokens and read again from the
trace for older ones. No widgets and no engine here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moescope.trace.frames import Frame, TraceEvent, TraceMeta
from moescope.trace.metadata import router_groups
from moescope.ui.flips import Flips

LOGITS_BYTES = 48 << 20  # of router logits kept in memory


class Source(Protocol):
    """What is asked of a trace: a reader of a file, or a trace in memory."""

    problems: list[str]  # one sentence each: what could not be read

    @property
    def count(self) -> int: ...
    def frames(self, start: int = 0, stop: int | None = None) -> Iterator[Frame]: ...
    def frame(self, i: int) -> Frame: ...
    def placed_events(self) -> list[tuple[TraceEvent, int]]: ...
    def refresh(self) -> bool: ...
    def close(self) -> None: ...


class Lane:
    """The tokens of one lane of one sequence, oldest first. Rows are positions: row i is token i
    after the lane's first one. Letters: T rows held, L routers, K the widest top-k seen."""

    def __init__(self, sequence: int, lane: int, routers: int, top_k: int) -> None:
        self.sequence = sequence
        self.lane = lane
        self.count = 0
        self.top_k = max(1, top_k)
        self.routers = routers
        self.texts: list[str] = []
        self.variants: list[str] = []
        self.alternatives: list[tuple[tuple[int, float], ...]] = []
        self.first_use: list[int] = []  # (router, expert) pairs first used at each row
        self.model = 0  # of two models in one trace, which
        self._seen: set[int] = set()
        self._columns: dict[str, NDArray[Any]] = {}
        self._grow(256)

    # columns, each a view of the rows that are held

    @property
    def position(self) -> NDArray[np.int64]:
        return self._columns["position"][: self.count]

    @property
    def token_id(self) -> NDArray[np.int64]:
        return self._columns["token_id"][: self.count]

    @property
    def phase(self) -> NDArray[np.int8]:
        return self._columns["phase"][: self.count]

    @property
    def index(self) -> NDArray[np.int64]:
        """Frame numbers in the trace, -1 for frames that came without one."""
        return self._columns["index"][: self.count]

    @property
    def rank(self) -> NDArray[np.int32]:
        """1 is the most likely; 0 unknown."""
        return self._columns["rank"][: self.count]

    @property
    def logprob(self) -> NDArray[np.float32]:
        return self._columns["logprob"][: self.count]

    @property
    def kl(self) -> NDArray[np.float32]:
        return self._columns["kl"][: self.count]

    @property
    def expert_ids(self) -> NDArray[np.int16]:
        return self._columns["expert_ids"][: self.count]  # [T, L, K]

    @property
    def weights(self) -> NDArray[np.float32]:
        return self._columns["weights"][: self.count]  # [T, L, K], NaN where not recorded

    @property
    def scores(self) -> NDArray[np.float32]:
        return self._columns["scores"][: self.count]

    @property
    def score_sum(self) -> NDArray[np.float32]:
        return self._columns["score_sum"][: self.count]  # [T, L]

    @property
    def mass(self) -> NDArray[np.float32]:
        return self._columns["mass"][: self.count]

    @property
    def entropy(self) -> NDArray[np.float32]:
        return self._columns["entropy"][: self.count]

    @property
    def margin(self) -> NDArray[np.float32]:
        return self._columns["margin"][: self.count]

    @property
    def runner_up(self) -> NDArray[np.int16]:
        return self._columns["runner_up"][: self.count]

    def append(self, frame: Frame, index: int = -1) -> int:
        """Add a frame; one for a position held already replaces it and all after. Its row."""
        if self.count and frame.position <= self.position[-1]:
            self.count = int(np.searchsorted(self.position, frame.position))
            del self.texts[self.count :], self.variants[self.count :]
            del self.alternatives[self.count :], self.first_use[self.count :]
        self._widen(frame.expert_ids.shape[1])
        if self.count == len(self._columns["position"]):
            self._grow(2 * self.count)
        row, columns = self.count, self._columns
        columns["position"][row] = frame.position
        columns["token_id"][row] = frame.token_id
        columns["phase"][row] = frame.phase
        columns["index"][row] = index
        columns["rank"][row] = frame.rank or 0
        columns["logprob"][row] = np.nan if frame.logprob is None else frame.logprob
        columns["kl"][row] = np.nan if frame.kl is None else frame.kl
        for name in ("score_sum", "mass", "entropy", "margin", "runner_up"):
            columns[name][row] = getattr(frame, name)
        width = frame.expert_ids.shape[1]
        columns["expert_ids"][row] = -1
        columns["expert_ids"][row, :, :width] = frame.expert_ids
        for name, values in (("weights", frame.weights), ("scores", frame.scores)):
            columns[name][row] = np.nan
            if values is not None:
                columns[name][row, :, :width] = values
        self.texts.append(frame.text)
        self.variants.append(frame.variant)
        self.alternatives.append(frame.alternatives)
        self.first_use.append(self._first_uses(frame.expert_ids))
        self.count += 1
        return row

    def adopt(self, parent: Lane, position: int) -> None:
        """Begin with what `parent` holds before `position`: a shared prefix is stored once."""
        rows = int(np.searchsorted(parent.position, position))
        self._widen(parent.top_k)
        while len(self._columns["position"]) < rows:
            self._grow(2 * len(self._columns["position"]))
        for name, column in parent._columns.items():
            if column.ndim == 3:
                self._columns[name][:rows, :, : parent.top_k] = column[:rows]
            else:
                self._columns[name][:rows] = column[:rows]
        self.texts, self.variants = parent.texts[:rows], parent.variants[:rows]
        self.alternatives = parent.alternatives[:rows]
        self.first_use = parent.first_use[:rows]
        self._seen = set(parent._seen)
        self.count = rows

    def frame(self, row: int) -> Frame:
        """The token in `row` as a frame, without logits."""
        logprob = float(self.logprob[row])
        kl = float(self.kl[row])
        unknown = np.isnan(self.weights[row][self.expert_ids[row] >= 0]).all()
        return Frame(
            sequence=self.sequence,
            lane=self.lane,
            position=int(self.position[row]),
            token_id=int(self.token_id[row]),
            text=self.texts[row],
            phase=int(self.phase[row]),
            variant=self.variants[row],
            expert_ids=self.expert_ids[row],
            score_sum=self.score_sum[row],
            mass=self.mass[row],
            entropy=self.entropy[row],
            margin=self.margin[row],
            runner_up=self.runner_up[row],
            weights=None if unknown else np.nan_to_num(self.weights[row]),
            logprob=None if np.isnan(logprob) else logprob,
            kl=None if np.isnan(kl) else kl,
        )

    def row_of(self, position: int) -> int | None:
        row = int(np.searchsorted(self.position, position))
        found = row < self.count and self.position[row] == position
        return row if found else None

    def _first_uses(self, ids: NDArray[np.int16]) -> int:
        routers = np.arange(ids.shape[0], dtype=np.int64)[:, None]
        pairs = set((routers * 65536 + ids)[ids >= 0].tolist())
        new = len(pairs - self._seen)
        self._seen |= pairs
        return new

    def _widen(self, top_k: int) -> None:
        if top_k <= self.top_k:
            return
        for name, fill in (("expert_ids", -1), ("weights", np.nan), ("scores", np.nan)):
            old = self._columns[name]
            wide = np.full((*old.shape[:2], top_k), fill, old.dtype)
            wide[:, :, : self.top_k] = old
            self._columns[name] = wide
        self.top_k = top_k

    def _grow(self, rows: int) -> None:
        per_router = (rows, self.routers)
        per_pick = (rows, self.routers, self.top_k)
        shapes: dict[str, tuple[tuple[int, ...], Any]] = {
            "position": ((rows,), np.int64),
            "token_id": ((rows,), np.int64),
            "phase": ((rows,), np.int8),
            "index": ((rows,), np.int64),
            "rank": ((rows,), np.int32),
            "logprob": ((rows,), np.float32),
            "kl": ((rows,), np.float32),
            "score_sum": (per_router, np.float32),
            "mass": (per_router, np.float32),
            "entropy": (per_router, np.float32),
            "margin": (per_router, np.float32),
            "runner_up": (per_router, np.int16),
            "expert_ids": (per_pick, np.int16),
            "weights": (per_pick, np.float32),
            "scores": (per_pick, np.float32),
        }
        for name, (shape, dtype) in shapes.items():
            grown = np.zeros(shape, dtype)
            if name in self._columns:
                grown[: self.count] = self._columns[name][: self.count]
            self._columns[name] = grown


class History:
    """Every lane of every sequence seen so far. `sequence` is the newest."""

    def __init__(self, meta: TraceMeta, source: Source | None = None) -> None:
        self.meta = meta
        self.source = source
        self.lanes: dict[tuple[int, int], Lane] = {}
        self.sequence = 0
        self.read = 0  # frames taken from the source
        self.pieces: dict[int, str] = {}
        self.forks: dict[
            tuple[int, int], tuple[int, int]
        ] = {}  # (sequence, lane) -> (of, position)
        self.models: dict[int, int] = {}  # lane -> which of two models it is of, the first left out
        first = next(iter(router_groups(meta)), ())
        experts = max((router.num_experts for router in meta.routers), default=1)
        self.flips = Flips([router.layer for router in first], experts)
        self._events_seen = 0
        self._logits: OrderedDict[tuple[int, int, int], NDArray[np.float32]] = OrderedDict()
        self._keep = max(64, LOGITS_BYTES // max(1, 4 * experts * len(meta.routers)))

    def lane(self, lane: int, sequence: int | None = None) -> Lane | None:
        return self.lanes.get((self.sequence if sequence is None else sequence, lane))

    def lane_numbers(self, sequence: int | None = None) -> list[int]:
        wanted = self.sequence if sequence is None else sequence
        return sorted(lane for (number, lane) in self.lanes if number == wanted)

    def sequences(self) -> list[int]:
        return sorted({number for (number, _) in self.lanes})

    @property
    def behind(self) -> bool:
        """The source is known to hold frames that were not taken yet."""
        return self.source is not None and self.source.count > self.read

    def pull(self, limit: int = 1 << 30) -> int:
        """Take up to `limit` frames that the source has and we have not; returns how many."""
        if self.source is None:
            return 0
        if self.source.count == self.read:
            self.source.refresh()
        start = self.read
        stop = min(self.source.count, start + limit)
        if stop <= start:
            return 0
        for frame in self.source.frames(start, stop):
            self._take_events()
            self.add(frame, self.read)
            self.read += 1
        self._take_events()
        return self.read - start

    def add(self, frame: Frame, index: int = -1) -> None:
        key = (frame.sequence, frame.lane)
        lane = self.lanes.get(key)
        if lane is None:
            lane = Lane(*key, frame.expert_ids.shape[0], frame.expert_ids.shape[1])
            self.lanes[key] = lane
            lane.model = self.models.get(frame.lane, 0)
            fork = self.forks.get(key)
            parent = self.lanes.get((frame.sequence, fork[0])) if fork else None
            if fork is not None and parent is not None:
                lane.adopt(parent, fork[1])
        lane.append(frame, index)
        self.sequence = max(self.sequence, frame.sequence)
        if frame.logits is not None:
            self._logits[(*key, frame.position)] = frame.logits
            if len(self._logits) > self._keep:
                self._logits.popitem(last=False)

    def forked(self, sequence: int, lane: int, of: int, position: int) -> None:
        """Lane `lane` shares the tokens of lane `of` before `position`."""
        self.forks[(sequence, lane)] = (of, position)

    def placed(self, lane: int, model: Any) -> None:
        """From now on lane `lane` is of `model`; a number that none has is the first's."""
        self.models[lane] = int(model == 1 and len(self.meta.models) > 1)

    def logits(self, lane: Lane, row: int) -> NDArray[np.float32] | None:
        """Router logits [L, E] of one token, or None where they were not recorded."""
        key = (lane.sequence, lane.lane, int(lane.position[row]))
        held = self._logits.get(key)
        if held is not None:
            return held
        index = int(lane.index[row])
        if index < 0 or self.source is None:
            return None
        held = self.source.frame(index).logits
        if held is not None:
            self._logits[key] = held
            if len(self._logits) > self._keep:
                self._logits.popitem(last=False)
        return held

    def holds(self, lane: Lane, row: int) -> bool:
        """Whether `logits` of that token are in memory: nothing would be read."""
        return (lane.sequence, lane.lane, int(lane.position[row])) in self._logits

    def _take_events(self) -> None:
        """Events that were told before frame `read` was appended."""
        from moescope.trace.lanes import pieces as pieces_of

        assert self.source is not None
        placed = self.source.placed_events()
        while self._events_seen < len(placed) and placed[self._events_seen][1] <= self.read:
            event = placed[self._events_seen][0]
            self._events_seen += 1
            if event.kind in ("variant", "fork"):
                self.placed(event.lane, event.data.get("model", 0))
            if event.kind == "flips":
                self.flips.take(event)
            elif event.kind == "fork":
                sequence = int(event.data.get("sequence", self.sequence))
                self.forked(sequence, event.lane, int(event.data.get("fork_of", 0)), event.position)
            elif event.kind == "pieces":
                self.pieces.update(pieces_of([event]))
