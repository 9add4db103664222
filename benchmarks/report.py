"""One table of what was measured on the CPU, ratios first: `report.py [--markdown] [folder]`.

Reads what the steps of `run.py` and the benchmarks of the screen wrote. A step without results has
no rows; a figure without a clean turn is marked `~`.
"""

from __future__ import annotations

import argparse
import json
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
OURS, PURE, LLAMA = "moescope", "moescope, pure torch", "llama.cpp"


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio and what it is held to: at least (`≥`) or at most (`≤`) `limit`."""

    what: str
    sign: str
    limit: float
    find: Callable[[dict[str, Figures]], Figures | None]


def file_of(step: str) -> str:
    return f"cpu_{step}.json"


def read(folder: Path) -> dict[str, Figures]:
    """Results by step."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        if path.name.startswith(("cpu_", "screen_")):
            found[path.stem.removeprefix("cpu_")] = json.loads(path.read_text())
    return found


# --- targets --------------------------------------------------------------------------------------


def _over(base: str, kind: str, peer: str) -> Callable[[dict[str, Figures]], Figures | None]:
    """moescope over the best of a peer's modes; the best by the same figure."""
    key, best = ("tokens_per_s", max) if kind == "decode" else ("first_s", min)

    def find(found: dict[str, Figures]) -> Figures | None:
        step = found.get("decode", {})
        ratios = step.get(f"{kind}: {base} over", {})
        names = [name for name in ratios if name.startswith(peer)]
        if not names:
            return None
        chosen = best(names, key=lambda name: step["engines"][name][key]["median"])
        return {**ratios[chosen], "note": chosen}

    return find


def _at(step: str, *path: str) -> Callable[[dict[str, Figures]], Figures | None]:
    def find(found: dict[str, Figures]) -> Figures | None:
        value: Any = found.get(step)
        for name in path:
            if not isinstance(value, dict) or name not in value:
                return None
            value = value[name]
        return value  # type: ignore[no-any-return]

    return find


def _lanes_over_bound(found: dict[str, Figures]) -> Figures | None:
    """The worst number of lanes with variants and tokens of their own."""
    lanes = found.get("lanes", {}).get("lanes", {})
    over = {name: row for name, row in lanes.items() if name.endswith("variants")}
    if not over:
        return None
    worst = max(over, key=lambda name: over[name]["over_bound"])
    noise = {"noisy": True} if over[worst]["cost"].get("noisy") else {}
    return {"median": over[worst]["over_bound"], "note": f"{worst}, the worst", **noise}


TARGETS = (
    Target("decode, over llama.cpp", "≥", 1.10, _over(OURS, "decode", LLAMA)),
    Target("decode, over transformers' best", "≥", 1.20, _over(OURS, "decode", "transformers")),
    Target("decode, share of the read bandwidth", "≥", 0.75, _at("decode", "share_of_read", OURS)),
    Target("pure torch, over llama.cpp", "≥", 1.0, _over(PURE, "decode", LLAMA)),
    Target("pure torch, over transformers' best", "≥", 1.2, _over(PURE, "decode", "transformers")),
    Target("first token, over transformers' best", "≤", 1.05, _over(OURS, "first token", "transf")),
    Target("four equal lanes, over one", "≤", 1.40, _at("lanes", "lanes", "4 equal", "cost")),
    Target("lanes, over the bytes of their experts", "≤", 1.10, _lanes_over_bound),
    Target("recording ids, over off", "≤", 1.01, _at("tracing", "cost over off", "ids")),
    Target("recording weights, over off", "≤", 1.01, _at("tracing", "cost over off", "weights")),
    Target("recording logits, over off", "≤", 1.02, _at("tracing", "cost over off", "logits")),
    Target("four shadow variants, over none", "≤", 1.02, _at("tracing", "4 shadows over 0")),
    Target(
        "decode with the screen, over without", "≥", 0.90, _at("watching", "drawing over stopped")
    ),
)


def _targets(found: dict[str, Figures]) -> Iterator[list[str]]:
    signs = {"≥": operator.ge, "≤": operator.le}
    for target in TARGETS:
        value = target.find(found)
        if value is None:
            continue
        met = signs[target.sign](value["median"], target.limit)
        yield [
            target.what,
            _ratio(value),
            _spread(value),
            f"{target.sign} {target.limit:.2f}",
            "yes" if met else "NO",
            value.get("note", ""),
        ]


