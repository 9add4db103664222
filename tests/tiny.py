"""Tiny random checkpoints of every supported family, made with transformers, with a tokenizer.

`tiny_checkpoint` writes a folder as a hub repository would have it; layouts and config dialects can
be chosen. Weights are scaled so that routers spread over several nats and every tensor matters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.families import CLASSES, INIT, MLX, OLDER, SAME, TINY

# those with fused steps of their own; `tests.families` knows them all
FAMILIES = ("olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe", "mixtral")
LAYOUTS = ("hub", "fused", "mlx")
PUBLISHED_AS_NUM_EXPERTS = ("olmoe", "flex_olmo", "qwen2_moe", "qwen3_moe")
VOCAB = 264
END, USER, ASSISTANT = 256, 257, 258

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "num_experts_per_tok": 3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": END,
    "tie_word_embeddings": False,
}
_ROUTERS = (
    ".gate.weight",
    ".router.weight",
    ".router.layer.weight",
    ".router.proj.weight",
    ".router.gate.weight",
    ".router.classifier.weight",
    ".wg.weight",
)
# buffers that checkpoints hold
_LEARNED_BUFFERS = ("correction_bias", "expert_bias", "balancing_biases", "layer_scalar")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] != 'assistant' else '<|assistant|>' }}"
    "{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tiny_fields(family: str) -> dict[str, Any]:
    """What the config of a tiny model says, without what is null."""
    fields = {**_COMMON, **TINY[family]}
    return {name: value for name, value in fields.items() if value is not None}


def tiny_config(family: str, **overrides: Any) -> Any:
    """A transformers config; `overrides` are its fields."""
    from transformers import AutoConfig

    fields = {**_COMMON, **TINY[family], **overrides}
    if family in MLX:
        from tests.oracle.mlx_models import Config

        return Config(family, fields)
    return AutoConfig.for_model(SAME.get(family, family), **fields)


def tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A float32 transformers model in eval mode; `overrides` are config fields."""
    model = _model(family, tiny_config(family, **overrides))
    fill(model, family, seed)
    return model


def fill(model: Any, family: str, seed: int) -> None:
    """Random numbers in every tensor, as this family needs them."""
    import torch

    tied = getattr(model.config, "tie_word_embeddings", False)
    special = INIT.get(family, lambda name, tensor, noise: None)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in _learned(model):
            noise = torch.randn(tensor.shape, generator=generator)
            given = special(name, tensor, noise)
            tensor.copy_(_usual(name, tensor, noise, tied) if given is None else given)


def _model(family: str, config: Any) -> Any:
    """As it is initialised: in float32, its routers and experts in plain operators."""
    import torch
    import transformers
    from transformers.utils import logging

    if family in MLX:
        from tests.oracle.mlx_models import Model

        return Model(config)
    logging.disable_progress_bar()
    if family in CLASSES:
        known = CLASSES[family]
        build = getattr(transformers, known)._from_config if isinstance(known, str) else known
    else:
        build = transformers.AutoModelForCausalLM.from_config
    return build(
        config,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
    ).eval()


def _learned(model: Any) -> Iterator[tuple[str, Any]]:
    """Parameters, and buffers that a checkpoint holds."""
    yield from model.named_parameters()
    for name, buffer in model.named_buffers():
        if name.endswith(_LEARNED_BUFFERS):
            yield name, buffer


def _usual(name: str, tensor: Any, noise: Any, tied: bool) -> Any:
    """Routers spread over several nats, biases of both signs, norms around one."""
    if name.endswith("norm.weight") or "layernorm" in name:
        return 1.0 + 0.25 * noise
    if name.endswith((".bias", *_LEARNED_BUFFERS)):
        return 0.5 * noise
    if "embed_tokens" in name:
        # a tied head would only ever repeat the token it reads, were embeddings large
        return 0.1 * noise if tied else noise
    gain = 2.0 if name.endswith((*_ROUTERS, "lm_head.weight")) else 1.2
    return gain * noise / tensor.shape[-1] ** 0.5


