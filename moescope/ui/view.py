"""From history, cursor and variant to what each panel draws. Pure: no widget, no clock, no engine.

Loads are counted over the last `WINDOW` tokens up to the cursor and quantised to `LEVELS` steps of
the fair share here, before anything is compared: a number that hardly moved redraws nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.errors import MoescopeError
from moescope.kernels.spec import RouterSpec
from moescope.safety import printable
from moescope.ui import routers
from moescope.ui.history import Lane
from moescope.ui.panels import (
    LEVELS,
    ExpertRow,
    LayerData,
    MapData,
    PlotData,
    TokenData,
    VariantBarData,
    VariantItem,
)
from moescope.ui.routers import Decision, RouterTable

WINDOW = 64
LETTERS = "ABCDEFGH"
# Upper ends of levels 1 to 6, in multiples of the fair share K/E; 0 is never used, 7 is above all.
LOAD_STEPS = np.array([0.35, 0.75, 1.25, 2.0, 3.0, 4.5])


@dataclass(frozen=True, slots=True)
class Cursor:
    """What is looked at. `row` None: the newest token."""

    router: int = 0
    expert: int = 0
    row: int | None = None


def load_counts(lane: Lane, row: int, experts: int, window: int = WINDOW) -> NDArray[np.int64]:
    """How many of the last `window` tokens up to `row` used each expert: [L, E]."""
    ids = lane.expert_ids[max(0, row + 1 - window) : row + 1].astype(np.int64)  # [T, L, K]
    flat = ids + (np.arange(lane.routers) * experts)[None, :, None]
    counted = np.bincount(flat[ids >= 0], minlength=lane.routers * experts)
    return counted.reshape(lane.routers, experts)


def load_levels(counts: NDArray[np.int64], tokens: int, table: RouterTable) -> NDArray[np.uint8]:
    """Loads as levels 0..7 in fixed steps of the fair share, so that colours mean the same in every
    layer: 3 is the fair share, 7 is more than 4.5 times that (or every token, for small E)."""
    fair = table.top_k / np.maximum(table.num_experts, 1) * max(tokens, 1)
    ratio = counts / np.maximum(fair, 1e-9)[:, None]
    levels = 1 + np.searchsorted(LOAD_STEPS, ratio, side="left")
    levels[counts == 0] = 0
    return np.minimum(levels, LEVELS - 1).astype(np.uint8)


def marks_of(expert_ids: NDArray[np.int16], experts: int, value: int = 1) -> NDArray[np.uint8]:
    """A map of marks: `value` where an expert was picked, [L, E]."""
    marks = np.zeros((expert_ids.shape[0], experts), np.uint8)
    rows, columns = np.nonzero(expert_ids >= 0)
    marks[rows, expert_ids[rows, columns]] = value
    return marks


def map_data(
    table: RouterTable,
    decision: Decision,
    counts: NDArray[np.int64],
    tokens: int,
    cursor: Cursor,
) -> MapData:
    """The expert map of one token. `counts` [L, E] were taken over `tokens` tokens."""
    return MapData(
        levels=load_levels(counts, tokens, table),
        marks=marks_of(decision.expert_ids, table.widest),
        num_experts=table.num_experts,
        gutter=table.labels,
        score_sum=decision.score_sum,
        sum_wrong=routers.sums_wrong(table, decision),
        cursor=(cursor.router, cursor.expert),
    )


def empty_map(table: RouterTable, cursor: Cursor) -> MapData:
    """The map before the first token."""
    counts = np.zeros((table.count, table.widest), np.int64)
    return map_data(table, routers.not_recorded(table.count, ""), counts, 0, cursor)


def layer_data(
    table: RouterTable,
    lane: Lane,
    row: int,
    decision: Decision,
    counts: NDArray[np.int64],
    cursor: Cursor,
    spec_line: str,
) -> LayerData:
    """The router under the cursor, ranked, with the first expert that was not chosen."""
    at = cursor.router
    experts = int(table.num_experts[at])
    tokens = min(WINDOW, row + 1)
    load = counts[at, :experts] / max(1, int(counts[at].max()))
    margin = _known(decision.margin[at])
    allowed = table.allowed[at]
    sums = lane.score_sum[max(0, row + 1 - WINDOW) : row + 1, at]
    sums = sums[np.isfinite(sums)]
    mean = counts[at, :experts].mean()
    wrong = routers.sums_wrong(table, decision)
    return LayerData(
        title=f"layer {table.labels[at].lstrip('0') or '0'}",
        router=spec_line,
        rows=_ranked(decision, at, load),
        runner_up=_runner_up(decision, at, load, table),
        margin=margin,
        margin_unit="score" if decision.in_scores[at] else "logit",
        near_tie=bool(routers.near_ties(decision)[at]),
        score_sum=_known(decision.score_sum[at]),
        sum_range=_range(sums) if len(sums) >= 4 and decision.basis == routers.GENERATED else None,
        sum_expected=routers.expected_sum(allowed),
        sum_wrong=bool(wrong[at]),
        mass=_known(decision.mass[at]),
        entropy=_known(decision.entropy[at]),
        load_cv=float(counts[at, :experts].std() / mean) if mean else None,
        dead=int((counts[at, :experts] == 0).sum()),
        window=tokens,
        basis=decision.basis,
    )


def _ranked(decision: Decision, at: int, load: NDArray[np.float64]) -> tuple[ExpertRow, ...]:
    rows = []
    for rank, expert in enumerate(decision.expert_ids[at], start=1):
        if expert < 0:
            continue
        score = None if decision.scores is None else _known(decision.scores[at, rank - 1])
        weight = None if decision.weights is None else _known(decision.weights[at, rank - 1])
        rows.append(ExpertRow(rank, int(expert), score, weight, float(load[expert])))
    return tuple(rows)


def _runner_up(
    decision: Decision, at: int, load: NDArray[np.float64], table: RouterTable
) -> ExpertRow | None:
    expert = int(decision.runner_up[at])
    if expert < 0:
        return None
    policy = table.specs[at].policy
    scored = decision.scores is not None and policy.correction_bias == "none"
    chosen = decision.expert_ids[at] >= 0
    score = None
    if scored and decision.in_scores[at] and chosen.any():
        assert decision.scores is not None
        lowest = float(decision.scores[at][chosen].min())
        score = _known(np.float32(lowest - float(decision.margin[at])))
    return ExpertRow(0, expert, score, None, float(load[expert]))


def plot_data(
    table: RouterTable, lane: Lane, row: int, router: int, points: int = WINDOW
) -> PlotData:
    """The score sum of one router over the last tokens."""
    start = max(0, row + 1 - points)
    allowed = table.allowed[router]
    return PlotData(
        title=f"Σ score sum as generated · L{table.labels[router]} · last {points} tokens",
        x=lane.position[start : row + 1].copy(),
        series=(("Σ", lane.score_sum[start : row + 1, router].copy()),),
        guide=allowed if isinstance(allowed, float) else None,
        cursor=int(lane.position[row]) if lane.count else None,
    )


def token_data(
    table: RouterTable,
    lane: Lane,
    row: int,
    pieces: dict[int, str],
    variants: tuple[str, ...] = (),
) -> TokenData:
    """The token in `row`: how likely it was, what else could have come, what its routers did."""
    ids = lane.expert_ids[row]
    shared = None
    if row > 0:
        common = (ids[:, :, None] == lane.expert_ids[row - 1][:, None, :]) & (ids[:, :, None] >= 0)
        shared = (int(common.sum()), int((ids >= 0).sum()))
    known = int(np.isfinite(lane.margin[row]).sum())
    close = routers.near_ties(routers.as_generated(table, lane, row))
    logprob = _known(lane.logprob[row])
    token_id = int(lane.token_id[row])
    text = lane.texts[row] or pieces.get(token_id, "")
    return TokenData(
        title=f"token {int(lane.position[row])} {quoted(text)}",
        token_id=token_id,
        probability=None if logprob is None else float(np.exp(min(logprob, 0.0))),
        rank=int(lane.rank[row]) or None,
        alternatives=alternatives_before(lane, row, pieces),
        shared_with_previous=shared,
        near_ties=(int(close.sum()), known) if known else None,
        near_tie_below=routers.NEAR_TIE,
        new_experts=lane.first_use[row],
        variants=variants,
    )


def alternatives_before(
    lane: Lane, row: int, pieces: dict[int, str]
) -> tuple[tuple[str, float], ...]:
    """What else could have stood in `row`: they were recorded with the token before it."""
    if row == 0 or lane.position[row - 1] != lane.position[row] - 1:
        return ()
    found = []
    for token_id, logprob in lane.alternatives[row - 1]:
        if token_id != lane.token_id[row]:
            text = printable(pieces[token_id], 32) if token_id in pieces else f"#{token_id}"
            found.append((text, float(np.exp(min(logprob, 0.0)))))
    return tuple(found)


def variant_lines(
    table: RouterTable,
    logits: NDArray[np.float32] | None,
    token_id: int,
    made: Decision,
    expressions: tuple[tuple[str, str], ...],  # (letter, expression)
) -> tuple[str, ...]:
    """One line a variant: what it would have changed for this token."""
    if logits is None:
        return ("same logits: not recorded",) if expressions else ()
    lines = []
    for letter, expression in expressions:
        other = routers.reroute(table, expression, logits, token_id)
        changed = changed_picks(made.expert_ids, other.expert_ids)
        what = "same ids" if not changed else f"{changed} of {picks(made.expert_ids)} ids differ"
        with np.errstate(invalid="ignore"):
            total = float(np.nanmean(other.score_sum)) if table.count else float("nan")
        lines.append(f"same logits under {letter}: {what}, mean Σ {total:.3f}")
    return tuple(lines)


def picks(ids: NDArray[np.int16]) -> int:
    return int((ids >= 0).sum())


def changed_picks(a: NDArray[np.int16], b: NDArray[np.int16]) -> int:
    """How many picks of `a` are not picks of `b`, router by router."""
    common = (a[:, :, None] == b[:, None, :]) & (a[:, :, None] >= 0)
    return picks(a) - int(common.sum())


def variant_bar(
    table: RouterTable,
    expressions: tuple[str, ...],
    generating: frozenset[str],
    shown: str | None,
) -> VariantBarData:
    """The variant bar: letters in order, which one generates, which one the panels show."""
    items = []
    specs = [routers.specs_under(table, expression) for expression in expressions]
    for index, expression in enumerate(expressions):
        before = (i for i in range(index) if routers.equal_lanes(table, expressions[i], expression))
        twin = next(before, None)
        items.append(
            VariantItem(
                letter=LETTERS[index],
                title=variant_title(table, expression, specs[index]),
                state="generating" if expression in generating else "same_logits",
                equal_to="" if twin is None else LETTERS[twin],
                shown=expression == shown,
            )
        )
    return VariantBarData(tuple(items))


def variant_title(table: RouterTable, expression: str, specs: tuple[RouterSpec, ...]) -> str:
    """A name people can read: the catalogue's title, with the router in words for `trained`."""
    from moescope.variants import title
    from moescope.variants.steering import split

    if expression == routers.TRAINED:
        return f"trained  {specs[0].line()}" if specs else "trained"
    variant, steered = split(expression)
    return printable(f"{title(variant)} with {steered}" if steered else title(variant), 60)


def title_of(table: RouterTable, expression: str) -> str:
    """`variant_title` of an expression that may be unknown here."""
    try:
        return variant_title(table, expression, routers.specs_under(table, expression))
    except MoescopeError:
        return printable(expression, 60)


def quoted(text: str) -> str:
    return f"“{printable(text, 32)}”"


def _known(value: np.float32) -> float | None:
    number = float(value)
    return number if np.isfinite(number) else None


def _range(values: NDArray[np.float32]) -> tuple[float, float]:
    low, high = np.percentile(values, (10, 90))
    return float(low), float(high)
