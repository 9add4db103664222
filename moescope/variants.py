"""Router variants: the catalogue of known faults (data), and the expressions users write.

A variant is edits of a `RouterSpec`. An expression is one or more groups, separated by `/`; a group
is items separated by `,` and, after `@`, the layers it holds for (`3-7`, `0+2-4`; none: all). An
item is a name of the catalogue or a field of the spec: `norm_topk_prob=true`, `top_k+1`.

    softmax_over_selected        norm_topk_prob=true,num_experts_per_tok=4@3-7
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, NoReturn, get_args, get_type_hints

from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring

MAX_LENGTH = 1000
MAX_LAYER = 9999
HINT = "moescope variants lists names and fields"


@dataclass(frozen=True, slots=True)
class Variant:
    """One entry of the catalogue. A mapping as an edit's value turns present values into new ones
    and leaves others alone; `requires` names the present values it makes sense for."""

    name: str
    title: str
    summary: str
    policy: Mapping[str, Any] = field(default_factory=dict)
    wiring: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[tuple[int, int], ...] | None = None
    evidence: str = ""
    requires: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)


_BIASED = {"correction_bias": ("score", "logit")}
_NORMED = {"norm_topk_prob": (True,)}
_ALL = (
    Variant(
        "trained",
        "as trained",
        "The router that the checkpoint was trained with.",
    ),
    Variant(
        "softmax_over_selected",
        "softmax over the selected",
        "Scores only the chosen experts, so their weights sum to 1: coherent at first, then drift.",
        {"score_order": "topk_then_score", "norm_topk_prob": False},
        evidence="lablup/mlxcel #391 (OLMoE), tinygrad #17377, vllm-gaudi #970, "
        "HabanaAI/vllm-fork #1852; mlx-lm jamba",
        requires={"scoring_func": ("softmax",), "correction_bias": ("none", "logit")},
    ),
    Variant(
        "no_renormalisation",
        "never renormalised",
        "Leaves the weights of the chosen experts as they came from all scores.",
        {"norm_topk_prob": False, "score_order": {"topk_then_score": "score_then_topk"}},
        evidence="torchtitan #1448 (DeepSeek-V3), #2258, #2319 (gpt-oss), Megatron-LM #1593, "
        "flashinfer #2889; mlx-lm hunyuan",
    ),
    Variant(
        "always_renormalised",
        "always renormalised",
        "Divides the chosen weights by their sum where training did not.",
        {"norm_topk_prob": True},
        evidence="lablup/mlxcel #391 (OLMoE), axolotl scattermoe layers (default when unset)",
    ),
    Variant(
        "wrong_scoring_func",
        "sigmoid for softmax, or the other way round",
        "Scores with the function of another architecture; with a correction bias, ids change too.",
        {"scoring_func": {"softmax": "sigmoid", "sigmoid": "softmax", "sqrtsoftplus": "softmax"}},
        evidence="llama.cpp #18980 and ik_llama.cpp #1174 (GLM-4.7-Flash), mlx-lm #1354, #1883 and "
        "mlx-swift-lm #332 (LFM2)",
    ),
    Variant(
        "raw_logits_as_weights",
        "raw logits as weights",
        "Multiplies the experts with their logits: weights below 0 or above 1.",
        {"weights_from": "logits", "norm_topk_prob": False},
        evidence="SGLang #35160 (Qwen2-MoE)",
    ),
    Variant(
        "logits_bf16",
        "logits in bfloat16",
        "Rounds the gate's output to bfloat16: near ties flip.",
        {"logits_dtype": "bfloat16"},
        evidence="vLLM #14027, #41332, #42501 (MiniMax), SGLang #38695, #29892 (GLM-5.2), "
        "NeMo Automodel #3650",
    ),
    Variant(
        "scores_bf16",
        "scores in bfloat16",
        "Rounds the scores to bfloat16: many exact ties, weights off in the third digit.",
        {"score_dtype": "bfloat16"},
        evidence="mlx-lm kimi_linear, gemma4; transformers dbrx and gpt_oss",
    ),
    Variant(
        "double_softmax",
        "scored twice",
        "Takes probabilities for logits and scores them again: nearly flat weights.",
        {"score_passes": 2},
        evidence="transformers #45131, #45120, VeOmni #715, NeMo #1559",
        requires={"scoring_func": ("softmax", "sigmoid")},
    ),
    Variant(
        "bias_in_combine_weights",
        "bias in the combine weights",
        "Weights come from the biased scores that were meant for choosing only.",
        {"weights_from": "biased_scores"},
        evidence="vLLM #12002, transformers #41647 (DeepSeek-V3), #41663 (dots1), #39581 (ERNIE), "
        "mlx-lm #1257",
        requires=_BIASED,
    ),
    Variant(
        "selection_bias_dropped",
        "correction bias dropped",
        "Chooses without the correction bias: other experts, the same sum.",
        {
            "correction_bias": "none",
            "weights_from": {"biased_scores": "scores", "biased_minus_bias": "scores"},
        },
        evidence="vLLM #21586 (ERNIE), SGLang #10440, prime-rl #2681; mlx-lm ernie4_5_moe",
        requires=_BIASED,
    ),
    Variant(
        "bias_bf16",
        "correction bias in bfloat16",
        "Rounds the correction bias: biases far from 0 collapse onto a few values.",
        {"correction_bias_dtype": "bfloat16"},
        evidence="SGLang #8729 (GLM-4.5), #31213, #37133 (GLM-5.2), transformers #42580, "
        "Megatron-LM #1482",
        requires=_BIASED,
    ),
    Variant(
        "weights_by_subtracting_bias",
        "weights by subtracting the bias",
        "Recovers the score as (score + bias) − bias: small scores are lost to rounding.",
        {"weights_from": "biased_minus_bias"},
        evidence="flashinfer #3875, vLLM #47367 (GLM-5.2)",
        requires={"correction_bias": ("score",)},
    ),
    Variant(
        "renorm_eps_missing",
        "no eps in the sum",
        "Divides by a bare sum: NaN where every chosen score underflowed.",
        {"norm_eps": 0.0, "norm_eps_mode": "add"},
        evidence="flashinfer #3803, #3946, SGLang #31017, #34459",
        requires=_NORMED,
    ),
    Variant(
        "renorm_eps_added",
        "1e-6 added to the sum",
        "Renormalises with the eps of another family: weights shrink where scores are small.",
        {"norm_eps": 1e-6, "norm_eps_mode": "add"},
        evidence="mlx-lm #521; transformers lfm2_moe beside its relatives",
        requires={**_NORMED, "scoring_func": ("sigmoid", "sqrtsoftplus")},
    ),
    Variant(
        "renorm_eps_clamped",
        "sum clamped at 6.1e-5",
        "Never divides by less than 6.1e-5: weights of tiny scores no longer sum to 1.",
        {"norm_eps": 2.0**-14, "norm_eps_mode": "clamp"},
        evidence="llama.cpp #16655 (build_moe_ffn)",
        requires=_NORMED,
    ),
    Variant(
        "group_mask_zero",
        "masked groups at 0",
        "Masks groups with 0 instead of −inf: they win wherever an admissible value is negative.",
        {"group_mask_fill": "0"},
        evidence="DeepSeek-V3 #741, vLLM #13474, SGLang #3705, transformers #45440, #45441; "
        "mlx-lm deepseek_v3",
    ),
    Variant(
        "group_score_max",
        "groups scored by their best",
        "Ranks groups by their best expert, as DeepSeek-V2 does, where the top two are summed.",
        {"group_score": "max"},
        evidence="vLLM #13474, Megatron-LM #1378, #1381, mistral.rs #1278",
    ),
    Variant(
        "group_score_top2",
        "groups scored by their top two",
        "Ranks groups by the sum of their two best, as DeepSeek-V3 does, where the best counts.",
        {"group_score": "top2_sum"},
        evidence="llama.cpp build_moe_ffn (always)",
    ),
    Variant(
        "group_limit_ignored",
        "group limit ignored",
        "Chooses among all experts although only some groups are admissible.",
        {"n_group": 1, "topk_group": 1},
        evidence="llama.cpp #16063, #14939, axolotl scattermoe layers",
    ),
    Variant(
        "forced_grouping",
        "groups where there are none",
        "Takes every sigmoid router for DeepSeek-V3's: 4 of 8 groups admitted.",
        {"n_group": 8, "topk_group": 4, "group_score": "top2_sum"},
        evidence="vLLM #34673 (MiniMax-M2.1)",
        requires={"scoring_func": ("sigmoid",), "n_group": (1,)},
    ),
    Variant(
        "scaling_missing",
        "scaling factor left out",
        "Leaves out routed_scaling_factor: the routed experts are too quiet.",
        {"scale_power": 0},
        evidence="sglang-jax #1282, SGLang #8511, #8402, #8364, #31449, vLLM #23123",
    ),
    Variant(
        "scaling_twice",
        "scaling factor applied twice",
        "Applies routed_scaling_factor in the weights and once more: degenerate text.",
        {"scale_power": 2},
        evidence="SGLang #12998",
    ),
    Variant(
        "scaling_site",
        "scaling factor at the other site",
        "Scales the routed output instead of the weights, or the other way round.",
        {"scale_site": {"weights": "routed_output", "routed_output": "weights"}},
        evidence="SGLang #10019 (LongCat); mlx-lm beside transformers for step3p7, laguna",
    ),
    Variant(
        "sparsemixer_as_softmax",
        "softmax for SparseMixer",
        "Softmax, top-2, renormalised: the sum is 1 instead of about 1.7.",
        {"scoring_func": "softmax", "norm_topk_prob": True},
        evidence="llama.cpp src/models/phi3.cpp (PhiMoE)",
        requires={"scoring_func": ("sparsemixer",)},
    ),
    Variant(
        "router_quantised",
        "gate in 8 bits",
        "Quantises the gate's weight like any other: near ties flip.",
        {"gate_quant_bits": 8},
        evidence="mlx-lm quant_predicate, axolotl #3791, vllm-omni #5573",
    ),
    Variant(
        "tie_break",
        "ties to the higher id",
        "Gives exact ties to the higher expert id.",
        {"tie_break": "higher_id"},
        evidence="vLLM #55514, #52679, #54403, SGLang #31768",
    ),
)
CATALOGUE: dict[str, Variant] = {variant.name: variant for variant in _ALL}

# What the recorded logits cannot show: it happens before them, or beside the router.
_ON_LOGITS_TOO = {"combine_dtype"}
_BEFORE_LOGITS = {"gate_quant_bits"}
_ALIASES = {"top_k": "num_experts_per_tok"}


# --- expressions --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Edit:
    """One field of the spec: set (`=`), raised (`+`) or lowered (`-`) by `value`."""

    field: str
    operator: str
    value: Any

    def __str__(self) -> str:
        value = str(self.value).lower() if isinstance(self.value, bool) else str(self.value)
        return f"{self.field}{self.operator}{value}"


@dataclass(frozen=True, slots=True)
class Group:
    """Items in the order they apply, and the layers they hold for (None: all)."""

    items: tuple[str | Edit, ...]
    layers: tuple[tuple[int, int], ...] | None = None

    def holds(self, layer: int) -> bool:
        return self.layers is None or any(low <= layer <= high for low, high in self.layers)

    def __str__(self) -> str:
        items = ",".join(map(str, self.items))
        if self.layers is None:
            return items
        spans = (str(low) if low == high else f"{low}-{high}" for low, high in self.layers)
        return f"{items}@{'+'.join(spans)}"


@dataclass(frozen=True, slots=True)
class Edits:
    """A parsed expression, normalised: equal expressions are equal values. Empty: as trained."""

    groups: tuple[Group, ...] = ()

    @property
    def fields(self) -> frozenset[str]:
        """The spec fields that may change."""
        names: set[str] = set()
        for group in self.groups:
            for item in group.items:
                names |= {item.field} if isinstance(item, Edit) else _touched(CATALOGUE[item])
        return frozenset(names)

    @property
    def rebuilds(self) -> bool:
        """Whether the wiring changes, so that an interpreter must rebuild its step."""
        return bool(self.fields & _hints(RouterWiring).keys())

    @property
    def on_logits(self) -> bool:
        """Whether recorded logits are enough to see what this variant would have decided."""
        unseen = (_hints(RouterWiring).keys() - _ON_LOGITS_TOO) | _BEFORE_LOGITS
        return not self.fields & unseen

    def __str__(self) -> str:
        return "/".join(map(str, self.groups)) or "trained"


@lru_cache(maxsize=1024)
def parse(expression: str) -> Edits:
    """An expression as edits. Raises MoescopeError naming the part that is wrong."""
    if len(expression) > MAX_LENGTH:
        _refuse(expression[:40] + "…", f"expected at most {MAX_LENGTH} characters")
    groups = (_parse_group(text, expression) for text in expression.split("/"))
    return Edits(tuple(group for group in groups if group.items))


def canonical(expression: str) -> str:
    """The one way to write `expression`; `trained` where it changes nothing."""
    return str(parse(expression))


def _parse_group(text: str, expression: str) -> Group:
    body, at, where = text.partition("@")
    items = [_parse_item(item.strip(), expression) for item in body.split(",")]
    layers = _parse_layers(where, expression) if at else None
    return Group(tuple(item for item in items if item != "trained"), layers)


def _parse_item(text: str, expression: str) -> str | Edit:
    found = re.fullmatch(r"(\w+)\s*([=+-])\s*(.*)", text, re.ASCII)
    if not found:
        if text not in CATALOGUE:
            known = [*CATALOGUE, *_hints(RouterPolicy), *_hints(RouterWiring)]
            missing = f"{text} needs a value, as in {text}=…"
            _refuse(expression, missing if text in known else _unknown(text, known))
        return text
    name, operator, value = found.groups()
    name = _ALIASES.get(name, name)
    hints = {**_hints(RouterPolicy), **_hints(RouterWiring)}
    if name in CATALOGUE:
        _refuse(expression, f"{name} takes no {operator!r}; a comma joins several")
    if name not in hints:
        _refuse(expression, _unknown(name, [*hints, *CATALOGUE]))
    if name in ("num_experts", "num_null_experts"):
        _refuse(expression, f"{name} is a fact of the checkpoint and cannot be edited")
    if operator != "=":
        if hints[name] is not int:
            _refuse(expression, f"{name}: only whole numbers can be raised or lowered")
        if not re.fullmatch(r"0*[1-9]\d{0,5}", value, re.ASCII):
            _refuse(expression, f"{name}: expected a number from 1 after {operator}", value)
        return Edit(name, operator, int(value))
    return Edit(name, "=", _parse_value(name, value, hints[name], expression))


def _parse_value(name: str, text: str, hint: Any, expression: str) -> Any:
    """A value of the field's type: an enum word, true or false, an integer, a finite number."""
    if words := {str(value): value for value in get_args(hint) if value != "model"}:
        if text not in words:
            _refuse(expression, f"{name}: expected one of {', '.join(words)}", text)
        return words[text]
    if hint is bool:
        if text not in ("true", "false"):
            _refuse(expression, f"{name}: expected true or false", text)
        return text == "true"
    if hint is int:
        if not re.fullmatch(r"\d{1,6}", text, re.ASCII):
            _refuse(expression, f"{name}: expected a whole number", text)
        return int(text)
    if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text, re.ASCII | re.IGNORECASE):
        _refuse(expression, f"{name}: expected a number", text)
    number = float(text)
    if not math.isfinite(number):
        _refuse(expression, f"{name}: expected a finite number", text)
    return number + 0.0  # -0 is 0


