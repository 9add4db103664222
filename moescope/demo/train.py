"""Trains the embedded demo checkpoint, from the corpus to the files on disk.

A compact OLMoE written for training on a CPU, its tokenizer, the loop, and the export in the
published layout. The objective is next-token cross entropy plus the load-balancing loss, and
nothing else: how the model answers to a wrong router is a property it happens to have. Measuring
that is the business of `measure.py`.

    python -m moescope.demo.train

Letters in shapes: B sequences, S positions, T = B * S tokens, H hidden width, E experts, K picked,
I expert width, L layers, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
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
    """Everything else that decides the result, for one stage."""

    seed: int  # of the corpus, the first weights, and the order of the batches
    steps: int
    warmup: int
    decay: int  # of the steps, the last ones
    floor: float  # of the learning rate, reached at the last step
    batch: int  # sequences a step, shared by the workers
    learning_rate: float
    betas: tuple[float, float]
    corpus_documents: int = 150_000
    workers: int = 2  # processes of one thread each; each has its part of the batch
    weight_decay: float = 0.05
    clip: float = 1.0


# The second stage goes on from the first one's weights, with a new optimizer and new documents.
STAGES = (
    Settings(
        seed=20261121,
        steps=1250,
        warmup=150,
        decay=1100,
        floor=0.855,
        batch=8,
        learning_rate=4e-3,
        betas=(0.9, 0.97),
    ),
    Settings(
        seed=20261122,
        steps=1933,
        warmup=50,
        decay=483,
        floor=0.02,
        batch=4,
        learning_rate=3e-3,
        betas=(0.9, 0.98),
    ),
)


# -------------------------------------------------------------------------------------------- model


class _Dispatch(torch.autograd.Function):
    """Rows [T, H] -> rows sorted by expert [T*K, H]; the way back sums a token's K rows.

    Indexing's own backward adds row by row on one thread; gathering by the inverse does not.
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


# ------------------------------------------------------------------------------- tokenizer and data


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE. Every digit is a token, so that sums can be learnt by column."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All documents in one row of uint16, an end token after each."""
    rows = []
    for start in range(0, len(texts), 5000):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + 5000]):
            rows.append(np.array([*encoding.ids, tokenizer.token_to_id(END)], np.uint16))
    return np.concatenate(rows)


def texts(seed: int, count: int, *, held: bool = False) -> list[str]:
    stream = corpus.documents(seed, held=held)
    return [next(stream).text for _ in range(count)]


def batches(ids: np.ndarray, batch: int, length: int, seed: int) -> Iterator[Tensor]:
    """Windows of `length` + 1 tokens in a shuffled order, epoch after epoch."""
    rng = np.random.default_rng(seed)
    starts = np.arange(0, len(ids) - length - 1, length)
    while True:
        order = rng.permutation(starts + rng.integers(0, length))
        order = order[order + length + 1 <= len(ids)]
        for at in range(0, len(order) - batch + 1, batch):
            rows = np.stack([ids[s : s + length + 1] for s in order[at : at + batch]])
            yield torch.from_numpy(rows.astype(np.int64))


# --------------------------------------------------------------------------------------------- loop


def rate(step: int, settings: Settings) -> float:
    """Linear warm-up, a plateau, and a straight line down to `floor` over the last steps."""
    up = (step + 1) / settings.warmup
    down = max(0, settings.steps - 1 - step) / settings.decay
    return settings.learning_rate * min(1.0, up, settings.floor + (1 - settings.floor) * down)


