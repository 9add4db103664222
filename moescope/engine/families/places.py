"""Where each published tensor goes: a plan made, and every shape checked, before anything is read.

`place` reads names and shapes only. Names are `names`', orders `forms`', experts `layouts`'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

from moescope.engine.config import bad
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families.forms import FORMS, In
from moescope.engine.families.layouts import LAYOUTS, ExpertLayout, written_by_mlx
from moescope.engine.families.names import Alternative, Dictionary, Names, Source
from moescope.engine.families.plans import Piece, Placement, Plan
from moescope.engine.parameters import Shape, Slot, slots
from moescope.engine.quantised.packed import Held
from moescope.safety import single_line

_FLOATS = ("F32", "BF16", "F16")
# A second copy of a tied head, frequencies that are computed anyway, scales of activations.
_HARMLESS = (
    "lm_head.weight",
    ".rotary_emb.inv_freq",
    ".input_scale",
    ".input_global_scale",
    ".activation_scale",
    ".k_scale",
    ".v_scale",
)
# Further heads and towers, which a text decoder has no use for.
_ELSEWHERE = (
    "*mtp.*",
    "*mtp_block.*",
    "*.nextn.*",
    "*visual.*",
    "*vision*",
    "*audio*",
    "*image*",
    "*projector.*",
    "mlp1.*",
    "sound_*",
    "*patch_merge*",
    "talker.*",
    "code2wav.*",
)


def place(
    spec: DecoderSpec,
    names: Names,
    keys: Mapping[str, str],
    stored: Mapping[str, Held],
) -> Plan:
    """Find a source for every tensor of `spec`.

    `names` is a family's names table; `keys` renames the words of `Slot.says` to what its config
    calls them; `stored` is what there is by name, packed tensors as what they stand for
    (`quantised.held`). Raises MoescopeError for a tensor that is missing or has a shape the
    config does not give it.
    """
    placer = _Placer(spec, names, keys, stored)
    placements = tuple(placer.placements())
    used = {piece.source for placement in placements for piece in placement.pieces}
    unused = sorted(set(stored) - used)
    known = (*_ELSEWHERE, *_listed(names.get("unread", ())))
    reasonless = [name for name in unused if not placer.has_reason(name, known)]
    return Plan(placements, tuple(placer.titles), tuple(unused), tuple(reasonless))


def _listed(patterns: Any) -> tuple[str, ...]:
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


class _Placer:
    def __init__(
        self,
        spec: DecoderSpec,
        names: Names,
        keys: Mapping[str, str],
        stored: Mapping[str, Held],
    ) -> None:
        self.spec, self.keys, self.stored = spec, keys, stored
        self.dictionary = Dictionary(names, stored, mlx=written_by_mlx(stored))
        self.operators = {
            f"layers.{number}.{branch.name}": branch.operator for number, branch in spec.operators()
        }
        self.titles: dict[str, None] = {}
        first = self.dictionary.published("layers.0")
        self._layers = [name.removesuffix("0") for name in first if name.endswith(".0")]

    def placements(self) -> Iterator[Placement]:
        for branch, found in groupby(slots(self.spec), key=_branch_of):
            group = list(found)
            layout = None
            for slot in group:
                if slot.per_expert:
                    layout = layout or self._layout(branch, group)
                    placement = Placement(slot.name, slot.shape, tuple(_in(slot, *layout)))
                else:
                    placement = self._plain(slot, self.operators.get(branch))
                yield self._checked(slot, placement)

    def has_reason(self, name: str, known: tuple[str, ...]) -> bool:
        """Whether it is no surprise that nothing reads this tensor."""
        if name.endswith(_HARMLESS) or any(fnmatchcase(name, pattern) for pattern in known):
            return True
        return any(
            name.startswith(before) and _number(name[len(before) :]) >= len(self.spec.layers)
            for before in self._layers
        )

    # --- experts ----------------------------------------------------------------------------

    def _layout(self, branch: str, group: list[Slot]) -> tuple[ExpertLayout, str]:
        """The first layout whose tensors are there in the right shapes, and the module they are
        below; else the first whose names are there, for the sake of the message."""
        weights = [slot for slot in group if slot.per_expert and len(slot.shape) == 3]
        modules = self.dictionary.published(branch)
        layouts = self.dictionary.layouts(branch) or LAYOUTS
        close = None
        for layout in layouts:
            for module in modules:
                each = [list(_samples(slot, layout, module)) for slot in weights]
                samples = [piece for found in each for piece in found]
                if not all(each) or any(piece.source not in self.stored for piece in samples):
                    continue
                if all(map(self._fits, samples)):
                    self.titles[layout.title] = None
                    return layout, module
                close = close or (layout, module)
        if close is None:
            wanted = next(
                piece for layout in layouts for piece in _in(weights[-1], layout, modules[0])
            )
            raise _missing(wanted.source)
        return close

    # --- everything else --------------------------------------------------------------------

    def _plain(self, slot: Slot, operator: Any) -> Placement:
        """A slot from one tensor for all its parts, or else part by part."""
        if len(slot.parts) > 1:
            whole = self._choose(slot.name, slot.shape, operator, 0, required=False)
            if whole is not None:
                return Placement(slot.name, slot.shape, whole[0])
        pieces: list[Piece] = []
        row, constant = 0, None
        for part, rows in slot.parts:
            found = self._choose(part, (rows, *slot.shape[1:]), operator, row)
            assert found is not None
            pieces += found[0]
            constant = constant if found[1] is None else found[1]
            row += rows
        return Placement(slot.name, slot.shape, tuple(pieces), constant)

    def _choose(
        self, ours: str, shape: Shape, operator: Any, row: int, *, required: bool = True
    ) -> tuple[tuple[Piece, ...], float | None] | None:
        """The first alternative that is there in the right shape; else the first that is there."""
        close = None
        alternatives = self.dictionary.alternatives(ours)
        for found in alternatives:
            if not found.sources or not all(s.name in self.stored for s in found.sources):
                continue
            pieces = tuple(self._pieces(found, shape, operator, row))
            if all(map(self._fits, pieces)):
                return pieces, None
            close = close or pieces
        if close is not None:
            return close, None
        constant = next((a.constant for a in alternatives if a.constant is not None), None)
        if constant is not None:
            return (), constant
        if not required:
            return None
        raise _missing(alternatives[0].sources[0].name)

    def _pieces(self, found: Alternative, shape: Shape, operator: Any, row: int) -> Iterator[Piece]:
        blocks = found.blocks(operator) if found.blocks is not None else 0
        left, at = shape[0] // (blocks or 1), row // (blocks or 1)
        for source in found.sources:
            count = left if source.rows is None else source.rows(operator)
            wanted = (count, *shape[1:])
            yield self._in_some_form(source, wanted, operator, at, blocks)
            at, left = at + count, left - count

    def _in_some_form(
        self, source: Source, shape: Shape, operator: Any, row: int, blocks: int
    ) -> Piece:
        shape = (blocks, *shape) if blocks else shape
        rows = shape[1] if blocks else shape[0]
        pieces = [
            Piece(source.name, shape, None, row, row + rows, blocks, form, _sizes(form, operator))
            for form in source.forms
        ]
        return next((piece for piece in pieces if self._fits(piece)), pieces[0])

    # --- checks -----------------------------------------------------------------------------

    def _fits(self, piece: Piece) -> bool:
        return self.stored[piece.source].fits(piece.stored_shape)

    def _checked(self, slot: Slot, placement: Placement) -> Placement:
        """Its pieces checked, with what is packed noted; MoescopeError for a missing tensor."""
        pieces = []
        for piece in placement.pieces:
            info = self.stored.get(piece.source)
            if info is None:
                raise _missing(piece.source)
            if not info.readings and info.dtype not in _FLOATS:
                raise _no_float(piece.source, info)
            if not info.fits(piece.stored_shape):
                raise _misfit(slot, piece, info, self.keys)
            pieces.append(replace(piece, packed=info.reading(piece.stored_shape)))
        return replace(placement, pieces=tuple(pieces), dtype=slot.dtype)


def _number(name: str) -> int:
    """The layer a name begins with; -1 where it begins with none."""
    digits = name.partition(".")[0]
    return int(digits) if digits.isdecimal() and len(digits) < 9 else -1


def _branch_of(slot: Slot) -> str:
    """`layers.3.mlp` of a slot of a branch, the slot's own name of any other."""
    words = slot.name.split(".")
    return ".".join(words[:3]) if words[0] == "layers" and len(words) > 3 else slot.name