def _parse_layers(text: str, expression: str) -> tuple[tuple[int, int], ...]:
    """`3-7+9` as sorted spans that neither touch nor overlap."""
    spans = []
    for part in text.split("+"):
        found = re.fullmatch(r"\s*(\d{1,4})(?:\s*-\s*(\d{1,4}))?\s*", part, re.ASCII)
        if not found:
            _refuse(expression, "layers: expected numbers as in @3-7 or @0+2-4", text)
        low = int(found[1])
        high = int(found[2]) if found[2] else low
        if high < low:
            _refuse(expression, "layers: expected the lower number first", part)
        spans.append((low, high))
    merged: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


# --- from edits to specs --------------------------------------------------------------------------


def apply(expression: str | Edits, spec: RouterSpec, layer: int) -> RouterSpec:
    """`spec`, the trained router of `layer`, under the expression. Raises MoescopeError naming the
    fields when the result means nothing."""
    edits = parse(expression) if isinstance(expression, str) else expression
    for group in edits.groups:
        if group.holds(layer):
            try:
                spec = _edited(spec, group.items)
            except ValueError as error:
                raise MoescopeError(
                    f"variant {str(edits)!r}: layer {layer}: {error}", hint=HINT
                ) from None
    return spec


def applicable(variant: Variant | str, spec: RouterSpec) -> bool:
    """Whether `variant` means something for `spec` and changes what it decides."""
    variant = CATALOGUE[variant] if isinstance(variant, str) else variant
    if variant.name == "trained":
        return True
    if any(_present(spec, name) not in allowed for name, allowed in variant.requires.items()):
        return False
    try:
        return not _edited(spec, (variant.name,)).equal(spec)
    except ValueError:
        return False


