"""Checking a model against a golden trace: the same experts, order, Σ and weights, within reason.

The model is fed the golden's own tokens, so nothing compounds but what its layers hand on. A *row*
is one router's decision for one token. Two runs of one model differ where a decision was nearly a
tie, so a flip counts against the model only where the golden margin is at least ε of the score at
the cut; the tolerances for each dtype are in `TOLERANCES`. What is compared is in `check_rows.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis.balance_sums import Trace
from moescope.diagnosis.check_rows import KINDS, Golden, Rows, compare
from moescope.diagnosis.forced import forced
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import single_line
from moescope.trace.frames import PREFILL, RouterInfo
from moescope.trace.measures import recorded_weights
from moescope.trace.metadata import router_groups


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What may differ. `margin` is ε, a share of the score at the cut; sums and weights may be off
    by a share of the golden row's Σ; `agree` is the share of rows that must comply."""

    margin: float
    score_sum: float
    weight: float
    agree: float
    order: float  # the share of rows with the same experts that must rank them alike


# The coarser dtype of the two counts. Measured on tiny models of five families and on the demo:
# float32 against itself differs in nothing; with bfloat16 on one side 1 to 3 % of the rows flip,
# all but a few below a margin of 0.1, and what flipped moves the rows after it.
TOLERANCES: dict[str, Tolerance] = {
    "float32": Tolerance(margin=1e-3, score_sum=1e-3, weight=1e-3, agree=1.0, order=1.0),
    "float16": Tolerance(margin=0.02, score_sum=0.05, weight=0.05, agree=0.98, order=0.98),
    "bfloat16": Tolerance(margin=0.1, score_sum=0.1, weight=0.1, agree=0.95, order=0.95),
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One row that does not comply."""

    kind: str  # experts, order, score_sum, weights or valid
    sequence: int
    position: int
    router: int
    layer: int
    margin: float  # golden, as a share of the score at the cut
    expected: str
    found: str


@dataclass(frozen=True, slots=True)
class RouterCheck:
    """One router: rows compared, and of each kind how many do not comply."""

    layer: int
    site: str
    rows: int
    near_ties: int  # rows whose golden margin is below ε
    flips: int  # rows with other experts, near ties included
    failed: dict[str, int]  # kind -> rows
    passed: dict[str, bool]
    largest_sum_error: float  # shares of the golden Σ; NaN where nothing was compared
    largest_weight_error: float


@dataclass(frozen=True, slots=True)
class CheckResult:
    """`passed` is what the exit code says."""

    passed: bool
    tokens: int
    sequences: int
    tolerance: Tolerance
    dtype: str
    golden_dtype: str
    same: dict[str, bool | None]  # config, weights, tokenizer: the golden's model is this one
    routers: tuple[RouterCheck, ...]
    agreement: dict[str, float]  # kind -> share of rows that comply
    recorded: dict[str, bool]  # kinds the golden allows to compare
    compared: dict[str, bool]  # kinds of which some row was compared
    largest_logprob_difference: float  # of the tokens fed; NaN where not recorded
    findings: tuple[Finding, ...]  # the first few of each kind and router, earliest first

    def to_json(self) -> dict[str, Any]:
        """JSON values; what is not a finite number is null."""
        document: dict[str, Any] = _plain(asdict(self))
        return document


def tolerance_for(*dtypes: str) -> Tolerance:
    """The tolerance of the coarsest of `dtypes`; an unknown one counts as bfloat16."""
    order = list(TOLERANCES)
    ranks = [order.index(dtype) if dtype in TOLERANCES else len(order) - 1 for dtype in dtypes]
    return TOLERANCES[order[max(ranks, default=0)]]


def check(
    model: Any,
    golden: Trace,
    *,
    tolerance: Tolerance | None = None,
    variant: str = "trained",
    lane: int | None = None,
    decode: bool = True,
) -> CheckResult:
    """Feed `model` the tokens of every sequence of `golden` and compare what its routers decide.

    `decode` feeds what was decoded one token at a time, as it was; without, all of it as a prompt.
    Raises `MoescopeError`: TRACE for a golden without tokens or routers, FOUND for a model with
    other routers than the golden's.
    """
    routers, sequences = _golden(golden, lane)
    _same_routers(routers, model)
    golden_dtype = str(golden.meta.engine.get("dtype", "float32"))
    dtype = model.interpreter.dtype
    tolerance = tolerance or tolerance_for(dtype, golden_dtype)
    rows = Rows(len(routers), tolerance.margin)
    tokens, logprob = 0, math.nan
    specs = [router.spec for router in model.interpreter.routers]
    for sequence in sequences:
        prompt = int(sequence.prompt) if decode else None
        found = forced(model, sequence.token_ids.tolist(), prompt=prompt, variant=variant)
        compare(rows, sequence, found, specs, tolerance)
        tokens += len(sequence.token_ids)
        with np.errstate(invalid="ignore"):
            apart = np.abs(found.logprob - sequence.logprob)
        logprob = np.fmax(logprob, np.nanmax(apart) if np.isfinite(apart).any() else math.nan)
    per_router = tuple(_router(rows, at, router, tolerance) for at, router in enumerate(routers))
    return CheckResult(
        passed=all(all(router.passed.values()) for router in per_router),
        tokens=tokens,
        sequences=len(sequences),
        tolerance=tolerance,
        dtype=dtype,
        golden_dtype=golden_dtype,
        same=_same_model(golden, model),
        routers=per_router,
        agreement={kind: _share(rows.failed[kind].sum(), rows.of(kind).sum()) for kind in KINDS},
        recorded=_recorded(sequences),
        compared={kind: bool(rows.of(kind).sum()) for kind in KINDS},
        largest_logprob_difference=float(logprob),
        findings=tuple(
            Finding(f.kind, f.sequence, f.position, f.router, routers[f.router].layer, *f.words)
            for f in rows.examples()
        ),
    )


def _recorded(sequences: Sequence[Golden]) -> dict[str, bool]:
    weighed = any(sequence.weights is not None for sequence in sequences)
    ranked = any(sequence.ranked for sequence in sequences)
    return dict.fromkeys(KINDS, True) | {"order": ranked, "score_sum": weighed, "weights": weighed}


def uncompared(result: CheckResult, kind: str) -> str:
    """Why nothing was compared in this respect; "" where something was."""
    if result.compared[kind]:
        return ""
    return "no row has the same experts" if result.recorded[kind] else "not recorded"


def _router(rows: Rows, at: int, router: RouterInfo, tolerance: Tolerance) -> RouterCheck:
    wanted = dict.fromkeys(KINDS, tolerance.agree) | {"order": tolerance.order, "valid": 1.0}
    failed = {kind: int(rows.failed[kind][at]) for kind in KINDS}
    return RouterCheck(
        layer=router.layer,
        site=router.site,
        rows=int(rows.rows[at]),
        near_ties=int(rows.near_ties[at]),
        flips=int(rows.flips[at]),
        failed=failed,
        passed={
            kind: _share(failed[kind], int(rows.of(kind)[at])) >= wanted[kind] for kind in KINDS
        },
        largest_sum_error=float(rows.largest_sum[at]),
        largest_weight_error=float(rows.largest_weight[at]),
    )


def _share(failed: int, of: int) -> float:
    """The share that complies; 1 where nothing was compared."""
    return 1.0 - float(failed) / float(of) if of else 1.0


# --- the golden -----------------------------------------------------------------------------------


def _golden(trace: Trace, lane: int | None) -> tuple[tuple[RouterInfo, ...], list[Golden]]:
    """The routers and sequences of one lane. Raises `MoescopeError` (TRACE)."""
    keys = trace.keys()
    present = [int(number) for number in np.unique(keys[:, 1]) if number >= 0]
    if not present or not trace.meta.routers:
        raise _bad("expected a trace with tokens and routers, found none")
    lane = present[0] if lane is None else lane
    if lane not in present:
        raise MoescopeError(f"--lane: the golden has no lane {lane}")
    sequences = []
    for number in np.unique(keys[keys[:, 1] == lane, 0]).tolist():
        sequences.append(_sequence(trace, trace.lane_frames(lane, number), number))
    groups = list(router_groups(trace.meta))
    width = sequences[0].expert_ids.shape[1]
    routers = next((group for group in groups if len(group) == width), groups[0])
    if any(sequence.expert_ids.shape[1] != len(routers) for sequence in sequences):
        raise _bad("expected a decision of every router for every token")
    return routers, sequences


def _sequence(trace: Trace, indices: NDArray[np.int64], number: int) -> Golden:
    positions = trace.keys()[indices, 2]
    if not np.array_equal(positions, np.arange(len(indices))):
        raise _bad(f"sequence {number}: expected every token from the first on")
    columns = dict(_columns(trace, indices))
    if (columns["token_id"] < 0).any():
        raise _bad("token ids: expected ids, found redacted ones")
    phase = columns.pop("phase")
    prompt = int((phase == PREFILL).sum()) if (phase[: (phase == PREFILL).sum()] == 0).all() else 0
    absent = trace.meta.absent
    weighed = trace.meta.weights_kind == "applied" and trace.meta.record != "ids"
    return Golden(
        sequence=number,
        prompt=max(1, prompt),
        token_ids=columns["token_id"],
        logprob=columns["logprob"].astype(np.float64),
        expert_ids=columns["expert_ids"],
        weights=recorded_weights(columns["weights"], columns["expert_ids"])
        if weighed and "weights" not in absent
        else None,
        scores=recorded_weights(columns["scores"], columns["expert_ids"])
        if weighed and "scores" not in absent
        else None,
        score_sum=columns["score_sum"],
        margin=columns["margin"],
        ranked=trace.meta.rank_ordered,
    )


def _columns(trace: Trace, indices: NDArray[np.int64]) -> Iterator[tuple[str, NDArray[Any]]]:
    low, high = int(indices.min()), int(indices.max()) + 1
    for name in (
        *("token_id", "phase", "logprob", "expert_ids", "weights", "scores"),
        *("score_sum", "margin"),
    ):
        yield name, trace.column(name, low, high)[indices - low]


def _same_routers(golden: Sequence[RouterInfo], model: Any) -> None:
    """Rows can be laid side by side only where routers correspond."""
    ours = model.interpreter.routers
    if len(golden) != len(ours):
        raise MoescopeError(
            f"routers: expected {len(golden)} as in the golden, found {len(ours)}",
            code=ExitCode.FOUND,
        )
    for index, (info, router) in enumerate(zip(golden, ours, strict=True)):
        for name, expected, found in (
            ("layer", info.layer, router.layer),
            ("experts", info.num_experts + info.num_null_experts, router.spec.E),
        ):
            known = name != "experts" or bool(info.spec)
            if known and expected != found:
                raise MoescopeError(
                    f"router {index}: {name}: expected {expected} as in the golden, found {found}",
                    code=ExitCode.FOUND,
                )


def _same_model(trace: Trace, model: Any) -> dict[str, bool | None]:
    """Whether hashes agree; None where one is not known."""
    recorded = trace.meta.models[0] if trace.meta.models else {}
    checkpoint = getattr(model, "checkpoint", None)
    same: dict[str, bool | None] = {}
    for name in ("config", "weights", "tokenizer"):
        theirs, ours = recorded.get(f"{name}_hash"), getattr(checkpoint, f"{name}_hash", None)
        same[name] = None if theirs is None or ours is None else theirs == ours
    return same


def _bad(message: str) -> MoescopeError:
    return MoescopeError(f"golden: {single_line(message, 200)}", code=ExitCode.TRACE)


def with_overrides(tolerance: Tolerance, **given: float | None) -> Tolerance:
    """The tolerance with what was given."""
    return replace(tolerance, **{name: value for name, value in given.items() if value is not None})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return (value if math.isfinite(value) else None) if isinstance(value, float) else value