def _sizes(form: str, operator: Any) -> tuple[int, ...]:
    return FORMS[form].sizes(operator) if FORMS[form].order is not None else ()


def _in(slot: Slot, layout: ExpertLayout, module: str) -> Iterator[Piece]:
    """The pieces of an experts' slot in a layout."""
    for source, row, rows in _sources(slot, layout):
        yield from _of_experts(source, module, slot.shape, row, rows)


def _samples(slot: Slot, layout: ExpertLayout, module: str) -> Iterator[Piece]:
    """One piece of each kind, by which a layout is known."""
    for source, row, rows in _sources(slot, layout):
        yield next(_of_experts(source, module, slot.shape, row, rows))


def _sources(slot: Slot, layout: ExpertLayout) -> list[tuple[In, int, int]]:
    """(where, first row, rows) of what a slot is filled from; none where the layout has no such
    tensors."""
    whole = layout.source(slot.name.rpartition("experts.")[2])
    if whole is not None:
        return [(whole, 0, slot.shape[1])]
    found, row = [], 0
    for part, rows in slot.parts:
        if (source := layout.source(part)) is None:
            return []
        found.append((source, row, rows))
        row += rows
    return found


def _of_experts(source: In, module: str, shape: Shape, row: int, rows: int) -> Iterator[Piece]:
    experts, form = shape[0], source.forms[0]
    pattern, wanted = f"{module}.{source.place}", (rows, *shape[2:])
    if "{e}" not in pattern:
        yield Piece(pattern, (experts, *wanted), None, row, row + rows, experts, form)
        return
    for expert in range(experts):
        name = pattern.replace("{e}", str(expert))
        yield Piece(name, wanted, expert, row, row + rows, 0, form)


