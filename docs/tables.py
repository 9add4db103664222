"""Rewrites the generated tables of README.md and docs/ from the tables in code.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, the text of a file after
`<!-- file: PATH -->`. `python docs/tables.py` rewrites them; the test suite checks that they are up
to date.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/adding-a-family.md",
    "docs/balance.md",
    "docs/check.md",
    "docs/diagnose.md",
    "docs/families.md",
    "docs/keys.md",
    "docs/performance.md",
    "docs/traces.md",
    "docs/quantised.md",
    "docs/variants.md",
)
sys.path.insert(0, str(ROOT))  # the tests' tables
BLOCK = re.compile(r"(<!-- (table|file): (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *(list(row) for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in lines
    )


def families() -> str:
    """Model types, as many to a line as fit."""
    from moescope.engine.families import SUPPORTED

    return textwrap.fill(" · ".join(f"`{name}`" for name in SUPPORTED), 118) + "\n"


def family_table() -> str:
    """What each family is, at the sizes of a released checkpoint."""
    from moescope.engine.families import SUPPORTED

    def row(name: str) -> tuple[str, ...]:
        spec = _released(name)
        routers = dict.fromkeys(router.line(wiring=True) for _, _, router in spec.routers())
        layouts = {row["experts"] for row in _of(name, "layout")}
        family = SUPPORTED[name]
        cells = (" / ".join(routers), _mixers(spec), "; ".join(sorted(layouts)))
        return (f"`{name}`", family.title, *cells)

    head = ("`model_type`", "family", "router", "what mixes tokens", "layouts of the experts")
    return table(head, map(row, SUPPORTED))


def family_notes() -> str:
    """What else a user should know of a family."""
    from moescope.engine.families import SUPPORTED

    return "".join(
        f"- `{name}`: {note}.\n" for name, family in SUPPORTED.items() for note in family.notes
    )


_SIZES = re.compile(r" \d+(×\d+)?|, (kv|latent|state) \d+")


def _released(name: str) -> Any:
    """The spec of a released checkpoint, else of what the config class takes for one, else of the
    tiny checkpoint that is tested."""
    from transformers import AutoConfig

    from moescope.engine import families
    from moescope.engine.config import parse_object
    from moescope.errors import MoescopeError
    from tests.families import PUBLISHED
    from tests.oracle.matrix import BY_FAMILY, spec_of

    if name in PUBLISHED:
        return families.build(PUBLISHED[name])
    text = AutoConfig.for_model(name).to_json_string(use_diff=False)
    try:
        return families.build(parse_object(text.encode(), "config.json"))
    except MoescopeError:  # its class gives no config of which a model can be made
        return spec_of(BY_FAMILY[name][0])


def _mixers(spec: Any) -> str:
    from moescope.engine.layer_words import layer_kinds

    words = dict.fromkeys(_SIZES.sub("", mixers) for mixers, _ in layer_kinds(spec))
    return " / ".join(word for word in words if word != "-")


def conformance() -> str:
    from moescope.engine.families import SUPPORTED

    head = (
        "`model_type`",
        "checked against",
        "runs of 24 tokens",
        "largest weight difference",
        "largest logit difference",
        "wrong specs, all noticed",
        "layouts, all equal",
        "bfloat16: same sets in clear rows",
    )
    return table(head, map(_checked, SUPPORTED))


def _checked(family: str) -> tuple[str, ...]:
    from tests.families import MLX, SAME

    oracle = "mlx-lm" if family in MLX else "transformers"
    version = _results(family)["versions"][oracle]
    runs, close = _of(family, "float32"), _of(family, "bfloat16")
    return (
        f"`{family}`",
        f"{oracle} {version}" + (f" (`{SAME[family]}`)" if family in SAME else ""),
        str(len(runs)),
        f"{_most(runs, 'largest_weight_difference'):.1e}",
        f"{_most(runs, 'largest_logit_difference'):.1e}",
        str(len(_of(family, "mutant"))),
        str(len(_of(family, "layout"))),
        f"{100 * min(row['same_sets'] for row in close):.1f} %" if close else "",
    )


@cache
def _results(family: str) -> dict[str, Any]:
    """The committed results of `make conformance`."""
    path = ROOT / f"tests/oracle/conformance/{family}.json"
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def _of(family: str, kind: str) -> list[dict[str, Any]]:
    return [row for row in _results(family)["rows"] if row["kind"] == kind]


def _most(rows: list[dict[str, Any]], key: str) -> float:
    return max(row[key] for row in rows)


def variants() -> str:
    from moescope.variants import CATALOGUE

    return table(
        ("name", "what it does", "seen in"),
        ((f"`{v.name}`", v.summary, v.evidence or "") for v in CATALOGUE.values()),
    )


def faults() -> str:
    from moescope.variants import CATALOGUE, FAULTS

    forms = {name: [v for v in CATALOGUE.values() if v.reported == name] for name in FAULTS}
    seen = {"routing": "in the routing", "downstream": "in the layers after", "none": "not at all"}
    return table(
        ("fault", "forms", "shows", "signature", "fix"),
        (
            (
                f"`{name}`",
                ", ".join(f"`{v.name}`" for v in held) if len(held) > 1 else "",
                seen[held[0].seen],
                str(held[0].signature) if held[0].seen == "routing" else "",
                held[0].fix,
            )
            for name, held in forms.items()
        ),
    )


def diagnosis() -> str:
    """The committed results of `make diagnosis`."""
    from tests.diagnosis import report

    return table(*report.by_family(report.committed()))


def diagnosis_faults() -> str:
    from tests.diagnosis import report

    return table(*report.by_fault(report.committed()))


def diagnosis_misses() -> str:
    from tests.diagnosis import report

    return table(*report.misses(report.committed()))


def diagnosis_absent() -> str:
    """The families without results, and why."""
    from tests.diagnosis import report

    return textwrap.fill(report.absent(report.committed()), 118) + "\n"


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


def lint() -> str:
    """The rules, from the first sentence of their docstrings."""
    from moescope.trace.lint_rules import RULES

    return table(
        ("rule", "what it looks for"),
        ((f"`{rule.__name__}`", _line(rule.__doc__ or "")) for rule in RULES),
    )


def _line(text: str) -> str:
    return " ".join(text.split()).rstrip(".")


def cpu() -> str:
    """What `make bench` measured last."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import report

    return str(report.table(ROOT / "benchmarks/results", markdown=True)) + "\n"


