"""Trains the embedded demo checkpoint, from the corpus to the files on disk.

A compact OLMoE written for training on a CPU, its tokenizer, the loop, and the export in the published layout.
The objective is next-token cross entropy plus the load-balancing loss, and nothing else: how the model answers to
a wrong router is a property it happens to have. Measuring that is `measure.py`'s business.

    python -m moescope.demo.train

Letters in shapes: B sequences, S positions, T = B * S tokens, H hidden width, E experts, K picked, I expert width.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from moescope.demo import CHECKPOINT, corpus

END = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Shape:
    """The architecture, in the words of an OLMoE `config.json`."""

    vocab_size: int = 1024
    hidden_size: int = 128
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_experts: int = 32
    num_experts_per_tok: int = 4
    intermediate_size: int = 40
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    router_aux_loss_coef: float = 0.01


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything else that decides the result. The defaults made the checkpoint in this folder."""

    seed: int = 20261121
    corpus_documents: int = 200_000
    steps: int = 3000
    batch: int = 16  # sequences a step
    learning_rate: float = 4e-3
    warmup: int = 100
    floor: float = 0.03  # of the learning rate, reached at the last step
    betas: tuple[float, float] = (0.9, 0.97)
    weight_decay: float = 0.05
    clip: float = 1.0


# ---------------------------------------------------------------------------------------------------- model


class _Dispatch(torch.autograd.Function):
    """Rows [T, H] -> rows sorted by expert [T*K, H]; the way back sums a token's K rows.

    The plain indexing backward adds row by row on one thread; gathering by the inverse permutation does not.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.k = k
        return x.index_select(0, order.div(k, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        rows = grad.index_select(0, inverse)
        return rows.view(-1, ctx.k, rows.shape[-1]).sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """Rows sorted by expert [T*K, H] -> rows by token [T*K, H]: the inverse permutation."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return x.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None


class Experts(nn.Module):
    """Softmax over all experts, then top-k, weights not renormalised (`norm_topk_prob` false)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size
        self.k = shape.num_experts_per_tok
        self.router = nn.Parameter(torch.empty(e, h))
        self.gate_up = nn.Parameter(torch.empty(e, 2 * i, h))
        self.down = nn.Parameter(torch.empty(e, h, i))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, H] -> output [T, H], the load-balancing loss, and the mean score sum."""
        scores = F.linear(x, self.router).softmax(-1)  # [T, E]
        weights, ids = scores.topk(self.k)  # [T, K]
        order = ids.flatten().argsort()  # [T*K]
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(order.numel())
        counts = ids.flatten().bincount(minlength=self.router.shape[0])  # [E]
        rows = _Dispatch.apply(x, order, inverse, self.k).split(counts.tolist())
        out = []
        for row, gate_up, down in zip(rows, self.gate_up, self.down, strict=True):
            gate, up = F.linear(row, gate_up).chunk(2, dim=-1)
            out.append(F.linear(F.silu(gate) * up, down))
        by_token = _Combine.apply(torch.cat(out), order, inverse).view(*ids.shape, -1)  # [T, K, H]
        output = (weights.unsqueeze(1) @ by_token).squeeze(1)
        share = counts / x.shape[0]
        balance = len(counts) * (share * scores.mean(0)).sum()
        return output, balance, weights.detach().sum(-1).mean()


class Attention(nn.Module):
    """Causal attention with OLMoE's RMSNorm over the whole query and key projections."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h, eps = shape.hidden_size, shape.rms_norm_eps
        self.heads = shape.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(h, h, bias=False) for _ in range(4)
        )
        self.q_norm, self.k_norm = nn.RMSNorm(h, eps), nn.RMSNorm(h, eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B, S, H] -> [B, S, H]."""
        b, s, h = x.shape
        q, k, v = (
            y.view(b, s, self.heads, -1).transpose(1, 2)
            for y in (self.q_norm(self.q_proj(x)), self.k_norm(self.k_proj(x)), self.v_proj(x))
        )
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True
        )
        return self.o_proj(y.transpose(1, 2).reshape(b, s, h))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention. x [B, heads, S, D]; cos, sin [S, D]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h, eps = shape.hidden_size, shape.rms_norm_eps
        self.input_layernorm, self.self_attn = nn.RMSNorm(h, eps), Attention(shape)
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(h, eps), Experts(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        routed, balance, mass = self.mlp(self.post_attention_layernorm(x).flatten(0, 1))
        return x + routed.view_as(x), balance, mass


class Olmoe(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        h = shape.hidden_size
        self.embed_tokens = nn.Embedding(shape.vocab_size, h)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(h, shape.rms_norm_eps)
        self.lm_head = nn.Linear(h, shape.vocab_size, bias=False)
        width = h // shape.num_attention_heads
        speed = shape.rope_theta ** -(torch.arange(0, width, 2) / width)
        angle = torch.outer(torch.arange(shape.max_position_embeddings), speed).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def initialise(self) -> None:
        """Normal weights of width 1/sqrt(fan in), smaller where a branch adds to the residual."""
        branches = 2 * len(self.layers)
        for name, weight in self.named_parameters():
            if weight.dim() == 1:
                continue
            std = weight.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down")):
                std /= branches**0.5
            elif "router" in name:
                std = 0.02
            nn.init.normal_(weight, std=std)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """ids [B, S] -> logits [B, S, V], the balance loss's mean over layers, score sums [L]."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x, balances, masses = self.embed_tokens(ids), [], []
        for layer in self.layers:
            x, balance, mass = layer(x, cos, sin)
            balances.append(balance)
            masses.append(mass)
        return self.lm_head(self.norm(x)), torch.stack(balances).mean(), torch.stack(masses)
