"""Latent attention from a config: ranks, dims, the rope of its moving part, the softmax scale.

Sources: arXiv 2405.04434, section 2.1; transformers `DeepseekV2Attention`, `DeepseekV3Attention`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from moescope.engine.config import Fields
from moescope.engine.families import common, ropes
from moescope.engine.families.ropes import Applies
from moescope.engine.operators import MLA, Indexer, Norm, Rope

LATENT_EPS = 1e-6  # of the norms on latents, whatever rms_norm_eps is


@dataclass(frozen=True, slots=True)
class Ranks:
    """The widths of one latent attention; `q` 0: queries have no latent. As a family's usual: what
    its config class takes where the config is silent."""

    q: int = 1536
    kv: int = 512
    nope: int = 128
    rope: int = 64
    v: int = 128

    @property
    def width(self) -> int:
        """Of a query or key of one head."""
        return self.nope + self.rope


def read_ranks(config: Fields, usual: Ranks) -> Ranks:
    """A `q_lora_rank` of null is none; one that is absent is the usual."""
    null = "q_lora_rank" in config.values and not config.has("q_lora_rank")
    rope = config.int("qk_rope_head_dim", 2, common.SIZE, usual.rope)
    if rope % 2:
        raise config.error("qk_rope_head_dim", "an even number")
    return Ranks(
        0 if null else config.int("q_lora_rank", 1, common.SIZE, usual.q),
        config.int("kv_lora_rank", 1, common.SIZE, usual.kv),
        config.int("qk_nope_head_dim", 1, common.SIZE, usual.nope),
        rope,
        config.int("v_head_dim", 1, common.SIZE, usual.v),
    )


def read_sizes(
    config: Fields, ranks: Ranks, *, eps: float, context: int, head_dim: int = 0
) -> common.Sizes:
    """As `common.read_sizes`; `head_dim` (usually that of the rope part) is what the family's code
    calls so. Heads share no keys."""
    head_dim = head_dim or ranks.rope
    sizes = common.read_sizes(config, eps=eps, context=context, head_dim=head_dim)
    if sizes.kv_heads != sizes.heads:
        raise config.error("num_key_value_heads", f"num_attention_heads, {sizes.heads}")
    return sizes


def read_rope(
    config: Fields,
    sizes: common.Sizes,
    ranks: Ranks,
    *,
    usual_theta: float = 10000.0,
    applies: Applies = "model",
    interleaved: bool | None = None,
) -> Rope:
    """The rope of the moving part; `interleaved` None: by `rope_interleave`, usually true."""
    if interleaved is None:
        interleaved = config.bool("rope_interleave", True)
    rope = ropes.read_rope(
        config,
        ranks.rope,
        sizes.context,
        usual_theta=usual_theta,
        applies=applies,
        style="interleaved" if interleaved else "half",
    )
    if rope.dims != ranks.rope:
        holder = config if config.has("partial_rotary_factor") else config.fields("rope_parameters")
        raise (holder or config).error("partial_rotary_factor", "1 for this model type")
    return rope


def softmax_scale(config: Fields, rope: Rope | None, width: int) -> float:
    """1 / sqrt(width), times the square of yarn's mscale over all dims where there is one."""
    scale = float(width**-0.5)
    source = config.fields("rope_parameters") or config.fields("rope_scaling")
    if rope is None or rope.scaling is None or source is None:
        return scale
    every = source.float("mscale_all_dim", 0.0, 1e6, default=0.0)
    mscale = ropes.yarn_mscale(rope.scaling.factor, every) if every else 1.0
    return scale * mscale * mscale


def attention(
    config: Fields,
    sizes: common.Sizes,
    ranks: Ranks,
    rope: Rope | None,
    *,
    indexer: Indexer | None = None,
    shares_choice: bool = False,
    gate: Literal["none", "in_q_proj", "sigmoid_per_head"] = "none",
) -> MLA:
    return MLA(
        sizes.hidden,
        sizes.heads,
        ranks.kv,
        ranks.nope,
        ranks.rope,
        ranks.v,
        softmax_scale(config, rope, ranks.width),
        rope,
        ranks.q,
        Norm(ranks.kv, LATENT_EPS),
        Norm(ranks.q, LATENT_EPS) if ranks.q else None,
        bias=config.bool("attention_bias", False),
        indexer=indexer,
        shares_choice=shares_choice,
        gate=gate,
        q_reads_raw=gate == "in_q_proj",
    )


def read_indexer(config: Fields, rope: Rope | None, *, heads: int, topk: int = 2048) -> Indexer:
    """DeepSeek sparse attention (DeepSeek-V3.2-Exp's report): `heads` is the family's usual."""
    dim = config.int("index_head_dim", 2, common.SIZE, 128)
    if rope is not None and rope.dims > dim:
        raise config.error("index_head_dim", f"at least qk_rope_head_dim {rope.dims}")
    return Indexer(
        config.int("index_n_heads", 1, common.COUNT, heads),
        dim,
        config.int("index_topk", 1, ropes.FAR, topk),
        rope,
        Norm(dim, 1e-6, "layer", bias=True),
    )
