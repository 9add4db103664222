"""How evenly a lane uses its experts, as what the balance screen draws. Pure.

The measures are those of `diagnosis.balance`; loads are counted once a token and kept in `Tally`.
Letters: T tokens, L routers, E expert classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moescope.diagnosis import balance, balance_chance
from moescope.trace import measures
from moescope.trace.frames import DECODE
from moescope.ui.history import History, Lane
from moescope.ui.routers import RouterTable
from moescope.ui.view import WINDOW

PAIRED = 512  # tokens that pairs are counted over
PAIRS = 6
# label, measure, what an even router gives, digits
MEASURES = (
    ("CV", balance.variation, 0, 3),
    ("max / mean", balance.max_over_mean, 1, 2),
    ("MaxVio", balance.max_violation, 0, 2),
    ("Gini", balance.gini, 0, 3),
    ("Jain", balance.jain, 1, 3),
    ("exp(H) / E", balance.effective_experts, 1, 3),
    ("dead", balance.dead, 0, 0),
    ("cold", balance.cold, 0, 0),
)
SMALL_IS_WORSE = ("Jain", "exp(H) / E")


@dataclass(frozen=True, slots=True)
class BalanceRow:
    """One measure. `worst` names its layer; `chance` is what an even router stays below."""

    label: str
    here: str
    median: str
    worst: str
    even: str
    chance: str
    noise: bool = False  # no more uneven than chance


@dataclass(frozen=True, slots=True, eq=False)
class BalanceData:
    """Numbers on the left, loads of the layer's experts below."""

    title: str
    note: str
    rows: tuple[BalanceRow, ...]
    lines: tuple[tuple[str, str], ...]  # (label, text)
    load: NDArray[np.int64]  # [E] of the layer
    load_title: str
    fair: float  # tokens that would pick each expert
    picked: frozenset[int]  # for the token under the cursor


class Tally:
    """Loads of a lane by phase, counted as it grows."""

    def __init__(self, lane: Lane, experts: int) -> None:
        self.lane, self.experts = lane, experts
        self.rows = 0
        self.load = np.zeros((2, lane.routers, experts), np.int64)  # prefill, decode
        self.tokens = np.zeros(2, np.int64)

    def feed(self) -> bool:
        """Count what came; a lane that was cut is counted anew. True when there was more."""
        if self.lane.count < self.rows:
            self.rows = 0
            self.load[:], self.tokens[:] = 0, 0
        start, self.rows = self.rows, self.lane.count
        ids, phases = self.lane.expert_ids[start:], self.lane.phase[start:]
        for phase in np.unique(phases).tolist():
            self.load[phase] += measures.expert_load(ids[phases == phase], self.experts)
            self.tokens[phase] += int((phases == phase).sum())
        return self.rows > start


def balance_data(
    table: RouterTable, history: History, tally: Tally, router: int, row: int
) -> BalanceData:
    """Everything about `router`, and how it stands among the others."""
    lane = tally.lane
    experts = int(table.num_experts[router])
    load = tally.load.sum(axis=0)
    own, tokens = load[router, :experts], int(tally.tokens.sum())
    k = float(own.sum() / tokens) if tokens else 0.0
    label = table.labels[router]
    ids = lane.expert_ids[row, router] if tokens else np.empty(0, np.int16)
    return BalanceData(
        title=f"balance of L{label} over {tokens:,} tokens",
        note=f"top-{table.top_k[router]} of {experts}",
        rows=_rows(table, load, router, tokens, k),
        lines=(
            *_losses(table, history, lane, router),
            *_needed(own, experts, k),
            *_phases(tally, router, experts),
            *_coverage(own, experts, int(table.top_k[router])),
            *_pairs(lane, router, experts),
        ),
        load=own,
        load_title=f"L{label} · load of {experts} experts",
        fair=tokens * k / experts,
        picked=frozenset(int(expert) for expert in ids if expert >= 0),
    )


def _rows(
    table: RouterTable, load: NDArray[np.int64], router: int, tokens: int, k: float
) -> tuple[BalanceRow, ...]:
    widths = table.num_experts.astype(np.int64)
    experts = int(widths[router])
    bounds = {}
    if tokens and 0 < k < experts:
        bounds["CV"] = balance_chance.bound_variation(tokens, experts, k)
        bounds["MaxVio"] = balance_chance.bound_max_violation(tokens, experts, k)
        bounds["max / mean"] = 1 + bounds["MaxVio"]
        bounds["dead"] = balance_chance.expected_dead(tokens, experts, k)
    rows = []
    for name, measure, even, digits in MEASURES:
        values = np.full(table.count, np.nan)
        for width in np.unique(widths):
            members = np.flatnonzero(widths == width)
            values[members] = measure(load[members, :width])
        bound = bounds.get(name)
        known = values[np.isfinite(values)]
        middle = float(np.median(known)) if len(known) else float("nan")
        sign = "≈ " if name == "dead" else "< "
        rows.append(
            BalanceRow(
                label=name,
                here=_number(values[router], digits),
                median=_number(middle, digits),
                worst=_worst(values, table.labels, digits, smallest=name in SMALL_IS_WORSE),
                even=str(even),
                chance="" if bound is None else sign + _number(bound, max(digits, 1)),
                noise=bound is not None and name != "dead" and not values[router] > bound,
            )
        )
    return tuple(rows)