# --- tables ---------------------------------------------------------------------------------------


def _engines(found: dict[str, Figures]) -> Iterator[list[str]]:
    step = found.get("decode")
    if step is None:
        return
    for name, row in step["engines"].items():
        yield [
            name,
            _ratio(step.get(f"decode: {OURS} over", {}).get(name)),
            _ratio(step.get(f"first token: {OURS} over", {}).get(name)),
            _ratio(step["share_of_read"].get(name)),
            _number(row["tokens_per_s"], 1),
            _number(row["gb_s"], 1),
            _number(row["first_s"], 3),
        ]
    ours, slow = step["engines"].get(OURS), found.get("slow", {"engines": {}})
    for name, row in slow["engines"].items():
        fast = ours is not None
        yield [
            f"{name} (alone)",
            f"{ours['tokens_per_s']['median'] / row['tokens_per_s']['median']:.1f}" if fast else "",
            f"{ours['first_s']['median'] / row['first_s']['median']:.3f}"
            if fast and "first_s" in row
            else "",
            f"{row['gb_s']['median'] / slow['read_gb_s']:.2f}",
            _number(row["tokens_per_s"], 1),
            _number(row["gb_s"], 1),
            _number(row["first_s"], 3) if "first_s" in row else "",
        ]
    yield ["read bandwidth", "", "", "1", "", _number(step["read_gb_s"]["gb_s"], 1), ""]


def _lanes(found: dict[str, Figures]) -> Iterator[list[str]]:
    for name, row in found.get("lanes", {}).get("lanes", {}).items():
        yield [
            name,
            _ratio(row["cost"]),
            f"{row['bound']:.2f}",
            f"{row['over_bound']:.2f}",
            f"{row['distinct_experts']:.1f}",
            f"{1e3 * row['step_s']['median']:.1f}",
        ]


def _tracing(found: dict[str, Figures]) -> Iterator[list[str]]:
    step = found.get("tracing", {})
    for name, row in step.get("levels", {}).items():
        ratio = step["cost over off"].get(name)
        yield [
            name,
            _ratio(ratio, 4),
            _spread(ratio, 4),
            f"{1e3 * row['step_s']:.2f}",
            f"{1e6 * row['folding_s']:.0f}",
            f"{row['bytes_a_token']}",
        ]


def _router(found: dict[str, Figures]) -> Iterator[list[str]]:
    for case, row in found.get("router", {}).get("cases", {}).items():
        microseconds = row["microseconds"]
        for ours, faster in row["faster than"].items():
            yield [
                case,
                ours,
                *(_ratio(faster[peer]) for peer in ("torch eager", "torch.compile", "copy")),
                _number(microseconds[ours], 1),
                _number(microseconds["torch eager"], 1),
                _number(microseconds["copy"], 2),
            ]


def _families(found: dict[str, Figures]) -> Iterator[list[str]]:
    for name, row in found.get("families", {}).get("cases", {}).items():
        noise = {"noisy": True} if row["turns_noisy"] == row["turns"] else {}
        yield [
            name,
            _ratio({**row["faster"], **noise}),
            _number(row["step_ms"], 1),
            _number(row["torch_ms"], 1),
            f"{row['gb_read']:.2f}",
            row["step"].partition("in torch: ")[2],
        ]


def _loading(found: dict[str, Figures]) -> Iterator[list[str]]:
    step = found.get("loading", {})
    for name, row in step.get("loaders", {}).items():
        ratio = step["time over reading"].get(name)
        if name == "cold: moescope":
            ratio = step["time over reading, cold"]
        yield [name, _ratio(ratio), _number(row["gb_s"], 2), _number(row["load_s"], 2)]


def _start(found: dict[str, Figures]) -> Iterator[list[str]]:
    for name, row in found.get("start", {}).get("starts", {}).items():
        yield [name, _number(row["start_s"], 3)]


