"""What `moescope compare` prints: texts, where lanes part, how far they agree, layer by layer."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moescope.commands import options

if TYPE_CHECKING:
    from moescope.diagnosis.compare import Agreement, Comparison, Divergence
    from moescope.diagnosis.compare_run import CompareRun
    from moescope.diagnosis.gate_rows import GateRows
    from moescope.diagnosis.ladder import Ladder

WIDTH = 92  # of texts, where the terminal is as wide
LABEL = 38  # columns of what a row is about
SHOWN_ROWS = 8  # of gates
FED = {
    "free": "each lane writes its own text",
    "lane A's": "same tokens: all lanes fed lane A's text",
}


def lines(outcome: CompareRun, how: Mapping[str, str], models: Sequence[str] = ()) -> list[str]:
    """What was found. `models` names the model of each lane, where they are several."""
    found: list[str] = []
    written = how["mode"] == "free" or how["text"] == "lane A's"
    for lane in outcome.lanes:
        full = "  (the context is full: --max-context)" if lane.reason == "context" else ""
        model = f"{options.plain(models[lane.lane])}  " if models else ""
        found.append(f"{letter(lane.lane)}  {model}{lane.variant}{full}")
        if written:
            text = options.plain(lane.text.strip("\n")) or f"ids {lane.token_ids}"
            for line in text.splitlines():
                found += textwrap.indent(textwrap.fill(line, _room(3)), "   ").splitlines() or [""]
    fed = FED.get(how["mode"]) or FED.get(how["text"]) or f"same tokens: {how['text']}"
    for comparison in outcome.comparisons:
        found.append(f"\n{letter(comparison.lane_a)} and {letter(comparison.lane_b)}: {fed}")
        found += comparison_lines(comparison)
    if outcome.gate_rows is not None:
        found += _gate_rows(outcome.gate_rows)
    return found


def comparison_lines(comparison: Comparison) -> list[str]:
    """How far two lanes agree, and layer by layer."""
    rows: list[str] = []
    for label, value in _rows(comparison):
        first, *rest = _folded(value)
        rows += [f"   {label:<{LABEL - 4}} {first}", *(" " * LABEL + more for more in rest)]
    return rows + _layers(comparison)


def _room(indent: int) -> int:
    """Columns for text behind `indent`; where there is no terminal, `WIDTH`."""
    columns = shutil.get_terminal_size((WIDTH + 3, 24)).columns
    return max(20, min(WIDTH + 3, columns) - indent)


def _folded(value: str) -> list[str]:
    """A value in as many lines as it takes. Where parts of it stand two spaces apart, those are
    kept whole."""
    if "  " not in value:
        return textwrap.wrap(value, _room(LABEL)) or [""]
    lines = [""]
    for part in value.split("  "):
        longer = f"{lines[-1]}  {part}".strip()
        if lines[-1] and len(longer) > _room(LABEL):
            lines.append(part)
        else:
            lines[-1] = longer
    return lines


def letter(lane: int) -> str:
    return "ABCDEFGH"[lane] if 0 <= lane < 8 else str(lane)


def _rows(found: Comparison) -> list[tuple[str, str]]:
    rows = [("texts part at token", _at(found.ids_part_at))]
    rows.append(("first other experts", _first(found.first_divergence)))
    parts = (
        ("on the same tokens", found.same_ids.all),
        ("after the texts parted", found.compounded.all),
    )
    for title, part in parts:
        rows += _agreement(title, part)
    if found.flips:
        decisions = sum(router.tokens for router in found.same_ids.routers)
        rows.append(("flips, on the same tokens", f"{found.flips} of {decisions}"))
        if set(found.causes) != {""}:
            rows.append(("   because of", _causes(found.causes)))
        rows.append((f"   by margin of A{_unit(found.margin_units_a)}", _margins(found)))
    if found.kl_tokens:
        rows.append(("KL of the next token, mean", f"{_small(found.kl_mean)} nats"))
        rows.append(("same most likely next token", _share(found.top1_agrees)))
    return rows


def _first(first: Divergence | None) -> str:
    if first is None:
        return "never, on the same tokens"
    from moescope.diagnosis.causes import TITLES

    a, b = (first.margin_a, first.margin_unit_a), (first.margin_b, first.margin_unit_b)
    margins = ", ".join(f"{_number(margin)} {unit}".rstrip() for margin, unit in (a, b))
    why = f" by {TITLES[first.cause]}," if first.cause else ","
    return f"@{first.position} L{first.layer}{why} margins {margins}"


def _agreement(title: str, part: Agreement) -> list[tuple[str, str]]:
    if not part.tokens:
        return []
    return [
        (f"{title}: tokens", str(part.tokens)),
        ("   same set of experts", _share(part.same_set)),
        ("   same order", _share(part.same_order)),
        ("   Jaccard", _number(part.jaccard)),
        ("   mean |Δ weight|", _number(part.weight_difference)),
        ("   Σ of each", f"{_number(part.score_sum_a)}  {_number(part.score_sum_b)}"),
    ]


def _causes(causes: Mapping[str, int]) -> str:
    from moescope.diagnosis.causes import TITLES

    total = sum(causes.values())
    ranked = sorted(causes.items(), key=lambda item: -item[1])
    return ", ".join(f"{TITLES[name]} {count / total:.0%}" for name, count in ranked)


def _margins(found: Comparison) -> str:
    """`<0.001: 41% flip  <0.01: 12% flip  …`, bins with decisions only."""
    shown = []
    for bin_ in found.margins:
        if bin_.decisions:
            name = "more" if bin_.below is None else f"<{bin_.below:g}"
            shown.append(f"{name}: {bin_.flips / bin_.decisions:.0%} flip")
    return "  ".join(shown) or "-"


def _unit(units: Sequence[str]) -> str:
    """` (score)`; both where a variant has both."""
    kinds = dict.fromkeys(units)
    return f" ({' or '.join(kinds)})" if kinds else ""


def _layers(found: Comparison) -> list[str]:
    """One row a layer, on the same tokens."""
    head = "   layer  same set     order  Jaccard  |Δ weight|     Σ A     Σ B   flips"
    rows = []
    for at, (layer, part) in enumerate(zip(found.layers, found.same_ids.routers, strict=True)):
        if not part.tokens:
            continue
        flips = sum(found.flips_by_router[at].values())
        rows.append(
            f"   {layer:>5}  {_share(part.same_set):>8}  {_share(part.same_order):>8}"
            f"  {_number(part.jaccard):>7}  {_number(part.weight_difference):>10}"
            f"  {_number(part.score_sum_a):>6}  {_number(part.score_sum_b):>6}  {flips:>6}"
        )
    return ["", head, *rows] if rows else []


def _gate_rows(found: GateRows) -> list[str]:
    if not found.flips:
        return ["", "gate: no flip on the same tokens comes from its rows"]
    kept = found.rows[:SHOWN_ROWS]
    shared = (
        f"{found.shared} of them need several rows at once" if found.shared else "each by a row"
    )
    size = "" if found.row_bytes is None else f" ({found.row_bytes / 1e3:.1f} kB each in 16 bit)"
    lines = ["", f"gate: {_flips(found.flips)} from its rows, {shared}"]
    if kept:
        lines.append(f"   rows to keep in higher precision first{size}:")
    for row in kept:
        error = f"logit off by up to {row.error:.3f}"
        lines.append(f"   L{row.layer:02d} E{row.expert:03d}  {_flips(row.flips)}, {error}")
    if len(found.rows) > len(kept):
        lines.append(f"   and {len(found.rows) - len(kept)} more (--json lists them)")
    return lines


def _flips(count: int) -> str:
    return "1 flip" if count == 1 else f"{count} flips"


def ladder_lines(ladder: Ladder) -> list[str]:
    """The rungs as a table, and what each of them took off."""
    head = "   rung              KL mean   KL max  max |Δlogp|  same top-1  B alone alike"
    lines = ["", f"A's routing forced into B ({ladder.lane_b}), {ladder.tokens} tokens", head]
    for rung in ladder.rungs:
        lines.append(
            f"   {rung.name:<16} {_small(rung.kl_mean):>8} {_small(rung.kl_max):>8}"
            f" {_small(rung.logprob_max):>12} {_share(rung.top1_agrees):>11}"
            f" {_share(rung.same_experts):>14}"
        )
    shares = ladder.shares
    if shares is None:
        return [*lines, "   both expect the same next tokens: there is nothing to explain"]
    titles = {
        "experts": "the choice of experts",
        "order": "their order",
        "weights": "their weights",
        "rest": "what is not routing",
    }
    parts = [f"{titles[name]} {share:.0%}" for name, share in shares.items()]
    said = f"   of the mean KL: {', '.join(parts)}"
    return [*lines, *textwrap.wrap(said, _room(0), subsequent_indent=" " * 6)]


def _at(position: int | None) -> str:
    return "never" if position is None else f"@{position}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}" if value < 0.001 else f"{value:.3f}"
