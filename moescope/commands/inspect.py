"""Say what a checkpoint is: family, decoder, router, sizes and warnings. Loads no weights.

Works on a folder that holds only a config.json.
"""

from __future__ import annotations

import argparse
from typing import Any

from moescope.commands import options

PRINTED_APART = ("layers", "notes", "router_fields")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder, org/name, or demo")
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from moescope.engine.checkpoint import Checkpoint
    from moescope.engine.describe import describe

    with Checkpoint.open(options.model_of(args.model), weights=False) as checkpoint:
        facts = describe(checkpoint)
    if args.json:
        options.print_json(facts)
        return 0
    for name, value in facts.items():
        if name not in PRINTED_APART:
            print(f"{name.replace('_', ' '):<20} {options.plain(_human(name, value))}")
    print("layers")
    for first, last, line in facts["layers"]:
        span = f"{first}" if first == last else f"{first}-{last}"
        print(f"  {span:<8} {options.plain(line)}")
    for note in facts["notes"]:
        print(f"note: {options.plain(note)}")
    return 0


def _human(name: str, value: Any) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case dict():
            return ", ".join(f"{_human(name, number)} in {key}" for key, number in value.items())
        case list():
            return ", ".join(map(str, value)) or "-"
        case int() if "bytes" in name or "memory" in name:
            return size(value)
        case int() if "parameters" in name:
            return f"{value / 1e9:.2f} G" if value >= 1e8 else f"{value / 1e6:.2f} M"
        case _:
            return str(value)


def size(count: int) -> str:
    """Bytes in decimal units, as disks and memory bandwidths are counted."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"