@torch.no_grad()
def evaluate(model: Olmoe, ids: Tensor) -> tuple[float, list[float]]:
    """Mean loss in nats on windows [B, S+1], and the mean score sum of every layer."""
    losses, masses = [], []
    for rows in ids.split(16):
        logits, _, mass = model(rows[:, :-1])
        losses.append(F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
        masses.append(mass)
    return torch.stack(losses).mean().item(), torch.stack(masses).mean(0).tolist()


def average(model: nn.Module, late: bool) -> bool:
    """Averages the gradients over the workers; true when any of them says that it is late."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([*(g.flatten() for g in gradients), torch.tensor([float(late)])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for g, part in zip(gradients, flat[:-1].split([g.numel() for g in gradients]), strict=True):
        g.copy_(part.view_as(g))
    return bool(flat[-1] > 0)


def work(
    rank: int,
    shape: Shape,
    settings: Settings,
    folder: Path,
    out: Path,
    hours: float,
    begin: Path | None,
) -> None:
    """One worker's training loop. The first of them reports, and exports a snapshot at times."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", rank=rank, world_size=settings.workers
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids, held = np.load(folder / "train.npy"), np.load(folder / "held.npy")
    length = shape.max_position_embeddings
    held_rows = next(batches(held, 32, length, settings.seed))
    torch.manual_seed(settings.seed)
    model = Olmoe(shape)
    model.initialise()
    if begin:
        restore(model, begin)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in model.parameters() if p.dim() > 1]},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ],
        betas=settings.betas,
        weight_decay=settings.weight_decay,
        fused=True,
    )
    if rank == 0:
        count = sum(p.numel() for p in model.parameters())
        print(f"{count / 1e6:.2f} M parameters, {len(ids) / 1e6:.2f} M tokens", flush=True)
    start, stream = time.monotonic(), batches(ids, settings.batch, length, settings.seed)
    step, told = 0, False
    while step < settings.steps:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, settings)
        rows = next(stream)[rank :: settings.workers]
        logits, balance, mass = model(rows[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        (loss + shape.router_aux_loss_coef * balance).backward()
        late = average(model, time.monotonic() - start > hours * 3600)
        norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if late and not told:
            told = True
            if step < settings.steps - settings.decay:
                settings = replace(settings, steps=step + step // 3, decay=step // 3)
                if rank == 0:
                    print(f"late: steps={settings.steps} decay={settings.decay}", flush=True)
        if rank:
            continue
        if step % 50 == 0 or step == 1:
            print(
                f"{time.monotonic() - start:7.0f} s  step {step:5d}  loss {loss.item():.4f}  "
                f"balance {balance.item():.3f}  norm {norm.item():.2f}  "
                f"score sums {' '.join(f'{m:.2f}' for m in mass.tolist())}",
                flush=True,
            )
        if step % 250 == 0 or step == settings.steps:
            held_loss, masses = evaluate(model, held_rows)
            sums = " ".join(f"{m:.3f}" for m in masses)
            print(f"held-out loss {held_loss:.4f}  score sums {sums}", flush=True)
            export(model, tokenizer, shape, out)
    dist.destroy_process_group()


def train(shape: Shape, settings: Settings, out: Path, hours: float, begin: Path | None) -> None:
    """Writes the corpus as tokens to a temporary folder, then lets the workers train on it."""
    documents = texts(settings.seed, settings.corpus_documents)
    if begin:
        tokenizer = Tokenizer.from_file(str(begin / "tokenizer.json"))
    else:
        tokenizer = train_tokenizer(documents[:20_000], shape.vocab_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        np.save(folder / "train.npy", encode(tokenizer, documents))
        np.save(folder / "held.npy", encode(tokenizer, texts(settings.seed, 1000, held=True)))
        del documents
        mp.spawn(work, (shape, settings, folder, out, hours, begin), nprocs=settings.workers)


# ------------------------------------------------------------------------------------------- export


def published(model: Olmoe) -> Iterator[tuple[str, Tensor]]:
    """Every weight as OLMoE's published checkpoints name it, as a view of the parameter."""
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        if ".mlp." not in name:
            yield (name if name == "lm_head.weight" else f"model.{name}"), weight
            continue
        path, leaf = name.rsplit(".", 1)
        if leaf == "router":
            yield f"model.{path}.gate.weight", weight
            continue
        for e, expert in enumerate(weight):
            if leaf == "down":
                yield f"model.{path}.experts.{e}.down_proj.weight", expert
            else:
                for half, part in zip(("gate", "up"), expert.chunk(2), strict=True):
                    yield f"model.{path}.experts.{e}.{half}_proj.weight", part


def restore(model: Olmoe, folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    for name, weight in published(model):
        weight.copy_(stored.pop(name))
    assert not stored, f"not used: {sorted(stored)}"


def config(shape: Shape, end: int) -> dict[str, Any]:
    """`config.json` in the dialect of the published OLMoE checkpoints."""
    return {
        "architectures": ["OlmoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": end,
        "clip_qkv": None,
        "eos_token_id": end,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "model_type": "olmoe",
        "norm_topk_prob": False,
        "num_attention_heads": shape.num_attention_heads,
        "num_experts": shape.num_experts,
        "num_experts_per_tok": shape.num_experts_per_tok,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_attention_heads,
        "output_router_logits": False,
        "pad_token_id": end,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": shape.rope_theta,
        "router_aux_loss_coef": shape.router_aux_loss_coef,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def export(model: Olmoe, tokenizer: Tokenizer, shape: Shape, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    end = tokenizer.token_to_id(END)
    files = {
        "config.json": config(shape, end),
        "generation_config.json": {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end},
        "tokenizer_config.json": {
            "add_bos_token": False,
            "bos_token": END,
            "clean_up_tokenization_spaces": False,
            "eos_token": END,
            "model_max_length": shape.max_position_embeddings,
            "pad_token": END,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    }
    for name, value in files.items():
        (out / name).write_text(json.dumps(value, indent=2) + "\n")
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    partial = out / "model.safetensors.partial"
    rounded = {name: w.to(torch.bfloat16).contiguous() for name, w in published(model)}
    save_file(rounded, partial, metadata={"format": "pt"})
    partial.chmod(0o644)
    partial.replace(out / "model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=CHECKPOINT)
    parser.add_argument(
        "--hours", type=float, default=2.0, help="a stage's cap: then its rate falls at once"
    )
    given = parser.parse_args()
    for number, settings in enumerate(STAGES):
        train(Shape(), settings, given.out, given.hours, given.out if number else None)


if __name__ == "__main__":
    main()
