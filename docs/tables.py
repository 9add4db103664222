"""Rewrites the generated tables of README.md and docs/ from the tables in code.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `python docs/tables.py` rewrites
them; the test suite checks that they are up to date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/variants.md", "docs/traces.md")
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
    document = json.loads((ROOT / "tests/oracle/conformance.json").read_text())
    rows: dict[str, list[dict[str, float]]] = {}
    for row in document["rows"]:
        rows.setdefault(row["family"], []).append(row)
    return table(
        ("family", "runs compared", "largest weight difference", "largest logit difference"),
        (
            (f"`{family}`", str(len(runs)), *(_worst(runs, key) for key in ("weights", "logits")))
            for family, runs in rows.items()
        ),
    )


def _worst(runs: list[dict[str, float]], key: str) -> str:
    return f"{max(run['largest'][key] for run in runs):.1e}"  # type: ignore[index]


def variants() -> str:
    from moescope.variants import CATALOGUE

    return table(
        ("name", "what it does", "seen in"),
        ((f"`{v.name}`", v.summary, v.evidence or "") for v in CATALOGUE.values()),
    )


def key_table() -> str:
    from moescope.ui import keys

    rows: dict[str, str] = {}
    for key in (*keys.MAIN, *keys.APP):
        if key.id.startswith("generate_") and key.id != "generate_A":
            continue
        shown = key.shown or key.keys.split(",")[0]
        label = "Generate with that variant" if key.id == "generate_A" else key.label
        rows["A … H" if key.id == "generate_A" else shown] = f"{label}. {key.tip}".strip()
    return table(("key", "does"), ((f"`{key}`", text) for key, text in rows.items()))


TABLES: dict[str, Callable[[], str]] = {
    "families": families,
    "conformance": conformance,
    "variants": variants,
    "keys": key_table,
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
