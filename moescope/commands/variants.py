"""List router variants and, with MODEL, what each would change for that model.

A variant expression is a name from this list, or fields of the router's spec, optionally for some
layers: softmax_over_selected, norm_topk_prob=true,num_experts_per_tok=4, num_experts_per_tok+1@3-7.
"""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

from moescope.commands import options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="a checkpoint folder, org/name, or demo"
    )
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from moescope import variants

    spec = _first_router(args.model) if args.model else None
    rows = [_row(variant, spec) for variant in variants.CATALOGUE.values()]
    if args.json:
        trained = spec.line() if spec is not None else None
        options.print_json({"model": args.model, "trained": trained, "variants": rows})
        return 0
    if spec is not None:
        print(f"{options.plain(args.model)}: {spec.line()}\n")
    for row in rows:
        if spec is None or row["applies"]:
            _print(row)
    skipped = [row["name"] for row in rows if spec is not None and not row["applies"]]
    if skipped:
        print(textwrap.fill(f"change nothing here: {', '.join(skipped)}", 96))
    return 0


def _first_router(model: str) -> Any:
    from moescope.engine import families
    from moescope.engine.checkpoint import Checkpoint

    with Checkpoint.open(options.model_of(model), weights=False) as checkpoint:
        return families.build(checkpoint.config).routers()[0][2]


def _row(variant: Any, spec: Any) -> dict[str, Any]:
    from moescope import variants

    row = {
        "name": variant.name,
        "title": variant.title,
        "summary": variant.summary,
        "evidence": variant.evidence,
    }
    if spec is None:
        return row
    applies = variants.applicable(variant, spec)
    result = variants.apply(variant.name, spec, 0) if applies else spec
    return {**row, "applies": applies, "router": result.line(), "equal": spec.equal(result)}


def _print(row: dict[str, Any]) -> None:
    print(row["name"])
    for text in (
        row["summary"],
        row.get("router"),
        row["evidence"] and f"seen in {row['evidence']}",
    ):
        if text:
            print(textwrap.indent(textwrap.fill(text, 92), "    "))
