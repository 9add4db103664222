"""Published layouts, written from a hub checkpoint without `moescope.engine.families`.

`LAYOUTS` are functions over the tensors of Qwen3-MoE (gate, up, down of each expert apart, q, k, v
apart); `as_mlx` has mlx-lm's own code do it, for every family that mlx-lm knows.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import MISSING, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
_OTHER_TOWERS = re.compile(r"visual|vision|audio|projector")
_EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(gate|up|down)_proj\.weight")


def experts(tensors: Tensors) -> tuple[Tensors, dict[str, dict[str, torch.Tensor]]]:
    """Everything else, and by module the stacked gate, up and down, [E, out, in] each."""
    rest, found = {}, {}
    for name, tensor in tensors.items():
        if (match := _EXPERT.fullmatch(name)) is None:
            rest[name] = tensor
        else:
            found.setdefault(match[1], {}).setdefault(match[3], {})[int(match[2])] = tensor
    stacked = {
        module: {
            kind: torch.stack([each[e] for e in range(len(each))]) for kind, each in kinds.items()
        }
        for module, kinds in found.items()
    }
    return rest, stacked


def apart(tensors: Tensors) -> Tensors:
    """One tensor per expert, of what transformers holds fused."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".experts.")
        if not module or kind not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
            continue
        for e, matrix in enumerate(tensor):
            parts = matrix.chunk(2) if kind == "gate_up_proj" else (matrix,)
            names = ("gate", "up") if kind == "gate_up_proj" else ("down",)
            for part, matrix_of in zip(names, parts, strict=True):
                found[f"{module}.experts.{e}.{part}_proj.weight"] = matrix_of
    return found


