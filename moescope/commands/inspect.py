"""Say what a checkpoint is: family, decoder, router, sizes and warnings. Loads no weights.

Works on a folder that holds only a config.json.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Iterator
from typing import Any

from moescope.commands import options

NAME = 11  # columns of what a line is about
LABEL, CELL = 26, 11  # of the table of memory: its first column, the others
MOST, LEAST = 100, 60  # columns of a page
NO_WEIGHTS = "no weights in this folder"


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
    width = min(max(shutil.get_terminal_size().columns, LEAST), MOST)
    for line in page(facts, width):
        print(options.plain(line))
    return 0


def page(facts: dict[str, Any], width: int = 80) -> Iterator[str]:
    """The lines of a report `width` columns wide."""
    yield from _head(facts, width)
    yield ""
    yield from _layers(facts["layers"], width)
    yield ""
    for router in facts["routers"]:
        yield from _router(router, facts, width)
    yield ""
    yield from _memory(facts, width)
    notes = [note for note in facts["notes"] if note != NO_WEIGHTS]
    if notes:
        yield ""
    for note in notes:
        yield from _wrapped("note", note, width)


def _head(facts: dict[str, Any], width: int) -> Iterator[str]:
    share = facts["active_parameters"] / facts["parameters"]
    yield from _wrapped("model", facts["name"], width)
    yield from _wrapped("family", f"{facts['family']} ({facts['model_type']})", width)
    nulls = any(router["fields"].get("num_null_experts") for router in facts["routers"])
    most = "at most " * nulls
    active = f"{most}{count(facts['active_parameters'])} for each token ({share:.0%})"
    yield from _wrapped("parameters", f"{count(facts['parameters'])}, {active}", width)
    sizes = f"hidden {facts['hidden_size']}, vocabulary {facts['vocab_size']}"
    tokenizer = "" if facts["tokenizer"] else "; no tokenizer.json"
    yield from _wrapped("sizes", f"{sizes}, context {facts['context']}{tokenizer}", width)
    yield from _weights(facts, width)


def _weights(facts: dict[str, Any], width: int) -> Iterator[str]:
    method = facts["quantisation"]
    if facts["stored"] is None:
        words = "none in this folder" + (f"; the config says {method}" if method else "")
        yield from _wrapped("weights", words, width)
        return
    shards = f"{facts['shards']} shard" + "s" * (facts["shards"] != 1)
    held = f"{size(facts['weights_bytes'])} in {shards}; {facts['layout']}"
    left = facts["unused_tensors"]
    yield from _wrapped("weights", held + (f"; {left} tensors not used" if left else ""), width)
    kinds, total = facts["stored"], sum(kind["bytes"] for kind in facts["stored"])
    parts = [f"{kind['as']} {_share(kind['bytes'] / total)}" for kind in kinds]
    words = kinds[0]["as"] if len(kinds) == 1 else ", ".join(parts)
    yield from _wrapped("stored as", words + (f" ({method})" if method else ""), width)


def _share(share: float) -> str:
    return f"{share:.0%}" if share >= 0.005 else "<1%"


def _layers(rows: list[dict[str, Any]], width: int) -> Iterator[str]:
    """Equal layers in one line: numbers, mixer, feed-forward part; in two where one is too long."""
    first = max(len(row["layers"]) for row in rows)
    second = max(len(row["mixer"]) for row in rows)
    third = max(len(row["feed_forward"]) for row in rows)
    left = " " * (first + 4)
    yield "layers"
    for row in rows:
        start = f"  {row['layers']:<{first}}  "
        if len(left) + second + 2 + third <= width:
            yield f"{start}{row['mixer']:<{second}}  {row['feed_forward']}"
            continue
        for words in (row["mixer"], row["feed_forward"]):
            for line in textwrap.wrap(words, width - len(left)):
                yield start + line
                start = left


def _router(router: dict[str, Any], facts: dict[str, Any], width: int) -> Iterator[str]:
    only = len(facts["routers"]) == 1
    where = "" if only else f"; layers {router['layers']}"
    yield from _wrapped("router", router["words"] + where, width)
    pairs = (f"{name} {_field(value)}" for name, value in router["fields"].items())
    yield from _wrapped("fields", " · ".join(pairs), width)
    if router is facts["routers"][-1] and facts["router_stored_as"]:
        yield from _wrapped("stored as", facts["router_stored_as"], width)


def _field(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _memory(facts: dict[str, Any], width: int) -> Iterator[str]:
    """A table: rows are devices and what they hold, columns dtypes."""
    needed, read = facts["memory_needed"], facts["bytes_per_token"]
    dtypes = list(facts["cache_bytes"])
    yield f"{'memory needed':<{LABEL}}" + "".join(f"{dtype:>{CELL}}" for dtype in dtypes)

    def row(label: str, cells: dict[str, int]) -> str:
        return f"  {label:<{LABEL - 2}}" + "".join(f"{size(cells[d]):>{CELL}}" for d in dtypes)

    for label, device in (("cpu, cuda", "cpu"), ("mlx", "mlx")):
        reason = facts["runs_on"][device]
        if not reason:
            yield row(label, needed[device])
            continue
        left = f"  {label:<{NAME}}"
        yield from textwrap.wrap(
            f"does not run: {reason}",
            width,
            initial_indent=left,
            subsequent_indent=" " * len(left),
        )
    yield row(f"  cache, {facts['cache_tokens']} tokens", facts["cache_bytes"])
    yield row("read for each token", read)
    if facts["packed_bytes"]:
        grown = facts["packed_expanded"]["bfloat16"]
        words = (
            f"{size(facts['packed_bytes'])} of packed weights are {size(grown)} in bfloat16: torch "
            f"expands them. As stored, a token reads {size(read['stored'])}."
        )
        kept = needed["mlx"]["bfloat16"] < needed["cpu"]["bfloat16"]
        words += " MLX multiplies them packed." * (kept and not facts["runs_on"]["mlx"])
        yield from (f"  {line}" for line in textwrap.wrap(words, width - 2))


def _wrapped(name: str, words: str, width: int) -> Iterator[str]:
    """`name` and words beside it, the following lines below the first word."""
    left = " " * (NAME + 1)
    lines = textwrap.wrap(words, width - len(left), break_on_hyphens=False) or [""]
    yield f"{name:<{NAME}} {lines[0]}".rstrip()
    for line in lines[1:]:
        yield left + line


def count(number: int) -> str:
    """Parameters: `1.03 T`, `30.5 G`, `720 M`."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number / 1e3:.3g} k"


def size(number: int) -> str:
    """Bytes in decimal units, as disks and memory bandwidths are counted."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} B"
