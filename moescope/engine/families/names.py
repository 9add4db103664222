"""From our tensor names to those of a checkpoint: prefixes as a table, expert layouts as a table.

`place` decides, before anything is read, where each published tensor goes, and checks every shape
against the config. It reads names and shapes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from moescope.engine.config import bad
from moescope.engine.decoder import DecoderSpec
from moescope.engine.parameters import Slot, slots
from moescope.safety import single_line


class Stored(Protocol):
    """What `place` asks of a published tensor."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def shard(self) -> str: ...


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Where the experts' gate, up and down matrices are, below the MoE module.

    With `{e}` a name stands for one expert's matrix; without, for all experts stacked. `gate_up` is
    gate rows above up rows in one tensor.
    """

    title: str
    down: str
    gate_up: str = ""
    gate: str = ""
    up: str = ""


LAYOUTS: tuple[ExpertLayout, ...] = (
    ExpertLayout(
        "hub, one tensor per expert",
        gate="experts.{e}.gate_proj.weight",
        up="experts.{e}.up_proj.weight",
        down="experts.{e}.down_proj.weight",
    ),
    ExpertLayout(
        "hub, one tensor per expert (w1, w2, w3)",
        gate="experts.{e}.w1.weight",
        up="experts.{e}.w3.weight",
        down="experts.{e}.w2.weight",
    ),
    ExpertLayout(
        "transformers 5, fused experts",
        gate_up="experts.gate_up_proj",
        down="experts.down_proj",
    ),
    ExpertLayout(
        "mlx-lm, stacked experts",
        gate="switch_mlp.gate_proj.weight",
        up="switch_mlp.up_proj.weight",
        down="switch_mlp.down_proj.weight",
    ),
)

PRE_NORM_NAMES: dict[str, tuple[str, ...]] = {
    "embed": ("model.embed_tokens",),
    "final_norm": ("model.norm",),
    "head": ("lm_head",),
    "layers.{n}.attention": ("model.layers.{n}.self_attn",),
    "layers.{n}.attention.pre_norm": ("model.layers.{n}.input_layernorm",),
    "layers.{n}.mlp": ("model.layers.{n}.mlp", "model.layers.{n}.block_sparse_moe"),
    "layers.{n}.mlp.pre_norm": ("model.layers.{n}.post_attention_layernorm",),
}
POST_NORM_NAMES: dict[str, tuple[str, ...]] = {
    **{ours: theirs for ours, theirs in PRE_NORM_NAMES.items() if not ours.endswith("pre_norm")},
    "layers.{n}.attention.post_norm": ("model.layers.{n}.post_attention_layernorm",),
    "layers.{n}.mlp.post_norm": ("model.layers.{n}.post_feedforward_layernorm",),
}


_HARMLESS = ("lm_head.weight", ".rotary_emb.inv_freq")


@dataclass(frozen=True, slots=True)
class Piece:
    """One published tensor, and the rows of the target it fills (of one expert, or of all)."""

    source: str
    shape: tuple[int, ...]
    expert: int | None
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Placement:
    """One tensor of ours and the published pieces it is filled from."""

    target: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    placements: tuple[Placement, ...]
    layouts: tuple[str, ...]  # titles of the expert layouts met
    unused: tuple[str, ...]  # published tensors that nothing reads

    def notes(self) -> list[str]:
        """What a user should know of tensors that nothing reads: a bias left out is a wrong number.
        A second copy of a tied head, and frequencies that are computed anyway, are harmless."""
        found = [name for name in self.unused if not name.endswith(_HARMLESS)]
        if not found:
            return []
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        return [
            f"{single_line(found[0], 200)}{more}: not read, config.json asks for no such tensor"
        ]


def place(
    spec: DecoderSpec,
    names: Mapping[str, tuple[str, ...]],
    keys: Mapping[str, str],
    stored: Mapping[str, Stored],
) -> Plan:
    """Find a source for every tensor of `spec`.

    `names` maps our prefixes to published ones (several where dialects differ); `keys` renames the
    words of `Slot.says` to what this family's config calls them. Raises MoescopeError for a tensor
    that is missing or has a shape the config does not give it.
    """
    used: set[str] = set()
    titles: dict[str, None] = {}
    placements = []
    for slot in slots(spec):
        pieces = (
            _expert_pieces(slot, names, stored, titles)
            if slot.per_expert
            else _pieces(slot, names, stored)
        )
        for piece in pieces:
            _check(slot, piece, keys, stored)
            used.add(piece.source)
        placements.append(Placement(slot.name, slot.shape, tuple(pieces)))
    return Plan(tuple(placements), tuple(titles), tuple(sorted(set(stored) - used)))


def published(ours: str, names: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The names a tensor of ours may have in a checkpoint; the longest known prefix wins."""
    words = ours.split(".")
    number = words[1] if words[0] == "layers" else ""
    if number:
        words[1] = "{n}"
    for length in range(len(words), 0, -1):
        if (theirs := names.get(".".join(words[:length]))) is not None:
            rest = [""] * bool(words[length:]) + words[length:]
            return [prefix.replace("{n}", number) + ".".join(rest) for prefix in theirs]
    return [ours]


