"""What the lineage of DeepSeek's router shares: grouped choice by biased scores, shared experts in
one block, dense layers first. What attends is each family's own affair.

Source: arXiv 2412.19437, section 2.1.2; transformers `DeepseekV3TopkRouter` and its copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families import common
from moescope.engine.operators import MLP, Attention, MoE, Operator
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")
SHARED = ("n_shared_experts", "num_shared_experts")
DENSE, SPARSE = "dense", "sparse"


@dataclass(frozen=True, slots=True)
class Usual:
    """What a family's config class takes where the config is silent; None: it must be there."""

    scale: float | None = 1.0  # routed_scaling_factor
    groups: tuple[int, int] = (1, 1)  # n_group, topk_group
    renormalises: bool = True
    chosen: int | None = None  # num_experts_per_tok
    shared: int = 1


def read_router(config: Fields, usual: Usual) -> RouterSpec:
    """Sigmoid scores in float32; groups and experts chosen by score + bias, weighted by score. Some
    configs (dots.llm1) give the name of the method for that of the scores."""
    config.str("scoring_func", ("sigmoid", "noaux_tc"), default="sigmoid")
    config.str("topk_method", ("noaux_tc",), default="noaux_tc")
    experts, chosen = read_counts(config, usual.chosen)
    groups, best = read_groups(config, experts, *usual.groups)
    policy = RouterPolicy(
        chosen,
        scoring_func="sigmoid",
        correction_bias="score",
        n_group=groups,
        topk_group=best,
        norm_topk_prob=config.bool("norm_topk_prob", usual.renormalises),
        norm_eps=1e-20,
        routed_scaling_factor=read_scale(config, usual.scale),
    )
    wiring = RouterWiring(
        experts,
        router_dtype="float32",
        shared_experts=read_shared_count(config, usual.shared),
        combine_dtype="float32",
    )
    return RouterSpec(policy, wiring)


def read_counts(config: Fields, chosen: int | None = None) -> tuple[int, int]:
    """Experts, and how many of them a token takes."""
    experts = config.int(EXPERTS, 1, common.COUNT)
    if chosen is None:
        count = config.int("num_experts_per_tok", 1, 64)
    else:
        count = config.int("num_experts_per_tok", 1, 64, chosen)
    if count > experts:
        raise config.error("num_experts_per_tok", f"at most {experts} experts")
    return experts, count


def read_groups(config: Fields, experts: int, groups: int, best: int) -> tuple[int, int]:
    """Groups of experts, and how many of them a token may choose from; none are one group."""
    groups = config.int("n_group", 1, common.COUNT, groups)
    best = config.int("topk_group", 1, common.COUNT, best)
    if experts % groups:
        raise config.error("n_group", f"a divisor of {experts} experts")
    if best > groups:
        raise config.error("topk_group", f"at most n_group {groups}")
    return groups, best


def read_scale(config: Fields, usual: float | None) -> float:
    if usual is None:
        return config.float("routed_scaling_factor", 0.0, 1e6)
    return config.float("routed_scaling_factor", 0.0, 1e6, usual)


def read_shared_count(config: Fields, usual: int) -> int:
    return config.int(SHARED, 0, common.COUNT, usual)


def read_moe(
    config: Fields, sizes: common.Sizes, router: RouterSpec, *, width: int = 0, bias: bool = False
) -> MoE:
    """Routed experts, and the shared ones as one block of their widths together."""
    width = width or config.int("moe_intermediate_size", 1, common.SIZE)
    activation, count = common.read_activation(config), router.wiring.shared_experts
    shared = MLP(sizes.hidden, width * count, activation, bias=bias) if count else None
    return MoE(sizes.hidden, router, common.experts(config, width), shared)


def read_dense(config: Fields, sizes: common.Sizes, *, bias: bool = False) -> MLP:
    return MLP(sizes.hidden, sizes.width, common.read_activation(config), bias=bias)


def first_dense(config: Fields, layers: int, usual: int) -> list[bool]:
    """Which layers are sparse: all from `first_k_dense_replace` on."""
    if config.int("moe_layer_freq", 1, 1024, 1) != 1:
        raise config.error("moe_layer_freq", "1 for this model type")
    first = config.int("first_k_dense_replace", 0, 1024, usual)
    return [number >= first for number in range(layers)]


def every_so_many(config: Fields, layers: int, usual: int) -> list[bool]:
    """Which layers are sparse: every `moe_layer_freq`th from `first_k_dense_replace` on."""
    first = config.int("first_k_dense_replace", 0, 1024, usual)
    every = config.int("moe_layer_freq", 1, 1024, 1)
    return [number >= first and number % every == 0 for number in range(layers)]


def typed_layers(config: Fields, layers: int, usual: Sequence[bool] | int) -> list[bool]:
    """Which layers are sparse: by `mlp_layer_types`, else as `usual`, or by
    `first_k_dense_replace` where that is a number."""
    if not config.has("mlp_layer_types"):
        return first_dense(config, layers, usual) if isinstance(usual, int) else list(usual)
    types = common.read_layer_types(config, layers, (DENSE, SPARSE), (), "mlp_layer_types")
    return [kind == SPARSE for kind in types]


def placed_in_windows(sliding: Attention, types: Sequence[str]) -> list[Attention]:
    """Layers with a window have positions, those without have none."""
    full = replace(sliding, window=0, rope=None)
    return [sliding if kind == common.SLIDING else full for kind in types]


def decoder(
    sizes: common.Sizes, mixers: Sequence[Operator], blocks: Sequence[MoE | MLP]
) -> DecoderSpec:
    """Pre-norm layers of a mixer and a block each."""
    pairs = zip(mixers, blocks, strict=True)
    return common.decoder(sizes, [common.pre_norm_layer(sizes, *pair) for pair in pairs])


def blocks(sparse: Sequence[bool], moe: MoE, dense: MLP) -> list[MoE | MLP]:
    return [moe if wanted else dense for wanted in sparse]
