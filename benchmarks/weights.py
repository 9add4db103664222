"""Random weights in real shapes, made once from a seed: a checkpoint and a GGUF that hold the same.

The checkpoint is a folder as a hub repository has it (config.json, one shard per layer, the demo's
tokenizer), which moescope, transformers and mlx-lm load; the GGUF is what llama.cpp's converter
makes of it: matrices in bfloat16, norms and routers in float32. Scales are such that greedy tokens
do not collapse into one, and that a router variant changes what is said.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shapes import Shapes

if TYPE_CHECKING:
    from torch import Tensor

SEED = 20
MADE = "made.json"  # written last: what the folder holds
GGUF = "model.gguf"
VERSION = 2

_OF_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
}
_LOUD = {"self_attn.o_proj": 2.0, "experts.down_proj": 8.0}  # so that layers matter
_FLOAT32 = ("norm", "mlp.gate")  # endings of names that a GGUF keeps in float32


def prepare(folder: Path, shapes: Shapes, *, gguf: bool = True) -> dict[str, Any]:
    """Fill `folder` unless it holds these weights already; says what it holds."""
    wanted = {"version": VERSION, "seed": SEED, "shapes": asdict(shapes), "gguf": gguf}
    made = folder / MADE
    if made.exists() and json.loads(made.read_text()) == wanted:
        return wanted
    folder.mkdir(parents=True, exist_ok=True)
    made.unlink(missing_ok=True)
    _write(folder, shapes, gguf)
    made.write_text(json.dumps(wanted))
    return wanted


def names(shapes: Shapes) -> Iterator[list[tuple[str, tuple[int, ...]]]]:
    """Names and shapes by shard; the experts of a layer are one tensor [E, rows, columns]."""
    H, E, width = shapes.hidden, shapes.experts, shapes.width
    yield [
        ("model.embed_tokens", (shapes.vocab, H)),
        ("model.norm", (H,)),
        ("lm_head", (shapes.vocab, H)),
    ]
    for layer in range(shapes.layers):
        path = f"model.layers.{layer}."
        yield [
            (path + "input_layernorm", (H,)),
            (path + "post_attention_layernorm", (H,)),
            *((f"{path}self_attn.{n}_proj", (H, H)) for n in "qkvo"),
            *((f"{path}self_attn.{n}_norm", (H,)) for n in "qk"),
            (path + "mlp.gate", (E, H)),
            (path + "mlp.experts.gate_proj", (E, width, H)),
            (path + "mlp.experts.up_proj", (E, width, H)),
            (path + "mlp.experts.down_proj", (E, H, width)),
        ]


def random(name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of that name, bfloat16; the same whatever else was made."""
    import torch

    generator = torch.Generator().manual_seed(SEED * 2**32 + zlib.crc32(name.encode()))
    values = torch.randn(shape, generator=generator)
    if name.endswith("norm"):
        values.mul_(0.1).add_(1.0)
    elif not name.endswith("embed_tokens"):
        loud = next((by for end, by in _LOUD.items() if name.endswith(end)), 1.0)
        values.mul_(loud * shape[-1] ** -0.5)
    return values.to(torch.bfloat16)


def _write(folder: Path, shapes: Shapes, gguf: bool) -> None:
    from safetensors.torch import save_file

    from moescope.demo import CHECKPOINT

    shards = list(names(shapes))
    flat = [item for shard in shards for item in shard]
    file = _Gguf(folder / GGUF, shapes, flat) if gguf else None
    index: dict[str, str] = {}
    for number, shard in enumerate(shards):
        made = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        held: dict[str, Tensor] = {}
        for name, shape in shard:
            tensor = random(name, shape)
            held.update(_as_stored(name, tensor))
            if file is not None:
                file.add(name, tensor)
        save_file(held, folder / made, metadata={"format": "pt"})
        index.update(dict.fromkeys(held, made))
    if file is not None:
        file.close()
    total = 2 * shapes.parameters
    document = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    (folder / "config.json").write_text(json.dumps(shapes.config(), indent=2))
    shutil.copy(CHECKPOINT / "tokenizer.json", folder)


def _as_stored(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Names as hub repositories have them: one tensor per expert."""
    if ".experts." not in name:
        return {f"{name}.weight": tensor}
    path, kind = name.rsplit(".", 1)
    return {f"{path}.{expert}.{kind}.weight": rows for expert, rows in enumerate(tensor)}


class _Gguf:
    """A GGUF written tensor by tensor, so that little more than one is held."""

    def __init__(
        self, path: Path, shapes: Shapes, tensors: list[tuple[str, tuple[int, ...]]]
    ) -> None:
        import gguf
        import numpy as np

        self.writer = gguf.GGUFWriter(path, "olmoe")
        self.writer.add_context_length(shapes.context)
        self.writer.add_embedding_length(shapes.hidden)
        self.writer.add_block_count(shapes.layers)
        self.writer.add_feed_forward_length(shapes.width)
        self.writer.add_head_count(shapes.heads)
        self.writer.add_head_count_kv(shapes.heads)
        self.writer.add_rope_freq_base(shapes.rope_theta)
        self.writer.add_layer_norm_rms_eps(shapes.eps)
        self.writer.add_expert_count(shapes.experts)
        self.writer.add_expert_used_count(shapes.top_k)
        self.writer.add_vocab_size(shapes.vocab)
        self.writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
        self.writer.add_tokenizer_model("no_vocab")
        for name, shape in tensors:
            wide = name.endswith(_FLOAT32)
            kind = gguf.GGMLQuantizationType.F32 if wide else gguf.GGMLQuantizationType.BF16
            count = int(np.prod(shape)) * (4 if wide else 2)
            self.writer.add_tensor_info(_gguf_name(name), shape, np.dtype("f4"), count, kind)
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_ti_data_to_file()

    def add(self, name: str, tensor: Tensor) -> None:
        import torch

        wide = name.endswith(_FLOAT32)
        self.writer.write_tensor_data(
            tensor.float().numpy() if wide else tensor.view(torch.int16).numpy()
        )

    def close(self) -> None:
        self.writer.close()


def _gguf_name(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, layer, rest = name.split(".", 3)
        return f"blk.{layer}.{_OF_GGUF[rest]}.weight"
    return f"{_OF_GGUF[name]}.weight"
