"""What a config leaves out means what it means to transformers' config classes, or is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from moescope.engine import families
from moescope.engine.config import parse_object
from moescope.engine.decoder import DecoderSpec
from moescope.engine.operators import Attention, MoE
from moescope.errors import MoescopeError
from tests.families import TINY
from tests.tiny import FAMILIES, tiny_config, tiny_fields

# Fields without which nothing is built: a default for them would be a guess at the weights.
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_experts_per_tok": 2,
}
THETA_REQUIRED = ("flex_olmo", "mixtral")


def minimal(family: str) -> dict[str, Any]:
    experts = "num_local_experts" if family == "mixtral" else "num_experts"
    theta = {"rope_theta": 5e5} if family in THETA_REQUIRED else {}
    return {"model_type": family, **SIZES, experts: 8, **theta}


def attention(spec: DecoderSpec, layer: int = 0) -> Attention:
    found = spec.layers[layer].branches[0].operator
    assert isinstance(found, Attention)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_are_those_of_the_config_class(family: str) -> None:
    from transformers import AutoConfig

    theirs = AutoConfig.for_model(**minimal(family))
    spec = families.build(minimal(family))
    mixer, block = attention(spec), spec.layers[0].branches[1].operator
    assert isinstance(block, MoE) and spec.final_norm is not None and mixer.rope is not None
    assert spec.context == theirs.max_position_embeddings
    assert mixer.kv_heads == theirs.num_key_value_heads
    assert spec.final_norm.eps == theirs.rms_norm_eps
    assert spec.tied_head == theirs.tie_word_embeddings
    assert mixer.rope.theta == theirs.rope_parameters["rope_theta"]
    assert mixer.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert mixer.clip_qkv == getattr(theirs, "clip_qkv", None)
    assert mixer.qkv_bias == getattr(theirs, "qkv_bias", getattr(theirs, "attention_bias", False))
    assert mixer.window == (getattr(theirs, "sliding_window", None) or 0)
    assert block.router.policy.norm_topk_prob == getattr(theirs, "norm_topk_prob", True)
    assert block.experts.activation == theirs.hidden_act
    assert len(spec.routers()) == 4


@pytest.mark.parametrize("family", TINY)
def test_silence_means_what_the_config_class_fills_in(family: str) -> None:
    """A config that says only what it must, and the same with every field spelled out."""
    said = {"model_type": family, **tiny_fields(family)}
    text = tiny_config(family).to_json_string(use_diff=False)
    spelled = parse_object(text.encode(), "config.json")
    theta = spelled.get("rope_theta") or (spelled.get("rope_parameters") or {}).get("rope_theta")
    if theta and "rope_parameters" not in said:
        said["rope_theta"] = theta  # where it is not the usual one it must be said
    assert families.build(said) == families.build(spelled)


@pytest.mark.parametrize("family", FAMILIES)
def test_yarn_takes_the_context_that_the_config_class_has(family: str) -> None:
    """An absent `original_max_position_embeddings` is the whole context; torch's frequencies."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from moescope.engine.torch_operators.rope import frequencies as _frequencies

    yarn = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 8.0, "rope_theta": 5e5}
    config = {**minimal(family), "head_dim": 8, "rope_parameters": yarn}
    theirs, scale = ROPE_INIT_FUNCTIONS["yarn"](AutoConfig.for_model(**config), "cpu")
    rope = attention(families.build(config)).rope
    assert rope is not None
    ours, factor = _frequencies(rope)
    assert math.isclose(factor, scale) and bool((ours == theirs).all())


@pytest.mark.parametrize("family", THETA_REQUIRED)
def test_a_base_that_is_not_the_usual_one_must_be_given(family: str) -> None:
    config = minimal(family)
    del config["rope_theta"]
    with pytest.raises(MoescopeError, match="rope_theta: expected a number"):
        families.build(config)


@pytest.mark.parametrize("edit", [{}, {"sliding_window": None}, {"sliding_window": 64}])
def test_a_null_window_is_none_where_windows_are_used(edit: dict[str, Any]) -> None:
    from transformers import AutoConfig

    config = {**minimal("qwen3_moe"), "use_sliding_window": True, **edit}
    theirs = AutoConfig.for_model(**config).sliding_window
    assert attention(families.build(config)).window == (theirs or 0)
