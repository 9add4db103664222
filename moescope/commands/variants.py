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

    spec = _decoder(args.model) if args.model else None
    rows = [_row(variant, spec) for variant in variants.CATALOGUE.values()]
    if args.json:
        trained = spec.routers()[0][2].line() if spec is not None else None
        options.print_json({"model": args.model, "trained": trained, "variants": rows})
        return 0
    if spec is not None:
        print(f"{options.plain(args.model)}: {spec.routers()[0][2].line()}\n")
    for row in rows:
        if spec is None or row["applies"]:
            _print(row)
    skipped = [row["name"] for row in rows if spec is not None and not row["applies"]]
    if skipped:
        print(textwrap.fill(f"change nothing here: {', '.join(skipped)}", 96))
    return 0


def _decoder(model: str) -> Any:
    from moescope.engine import families
    from moescope.engine.checkpoint import Checkpoint

    with Checkpoint.open(options.model_of(model), weights=False) as checkpoint:
        return families.build(checkpoint.config)


def _row(variant: Any, spec: Any) -> dict[str, Any]:
    from moescope.variants import DECODER_EDITS

    row = {
        "name": variant.name,
        "fault": variant.reported,
        "title": variant.title,
        "summary": variant.summary,
        "seen": variant.seen,
        "signature": str(variant.signature) if variant.seen == "routing" else "",
        "fix": variant.fix,
        "rebuilds": variant.rebuilds,
        "changes": [DECODER_EDITS[name] for name in variant.decoder],
        "evidence": variant.evidence,
        "links": list(variant.links),
    }
    return row if spec is None else {**row, **_for_model(variant, spec)}


def _for_model(variant: Any, spec: Any) -> dict[str, Any]:
    """What the variant does to the first router that it means something for."""
    from moescope import variants
    from moescope.engine.edited import layers_of

    layers = layers_of(variant.name, spec)
    layer, _, trained = next(
        (router for router in spec.routers() if router[0] in layers), spec.routers()[0]
    )
    result = variants.apply(variant.name, trained, layer) if layers else trained
    return {
        "applies": bool(layers),
        "layers": [layers[0], layers[-1]] if layers else [],
        "router": result.line(wiring=variant.rebuilds),
        "equal": trained.equal(result) and not variant.decoder,
    }


SEEN = {
    "routing": "",
    "downstream": "shows only in the routers after the first",
    "none": "listed only: nothing of it is in the routing",
}


def _print(row: dict[str, Any]) -> None:
    print(row["name"])
    for text in (
        row["summary"],
        row.get("router"),
        "; ".join(row["changes"]),
        row["signature"] if row["name"] != "trained" else "",
        SEEN[row["seen"]],
        "rebuilds the step" if row["rebuilds"] else "",
        row["evidence"] and f"seen in {row['evidence']}",
    ):
        if text:
            print(textwrap.indent(textwrap.fill(text, 92), "    "))
