"""Configs of the lineages of DeepSeek's router: what is refused, by key and value, and what the
same thing is called by others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moescope.engine import families
from moescope.engine.decoder import DecoderSpec
from moescope.engine.load import load_model
from moescope.engine.operators import MLA, Attention, MoE
from moescope.engine.protocol import LoadRequest
from moescope.engine.torch_decoder import TorchDecoder
from moescope.engine.torch_operators import TorchMoE
from moescope.errors import MoescopeError
from tests.families import PUBLISHED
from tests.tiny import tiny_checkpoint, tiny_fields


def config_of(model_type: str) -> dict[str, Any]:
    return PUBLISHED.get(model_type) or {"model_type": model_type, **tiny_fields(model_type)}


def built(model_type: str, /, **edits: Any) -> DecoderSpec:
    return families.build({**config_of(model_type), **edits})


def mixers(spec: DecoderSpec) -> list[Any]:
    return [b.operator for _, b in spec.operators() if isinstance(b.operator, MLA | Attention)]


def moe(spec: DecoderSpec) -> MoE:
    return next(b.operator for _, b in spec.operators() if isinstance(b.operator, MoE))


@pytest.mark.parametrize(
    ("model_type", "edits", "says"),
    [
        ("deepseek", {"scoring_func": "sigmoid"}, 'scoring_func: expected one of softmax, found "'),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method: expected one of greedy, group_"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func: expected one of softmax"),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": None},
            "n_group: expected an integer",
        ),
        ("deepseek_v3", {"scoring_func": "softmax"}, 'noaux_tc, found "softmax"'),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method: expected one of noaux_tc"),
        ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq: expected 1"),
        ("deepseek_v3", {"n_group": 7}, "n_group: expected a divisor of 256 experts, found 7"),
        ("deepseek_v3", {"topk_group": 9}, "topk_group: expected at most n_group 8, found 9"),
        ("deepseek_v3", {"num_key_value_heads": 8}, "num_key_value_heads: expected num_attention"),
        ("deepseek_v3", {"qk_rope_head_dim": 63}, "qk_rope_head_dim: expected an even number"),
        ("deepseek_v3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1"),
        ("deepseek_v32", {"index_head_dim": 32}, "index_head_dim: expected at least qk_rope_head"),
        ("glm_moe_dsa", {"indexer_types": ["shared"] * 4}, "indexer_types: expected full for the"),
        ("glm_moe_dsa", {"index_topk_pattern": "FSXF"}, "index_topk_pattern: expected full or sha"),
        ("glm4_moe_lite", {"mlp_layer_types": ["moe"] * 47}, "mlp_layer_types: expected dense or"),
        ("exaone_moe", {"sliding_window_pattern": "LLLG"}, "sliding_window_pattern: expected an"),
        ("mistral4", {"rope_parameters": None}, "rope_parameters: expected yarn"),
        ("axk1", {"q_lora_rank": None}, "q_lora_rank: expected a positive integer"),
        ("beam", {"layer_types": ["chunked"] * 4}, "layer_types: expected full_attention or sl"),
        ("longcat_flash", {"zero_expert_type": "copy"}, "zero_expert_type: expected one of ident"),
        ("longcat_flash", {"norm_topk_prob": True}, "norm_topk_prob: expected false, found true"),
        ("longcat_flash", {"router_bias": True}, "router_bias: expected false, found true"),
        ("longcat_flash", {"mla_scale_q_lora": False}, "mla_scale_q_lora: expected true"),
        ("hy_v3", {"rope_theta": 1e7, "route_norm": False}, "route_norm: expected true, found f"),
        ("afmoe", {"score_func": "softmax"}, "score_func: expected one of sigmoid"),
        ("afmoe", {"n_group": 4}, "n_group: expected 1, found 4"),
        ("laguna", {"gating": False}, "gating: expected true, per-head or per-element"),
        ("laguna", {"moe_router_score_func": "sqrtsoftplus"}, "moe_router_score_func: expected on"),
        ("laguna", {"moe_apply_router_weight_on_input": True}, "weight_on_input: expected false"),
        ("laguna", {"num_attention_heads_per_layer": [4, 4, 4, 3]}, "multiples of num_key_value"),
        ("minimax_m2", {"scoring_func": "softmax"}, "scoring_func: expected one of sigmoid"),
        ("minimax_m2", {"attn_type_list": [1, 0]}, "attn_type_list: expected 1 for every layer"),
        ("minimax_m2", {"use_routing_bias": False}, "use_routing_bias: expected true"),
        ("bailing_moe", {"score_function": "relu"}, "score_function: expected one of softmax, si"),
    ],
)  # fmt: skip
def test_refused_by_key_and_value(model_type: str, edits: dict[str, Any], says: str) -> None:
    with pytest.raises(MoescopeError) as caught:
        built(model_type, **edits)
    assert says in caught.value.message and caught.value.message.startswith("config.json: ")


def test_kimi_k2_is_deepseek_v3_by_another_name() -> None:
    assert built("kimi_k2") == built("kimi_k2", model_type="deepseek_v3")
    assert built("kimi_k2", topk_method=None, scoring_func=None) == built("kimi_k2")


def test_dots_names_its_method_for_its_scores() -> None:
    assert built("dots1") == built("dots1", scoring_func="sigmoid")


def test_yarn_scales_the_softmax_where_it_says_for_all_dims() -> None:
    """DeepSeek-V3 as published: a factor of 40, mscale 1 for all dims."""
    scale = mixers(built("deepseek_v3"))[0].scale
    assert scale == pytest.approx(192**-0.5 * (0.1 * 3.6888794541 + 1) ** 2)
    rope = mixers(built("deepseek_v3"))[0].rope
    assert rope.scaling.attention_factor == 1.0 and rope.style == "interleaved"
    assert mixers(built("deepseek_v3", rope_scaling=None))[0].scale == 192**-0.5


@pytest.mark.parametrize(
    ("edits", "own"),
    [
        ({}, [True] * 8),
        ({"index_topk_freq": 4}, [True, True, False, False, False, True, False, False]),
        ({"index_topk_freq": 2, "index_skip_topk_offset": 1}, [True, False] * 4),
        ({"index_topk_pattern": "FFSSFSSS"}, [True, True, False, False, True] + [False] * 3),
        ({"indexer_types": ["full", "shared"] * 4}, [True, False] * 4),
    ],
)
def test_layers_with_an_indexer_of_their_own(edits: dict[str, Any], own: list[bool]) -> None:
    from transformers import AutoConfig

    config = {**config_of("glm_moe_dsa"), "num_hidden_layers": 8, **edits}
    found = mixers(families.build(config))
    assert [mixer.indexer is not None for mixer in found] == own
    assert [mixer.shares_choice for mixer in found] == [not each for each in own]
    theirs = AutoConfig.for_model(**config).indexer_types
    assert [kind == "full" for kind in theirs] == own


def test_routers_in_words() -> None:
    lines = {name: moe(built(name)).router.line() for name in ("deepseek_v3", "longcat_flash")}
    assert "sigmoid" in lines["deepseek_v3"] and "2.5" in lines["deepseek_v3"]
    assert "softmax" in lines["longcat_flash"] and "not renormalised" in lines["longcat_flash"]


def test_beams_residual_keeps_its_variance() -> None:
    """Each sum's two factors, squared, add up to one."""
    for _, branch in built("beam").operators():
        assert branch.keeps**2 + branch.multiplier**2 == pytest.approx(1.0)


