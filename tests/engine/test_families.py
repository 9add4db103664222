"""Configs to specs: both dialects, published sizes, and every refusal by name. No weights here."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.engine import families, parameters
from moescope.engine.decoder import DecoderSpec
from moescope.engine.operators import MLP, Attention, MoE
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import single_line
from tests.families import COUNTS, PUBLISHED, TINY
from tests.tiny import FAMILIES

OLMOE, QWEN3, QWEN2, MIXTRAL, FLEX = (
    PUBLISHED[name] for name in ("olmoe", "qwen3_moe", "qwen2_moe", "mixtral", "flex_olmo")
)
STEP = PUBLISHED["step3p5"]
CONFIGS = {name: PUBLISHED[name] for name in FAMILIES}


def moe(spec: DecoderSpec) -> MoE:
    return next(b.operator for _, b in spec.operators() if isinstance(b.operator, MoE))


def attention(spec: DecoderSpec, layer: int = 0) -> Attention:
    found = spec.layers[layer].branches[0].operator
    assert isinstance(found, Attention)
    return found


def refused(config: dict[str, Any]) -> MoescopeError:
    with pytest.raises(MoescopeError) as caught:
        families.build(config)
    assert caught.value.code == ExitCode.CHECKPOINT
    return caught.value


def test_the_tables_agree() -> None:
    assert set(families.SUPPORTED) == set(TINY)
    assert set(FAMILIES) <= set(families.SUPPORTED) >= set(PUBLISHED) >= set(COUNTS)


@pytest.mark.parametrize("model_type", COUNTS)
def test_published_sizes(model_type: str) -> None:
    """Parameters in all, and read for a token (without the rows of the embedding not looked up)."""
    total, active = COUNTS[model_type]
    spec = families.build(PUBLISHED[model_type])
    assert parameters.count(spec) / 1e9 == pytest.approx(total, rel=0.01)
    assert parameters.count_active(spec) / 1e9 == pytest.approx(active, rel=0.02)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_both_dialects_mean_the_same(model_type: str) -> None:
    older = CONFIGS[model_type]
    newer = dict(older)
    theta = newer.pop("rope_theta")
    newer.pop("rope_scaling", None)
    newer["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    newer["dtype"] = newer.pop("torch_dtype", "bfloat16")
    for a, b in (("num_experts", "num_local_experts"), ("num_local_experts", "num_experts")):
        if a in older:
            newer[b] = newer.pop(a)
    assert families.build(newer) == families.build(older)


def test_dialects_that_contradict_each_other_are_refused() -> None:
    error = refused({**QWEN3, "num_local_experts": 64})
    assert error.message.startswith("config.json: num_experts: expected the same as num_local")


@pytest.mark.parametrize(
    ("scaling", "dialect"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, "new"),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, "old"),
    ],
)
def test_yarn_in_both_dialects(scaling: dict[str, Any], dialect: str) -> None:
    found = attention(families.build({**QWEN3, "rope_scaling": scaling})).rope
    assert found is not None and found.scaling is not None, dialect
    assert found.theta == 1e6 and found.scaling.kind == "yarn"
    assert found.scaling.original_context == 32768
    assert found.scaling.attention_factor == pytest.approx(1.1386294)


def test_routers_are_as_the_families_have_them() -> None:
    lines = {name: moe(families.build(config)).router for name, config in CONFIGS.items()}
    assert lines["olmoe"].line() == "softmax → top-8, not renormalised"
    assert lines["qwen3_moe"].line() == "softmax → top-8, renormalised"
    assert lines["mixtral"].policy.norm_topk_prob
    assert {name for name, spec in lines.items() if spec.wiring.combine_dtype == "float32"} == {
        "mixtral"
    }
    assert lines["flex_olmo"].wiring.router_input == "residual"
    assert lines["qwen2_moe"].wiring.shared_expert_gate == "sigmoid"
    resolved = moe(families.build(OLMOE, "bfloat16")).router
    assert resolved.wiring.router_dtype == resolved.wiring.combine_dtype == "bfloat16"
    assert resolved.policy.score_dtype == "float32"


def test_windows_of_qwen2() -> None:
    """Every other layer below `max_window_layers`; `layer_types` overrides."""
    config = {**QWEN2, "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 5}
    spec = families.build(config)
    windows = [attention(spec, n).window for n in range(8)]
    assert windows == [64, 0, 64, 0, 64, 0, 0, 0]
    types = ["full_attention"] * 23 + ["sliding_attention"]
    spec = families.build({**config, "layer_types": types})
    assert [attention(spec, n).window for n in (0, 22, 23)] == [0, 0, 64]
    assert not any(attention(families.build(QWEN2), n).window for n in range(24))


def test_dense_layers_of_qwen() -> None:
    spec = families.build({**QWEN3, "decoder_sparse_step": 2, "mlp_only_layers": [1, 5]})
    sparse = [n for n, b in spec.operators() if isinstance(b.operator, MoE)]
    assert sparse == [n for n in range(48) if n % 2 == 1 and n not in (1, 5)]
    assert {b.operator.width for _, b in spec.operators() if isinstance(b.operator, MLP)} == {6144}


@pytest.mark.parametrize(
    ("model_type", "extra", "says"),
    [
        ("deepseek_v4", {}, "deepseek_v4: hyper-connection / compressed-attention decoder not"),
        ("inkling2", {}, "inkling2: hyper-connection"),
        ("minimax", {}, "minimax: lightning / KDA linear attention not implemented"),
        ("kimi_k3", {}, "kimi_k3: lightning / KDA"),
        ("ernie4_5_vl_moe", {}, "ernie4_5_vl_moe: text and vision tokens use separate expert sets"),
        ("nllb_moe", {}, "nllb_moe: encoder-decoder"),
        ("llada2_moe", {}, "llada2_moe: not autoregressive"),
        ("Klear", {"num_experts": 16}, "Klear: routed and shared experts mixed by a softmax"),
        ("muse_spark_text", {"num_experts": 16}, "muse_spark_text: experts of a compressed width"),
        ("mistral_large4_text", {}, "mistral_large4_text: its indexer"),
        ("openai_privacy_filter", {"num_local_experts": 8}, "openai_privacy_filter: labels tokens"),
        ("dots3_note", {"text_config": {"model_type": "x"}}, "dots3_note: latent attention in"),
        ("deepseek_ocr2", {"text_config": {}}, "deepseek_ocr2: reads text off images; images are"),
        (
            "bailing_hybrid",
            {"num_experts": 8, "architectures": ["BailingMoeV2_5ForCausalLM"]},
            "config.json: architectures: expected BailingMoeV3ForCausalLM: lightning attention is",
        ),
        (
            "bailing_hybrid",
            {"num_experts": 8, "group_norm_size": 4},
            "config.json: group_norm_size: expected nothing: lightning attention is not impl",
        ),
        ("phixtral", {"num_local_experts": 4}, "phixtral: blocks of attention beside experts"),
        ("my_vl_moe", {"text_config": {"num_experts": 8}}, "my_vl_moe: not supported"),
        ("llama", {}, "llama: no experts in config: nothing to route"),
        ("mine", {"auto_map": {"AutoModel": "x.Y"}}, "mine: needs the code that its folder brings"),
        ("x\x1b[31m\n", {}, r"x\x1b[31m\n: no experts"),
    ],
)
def test_other_model_types_are_refused_by_name(
    model_type: str, extra: dict[str, Any], says: str
) -> None:
    assert refused({"model_type": model_type, **extra}).message.startswith(says)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: expected a number"),
        ({"yarn_only_types": []}, "yarn_only_types: expected full_attention, found []"),
        ({"rope_theta": [5e6, 1e4] * 24}, "rope_theta: expected one number for all layers of sl"),
        ({"swiglu_limits": [7.0] * 44}, "swiglu_limits: expected a list of 45 numbers, found a"),
        ({"swiglu_limits": [-7.0] * 45}, "swiglu_limits: expected numbers 0..1e6"),
        ({"moe_layers_enum": "3,x"}, 'moe_layers_enum: expected numbers of layers, not "x"'),
        ({"moe_router_activation": "softmax"}, "moe_router_activation: expected one of sigmoid"),
        ({"norm_expert_weight": False}, "norm_expert_weight: expected true, found false"),
        ({"use_rope_layers": [False] * 45}, "use_rope_layers: expected true for every layer"),
        (
            {"num_sliding_attention_heads": 12},
            "num_key_value_heads: expected a divisor of [12, 64]",
        ),
        ({"per_layer_config": {"3": {"head_dim": 64}}}, "per_layer_config: expected no head_dim"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_step_does_not_say_of_every_layer_is_refused(edit: dict[str, Any], says: str) -> None:
    """In the text of a whole, too, by the place it has there."""
    assert refused({**STEP, **edit}).message.startswith(f"config.json: {says}")
    whole = {"model_type": "step3p7", "text_config": {**STEP, **edit}}
    assert refused(whole).message.startswith(f"config.json: text_config.{says}")


@pytest.mark.parametrize(
    ("config", "edit", "says"),
    [
        (OLMOE, {"clip_qkv": 8.0}, "mlx-lm (0.32) ignores clip_qkv"),
        (MIXTRAL, {"sliding_window": 4096}, "mlx-lm (0.32) ignores sliding_window"),
        (QWEN2, {"norm_topk_prob": True}, "mlx-lm (0.32) ignores norm_topk_prob"),
        (STEP, {"need_fp32_gate": True}, "the gate's product is in float32"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_others_read_otherwise_is_noted_where_it_matters(
    config: dict[str, Any], edit: dict[str, Any], says: str
) -> None:
    plain = {key: value for key, value in config.items() if key not in edit}
    assert any(note.startswith(says) for note in families.notes({**plain, **edit}))
    assert not any(note.startswith(says) for note in families.notes(plain))


def test_a_family_under_another_name() -> None:
    config = PUBLISHED["deepseek_v3"]
    renamed = {**config, "model_type": "joyai_llm_flash"}
    assert families.build(renamed) == families.build(config)
    assert families.family_of(renamed) is families.SUPPORTED["deepseek_v3"]


def test_the_refusal_says_what_is_near() -> None:
    error = refused({"model_type": "qwen3moe", "num_local_experts": 16})
    assert error.message.startswith("qwen3moe: not supported by this version (nearest: qwen3_moe")
    assert error.hint.startswith(f"a checkpoint of one of the {len(families.SUPPORTED)} families")


@pytest.mark.parametrize(
    ("config", "edit", "says"),
    [
        (OLMOE, {"hidden_act": "tanh"}, "hidden_act: expected one of silu, swish, gelu, gelu_new"),
        (OLMOE, {"num_experts": 0}, "olmoe: no experts in config: nothing to route"),
        (OLMOE, {"num_experts": None}, "olmoe: no experts in config: nothing to route"),
        (OLMOE, {"num_experts": "64"}, 'num_experts: expected an integer 1..4096, found "64"'),
        (OLMOE, {"num_experts_per_tok": 65}, "num_experts_per_tok: expected an integer 1..64"),
        (QWEN2, {"num_experts_per_tok": 61}, "num_experts_per_tok: expected at most num_experts"),
        (OLMOE, {"norm_topk_prob": 1}, "norm_topk_prob: expected true or false, found 1"),
        (OLMOE, {"num_key_value_heads": 3}, "num_key_value_heads: expected a divisor"),
        (OLMOE, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: expected 1"),
        (
            OLMOE,
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope_scaling.type: expected",
        ),
        (OLMOE, {"rope_scaling": {"type": "linear"}}, "rope_scaling.factor: expected a number"),
        (
            OLMOE,
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"factor": 4.0}},
            "rope_parameters: expected the same as rope_scaling",
        ),
        (
            QWEN2,
            {"rope_parameters": {"full_attention": {"rope_theta": 5e5}}},
            "rope_parameters.full_attention: expected no object: this model type has one rope",
        ),
        (
            QWEN3,
            {"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2.0}},
            "rope_theta: expected more than 1 where",
        ),
        (MIXTRAL, {"rope_theta": None}, "rope_theta: expected a number (this family's usual is"),
        (FLEX, {"rope_theta": None}, "rope_theta: expected a number (this family's usual is"),
        (MIXTRAL, {"sliding_window": 0}, "sliding_window: expected an integer 1.."),
        (QWEN2, {"layer_types": ["lightning"] * 24}, "layer_types: expected full_attention or"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 24}, "layer_types: expected no sliding"),
        (
            QWEN3,
            {"layer_types": ["sliding_attention"] * 48},
            "layer_types: expected full_attention",
        ),
        (QWEN3, {"mlp_only_layers": [48]}, "mlp_only_layers: expected layers 0..47"),
        (QWEN3, {"mlp_only_layers": list(range(48))}, "qwen3_moe: no experts in config"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_fields_are_refused_by_key_and_value(
    config: dict[str, Any], edit: dict[str, Any], says: str
) -> None:
    message = refused({**config, **edit}).message
    assert message.removeprefix("config.json: ").startswith(says), message


def test_absent_model_type() -> None:
    assert refused({}).message == "config.json: model_type: expected a string, found nothing"


_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 70),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True),
    st.text(max_size=8),
    st.lists(st.one_of(st.integers(-2, 60), st.text(max_size=3)), max_size=4),
    st.dictionaries(st.sampled_from(["type", "factor", "rope_type", "rope_theta"]), st.integers()),
)


@settings(max_examples=150, deadline=None)
@given(st.data(), st.sampled_from(sorted(PUBLISHED)))
def test_any_config_builds_or_is_refused(data: st.DataObject, model_type: str) -> None:
    """Whatever a config holds, the answer is a spec or a MoescopeError, and never anything else."""
    config = dict(PUBLISHED[model_type])
    keys = st.sampled_from(
        [*config, "rope_parameters", "layer_types", "head_dim", "attention_bias"]
    )
    for key in data.draw(st.lists(keys, min_size=1, max_size=3)):
        config[key] = data.draw(_VALUES)
    try:
        spec = families.build(config)
    except MoescopeError as error:
        assert error.message and error.message == single_line(error.message, 1000)
    else:
        assert parameters.count(spec) > 0 and replace(spec) == spec
        assert json.dumps([router.to_json() for _, _, router in spec.routers()])