def _each(write: Callable[[str, Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    """A layout of experts: what `write` makes of (module, stacked matrices), and the rest."""

    def layout(tensors: Tensors) -> Tensors:
        rest, stacked = experts(tensors)
        for module, kinds in stacked.items():
            rest |= write(module, kinds)
        return rest

    return layout


def _both(kinds: Tensors) -> torch.Tensor:
    return torch.cat([kinds["gate"], kinds["up"]], dim=1)


def _by_letters(module: str, kinds: Tensors) -> Tensors:
    letters = {"gate": "w1", "up": "w3", "down": "w2"}
    return {
        f"{module}.experts.{e}.{letters[kind]}.weight": stacked[e].clone()
        for kind, stacked in kinds.items()
        for e in range(len(stacked))
    }


def _renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {re.sub(old, new, name): tensor for name, tensor in tensors.items()}


def _other_towers(tensors: Tensors) -> Tensors:
    """Beside a text tower: a vision tower, a projector, a prediction head, and a further layer."""
    more = {
        "model.visual.blocks.0.attn.qkv.weight": torch.ones(4, 4),
        "model.multi_modal_projector.linear.weight": torch.ones(4, 4),
        "mtp.layers.0.input_layernorm.weight": torch.ones(4),
        "model.language_model.layers.4.eh_proj.weight": torch.ones(4, 8),
        "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    return _renamed(r"^model\.", "model.language_model.")(tensors) | more


LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "fused": _each(
        lambda m, k: {f"{m}.experts.gate_up_proj": _both(k), f"{m}.experts.down_proj": k["down"]}
    ),
    "fused, transposed": _each(
        lambda m, k: {
            f"{m}.experts.gate_up_proj": _both(k).transpose(1, 2),
            f"{m}.experts.down_proj": k["down"].transpose(1, 2),
        }
    ),
    "w1, w2, w3": _each(_by_letters),
    "input_linear": _each(
        lambda m, k: {
            f"{m}.input_linear.weight": _both(k),
            f"{m}.output_linear.weight": k["down"],
        }
    ),
    "in rows": _each(
        lambda m, k: {
            f"{m}.experts.mlp.w1": k["gate"].flatten(0, 1),
            f"{m}.experts.mlp.v1": k["up"].flatten(0, 1),
            f"{m}.experts.mlp.w2": k["down"].transpose(1, 2).flatten(0, 1),
        }
    ),
    "switch_mlp": _each(
        lambda m, k: {f"{m}.switch_mlp.{kind}_proj.weight": stacked for kind, stacked in k.items()}
    ),
    "switch_glu": _each(
        lambda m, k: {
            f"{m}.experts.switch_glu.{kind}_proj.weight": stacked for kind, stacked in k.items()
        }
    ),
    "block_sparse_moe": _renamed(r"\.mlp\.", ".block_sparse_moe."),
    "feed_forward and router": _renamed(r"\.mlp\.gate\.", ".feed_forward.router."),
    "language_model.model": _renamed("^", "language_model."),
    "thinker.model": _renamed("^", "thinker."),
    "no prefix": _renamed(r"^model\.", ""),
    "model.language_model, with other towers": _other_towers,
}
LAYOUTS["feed_forward and router"] = lambda tensors: _renamed(r"\.mlp\.", ".feed_forward.")(
    _renamed(r"\.mlp\.gate\.", ".mlp.router.")(tensors)
)


def older_hunyuan(tensors: Tensors, kv_heads: int) -> Tensors:
    """q, k and v in one tensor, group by group of the heads that share keys; up above gate."""
    rest = {}
    for name, tensor in tensors.items():
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        if leaf == "q_proj":
            k, v = (tensors[f"{module}.{other}_proj.weight"] for other in "kv")
            per_group = zip(
                tensor.chunk(kv_heads), k.chunk(kv_heads), v.chunk(kv_heads), strict=True
            )
            rows = [part for group in per_group for part in group]
            rest[f"{module}.qkv_proj.weight"] = torch.cat(rows)
        elif leaf == "up_proj":
            both = torch.cat([tensor, tensors[f"{module}.gate_proj.weight"]])
            rest[f"{module}.gate_and_up_proj.weight"] = both
        elif leaf not in ("k_proj", "v_proj", "gate_proj"):
            rest[name] = tensor
    return rest


# What mlx-lm asks of a config beside what transformers saves, where no filler will do.
_MLX_FIELDS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {
        "rope_scaling": {"factor": 1.0, "original_max_position_embeddings": 8, "mscale_all_dim": 0}
    },
    "glm_moe_dsa": {"rope_parameters": {"rope_theta": 1e4}, "scoring_func": "sigmoid"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "kimi_linear": {
        "linear_attn_config": {
            "kda_layers": [1, 3],
            "full_attn_layers": [2, 4],
            "num_heads": 2,
            "head_dim": 16,
            "short_conv_kernel_size": 4,
        }
    },
    "longcat_flash": {"attention_method": "MLA", "zero_expert_type": "identity"},
    "mimo_v2_flash": {"hybrid_layer_pattern": [0, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1]},
}
_FILLERS: dict[str, Any] = {"int": 2, "float": 0.5, "bool": True, "str": "noaux_tc"}


def text_alone(hub: Path, folder: Path) -> Path:
    """The text of a checkpoint of several towers, as a checkpoint of its own type."""
    whole = json.loads((hub / "config.json").read_text())
    shutil.copytree(hub, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "config.json").write_text(json.dumps(whole["text_config"]))
    tensors = load_file(hub / "model.safetensors")
    text = {
        name.replace("language_model.", "").removeprefix("thinker."): tensor
        for name, tensor in tensors.items()
        if not _OTHER_TOWERS.search(name)
    }
    save_file(text, folder / "model.safetensors")
    return folder


def known_to_mlx(model_type: str) -> bool:
    """Whether mlx-lm has a model of this type."""
    from mlx_lm.utils import MODEL_REMAPPING

    return find_spec(f"mlx_lm.models.{MODEL_REMAPPING.get(model_type, model_type)}") is not None


def as_mlx(hub: Path, folder: Path) -> Path:
    """A hub checkpoint as mlx-lm lays it out, with the config as it was."""
    import mlx.core as mx
    from mlx_lm.utils import _get_classes

    config = json.loads((hub / "config.json").read_text())
    model_class, arguments = _get_classes(config)
    layers = config.get("num_hidden_layers", 4)
    config.setdefault("num_experts", config.get("num_local_experts"))
    config |= _MLX_FIELDS.get(config["model_type"], {})
    for field in fields(arguments):
        if field.default is MISSING and field.default_factory is MISSING:
            kind = str(getattr(field.type, "__name__", field.type))
            filler = [True] * layers if kind.startswith("List") else _FILLERS.get(kind)
            config[field.name] = filler if config.get(field.name) is None else config[field.name]
    model = model_class(arguments.from_dict(config))
    weights = dict(mx.load(str(hub / "model.safetensors")))
    shutil.copytree(hub, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    laid_out = model.sanitize(weights) if hasattr(model, "sanitize") else weights
    mx.save_safetensors(str(folder / "model.safetensors"), laid_out, metadata={"format": "mlx"})
    return folder
