"""Families that transformers has no class for: tiny models of mlx-lm, which stand where models of
transformers stand in the harness. mlx computes on the CPU here."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.families import MLX
from tests.oracle.listening import Oracle, dense


class Config:
    """What the harness asks of a config."""

    def __init__(self, model_type: str, fields: dict[str, Any]) -> None:
        self.model_type = model_type
        self.fields = {"model_type": model_type, **fields}
        self.tie_word_embeddings = bool(fields.get("tie_word_embeddings"))

    def to_json_string(self, use_diff: bool = True) -> str:
        return json.dumps(self.fields)

    def save_pretrained(self, folder: Path) -> None:
        (folder / "config.json").write_text(self.to_json_string())


class Model:
    """A tiny model; its tensors have mlx-lm's names."""

    def __init__(self, config: Config) -> None:
        from mlx.utils import tree_flatten

        self.config = config
        shapes = {name: value.shape for name, value in tree_flatten(self._new().parameters())}
        self.tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}

    def _new(self) -> Any:
        module = import_module(f"mlx_lm.models.{self.config.model_type}")
        return module.Model(module.ModelArgs.from_dict(self.config.fields))

    def named_parameters(self) -> Any:
        return self.tensors.items()

    def named_buffers(self) -> Any:
        return ()

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self.tensors)

    def save_pretrained(self, folder: Path) -> None:
        """As published: one tensor per expert, and the gate's weight below the gate."""
        from safetensors.torch import save_file

        self.config.save_pretrained(folder)
        save_file(dict(_published(self.tensors)), folder / "model.safetensors")

    def loaded(self) -> Any:
        """The mlx-lm model with these tensors, as it loads them."""
        import mlx.core as mx

        arrays = {name: mx.array(tensor.numpy()) for name, tensor in self.tensors.items()}
        model = self._new()
        model.load_weights(list(model.sanitize(arrays).items()))
        return model


def _published(tensors: dict[str, torch.Tensor]) -> Any:
    for name, tensor in tensors.items():
        name = name.replace(".gate.gate_proj.", ".gate.")
        if ".switch_mlp." not in name:
            yield name, tensor
            continue
        for expert, part in enumerate(tensor):
            below = name.replace(".switch_mlp.", f".experts.{expert}.")
            yield below, part.contiguous()


class MlxOracle(Oracle):
    """An mlx-lm model whose routers are listened to."""

    def __init__(self, model: Model) -> None:
        self.model = model.loaded()
        self.heard: list[list[Any]] = []
        logits = MLX[model.config.model_type]
        for layer in self.model.layers:
            if (gate := getattr(layer.mlp, "gate", None)) is not None:
                layer.mlp.gate = self._listening(gate, logits)

    def _listening(self, gate: Any, logits_of: Any) -> Any:
        def run(x: Any) -> Any:
            ids, weights = gate(x)
            logits = logits_of(gate, x)
            flat = [np.array(part)[0] for part in (ids, weights, logits)]
            chosen = dense(flat[0].astype(int), flat[1], flat[2].shape[-1])
            self.heard[-1].append((*chosen, flat[2]))
            return ids, weights

        return run

    def forward(self, ids: Any, cache: Any = None) -> tuple[Any, Any, list[Any]]:
        import mlx.core as mx
        from mlx_lm.models.cache import make_prompt_cache

        cache = cache or make_prompt_cache(self.model)
        self.heard.append([])
        logits = self.model(mx.array(np.asarray(ids))[None], cache=cache)
        return np.array(logits)[0], cache, self.heard.pop()