def _worst(
    values: NDArray[np.float64], labels: tuple[str, ...], digits: int, *, smallest: bool
) -> str:
    known = np.isfinite(values)
    if not known.any():
        return "─"
    if values[known].min() == values[known].max():
        return _number(values[known][0], digits)
    ranked = np.where(known, values if smallest else -values, np.inf)
    at = int(ranked.argmin())
    return f"{_number(values[at], digits)} L{labels[at]}"


def _coverage(load: NDArray[np.int64], experts: int, k: int) -> list[tuple[str, str]]:
    top = max(1, min(k, experts - 1))
    share = float(balance.coverage(load[None], top)[0])
    if not np.isfinite(share):
        return []
    return [(f"busiest {top}", f"take {share:.0%} of the picks; even {top / experts:.0%}")]


def _losses(table: RouterTable, history: History, lane: Lane, router: int) -> list[tuple[str, str]]:
    """Both auxiliary losses over the newest tokens, as far as their logits are in memory."""
    rows, held = [], []
    for row in range(max(0, lane.count - WINDOW), lane.count):
        found = history.logits(lane, row) if history.holds(lane, row) else None
        if found is not None:
            rows.append(row)
            held.append(found)
    if not held:
        return [("auxiliary loss", "needs router logits, which were not recorded")]
    logits, experts = np.stack(held), int(table.num_experts[router])
    count, k = np.array([float(len(rows))]), int(table.top_k[router])
    own = balance.softmax(logits[:, router, :experts]).sum(axis=0)[None]
    picks = measures.expert_load(lane.expert_ids[rows][:, router : router + 1], experts)
    one = float(balance.layer_loss(picks.astype(np.float64), own, count)[0])
    text = f"layer {one:.3f} (even 1)"
    if len(set(table.num_experts.tolist())) == len(set(table.top_k.tolist())) == 1:
        probability = balance.softmax(logits[:, :, :experts])
        top = np.argpartition(-probability, k - 1, axis=2)[:, :, :k]
        pooled = balance.pooled_loss(
            measures.expert_load(top, experts).astype(np.float64),
            probability.sum(axis=0),
            np.full(table.count, float(len(rows))),
        )
        text += f" · transformers {pooled:.3f} (even {k})"
    total = float(balance.z_terms(logits[:, router, :experts].astype(np.float64)).mean())
    window = f"last {len(rows)}"
    return [(f"aux loss, {window}", text), (f"z-loss, {window}", f"{total:.2f}")]


def _phases(tally: Tally, router: int, experts: int) -> list[tuple[str, str]]:
    prefill, decode = tally.load[:, router : router + 1, :experts]
    apart = float(balance.distance(prefill, decode)[0])
    if not np.isfinite(apart):
        return []
    counts = int(tally.tokens[0]), int(tally.tokens[DECODE])
    chance = balance_chance.expected_distance(prefill[0], decode[0], *counts)
    return [("prefill ≠ decode", f"{apart:.2f} of the picks; by chance {chance:.2f}")]


def _needed(load: NDArray[np.int64], experts: int, k: float) -> list[tuple[str, str]]:
    cv = float(balance.variation(load[None])[0])
    needed = balance_chance.tokens_needed(cv, experts, k) if k and np.isfinite(cv) else None
    if needed is None:
        return []
    return [("noise floor", f"such a CV is more than chance from {needed:,} tokens on")]


def _pairs(lane: Lane, router: int, experts: int) -> list[tuple[str, str]]:
    ids = lane.expert_ids[-PAIRED:, router]
    if not len(ids):
        return []
    counts = balance.pair_counts(ids, experts)
    lift = balance.lift(counts, len(ids))
    a, b = np.triu_indices(experts, 1)
    order = np.argsort(-counts[a, b], kind="stable")[:PAIRS]
    shown = [
        f"E{a[i]:03d}+E{b[i]:03d} {counts[a[i], b[i]]} ×{lift[a[i], b[i]]:.1f}"
        for i in order
        if counts[a[i], b[i]]
    ]
    return [("pairs, lift", "  ".join(shown))] if shown else []


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "─"