def _pieces(
    slot: Slot, names: Mapping[str, tuple[str, ...]], stored: Mapping[str, Stored]
) -> list[Piece]:
    pieces, row = [], 0
    for part, rows in slot.parts:
        candidates = published(part, names)
        source = next((name for name in candidates if name in stored), candidates[0])
        shape = (rows, *slot.shape[1:])
        pieces.append(Piece(source, shape, None, row, row + rows))
        row += rows
    return pieces


def _expert_pieces(
    slot: Slot,
    names: Mapping[str, tuple[str, ...]],
    stored: Mapping[str, Stored],
    titles: dict[str, None],
) -> list[Piece]:
    modules = published(slot.name.partition(".experts.")[0], names)
    for layout in LAYOUTS:
        for module in modules:
            if f"{module}.{layout.down.format(e=0)}" in stored:
                titles[layout.title] = None
                return _in_layout(slot, layout, module)
    first = f"{modules[0]}.{LAYOUTS[0].down.format(e=0)}"
    raise _missing(first)


def _in_layout(slot: Slot, layout: ExpertLayout, module: str) -> list[Piece]:
    experts, rows, columns = slot.shape
    parts = slot.parts
    if layout.gate_up and len(parts) == 2:
        parts = (("gate_up", rows),)
    pieces, row = [], 0
    for part, count in parts:
        pattern = f"{module}.{getattr(layout, part)}"
        if "{e}" in pattern:
            pieces += [
                Piece(pattern.replace("{e}", str(e)), (count, columns), e, row, row + count)
                for e in range(experts)
            ]
        else:
            pieces.append(Piece(pattern, (experts, count, columns), None, row, row + count))
        row += count
    return pieces


def _missing(name: str) -> Exception:
    return bad(
        f"checkpoint: {single_line(name, 200)}: expected a tensor, found none",
        "download the checkpoint again: a shard may be missing or cut short",
    )


def _check(slot: Slot, piece: Piece, keys: Mapping[str, str], stored: Mapping[str, Stored]) -> None:
    info = stored.get(piece.source)
    if info is None:
        raise _missing(piece.source)
    found = tuple(info.shape)
    if found == piece.shape:
        return
    says = slot.says[-len(piece.shape) :] if slot.per_expert else slot.says
    layer = slot.name.split(".")[1] if slot.name.startswith("layers.") else ""
    where = f"layer {layer} " if layer else ""
    leaf = ".".join(piece.source.split(".")[-2:])
    shard = single_line(info.shard, 120)
    if len(found) != len(piece.shape):
        raise bad(
            f"{shard}: {single_line(piece.source, 200)}: expected {len(piece.shape)} dimensions, "
            f"found {len(found)}"
        )
    axis = next(i for i, size in enumerate(found) if size != piece.shape[i])
    key = keys.get(says[axis], says[axis])
    kind = ("rows", "columns")[axis] if len(found) <= 2 else ("experts", "rows", "columns")[axis]
    raise bad(
        f"config.json says {key} {piece.shape[axis]}; {where}{leaf} has {found[axis]} {kind} "
        f"({shard})",
        "config.json and the weights are of different models, or one of them is damaged",
    )