def title(expression: str | Edits) -> str:
    """Words for an expression, for a lane's head: `top-k + 1, layers 3-7`."""
    edits = parse(expression) if isinstance(expression, str) else expression
    return " / ".join(map(_group_title, edits.groups)) or CATALOGUE["trained"].title


def describe(expression: str, spec: RouterSpec) -> str:
    """Title and resulting spec, in one line; ≡ where the router decides as trained. Takes the
    first layer that the expression holds for."""
    edits = parse(expression)
    spans = [group.layers[0][0] for group in edits.groups if group.layers]
    everywhere = any(group.layers is None for group in edits.groups)
    result = apply(edits, spec, 0 if everywhere or not spans else min(spans))
    equal = " (≡ trained)" if edits.groups and result.equal(spec) else ""
    return f"{title(edits)}: {result.line()}{equal}"


@lru_cache(maxsize=4096)
def _edited(spec: RouterSpec, items: tuple[str | Edit, ...]) -> RouterSpec:
    """All items at once, so that fields which only go together can be set together."""
    new: dict[str, Any] = {}
    for item in items:
        for name, value in _assignments(item, spec, new):
            new[name] = value
    policy = {name: value for name, value in new.items() if name in _hints(RouterPolicy)}
    wiring = {name: value for name, value in new.items() if name not in policy}
    if wiring:
        spec = spec.with_wiring(**wiring)
    return spec.with_policy(**policy) if policy else spec