def test_notes_are_of_the_configs_they_are_about() -> None:
    def noted(model_type: str, word: str, **edits: Any) -> bool:
        notes = families.notes({**config_of(model_type), **edits})
        return any(word in note for note in notes)

    assert noted("deepseek_v3", "masked experts") and not noted("kimi_k2", "masked experts")
    assert not noted("deepseek_v3", "masked experts", topk_group=8)
    assert noted("deepseek_v2", "norm_topk_prob is ignored", norm_topk_prob=True)
    assert not noted("deepseek_v2", "norm_topk_prob is ignored")
    assert noted("bailing_moe", "compared with mlx-lm")


def test_a_checkpoint_without_a_correction_bias_has_none(tmp_path: Path) -> None:
    """A.X-K1 as released: no bias, and a norm after dense blocks that nothing reads."""
    from safetensors.torch import load_file, save_file

    folder = tiny_checkpoint("axk1", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if "correction_bias" not in name}
    assert len(kept) < len(tensors)
    norm = "model.layers.1.post_mlp_layernorm.weight"
    kept[norm.replace(".1.", ".0.")] = kept[norm].clone()
    save_file(kept, folder / "model.safetensors")
    model = load_model(LoadRequest(str(folder), device="cpu"))
    assert isinstance(model.interpreter, TorchDecoder)
    routers = [run.router for _, run in model.interpreter._operators if isinstance(run, TorchMoE)]
    assert all(bool((router.correction_bias == 0).all()) for router in routers)
    notes = model.facts["notes"]
    assert sum("correction_bias" in note for note in notes) == 1
    assert not any("post_mlp_layernorm" in note for note in notes)