def _missing(name: str) -> Exception:
    return bad(
        f"checkpoint: {single_line(name, 200)}: expected a tensor, found none",
        "download the checkpoint again: a shard may be missing or cut short",
    )


def _no_float(name: str, info: Held) -> Exception:
    return bad(
        f"{single_line(info.shard, 120)}: {single_line(name, 200)}: "
        f"expected {', '.join(_FLOATS[:-1])} or {_FLOATS[-1]}, found {info.dtype}",
        "config.json names no format of quantised weights that this could be of",
    )


_AXES = ("rows", "columns", "taps")


def _misfit(slot: Slot, piece: Piece, info: Held, keys: Mapping[str, str]) -> Exception:
    """The words of a shape that does not fit: which key of the config says otherwise."""
    found, expected = tuple(info.shape), piece.stored_shape
    layer = slot.name.split(".")[1] if slot.name.startswith("layers.") else ""
    where = f"layer {layer} " if layer else ""
    leaf = single_line(".".join(piece.source.split(".")[-2:]), 120)
    shard = single_line(info.shard, 120)
    if len(found) != len(expected):
        return bad(
            f"{shard}: {single_line(piece.source, 200)}: expected {len(expected)} dimensions, "
            f"found {len(found)}"
        )
    hint = "config.json and the weights are of different models, or one of them is damaged"
    if expected != piece.shape:
        return bad(
            f"config.json says {where}{leaf} is {list(expected)}; it is {list(found)} ({shard})",
            hint,
        )
    says = slot.says[-len(expected) :] if slot.per_expert else slot.says
    axis = next(i for i, size in enumerate(found) if size != expected[i])
    key = keys.get(says[axis], says[axis])
    words = ("experts", *_AXES) if slot.per_expert and len(found) > 2 else _AXES
    kind = words[axis]
    return bad(
        f"config.json says {key} {expected[axis]}; {where}{leaf} has {found[axis]} {kind} "
        f"({shard})",
        hint,
    )