def quantised() -> str:
    """Formats of packed weights, in the words of the table that reads them."""
    from moescope.engine.quantised.formats import FORMATS

    def tensors(roles: Any) -> str:
        return " ".join(f"`{role.suffix or '(the weight)'}`" for role in roles if role.read)

    return table(
        ("format", "written by", "a number is", "tensors"),
        (
            (title, known.writer, known.value, tensors(known.roles.values()))
            for title, known in FORMATS.items()
        ),
    )


TABLES: dict[str, Callable[[], str]] = {
    "quantised": quantised,
    "balance": balance,
    "tolerances": tolerances,
    "lint": lint,
    "cpu": cpu,
    "families": families,
    "family_table": family_table,
    "family_notes": family_notes,
    "conformance": conformance,
    "variants": variants,
    "faults": faults,
    "diagnosis": diagnosis,
    "diagnosis_faults": diagnosis_faults,
    "diagnosis_misses": diagnosis_misses,
    "diagnosis_absent": diagnosis_absent,
    "keys": all_keys,
    "first_keys": first_keys,
}


def listing(path: str) -> str:
    """The text of a file of this repository."""
    return f"```python\n{(ROOT / path).read_text()}```\n"


def filled(text: str) -> str:
    def block(m: re.Match[str]) -> str:
        held = TABLES[m[3]]() if m[2] == "table" else listing(m[3])
        return f"{m[1]}{held}{m[4]}"

    return BLOCK.sub(block, text)


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        if path.exists():
            path.write_text(filled(path.read_text()))


if __name__ == "__main__":
    main()
