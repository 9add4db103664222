"""How the weights of a plan are stored: in which formats, how many bytes, and what one token reads
of them. From headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moescope.engine import mlx_limits, parameters, quantised
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families.plans import Piece, Plan
from moescope.engine.header import TensorInfo

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_GATE = ".gate.weight"


@dataclass(frozen=True, slots=True)
class Stored:
    """`kinds`: (words, numbers, bytes) of each format, most bytes first; `router`: that of the
    routers' matrices. `packed` numbers take `packed_bytes`. Of tensors that MLX multiplies as they
    are, `kept_on_mlx` are the bytes, and `kept_numbers` what they stand for."""

    kinds: tuple[tuple[str, int, int], ...]
    router: str
    bytes_per_token: int
    packed: int
    packed_bytes: int
    kept_on_mlx: int
    kept_numbers: int


def stored(spec: DecoderSpec, plan: Plan, tensors: Mapping[str, TensorInfo]) -> Stored:
    """What a checkpoint holds of a decoder."""
    numbers: dict[str, int] = {}
    sizes: dict[str, int] = {}
    per_token = packed = packed_bytes = kept = kept_numbers = 0
    placements = {placement.target: placement for placement in plan.placements}
    for slot, read in parameters.read_per_token(spec):
        placement = placements[slot.name]
        for piece in placement.pieces:
            words, size = stored_as(piece, tensors), bytes_of(piece, tensors)
            numbers[words] = numbers.get(words, 0) + piece.elements
            sizes[words] = sizes.get(words, 0) + size
            if piece.packed is not None:
                packed, packed_bytes = packed + piece.elements, packed_bytes + size
        here = sum(bytes_of(piece, tensors) for piece in placement.pieces)
        per_token += here * read // slot.elements
        if mlx_limits.stays_packed(placement):
            kept, kept_numbers = kept + here, kept_numbers + slot.elements
    kinds = sorted(sizes, key=lambda words: -sizes[words])
    return Stored(
        tuple((words, numbers[words], sizes[words]) for words in kinds),
        router_words(plan, tensors),
        per_token,
        packed,
        packed_bytes,
        kept,
        kept_numbers,
    )


def router_words(plan: Plan, tensors: Mapping[str, TensorInfo]) -> str:
    """What the routers are stored in: `8-bit affine g64`; several, each with its count."""
    found: dict[str, int] = {}
    for placement in plan.placements:
        for piece in placement.pieces if placement.target.endswith(_GATE) else ():
            words = stored_as(piece, tensors)
            found[words] = found.get(words, 0) + 1
    if len(found) < 2:
        return "".join(found)
    return ", ".join(f"{words} ({count})" for words, count in found.items())


def stored_as(piece: Piece, tensors: Mapping[str, TensorInfo]) -> str:
    """`bfloat16`, or the format of what is packed."""
    if piece.packed is not None:
        return quantised.words(piece.packed)
    dtype = tensors[piece.source].dtype
    return _DTYPES.get(dtype, dtype)


def bytes_of(piece: Piece, tensors: Mapping[str, TensorInfo]) -> int:
    return sum(tensors[name].nbytes for name in piece.published)
