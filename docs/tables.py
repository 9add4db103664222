"""Rewrites the generated tables of README.md and docs/ from the tables in code.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `python docs/tables.py` rewrites
them; the test suite checks that they are up to date.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/balance.md",
    "docs/check.md",
    "docs/keys.md",
    "docs/performance.md",
    "docs/variants.md",
)
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in lines
    )


def families() -> str:
    from moescope.engine.families import SUPPORTED

    return table(
        ("`model_type`", "family", "router as released"),
        ((f"`{name}`", family.title, family.released) for name, family in SUPPORTED.items()),
    )


def conformance() -> str:
    rows: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for family, results in _results():
        for row in results:
            rows.setdefault(family, {}).setdefault(row["kind"], []).append(row)
    return table(
        (
            "family",
            "runs of 24 tokens",
            "largest weight difference",
            "largest logit difference",
            "wrong specs, all noticed",
            "layouts, all equal",
            "bfloat16: same sets in clear rows",
        ),
        (
            (
                f"`{family}`",
                str(len(kinds["float32"])),
                f"{_most(kinds['float32'], 'largest_weight_difference'):.1e}",
                f"{_most(kinds['float32'], 'largest_logit_difference'):.1e}",
                str(len(kinds["mutant"])),
                str(len(kinds["layout"])),
                f"{100 * min(row['same_sets'] for row in kinds['bfloat16']):.1f} %",
            )
            for family, kinds in rows.items()
        ),
    )


def _results() -> Iterable[tuple[str, list[dict[str, Any]]]]:
    """The committed rows of `make conformance`, family by family."""
    from moescope.engine.families import SUPPORTED

    for family in SUPPORTED:
        path = ROOT / f"tests/oracle/conformance/{family}.json"
        yield family, json.loads(path.read_text())["rows"]


def _most(rows: list[dict[str, Any]], key: str) -> float:
    return max(row[key] for row in rows)


def variants() -> str:
    from moescope.variants import CATALOGUE

    return table(
        ("name", "what it does", "seen in"),
        ((f"`{v.name}`", v.summary, v.evidence or "") for v in CATALOGUE.values()),
    )


FIRST_KEYS = (
    *("pause", "step", "back", "layer_up", "layer_down", "pick_left", "pick_right", "token_back"),
    *(
        "token_on",
        "inspect",
        "shown_next",
        "generate_A",
        "add_variant",
        "compare",
        "zoom_in",
        "tint",
    ),
    *("export", "open", "prompt", "help", "quit"),
)


def all_keys() -> str:
    from moescope.ui import keys

    return _key_table((*keys.MAIN, *keys.APP))


def first_keys() -> str:
    from moescope.ui import keys

    return _key_table(key for key in (*keys.MAIN, *keys.APP) if key.id in FIRST_KEYS)


def _key_table(keys: Iterable[Any]) -> str:
    rows: dict[str, str] = {}
    for key in keys:
        if key.id.startswith("generate_") and key.id != "generate_A":
            continue
        shown = key.shown or key.keys.split(",")[0]
        shown = {"left": "←", "right": "→", "shift+left": "shift+←", "shift+right": "shift+→"}.get(
            shown, shown
        )
        if key.id == "generate_A":
            rows["A … H"] = "Generate with that variant, from the next token on."
        else:
            rows[shown] = f"{key.label}. {key.tip}".strip()
    return table(("key", "does"), ((f"`{key}`", text) for key, text in rows.items()))


PARTS = re.compile(r"^ *(Formula|Balanced|Source): ", re.MULTILINE)


def balance() -> str:
    """The measures, from their docstrings: a summary, then Formula, Balanced and Source."""
    from moescope.diagnosis import balance as measures

    rows = []
    for name in (
        *("variation", "max_over_mean", "max_violation", "gini", "jain", "effective_experts"),
        *("dead", "cold", "coverage", "distance", "pooled_loss", "layer_loss", "sequence_loss"),
        *("z_terms", "pair_counts", "lift"),
    ):
        text = PARTS.split(getattr(measures, name).__doc__)
        said = dict(zip(text[1::2], text[2::2], strict=True))
        rows.append(
            [f"`{name}`", *(_line(said[part]) for part in ("Formula", "Balanced", "Source"))]
        )
    return table(("measure", "formula", "balanced", "source"), rows)


def tolerances() -> str:
    from moescope.commands.check import TOLERANCES as OPTIONS
    from moescope.diagnosis.check import TOLERANCES

    return table(
        ("option", "what", *TOLERANCES),
        (
            (f"`{option}`", text, *(f"{getattr(t, name):g}" for t in TOLERANCES.values()))
            for option, name, text in OPTIONS
        ),
    )


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def cpu() -> str:
    """What `make bench` measured last."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import report

    return str(report.table(ROOT / "benchmarks/results", markdown=True)) + "\n"


TABLES: dict[str, Callable[[], str]] = {
    "balance": balance,
    "tolerances": tolerances,
    "cpu": cpu,
    "families": families,
    "conformance": conformance,
    "variants": variants,
    "keys": all_keys,
    "first_keys": first_keys,
}


def filled(text: str) -> str:
    return BLOCK.sub(lambda m: m.group(1) + TABLES[m.group(2)]() + m.group(3), text)


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        if path.exists():
            path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