def _assignments(
    item: str | Edit, spec: RouterSpec, new: Mapping[str, Any]
) -> list[tuple[str, Any]]:
    if isinstance(item, str):
        variant = CATALOGUE[item]
        pairs = []
        for name, value in (*variant.policy.items(), *variant.wiring.items()):
            present = new.get(name, _present(spec, name))
            changed = value.get(present, present) if isinstance(value, Mapping) else value
            pairs.append((name, changed))
        return pairs
    if item.operator == "=":
        return [(item.field, item.value)]
    present = new.get(item.field, _present(spec, item.field))
    return [(item.field, present + (item.value if item.operator == "+" else -item.value))]


def _present(spec: RouterSpec, name: str) -> Any:
    return getattr(spec.policy if name in _hints(RouterPolicy) else spec.wiring, name)


def _touched(variant: Variant) -> set[str]:
    return {*variant.policy, *variant.wiring}


def _group_title(group: Group) -> str:
    words = ", ".join(map(_item_title, group.items))
    _, at, layers = str(group).partition("@")
    return f"{words}, layers {layers}" if at else words


def _item_title(item: str | Edit) -> str:
    if isinstance(item, str):
        return CATALOGUE[item].title
    if item.field == "num_experts_per_tok":
        return (
            f"top-{item.value}" if item.operator == "=" else f"top-k {item.operator} {item.value}"
        )
    return str(item)


@lru_cache(maxsize=2)
def _hints(kind: type) -> dict[str, Any]:
    """Field name -> type, in the order of the fields."""
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    words = f"unknown name {name[:80]!r}"
    return f"{words}; did you mean {', '.join(close)}?" if close else words


def _refuse(expression: str, why: str, found: str | None = None) -> NoReturn:
    """repr() shows control and format characters escaped, so this is safe to print."""
    tail = "" if found is None else f", found {found[:80]!r}"
    raise MoescopeError(
        f"variant {expression[:120]!r}: {why}{tail}", hint=HINT, code=ExitCode.USAGE
    )
