"""Lint: what can be wrong with a trace although every value in it is legal. Each rule is a defect
that somebody shipped.

`lint` collects the tokens of each lane as columns and asks every rule of the table RULES. A rule is
a pure function from `Rows` to findings; it says what it saw, what that means, and what to do.
Letters: T tokens, L routers, K picked, E expert classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterSpec
from moescope.trace import measures
from moescope.trace.frames import Frame, RouterInfo, TraceMeta
from moescope.trace.metadata import router_groups
from moescope.variants import apply
from moescope.variants.steering import split

MOST = 65_536  # tokens of a lane that are looked at
SHOWN = 3  # addresses of a finding
ERROR, WARNING, NOTE = "error", "warning", "note"

Array = NDArray[Any]


class Trace(Protocol):
    """What is asked of a trace."""

    meta: TraceMeta
    problems: list[str]

    def keys(self) -> NDArray[np.int64]: ...
    def column(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[Any]: ...
    def frame(self, index: int) -> Frame: ...
    def lane_frames(self, lane: int, sequence: int | None = None) -> NDArray[np.int64]: ...


@dataclass(frozen=True, slots=True)
class Finding:
    """What a rule saw. `rows` of `of` are affected; `where` names the first few."""

    rule: str
    severity: str
    sequence: int
    lane: int
    rows: int
    of: int
    where: tuple[str, ...]
    seen: str
    means: str
    advice: str


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The tokens of one lane of one sequence. None: not recorded."""

    sequence: int
    lane: int
    meta: TraceMeta
    routers: tuple[RouterInfo, ...]
    specs: tuple[RouterSpec | None, ...]  # in force; None: the trace does not say
    position: Array  # [T]
    token_id: Array  # [T]
    phase: Array  # [T]
    expert_ids: Array  # [T, L, K]
    weights: Array | None  # [T, L, K]
    score_sum: Array  # [T, L]
    margin: Array  # [T, L]
    runner_up: Array  # [T, L]

    @property
    def learned(self) -> list[int]:
        """Routers that are not a table of token ids."""
        return [at for at, router in enumerate(self.routers) if router.kind == "learned"]

    def experts(self, router: int) -> int:
        info = self.routers[router]
        return info.num_experts + info.num_null_experts

    def found(
        self, rule: str, severity: str, bad: Array, seen: str, means: str, advice: str
    ) -> Iterator[Finding]:
        """A finding where `bad` [T], [L] or [T, L] holds anywhere."""
        if not bad.any():
            return
        places = np.argwhere(bad)[:SHOWN]
        where = tuple(self._place(bad.shape, place.tolist()) for place in places)
        yield Finding(
            *(rule, severity, self.sequence, self.lane, int(bad.sum()), int(bad.size)),
            *(where, seen, means, advice),
        )

    def _place(self, shape: tuple[int, ...], place: Sequence[int]) -> str:
        if len(shape) == 2:
            return f"@{self.position[place[0]]} L{self.routers[place[1]].layer}"
        if shape[0] == len(self.routers) and shape[0] != len(self.position):
            return f"L{self.routers[place[0]].layer}"
        return f"@{self.position[place[0]]}"


def lint(trace: Trace) -> list[Finding]:
    """Everything that looks wrong, errors first. Raises `MoescopeError` (TRACE) for a trace without
    tokens or routers."""
    from moescope.trace.lint_rules import RULES

    if not trace.meta.routers:
        raise MoescopeError(
            "routers: expected at least one, found none: nothing can be checked",
            code=ExitCode.TRACE,
        )
    found = [finding for rows in lanes_of(trace) for rule in RULES for finding in rule(rows)]
    found += _damage(trace)
    order = (ERROR, WARNING, NOTE)
    return sorted(found, key=lambda f: (order.index(f.severity), f.sequence, f.lane))


def _damage(trace: Trace) -> Iterator[Finding]:
    for problem in trace.problems:
        yield Finding(
            *("damage", ERROR, 0, 0, 1, 1, (), problem),
            *("part of the file cannot be read", "record it again, or copy it with its -wal file"),
        )


def lanes_of(trace: Trace) -> Iterator[Rows]:
    """Every lane of every sequence, at most MOST tokens of each."""
    keys = trace.keys()
    known = keys[(keys[:, 0] >= 0) & (keys[:, 1] >= 0)]
    if not len(known):
        raise MoescopeError("the trace holds no token", code=ExitCode.TRACE)
    groups = list(router_groups(trace.meta))
    for sequence, lane in np.unique(known[:, :2], axis=0).tolist():
        indices = trace.lane_frames(lane, sequence)[:MOST]
        columns = _columns(trace, indices)
        width = columns["expert_ids"].shape[1]
        routers = next((group for group in groups if len(group) == width), None)
        if routers is None:
            raise MoescopeError(
                f"frames: expected {len(groups[0])} routers, found {width}", code=ExitCode.TRACE
            )
        absent = trace.meta.absent
        weighed = trace.meta.record != "ids" and "weights" not in absent
        weights = measures.recorded_weights(columns.pop("weights"), columns["expert_ids"])
        variant = _variant(trace, indices)
        yield Rows(
            sequence=sequence,
            lane=lane,
            meta=trace.meta,
            routers=tuple(routers),
            specs=tuple(_spec(router, trace.meta, variant) for router in routers),
            weights=weights if weighed else None,
            **columns,
        )


def _columns(trace: Trace, indices: NDArray[np.int64]) -> dict[str, Array]:
    names = ("position", "token_id", "phase", "expert_ids", "weights")
    low, high = int(indices.min()), int(indices.max()) + 1
    return {
        name: trace.column(name, low, high)[indices - low]
        for name in (*names, "score_sum", "margin", "runner_up")
    }


def _variant(trace: Trace, indices: NDArray[np.int64]) -> str | None:
    """The variant the lane ran; None where it changed, or was steered."""
    try:
        names = {trace.frame(int(at)).variant for at in (indices[0], indices[-1])}
    except MoescopeError:  # damaged, which is a finding of its own
        return None
    variant, steered = split(names.pop())
    return None if names or steered else variant


def _spec(router: RouterInfo, meta: TraceMeta, variant: str | None) -> RouterSpec | None:
    if variant is None:
        return None
    dtype = str(meta.engine.get("dtype", "float32"))
    dtype = dtype if dtype in ("float32", "bfloat16", "float16") else "float32"
    try:
        return apply(variant, RouterSpec.from_json(router.spec), router.layer).resolved(dtype)
    except (ValueError, MoescopeError):  # an import, or a variant of another version
        return None


def to_json(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]
