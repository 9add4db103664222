"""Where the matrices of the experts are: a table of layouts. What holds them is `names`' affair.

A layout is recognised by the names of its tensors and by their shapes, so one table serves all
families. Where shapes cannot tell (rows that interleave gate and up), a family lists its own
layouts in its names table: `"layers.{n}.mlp.experts": (GPT_OSS, ...)`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moescope.engine.families.forms import In

Where = str | In


@dataclass(frozen=True, slots=True)
class ExpertLayout:
    """Names below the module that routes. With `{e}` a name stands for one expert's matrix; without
    it, for those of all experts stacked. `gate_up` is gate and up in one tensor.

    Biases are where weights are: `x.weight` has `x.bias`, and `x` without an ending has `x_bias`.
    `queries` and `out` are those of routed attention.
    """

    title: str
    down: Where = ""
    gate_up: Where = ""
    gate: Where = ""
    up: Where = ""
    queries: Where = ""
    out: Where = ""

    def source(self, part: str) -> In | None:
        """Where `gate`, `up`, `down`, `queries`, `out` or a bias of theirs is; None: not here."""
        weight = part.removesuffix("bias").rstrip("._")
        found: Where = getattr(self, weight, "")
        if not found:
            return None
        source = In(found) if isinstance(found, str) else found
        return source if weight == part else In(_bias_of(source.place), *source.forms)


def _bias_of(name: str) -> str:
    stem = name.removesuffix(".weight")
    return f"{stem}.bias" if stem != name else f"{name}_bias"


def _each(title: str, module: str, gate: str, up: str, down: str) -> ExpertLayout:
    """Gate, up and down below `module`, one tensor each."""
    gate, up, down = (f"{module}.{name}.weight" if name else "" for name in (gate, up, down))
    return ExpertLayout(title, gate=gate, up=up, down=down)


_PROJ = ("gate_proj", "up_proj", "down_proj")

HUB = _each("hub, one tensor per expert", "experts.{e}", *_PROJ)

TRANSPOSED = ExpertLayout(
    "fused experts, transposed",
    gate_up=In("experts.gate_up_proj", "transposed"),
    down=In("experts.down_proj", "transposed"),
)
FC = ExpertLayout(
    "hub, stacked experts, transposed",
    gate_up=In("experts.fc1.weight", "transposed"),
    down=In("experts.fc2.weight", "transposed"),
)
MLX_BARE = _each("mlx-lm, stacked experts", "experts", *_PROJ)
FUSED = ExpertLayout(
    "transformers 5, fused experts",
    gate_up="experts.gate_up_proj",
    down="experts.down_proj",
)
SWITCH_MLP = _each("mlx-lm, stacked experts", "switch_mlp", *_PROJ)
# In the module itself: dense layers call their matrices so, too.
STACKED = ExpertLayout(
    "hub, stacked experts",
    gate="gate_proj.weight",
    up="up_proj.weight",
    down="down_proj.weight",
)

LAYOUTS: tuple[ExpertLayout, ...] = (
    HUB,
    _each("hub, one tensor per expert (w1, w2, w3)", "experts.{e}", "w1", "w3", "w2"),
    ExpertLayout(
        "hub, up and gate of an expert in one tensor",
        gate_up=In("experts.{e}.gate_and_up_proj.weight", "up first"),
        down="experts.{e}.down_proj.weight",
    ),
    FUSED,
    ExpertLayout(
        "transformers 5, stacked experts without a gate",
        up="experts.up_proj",
        down="experts.down_proj",
    ),
    TRANSPOSED,
    ExpertLayout(
        "fused experts (input_linear)",
        gate_up="input_linear.weight",
        down="output_linear.weight",
    ),
    ExpertLayout(
        "fused experts in rows",
        gate=In("experts.mlp.w1", "experts in rows"),
        up=In("experts.mlp.v1", "experts in rows"),
        down=In("experts.mlp.w2", "experts in rows, transposed"),
    ),
    ExpertLayout(
        "routed attention",
        queries="experts.input_linear.weight",
        out="experts.output_linear.weight",
    ),
    SWITCH_MLP,
    MLX_BARE,
    _each("mlx-lm, one tensor per expert (w1, v1, w2)", "experts.{e}", "w1", "v1", "w2"),
    _each("mlx-lm, stacked experts", "experts.switch_glu", *_PROJ),
    _each("mlx-lm, stacked experts", "switch_mlp", "", "fc1", "fc2"),
)

# Gate and up alternate. As published (MXFP4, [out, in]), as transformers saves it, as mlx-lm does.
GPT_OSS: tuple[ExpertLayout, ...] = (
    ExpertLayout(
        "gpt-oss, rows of gate and up alternate",
        gate_up=In("experts.gate_up_proj", "interleaved"),
        down="experts.down_proj",
    ),
    ExpertLayout(
        "gpt-oss, columns of gate and up alternate",
        gate_up=In("experts.gate_up_proj", "transposed interleaved"),
        down=In("experts.down_proj", "transposed"),
    ),
    MLX_BARE,
)

# What only mlx-lm writes; families whose norms hold w and not 1 + w must know.
_MLX = (".switch_mlp.", ".switch_glu.", *(f".experts.{name}." for name in _PROJ))


def written_by_mlx(names: Iterable[str]) -> bool:
    """Whether mlx-lm wrote tensors of these names."""
    return any(mark in name for name in names for mark in _MLX)