def tiny_checkpoint(
    family: str,
    tmp_path: Path,
    *,
    seed: int = 0,
    dtype: str = "float32",
    layout: str = "hub",
    dialect: str = "v5",
    max_shard_size: str | None = None,
    **overrides: Any,
) -> Path:
    """Write a checkpoint into `tmp_path / <family>...` and return that folder.

    `layout` is one of `LAYOUTS`; `dialect` is `v5` (what transformers 5 saves) or `hub` (the older
    names that published configs use). Equal arguments give equal bytes.
    """
    model = tiny_model(family, seed=seed, **overrides)
    return save_checkpoint(
        model,
        tmp_path / f"{family}-{seed}-{layout}-{dialect}-{dtype}",
        dtype=dtype,
        layout=layout,
        dialect=dialect,
        max_shard_size=max_shard_size,
    )


def save_checkpoint(
    model: Any,
    folder: Path,
    *,
    dtype: str = "float32",
    layout: str = "hub",
    dialect: str = "v5",
    max_shard_size: str | None = None,
    model_type: str = "",
) -> Path:
    """Write `model` with a tokenizer into `folder`; the model itself is left as it is. The config
    says `model_type`, if that is given."""
    import copy

    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    wanted = getattr(torch, dtype)
    if wanted is not torch.float32:
        model = copy.deepcopy(model).to(wanted)
    if layout == "hub":
        sizes = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
        model.save_pretrained(folder, **sizes)
    else:
        model.config.save_pretrained(folder)
        tensors = {k: v.detach().contiguous() for k, v in model.state_dict().items()}
        if getattr(model.config, "tie_word_embeddings", False):
            tensors.pop("lm_head.weight", None)
        if layout == "mlx":
            tensors = _mlx_layout(tensors, model.config.model_type)
        elif layout != "fused":
            raise ValueError(layout)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if dialect == "hub":
        older_names(folder / "config.json")
    if model_type:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": model_type}))
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: ids 0 to 255 are bytes, then an end, a user, an assistant token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = [_byte_letter(b) for b in range(256)]
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("<|endoftext|>", "<|user|>", "<|assistant|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))


def _byte_letter(byte: int) -> str:
    """The letter that byte-level BPE writes for a byte (printable ones for themselves)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if byte in printable:
        return chr(byte)
    return chr(256 + sorted(set(range(256)) - set(printable)).index(byte))


def _mlx_layout(tensors: dict[str, Any], model_type: str) -> dict[str, Any]:
    """`experts.gate_up_proj` [E, 2I, H] as mlx-lm keeps it: three stacked `switch_mlp` tensors."""
    out: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if model_type == "mixtral":
            name = name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("experts.gate_up_proj"):
            base = name.removesuffix("experts.gate_up_proj") + "switch_mlp"
            half = tensor.shape[1] // 2
            out[f"{base}.gate_proj.weight"] = tensor[:, :half].contiguous()
            out[f"{base}.up_proj.weight"] = tensor[:, half:].contiguous()
        elif name.endswith("experts.down_proj"):
            base = name.removesuffix("experts.down_proj") + "switch_mlp"
            out[f"{base}.down_proj.weight"] = tensor
        else:
            out[name] = tensor
    return out


def older_names(path: Path) -> None:
    """Rewrite a config saved by transformers 5 with the names that published configs use."""
    whole = json.loads(path.read_text())
    config = whole.get("text_config", whole)
    rope = config.get("rope_parameters") or {}
    nested = any(isinstance(value, dict) for value in rope.values())  # a rope for each type
    if "rope_parameters" in config and not nested:
        config.pop("rope_parameters", None)
        config["rope_theta"] = rope.pop("rope_theta", 10000.0)
        kind = rope.pop("rope_type", "default")
        config["rope_scaling"] = {"type": kind, **rope} if kind != "default" else None
    config["torch_dtype"] = config.pop("dtype", "float32")
    if config["model_type"] in FAMILIES:
        config.pop("layer_types", None)
    if config["model_type"] in PUBLISHED_AS_NUM_EXPERTS and "num_local_experts" in config:
        config["num_experts"] = config.pop("num_local_experts")
    OLDER.get(config["model_type"], lambda config: None)(config)
    path.write_text(json.dumps(whole, indent=2))
