"""The tables of docs/diagnose.md, made of the committed results of `make diagnosis`."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

RESULTS = Path(__file__).with_name("results")
LEVELS = {"weights": "with weights", "order": "in rank order"}
DTYPES = ("float32", "bfloat16")
CLASSLESS = ("bailing_moe", "deepseek")  # their code came with the checkpoints
WELL = ("named", "no trace", "correct")
Table = tuple[Sequence[str], list[Sequence[str]]]
Rows = list[dict[str, Any]]


def committed() -> Rows:
    paths = sorted(RESULTS.glob("*.json"))
    return [row for path in paths for row in json.loads(path.read_text())["rows"]]


def reported(names: Sequence[str]) -> list[str]:
    """Faults by the names they are reported under, each once."""
    from moescope.variants import CATALOGUE

    return list(dict.fromkeys(_reported(name, CATALOGUE) for name in names))


def _reported(name: str, catalogue: Any) -> str:
    """Of a pair, both."""
    return " + ".join(catalogue[part].reported for part in name.replace("/", " + ").split(" + "))


def _outcomes(rows: Rows, level: str) -> str:
    held = [row[level]["outcome"] for row in rows]
    named, silent = held.count("named"), held.count("no trace")
    return f"{named}, {silent}, {len(held) - named - silent}"


def by_family(rows: Rows) -> Table:
    lines = []
    for family in sorted({row["family"] for row in rows}):
        own = [row for row in rows if row["family"] == family]
        patched = [row for row in own if row["fault"]]
        sizes = [len(reported(row["weights"]["class"])) for row in patched]
        sizes = [size for size in sizes if size]
        clean = [row[level]["outcome"] for row in own if not row["fault"] for level in LEVELS]
        lines.append(
            (
                f"`{family}`",
                str(len({row["fault"] for row in patched})),
                *(
                    _outcomes([row for row in patched if row["dtype"] == dtype], level)
                    for level in LEVELS
                    for dtype in DTYPES
                ),
                f"{max(sizes, default=0)} ({median(sizes):g})" if sizes else "-",
                f"{clean.count('correct')} of {len(clean)}",
            )
        )
    columns = [f"{level}, {dtype}" for level in ("weights", "order") for dtype in DTYPES]
    head = ("family", "faults", *columns, "largest class (median)", "unpatched: routed correctly")
    return head, lines


def by_fault(rows: Rows) -> Table:
    patched = [row for row in rows if row["fault"]]
    lines = []
    for fault in dict.fromkeys(row["fault"] for row in patched):
        own = [row for row in patched if row["fault"] == fault]
        families = len({row["family"] for row in own})
        lines.append((f"`{fault}`", str(families), *(_outcomes(own, level) for level in LEVELS)))
    return ("fault", "families", *LEVELS.values()), lines


def misses(rows: Rows) -> Table:
    """Every miss by name; families with the same one share a line."""
    found: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for row in rows:
        for level, words in LEVELS.items():
            made = row[level]
            if made["outcome"] not in WELL:
                key = (row["fault"] or "unpatched", row["dtype"], words, _said(made))
                found[key].append(f"`{row['family']}`")
    lines = [
        (f"`{fault}`", f"{words}, {dtype}", said, ", ".join(families))
        for (fault, dtype, words, said), families in sorted(found.items())
    ]
    return ("fault", "recorded", "what was said", "families"), lines or [("none", "", "", "")]


def _said(made: dict[str, Any]) -> str:
    if made["verdict"] == "fault":
        return ", ".join(f"`{name}`" for name in made["class"])
    if made["outcome"] == "missed, not listed":
        return "routed correctly, without it among those that would look the same"
    return {"trained": "routed correctly", "none": "none of these"}[made["verdict"]]


def absent(rows: Rows) -> str:
    """Sentences of the families whose faults have no results."""
    from moescope.engine.families import SUPPORTED
    from tests.diagnosis.described import DESCRIBE

    run = {row["family"] for row in rows if row["fault"]}
    later = sorted(set(DESCRIBE) - run)
    never = sorted(set(SUPPORTED) - set(DESCRIBE) - set(CLASSLESS))
    sentences = [f"{_listed(CLASSLESS)} have no class in *transformers* to patch."]
    if never:
        sentences.append(f"Faults are not written yet for {_listed(never)}.")
    if later:
        sentences.append(f"Written, and run without a fault only: {_listed(later)}.")
    return " ".join(sentences)


def _listed(families: Sequence[str]) -> str:
    return ", ".join(f"`{family}`" for family in families)