def _screens(found: dict[str, Figures]) -> Iterator[list[str]]:
    for label in ("one thread", "a thread per core"):
        row = found.get("screen_cost", {}).get(label)
        if row:
            yield [f"share of tokens it costs, {label}", f"{row['cost_median']}", "≤ 0.10"]
    rows = (("screen_map", "cell", "a frame of the map, ms"), ("screen_redraw", "", "a key, ms"))
    for name, part, label in rows:
        step = found.get(name, {})
        if step:
            row = step[part]["load"] if part else step
            yield [label, f"{row['median_ms']}", f"≤ {step['target_ms']:g}"]
    if "screen_start" in found:
        yield ["first frame, s", f"{found['screen_start']['seconds_median']}", ""]


def _missing(found: dict[str, Figures]) -> Iterator[list[str]]:
    for step in found.values():
        for name, why in step.get("missing", {}).items():
            yield [name, why]


TABLES: tuple[tuple[tuple[str, ...], Callable[[dict[str, Figures]], Iterator[list[str]]]], ...] = (
    (("ratio", "median", "quartiles", "wanted", "met", ""), _targets),
    (
        (
            "engine",
            "moescope decodes ×",
            "its first token ×",
            "of read bandwidth",
            "tokens/s",
            "GB/s",
            "first token, s",
        ),
        _engines,
    ),
    (("lanes", "over one", "bytes", "over bytes", "experts a layer", "step, ms"), _lanes),
    (
        ("recording", "over off", "95 %", "step, ms", "folding, µs a token", "bytes a token"),
        _tracing,
    ),
    (
        (
            "router",
            "ours",
            "× torch eager",
            "× torch.compile",
            "× copy",
            "ours, µs",
            "eager, µs",
            "copy, µs",
        ),
        _router,
    ),
    (("in C", "× torch operators", "C, ms", "torch, ms", "GB read", "still in torch"), _families),
    (("loading", "time over reading", "GB/s", "s"), _loading),
    (("start-up", "s"), _start),
    (("the screen", "median", "wanted"), _screens),
    (("missing", "why"), _missing),
)


def table(folder: Path, *, markdown: bool = False) -> str:
    """Everything there is, as aligned text or as Markdown tables."""
    found = read(folder)
    parts = [_machine(found)]
    for head, rows in TABLES:
        body = list(rows(found))
        if body:
            parts.append((_as_markdown if markdown else _as_text)([list(head), *body]))
    return "\n\n".join(parts)


def _machine(found: dict[str, Figures]) -> str:
    steps = [step for step in found.values() if "asked" in step]
    if not steps:
        return "no results"
    first = steps[0]
    alike = all(step.get(n) == first.get(n) for step in steps for n in ("asked", "sources"))
    mixed = "" if alike else "\nSteps differ in what was asked, or in the sources they measured."
    machine, asked = first["machine"], first["asked"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{asked['model']}; prompt {asked['prompt']}, {asked['tokens']} tokens a turn, "
        f"{asked['threads']} threads, {asked['rounds']} rounds\n"
        f"{machine['processor']} ({', '.join(machine['instructions'])}), {machine['cores']} cores, "
        f"{machine['memory_gb']} GB, {machine['system']}, Python {machine['python']}\n{versions}\n"
        f"Medians; ~ where no turn was quiet.{mixed}"
    )


def _as_text(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if column == 0 or not _numeric(rows, column) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _as_markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    ends = ["---:" if _numeric(rows, column) else "---" for column in range(len(rows[0]))]
    return "\n".join([lines[0], "| " + " | ".join(ends) + " |", *lines[1:]])


def _numeric(rows: list[list[str]], column: int) -> bool:
    cells = [row[column] for row in rows[1:] if row[column]]
    return bool(cells) and all(cell[0] in "0123456789~" for cell in cells)


def _ratio(value: Figures | None, digits: int = 2) -> str:
    if value is None:
        return ""
    return ("~" if value.get("noisy") else "") + f"{value['median']:.{digits}f}"


def _spread(value: Figures | None, digits: int = 2) -> str:
    if value is None or not (value.keys() & {"quartiles", "interval"}):
        return ""
    low, high = value.get("interval") or value["quartiles"]
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _number(value: Figures, digits: int) -> str:
    return f"{value['median']:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "results")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    print(table(options.folder, markdown=options.markdown))


if __name__ == "__main__":
    main()
