"""A `DecoderSpec` as a program of the C library: its operators, buffers, norms and branches.

What attentions and feed-forward blocks are made of is in `native_mixers.py` and `native_blocks.py`.
An operator without a C form becomes a `Beside`: a place where the program stops and torch runs one
operator. Nothing here computes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moescope.engine.decoder import RESIDUAL, Branch, DecoderSpec, Layer
from moescope.engine.native_blocks import moe, plain_mlp
from moescope.engine.native_limits import why_beside
from moescope.engine.native_mixers import attention, mla
from moescope.engine.operators import (
    MLA,
    MLP,
    Attention,
    MoE,
    Norm,
    Pass,
    Rope,
    RoutedAttention,
)
from moescope.engine.steps import Shared
from moescope.kernels import native_ops as native

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Place:
    """Where an operator stands: the path of its tensors, its number among the running operators and
    among the routers, the buffers it reads (normed, and as it was) and the one it writes."""

    path: str
    number: int
    router: int
    h: int
    read: int
    y: int


@dataclass(frozen=True, slots=True)
class Beside:
    """An operator that torch runs, before the C operator `at`. `logits` is the buffer its router's
    logits belong in, -1 where it has no router."""

    at: int
    place: Place
    kind: str
    logits: int


class Program:
    """The operators of a decoder in execution order. Buffers are named here, numbered there."""

    def __init__(
        self, shared: Shared, gates: NDArray[np.uintp], kept: dict[Any, Tensor], threads: int
    ) -> None:
        self.shared, self.gates, self.kept, self.threads = shared, gates, kept, threads
        self.widths: dict[str, int] = {}
        self.besides: list[Beside] = []
        self._written: list[dict[str, Any]] = []
        self._routers = self._operators = 0
        self._decoder(shared.spec)

    def ops(self) -> NDArray[Any]:
        """As the library reads them."""
        out = np.zeros(len(self._written), native.OP)
        for op, fields in zip(out, self._written, strict=True):
            for name, value in fields.items():
                op[name] = value
        return out

    # --- what writers use -------------------------------------------------------------------

    def add(self, kind: str, **fields: Any) -> None:
        self._written.append({"kind": native.KINDS.index(kind), **fields})

    def buffer(self, name: str, width: int) -> int:
        """The number of a buffer, made wide enough."""
        self.widths[name] = max(width, self.widths.get(name, 0))
        return list(self.widths).index(name)

    def address(self, name: str) -> int:
        """Of a weight; 0 where the decoder has none by that name."""
        tensor = self.shared.weights.get(name)
        return 0 if tensor is None else tensor.data_ptr()

    def wide(self, name: str) -> int:
        """The address of a float32 copy of a small weight; 0 where there is none."""
        return self._keep(name, name, lambda tensor: tensor.float())

    def linear(self, name: str, x: int, y: int, rows: int, cols: int, act: Any = None) -> None:
        """y = act(weight x + bias)."""
        weight, bias = self.address(f"{name}.weight"), self.wide(f"{name}.bias")
        more = {} if act is None else {"act": act}
        self.add("linear", x=x, y=y, rows=rows, cols=cols, weight=weight, bias=bias, **more)

    def copy(self, x: int, y: int, cols: int, at: int = 0, to: int = 0, **strided: int) -> None:
        """Columns from `at` on, or blocks of them: `groups`, `step` and `to_step`."""
        self.add("copy", x=x, y=y, cols=cols, at=at, to=to, **{"groups": 1, **strided})

    def scale(
        self,
        x: int,
        cols: int,
        number: float = 1.0,
        *,
        at: int = 0,
        bias: int = 0,
        weight: int = 0,
        flags: int = 0,
    ) -> None:
        """Columns from `at` on times a number; before that (x + bias) times weight."""
        if number != 1.0 or bias or weight:
            learned = {"bias": bias, "weight": weight}
            self.add("scale", x=x, at=at, cols=cols, number=number, flags=flags, **learned)

    def norm(
        self,
        norm: Norm,
        path: str,
        x: int,
        y: int,
        *,
        at: int = 0,
        groups: int = 1,
        eps: float | None = None,
        wide: bool | None = None,
    ) -> int:
        """The norm whose tensors are `<path>.weight` and so on; the result's buffer."""
        wide = norm.applies == "float32" or norm.kind == "layer" if wide is None else wide
        weighted = norm.weight and norm.kind != "l2"
        flags = native.WIDE * wide | native.CENTRED * (norm.kind == "layer")
        self.add(
            "norm",
            **{"x": x, "y": y, "cols": norm.width, "at": at, "groups": groups},
            step=norm.width,
            eps=norm.eps if eps is None else eps,
            weight=self._gain(norm, f"{path}.weight") if weighted else 0,
            bias=self.wide(f"{path}.bias") if norm.kind == "layer" and norm.bias else 0,
            flags=flags,
        )
        if norm.gate_rank:
            self._gate_norm(norm, path, y)
        return y

    def turn(self, rope: Rope | None, x: int, heads: int, step: int, at: int = 0) -> None:
        """The first dims of heads that stand `step` columns apart."""
        if rope is None:
            return
        cos, sin = self.shared.tables[id(rope)]
        scaling, pairs = rope.scaling, rope.style == "interleaved"
        long = scaling is not None and scaling.kind == "longrope"
        self.add(
            "turn",
            **{"x": x, "at": at, "heads": heads, "step": step, "turned": rope.dims},
            switch_at=scaling.original_context if scaling is not None and long else 0,
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            flags=native.WIDE * (rope.applies == "float32") | native.PAIRS * pairs,
        )

    # --- the decoder ------------------------------------------------------------------------

    def _keep(self, key: Any, name: str, make: Callable[[Tensor], Tensor]) -> int:
        """The address of what is made of a weight, once."""
        tensor = self.shared.weights.get(name)
        if tensor is None:
            return 0
        if key not in self.kept:
            self.kept[key] = make(tensor).contiguous()
        return self.kept[key].data_ptr()

    def _gain(self, norm: Norm, name: str) -> int:
        """The float32 copy of a norm's weight, rounded where the torch operator rounds it."""
        if norm.kind != "rms_zero_centred":
            return self.wide(name)

        def gain(weight: Tensor) -> Tensor:
            whole = 1.0 + weight.float()
            return whole if norm.applies == "float32" else whole.to(weight.dtype).float()

        return self._keep(("gain", name), name, gain)

    def _gate_norm(self, norm: Norm, path: str, y: int) -> None:
        narrow = self.buffer("narrow", norm.gate_rank)
        opening = self.buffer("opening", norm.width)
        silu = (native.ACTIVATIONS.index("silu"), 0, 0, 0.0, 1.0, 0.0)
        self.linear(f"{path}.gate_a", y, narrow, norm.gate_rank, norm.width, silu)
        self.linear(f"{path}.gate_b", narrow, opening, norm.width, norm.gate_rank)
        columns = {"cols": norm.width, "groups": norm.width}
        self.add("gated", x=opening, y=y, flags=native.WIDE, **columns)

    def _decoder(self, spec: DecoderSpec) -> None:
        H, x = spec.hidden, self.buffer(RESIDUAL, spec.hidden)
        factor = self._rounded(spec.embedding_scale)
        self.add("embed", y=x, cols=H, weight=self.address("embed.weight"), number=factor)
        self.scale(x, H, **self._learned("embed."))
        carried: set[str] = set()
        for number, layer in enumerate(spec.layers):
            carried = self._layer(number, layer, carried) & set(spec.carried)
        x = self._read(RESIDUAL)
        if spec.final_norm is not None:
            x = self.norm(spec.final_norm, "final_norm", x, self.buffer("normed", H))
        assert self.shared.head is not None
        self.add(
            "head",
            **{"x": x, "rows": spec.vocab_size, "cols": H, "weight": self.shared.head.data_ptr()},
            bias=self.wide("head.bias"),
            number=spec.logit_scale,
            cap=spec.logit_softcap,
        )
        self.add("expect", rows=spec.vocab_size)

    def _learned(self, prefix: str) -> dict[str, int]:
        """A vector that is added, and one that multiplies the sum; 0 where there are none."""
        return {"bias": self.wide(f"{prefix}shift"), "weight": self.wide(f"{prefix}gain")}

    def _tap(self, name: str) -> int:
        return self.buffer(RESIDUAL if name == RESIDUAL else f"tap {name}", self.shared.spec.hidden)

    def _read(self, name: str) -> int:
        """The buffer of a tap as operators read it: the residual may be wider than the model."""
        tap, H = self._tap(name), self.shared.spec.hidden
        if name != RESIDUAL or self.shared.spec.residual_dtype == "model":
            return tap
        rounded = self.buffer("read", H)
        self.copy(tap, rounded, H, flags=native.ROUNDED)
        return rounded

    def _rounded(self, number: float) -> float:
        """As the model's dtype has it."""
        import torch

        return float(torch.tensor(number, dtype=getattr(torch, self.shared.dtype)))

    def _layer(self, number: int, layer: Layer, carried: set[str]) -> set[str]:
        """The taps that are written after a layer."""
        H, held = self.shared.spec.hidden, {RESIDUAL, *carried}
        for branch in layer.branches:
            self._branch(f"layers.{number}.{branch.name}", branch, held, H)
        if layer.learned_scale:
            factor = float(self.shared.weights[f"layers.{number}.scale"])
            wide = native.WIDE * (self.shared.spec.residual_dtype == "float32")
            self.scale(self._tap(RESIDUAL), H, factor, flags=wide)
        return held

    def _branch(self, path: str, branch: Branch, held: set[str], H: int) -> None:
        read = h = self._read(branch.reads)
        if branch.pre_norm is not None:
            h = self.norm(branch.pre_norm, f"{path}.pre_norm", read, self.buffer("normed", H))
        y = self.buffer("output", H)
        self._operator(branch, Place(path, self._operators, self._routers, h, read, y))
        if branch.post_norm is not None:
            self.norm(branch.post_norm, f"{path}.post_norm", y, y)
        self._sum(path, branch, y, branch.adds_to in held)
        held.add(branch.adds_to)

    def _sum(self, path: str, branch: Branch, y: int, held: bool) -> None:
        """What a branch gives and what its tap holds, each as the sum takes it, added."""
        to, H = self._tap(branch.adds_to), self.shared.spec.hidden
        float32 = self.shared.spec.residual_dtype == "float32" and branch.adds_to == RESIDUAL
        wide = native.WIDE * float32
        factors = {"number": branch.multiplier, "keeps": branch.keeps}
        if branch.learned_sum:
            self.scale(y, H, branch.multiplier)
            self.scale(y, H, **self._learned(f"{path}.sum."))
            if held:
                self.scale(to, H, branch.keeps, flags=wide)
                self.scale(to, H, flags=wide, **self._learned(f"{path}.sum.kept_"))
            factors = {"number": 1.0, "keeps": 1.0}
        flags = wide | (0 if held else native.FIRST)
        self.add("add", x=y, y=to, cols=H, flags=flags, **factors)

    def _operator(self, branch: Branch, place: Place) -> None:
        operator = branch.operator
        if why_beside(self.shared, operator, place.router):
            self._torch(operator, place)
        else:
            WRITERS[type(operator)](self, operator, place)
        self._operators += 1
        self._routers += isinstance(operator, MoE | RoutedAttention)

    def _torch(self, operator: Any, place: Place) -> None:
        logits, at = -1, len(self._written)
        if isinstance(operator, MoE | RoutedAttention):
            classes = self.shared.routers[place.router].spec.E
            logits = self.buffer("router logits", classes)
            self.add("keep", x=logits, router=place.router, classes=classes)
        self.besides.append(Beside(at, place, type(operator).__name__, logits))


def _pass(program: Program, operator: Pass, place: Place) -> None:
    program.copy(place.h, place.y, program.shared.spec.hidden)


WRITERS: dict[type, Callable[[Program, Any, Place], None]] = {
    Attention: attention,
    MLA: mla,
    MLP: plain_mlp,
    MoE: moe,
    Pass: _pass,
}
