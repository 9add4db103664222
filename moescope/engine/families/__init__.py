"""Families: from a `config.json` to a `DecoderSpec` and a map of tensor names.

`SUPPORTED` is the table; one module per lineage holds its rows and what they name. A model type
that is not in it is refused with a sentence that says what is missing and what to use instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from moescope.engine import quantised
from moescope.engine.config import Fields, bad
from moescope.engine.decoder import DecoderSpec, Layer
from moescope.engine.families.family import Family
from moescope.engine.families.places import place
from moescope.engine.families.plans import Plan
from moescope.engine.header import TensorInfo
from moescope.engine.operators import MoE, RoutedAttention
from moescope.engine.towers import Text, parts_of, text_of
from moescope.errors import MoescopeError
from moescope.safety import single_line

_FIRST = ("olmo", "qwen", "mixtral")  # of lists; other lineages by name


def _collected() -> dict[str, Family]:
    """The rows of every module of this package that holds a table FAMILIES."""
    modules = {
        module.name: import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)
    }
    others = sorted(set(modules) - set(_FIRST))
    tables = [vars(modules[name]).get("FAMILIES", {}) for name in (*_FIRST, *others)]
    found: dict[str, Family] = {}
    for table in tables:
        assert not set(found) & set(table), set(found) & set(table)
        found |= table
    return found


SUPPORTED = _collected()

# model_type pattern -> what is missing
REFUSALS: tuple[tuple[str, str], ...] = (
    ("deepseek_v4*", "hyper-connection / compressed-attention decoder not implemented"),
    ("deepseek_v41", "hyper-connection / compressed-attention decoder not implemented"),
    ("hy_v4", "hyper-connection / compressed-attention decoder not implemented"),
    ("glm5_next*", "hyper-connection / compressed-attention decoder not implemented"),
    ("qwen4_exp*", "hyper-connection / compressed-attention decoder not implemented"),
    ("inkling*", "hyper-connection / compressed-attention decoder not implemented"),
    ("minimax", "lightning / KDA linear attention not implemented"),
    ("bailing_moe_linear", "lightning / KDA linear attention not implemented"),
    ("kimi_k3", "lightning / KDA linear attention not implemented"),
    ("muse_spark*", "experts of a compressed width, with norms around each, not implemented"),
    ("mistral_large4*", "its indexer and its layers that share keys are not implemented"),
    ("openai_privacy_filter", "labels tokens and generates none"),
    ("dots3_note*", "latent attention in windows, with a norm of what is rotated, not implemented"),
    ("deepseek_ocr2*", "reads text off images; images are not read here"),
    ("unlimited_ocr*", "reads text off images; images are not read here"),
    ("phixtral", "blocks of attention beside experts, with biases, not implemented"),
    ("doge*", "experts that are looked up by products of keys, not implemented"),
    ("qwen3_omni_moe_talker*", "speaks codes of sound, not text"),
    ("klear*", "routed and shared experts mixed by a softmax, not implemented"),
    ("Klear*", "routed and shared experts mixed by a softmax, not implemented"),
    ("ernie4_5_vl_moe*", "text and vision tokens use separate expert sets"),
    ("switch_transformers", "encoder-decoder"),
    ("nllb_moe", "encoder-decoder"),
    ("nllb-moe", "encoder-decoder"),
    ("diffusion_gemma*", "not autoregressive"),
    ("llada*", "not autoregressive"),
)
# Keys by which configs count experts, at any level of one text config.
_EXPERT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
    "ffn_config",
)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a config, or a MoescopeError that says why there is none."""
    return SUPPORTED[_text_of(config).model_type]


def build(config: Mapping[str, Any], model_dtype: str | None = None) -> DecoderSpec:
    """The decoder a config describes. With `model_dtype`, the routers' dtypes are resolved to it.

    Raises MoescopeError naming the field for anything missing, out of range, or not implemented.
    """
    text = _text_of(config)
    try:
        spec = SUPPORTED[text.model_type].build(text.fields)
    except ValueError as error:  # a combination that specs refuse, from values each fine alone
        raise bad(f"config.json: {single_line(str(error), 200)}") from error
    if not spec.routers():
        raise _dense(text.model_type)
    return spec if model_dtype is None else resolved(spec, model_dtype)


def notes(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What a user should know of a config: what is left out, how others read it."""
    text = _text_of(config)
    of_family = SUPPORTED[text.model_type].notes_on(text.fields)
    return (*text.notes(), *quantised.notes(config), *of_family)


def _text_of(config: Mapping[str, Any]) -> Text:
    """The text model of a config, where it is of a family here and has experts."""
    model_type = Fields(config).str("model_type")
    found = None if _missing(model_type) else text_of(config, SUPPORTED)
    if found is None:
        raise _refusal(model_type, config)
    if not any(found.fields.values.get(key) for key in _EXPERT_KEYS):
        raise _dense(found.model_type)
    return found


def plan(config: Mapping[str, Any], spec: DecoderSpec, tensors: Mapping[str, TensorInfo]) -> Plan:
    """Where the tensors of a checkpoint go, from names, dtypes and shapes alone; MoescopeError for
    one that is missing, misfits, or is packed in a way that is not implemented."""
    family = family_of(config)
    return place(spec, family.names, family.keys, quantised.held(config, tensors))


def resolved(spec: DecoderSpec, model_dtype: str) -> DecoderSpec:
    """`spec` with every router's `model` dtypes replaced."""
    done: dict[int, Any] = {}

    def of(operator: Any) -> Any:
        if not isinstance(operator, MoE | RoutedAttention):
            return operator
        if id(operator) not in done:
            done[id(operator)] = replace(operator, router=operator.router.resolved(model_dtype))
        return done[id(operator)]

    def layer(old: Layer) -> Layer:
        return replace(
            old, branches=tuple(replace(b, operator=of(b.operator)) for b in old.branches)
        )

    return replace(spec, layers=tuple(layer(old) for old in spec.layers))


def _missing(model_type: str) -> str:
    """What a known type would need that is not implemented; empty for all others."""
    found = (why for pattern, why in REFUSALS if fnmatchcase(model_type, pattern))
    return next(found, "")


def _refusal(model_type: str, config: Mapping[str, Any]) -> MoescopeError:
    name = single_line(model_type, 80)
    for part in parts_of(config):
        inner = part.get("model_type")
        if isinstance(inner, str) and (why := _missing(inner)):
            return bad(f"{single_line(inner, 80)}: {why}", _SUPPORTED_HINT)
    counted = any(part.get(key) for part in parts_of(config) for key in _EXPERT_KEYS)
    if "auto_map" in config:
        return bad(
            f"{name}: needs the code that its folder brings (auto_map), which moescope never runs",
            _SUPPORTED_HINT,
        )
    if not counted:
        return _dense(model_type)
    near = get_close_matches(model_type[:80], SUPPORTED, 3)
    nearest = f" (nearest: {', '.join(near)})" if near else ""
    return bad(f"{name}: not supported by this version{nearest}", _SUPPORTED_HINT)


_SUPPORTED_HINT = f"a checkpoint of one of the {len(SUPPORTED)} families in docs/families.md"


def _dense(model_type: str) -> MoescopeError:
    return bad(
        f"{single_line(model_type, 80)}: no experts in config: nothing to route",
        "give a Mixture-of-Experts checkpoint, or run `moescope` alone for the embedded one",
    )
