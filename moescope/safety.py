"""What moescope accepts from strangers, and the one gate their text passes before anybody sees it.

`LIMITS` is the table of sizes beyond which a file is refused. `printable` and `single_line` make
foreign text (tokens, tensor names, paths, messages of libraries) safe to print; the rule is per
character and keeps no state, so a sequence cut anywhere comes out the same. Standard library only.
"""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from functools import lru_cache

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
TAB = "    "
CUT = "…"


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes beyond which a file is refused, and what each is measured against."""

    config_bytes: int = 4 * MIB  # config, generation_config, tokenizer_config: below 100 kB
    index_bytes: int = 64 * MIB  # model.safetensors.index.json: the largest are about 10 MB
    tokenizer_bytes: int = 128 * MIB  # tokenizer.json: up to about 35 MB
    template_bytes: int = 256 * KIB  # chat templates: below 20 kB
    header_bytes: int = 32 * MIB  # safetensors header: some 120 bytes a tensor
    tensors_per_shard: int = 200_000  # more cost seconds in every reader
    shards: int = 4096  # each keeps a file open for reading; the largest releases have 300
    tensor_name: int = 512  # printable ASCII: names are shown and are keys
    file_name: int = 255  # what file systems take
    rank: int = 8  # no layout of a decoder has more than 5
    dimension: int = 2**31 - 1  # MLX computes with 32 bits
    json_depth: int = 64  # configs nest about 6 deep
    layers: int = 1024
    experts: int = 4096  # per layer
    top_k: int = 64
    encode_chars: int = 4 * MIB  # a prompt: far beyond any context
    rendered_chars: int = 1_000_000  # a rendered chat: beyond any context
    template_seconds: float = 2.0  # of processor time; rendering takes milliseconds
    tokenizer_seconds: float = 5.0  # of processor time; loading the largest takes about one
    template_memory: int = 512 * MIB  # address space of the child that renders
    tokenizer_memory: int = 2 * GIB  # of the child that loads a tokenizer
    import_rows: int = 50_000_000
    import_bytes: int = 8 * GIB  # after expansion
    import_columns: int = 256
    import_line: int = 1 * MIB
    shown_line: int = 4096  # characters: drawing costs time per character


LIMITS = Limits()


@lru_cache(maxsize=8192)
def escape_char(char: str) -> str:
    """One character as it may be shown: itself, spaces for TAB, or a visible escape.

    Escaped are C0 (but LF), DEL, C1, and the categories Cf (bidi, zero width, tags), Zl, Zp, Cs, Co
    and Cn, and the variation selectors that can carry hidden text.
    """
    code = ord(char)
    if char == "\n" or 0x20 <= code <= 0x7E:
        return char
    if char == "\t":
        return TAB
    if code < 0xA0:
        return f"\\x{code:02x}"
    hidden = 0xE0100 <= code <= 0xE01EF
    if not hidden and (char.isprintable() or unicodedata.category(char) == "Zs"):
        return char
    return f"<U+{code:04X}>"


def printable(text: str, limit: int | None = LIMITS.shown_line) -> str:
    """`text` with nothing in it that a terminal acts on; at most `limit` characters, cut with `…`.

    Line feeds stay. Doing it twice changes nothing, and without a limit doing it to the parts gives
    the same as doing it to the whole.
    """
    if limit is not None:
        text = text[: limit + 1]
    if not (text.isascii() and text.replace("\n", "").isprintable()):
        text = "".join(map(escape_char, text))
    if limit is not None and len(text) > limit:
        return text[: max(limit - len(CUT), 0)] + CUT[:limit]
    return text


def single_line(text: str, limit: int | None = LIMITS.shown_line) -> str:
    """`printable`, and line feeds shown as `\\n`: for messages, titles and cells of tables."""
    if limit is not None:
        text = text[: limit + 1]
    return printable(text.replace("\n", "\\n"), limit)
