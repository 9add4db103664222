"""From our tensor names to published ones: the names table of a family, and how it is read.

A names table maps names of ours, or beginnings of them, to where a checkpoint may have them; `{n}`
is the layer. The longest beginning that is in the table wins, and what is left of the name is
appended. What a family does not say, `SYNONYMS` (below a branch) and `PRE_NORM_NAMES` say.

A published name that starts with a dot is relative, as in Python's imports: `.x` is below the
published place of our parent, `..x` beside that parent, and so on:

    NAMES = {
        **PRE_NORM_NAMES,
        "layers.{n}": "transformer.blocks.{n}",               # all layers live elsewhere
        "layers.{n}.mlp": (".mlp", ".block_sparse_moe"),      # either: the first that is there
        "layers.{n}.mlp.pre_norm": "..norm_2",                # of the branch, but beside it
        "layers.{n}.mlp.gate.correction_bias": "..router_bias",
        "layers.{n}.attention.qkv": In(".Wqkv", "qkv by group"),   # all parts in one tensor
        "layers.{n}.attention.pre_norm": In("..norm_1", mlx="plus one"),  # as mlx-lm stores it
        "layers.{n}.attention.kv_b_proj": Stack(...),         # one tensor of ours from several
        "layers.{n}.mlp.gate.correction_bias": (".bias", Constant(0.0)),  # may be absent
        "layers.{n}.mlp.experts": GPT_OSS,                    # layouts of its own (`layouts`)
        "unread": ("*.indexer.*",),                           # known, and left out on purpose
    }

Among several, the first that is in the checkpoint with the shape the config asks for is taken; so
`In(".conv", "squeezed", "conv last")` leaves the choice of form to the shape. Tables are written as
the text model's own checkpoints have it (`model.layers...`); `WRAPPERS` are what others put around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moescope.engine.families.forms import PLAIN, In
from moescope.engine.families.layouts import ExpertLayout

OfOperator = Callable[[Any], int]


@dataclass(frozen=True, slots=True)
class Stack:
    """One tensor of ours from several published ones, above each other; within each of `blocks`
    (heads, say) where the operator has them. `rows` of each, of one block, from the operator."""

    of: tuple[tuple[str | In, OfOperator], ...]
    blocks: OfOperator | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    """What a tensor holds where the checkpoint has none: the last of several places. With `mlx`,
    only in what mlx-lm wrote, which leaves some tensors out."""

    value: float
    mlx: bool = False


Place = str | In | Stack | Constant | ExpertLayout
Names = Mapping[str, Place | tuple[Place, ...]]

PRE_NORM_NAMES: Names = {
    "embed": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
    "layers.{n}": "model.layers.{n}",
    "layers.{n}.attention": ".self_attn",
    "layers.{n}.attention.pre_norm": "..input_layernorm",
    "layers.{n}.mlp": (".mlp", ".block_sparse_moe", ".feed_forward"),
    "layers.{n}.mlp.pre_norm": "..post_attention_layernorm",
}
POST_NORM_NAMES: Names = {
    **{ours: theirs for ours, theirs in PRE_NORM_NAMES.items() if not ours.endswith("pre_norm")},
    "layers.{n}.attention.post_norm": "..post_attention_layernorm",
    "layers.{n}.mlp.post_norm": "..post_feedforward_layernorm",
}

_CONV = ("squeezed", "conv last", PLAIN)
_FUSED = (".gate_up_proj", ".input_linear", In(".gate_and_up_proj", "up first"))

# Below a branch: what families call the same thing.
SYNONYMS: Names = {
    "gate": (
        ".gate",
        ".router",
        ".router.layer",
        ".router.gate",
        ".router.proj",
        ".router.classifier",
        ".gate.wg",
        ".gate.proj",
        ".gate.gate_proj",
    ),
    "gate.correction_bias": tuple(
        In(place, PLAIN, "one row")
        for place in (
            ".e_score_correction_bias",
            "..e_score_correction_bias",
            ".expert_bias",
            "..expert_bias",
            "..router_bias",
            "..experts.e_score_correction_bias",
            "..moe_statics.e_score_correction_bias",
            ".moe_statics.e_score_correction_bias",
        )
    ),
    "gate_up": _FUSED,
    "gate_proj": (".gate_proj", ".w1", ".g_proj"),
    "up_proj": (".up_proj", ".w3"),
    "down_proj": (".down_proj", ".w2", ".output_linear"),
    "shared_expert": (".shared_expert", ".shared_experts", ".shared_mlp", ".share_expert"),
    "shared_expert.gate_up": _FUSED,
    "shared_expert.gate_proj": (".gate_proj", ".w1"),
    "shared_expert.up_proj": (".up_proj", ".w3"),
    "shared_expert.down_proj": (".down_proj", ".w2", ".output_linear"),
    "o_proj": (".o_proj", ".out_proj", ".dense"),
    "q_norm": (".q_norm", ".q_layernorm", ".query_layernorm"),
    "k_norm": (".k_norm", ".k_layernorm", ".key_layernorm"),
    "q_a_norm": (".q_a_layernorm", ".q_a_norm"),
    "kv_a_norm": (".kv_a_layernorm", ".kv_a_norm"),
    "indexer.q_proj": ".wq_b",
    "indexer.k_proj": ".wk",
    "indexer.weights": ".weights_proj",
    "kv_a_proj": (".kv_a_proj_with_mqa", ".kv_a_proj"),
    "kv_b_proj": (
        ".kv_b_proj",
        Stack(
            (
                (In(".embed_q", "transposed"), lambda m: m.nope_dim),
                (".unembed_out", lambda m: m.v_dim),
            ),
            blocks=lambda m: m.heads,
        ),
    ),
    # ours is [q; k; v; z] and [b; a]
    "in_proj_qkvz": (
        In(".in_proj_qkvz", "qkvz by key head"),
        Stack(
            (
                (".in_proj_qkv", lambda a: 2 * a.key_heads * a.key_dim + _values(a)),
                (".in_proj_z", lambda a: _values(a)),
            )
        ),
    ),
    "in_proj_ba": (
        In(".in_proj_ba", "ba by key head"),
        Stack(
            ((".in_proj_b", lambda a: a.value_heads), (".in_proj_a", lambda a: a.value_heads)),
        ),
    ),
    "conv.weight": (In("..conv1d.weight", *_CONV), In("..conv.weight", *_CONV)),
    "conv.bias": ("..conv1d.bias", "..conv.bias"),
}


def _values(a: Any) -> int:
    return int(a.value_heads * a.value_dim)


@dataclass(frozen=True, slots=True)
class Wrapper:
    """What a checkpoint puts in place of the beginning `of` of every name that has it."""

    of: str
    instead: str

    def published(self, name: str) -> str:
        if not name.startswith(self.of):
            return name
        return self.instead + name.removeprefix(self.of)


WRAPPERS: tuple[Wrapper, ...] = (
    Wrapper("", ""),
    Wrapper("model.", "model.language_model."),
    Wrapper("", "language_model."),
    Wrapper("", "thinker."),
    Wrapper("", "model.language_model."),
    Wrapper("model.", "language_model."),
    Wrapper("model.", ""),
)


@dataclass(frozen=True, slots=True)
class Source:
    """A full published name and the forms to try. `rows` is how much of ours it fills; None: all
    that is wanted."""

    name: str
    forms: tuple[str, ...] = (PLAIN,)
    rows: OfOperator | None = None


@dataclass(frozen=True, slots=True)
class Alternative:
    """Published tensors that together are one of ours; none of them where it is a `constant`."""

    sources: tuple[Source, ...]
    blocks: OfOperator | None = None
    constant: float | None = None


class Dictionary:
    """A names table with the synonyms below it, for one checkpoint."""

    def __init__(self, names: Names, stored: Iterable[str], *, mlx: bool = False) -> None:
        self._names, self._mlx = names, mlx
        self._known: dict[str, tuple[Alternative, ...]] = {}
        self._wrapper = WRAPPERS[0]
        held = stored if isinstance(stored, Mapping | set | frozenset) else set(stored)
        tops = [self.published(top) for top in ("embed.weight", "final_norm.weight")]
        for wrapper in WRAPPERS:
            if any(wrapper.published(name) in held for names_ in tops for name in names_):
                self._wrapper = wrapper
                break

    @property
    def prefix(self) -> str:
        """What a checkpoint of several towers puts before the names of its text tower."""
        return self._wrapper.instead

    def published(self, ours: str) -> list[str]:
        """All names a tensor of ours may have, the usual one first."""
        return [source.name for found in self.alternatives(ours) for source in found.sources]

    def alternatives(self, ours: str) -> tuple[Alternative, ...]:
        """Where a tensor of ours (or the beginning of a name) may be."""
        words = ours.split(".")
        number = words[1] if words[0] == "layers" else ""
        if number:
            words[1] = "{n}"
        found = self._of(".".join(words))
        return tuple(self._filled(alternative, number) for alternative in found)

    def layouts(self, module: str) -> tuple[ExpertLayout, ...]:
        """The expert layouts that a family lists for a module of ours, if it does."""
        words = module.split(".")
        words[1] = "{n}"
        listed = _several(self._names.get(f"{'.'.join(words)}.experts", ()))
        return tuple(layout for layout in listed if isinstance(layout, ExpertLayout))

    def _filled(self, found: Alternative, number: str) -> Alternative:
        def of(source: Source) -> Source:
            name = self._wrapper.published(source.name.replace("{n}", number))
            return replace(source, name=name)

        return replace(found, sources=tuple(map(of, found.sources)))

    def _of(self, ours: str) -> tuple[Alternative, ...]:
        if (known := self._known.get(ours)) is None:
            known = self._known[ours] = tuple(self._look_up(ours))
        return known

    def _look_up(self, ours: str) -> Iterable[Alternative]:
        places = self._names.get(ours)
        if places is None:
            places = SYNONYMS.get(_below_branch(ours))
        if places is not None:
            for place in _several(places):
                yield from self._resolved(ours, place)
            return
        parent, _, leaf = ours.rpartition(".")
        if not parent:
            yield Alternative((Source(ours),))
            return
        for found in self._of(parent):
            below = (replace(source, name=f"{source.name}.{leaf}") for source in found.sources)
            yield replace(found, sources=tuple(below))

    def _resolved(self, ours: str, place: Place) -> Iterable[Alternative]:
        match place:
            case Constant():
                if self._mlx or not place.mlx:
                    yield Alternative((), constant=place.value)
            case Stack():
                # every tensor of a stack is below the same published parent
                lists = [self._sources(ours, item, rows) for item, rows in place.of]
                for sources in zip(*lists, strict=True):
                    yield Alternative(sources, place.blocks)
            case str() | In():
                yield from (Alternative((source,)) for source in self._sources(ours, place))
            case _:
                raise TypeError(f"{ours}: {place!r}")

    def _sources(self, ours: str, place: str | In, rows: OfOperator | None = None) -> list[Source]:
        if isinstance(place, str):
            place = In(place)
        forms = (place.mlx,) if place.mlx and self._mlx else place.forms
        return [Source(name, forms, rows) for name in self._absolute(ours, place.place)]

    def _absolute(self, ours: str, place: str) -> list[str]:
        ups = len(place) - len(place.lstrip("."))
        if not ups:
            return [place]
        parent = ours
        for _ in range(ups):
            parent = parent.rpartition(".")[0]
        bases = [source.name for found in self._of(parent) for source in found.sources]
        return [f"{base}.{place[ups:]}" for base in dict.fromkeys(bases)]


def _several(places: Place | tuple[Place, ...]) -> tuple[Place, ...]:
    return places if isinstance(places, tuple) else (places,)


def _below_branch(ours: str) -> str:
    """`gate.weight` of `layers.{n}.mlp.gate.weight`; nothing where ours is not below a branch."""
    words = ours.split(".")
    return ".".join(words[3:]) if words[0] == "layers" else ""
