"""A.X-K1 and A.X-K2."""

from __future__ import annotations

from typing import Any

from tests.families.deepseek import LATENT, UNSEEN_INDEXER, YARN
from tests.families.kit import Case

_GROUPS = {"n_group": 4, "topk_group": 2}
TINY: dict[str, dict[str, Any]] = {
    "axk1": {**LATENT, **_GROUPS, "n_routed_experts": 8},
    "axk2": {
        **LATENT,
        "n_routed_experts": 8,
        "index_n_heads": 16,
        "index_head_dim": 12,
        "index_topk": 64,
        "gated_norm_rank": 4,
    },
}
CASES = (
    Case("axk1", "released", 0),
    Case(
        "axk1",
        "ungrouped",
        1,
        {
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "norm_topk_prob": False,
            "attention_bias": True,
            "mlp_layer_types": ["sparse", "dense", "sparse", "dense"],
            "rope_parameters": YARN,
        },
    ),
    Case("axk2", "light", 1),
    Case(
        "axk2",
        "groups",
        0,
        {
            "n_group": 4,
            "topk_group": 3,
            "index_topk": 9,
            "norm_topk_prob": False,
            "attention_bias": True,
        },
    ),
)


def _init(name: str, tensor: Any, noise: Any) -> Any:
    """The narrow layers of gated norms are no norms. Biased scores are below 0, so that all of a
    masked group are chosen, and none of several that tie."""
    if name.endswith("correction_bias"):
        return 0.3 * noise - 1.5
    return noise / tensor.shape[-1] ** 0.5 if ".mlp.fc" in name else None


INIT = {"axk2": _init}
EXEMPT = {
    ("axk2-light", "RouterPolicy.group_mask_fill"): "no groups",
} | {("axk2-light", what): why for what, why in UNSEEN_INDEXER.items()}
