"""Decoding on MLX: moescope with its trace written, beside mlx-lm, on the same weights in one run.

    python benchmarks/mlx_decode.py                 # float32 on MLX's CPU, bfloat16 on Metal
    python benchmarks/mlx_decode.py --bits 4        # as mlx-lm quantises
    python benchmarks/mlx_decode.py --layers 16 --hidden 2048 --width 1024 --vocab 50304

Weights are random, of a seed, in the shapes of OLMoE made smaller, written as mlx-lm publishes
them. The two take turns, round by round; what counts is the ratio of each round. mlx-lm decodes
with its own `generate_step`, which evaluates one token ahead; moescope with a `Session` whose every
frame goes to a trace on disk. Times are of single tokens after the prompt.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import machine

SEED = 20


@dataclass(frozen=True)
class Shapes:
    """`bits` 0: not quantised."""

    layers: int = 4
    hidden: int = 1024
    width: int = 512
    experts: int = 64
    chosen: int = 8
    heads: int = 16
    vocab: int = 16384
    bits: int = 0

    def config(self) -> dict[str, Any]:
        quantised = {"group_size": 64, "bits": self.bits, "mode": "affine"}
        return {
            "model_type": "olmoe",
            "hidden_size": self.hidden,
            "intermediate_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.chosen,
            "norm_topk_prob": False,
            "vocab_size": self.vocab,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            **({"quantization": quantised} if self.bits else {}),
        }

    def matrices(self) -> dict[str, tuple[int, ...]]:
        H, E, width = self.hidden, self.experts, self.width
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens": (self.vocab, H)}
        for layer in range(self.layers):
            path = f"model.layers.{layer}."
            found |= {f"{path}self_attn.{name}_proj": (H, H) for name in "qkvo"}
            found[f"{path}mlp.gate"] = (E, H)
            found |= {f"{path}mlp.switch_mlp.{name}_proj": (E, width, H) for name in ("gate", "up")}
            found[f"{path}mlp.switch_mlp.down_proj"] = (E, H, width)
        return found | {"lm_head": (self.vocab, H)}

    def norms(self) -> list[str]:
        kinds = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm")
        of_layer = (*kinds, "self_attn.k_norm")
        names = [f"model.layers.{n}.{kind}" for n in range(self.layers) for kind in of_layer]
        return [*names, "model.norm"]

    def read_per_token(self) -> int:
        """Weights that one token reads."""
        whole = {name: shape for name, shape in self.matrices().items() if "embed" not in name}
        total = 0
        for name, shape in whole.items():
            count = 1
            for size in shape:
                count *= size
            total += count * self.chosen // self.experts if "switch_mlp" in name else count
        return total


def write(folder: Path, shapes: Shapes, dtype: str) -> None:
    """The checkpoint, one shard."""
    import mlx.core as mx

    mx.random.seed(SEED)
    kind = getattr(mx, dtype)
    tensors: dict[str, mx.array] = {}
    for name, shape in shapes.matrices().items():
        scale = 1.0 if "embed" in name else shape[-1] ** -0.5
        weight = (mx.random.normal(shape) * scale).astype(kind)
        if shapes.bits:
            codes, scales, biases = mx.quantize(weight, 64, shapes.bits)
            parts = {"weight": codes, "scales": scales, "biases": biases}
        else:
            parts = {"weight": weight}
        mx.eval(parts)
        tensors |= {f"{name}.{role}": array for role, array in parts.items()}
    for name in shapes.norms():
        tensors[f"{name}.weight"] = (1 + 0.1 * mx.random.normal((shapes.hidden,))).astype(kind)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, {"format": "mlx"})
    config = {**shapes.config(), "torch_dtype": dtype}
    (folder / "config.json").write_text(json.dumps(config, indent=2))


Decode = Callable[[list[int], int], tuple[list[int], float]]  # -> tokens, tokens per second


def moescope(folder: Path, dtype: str) -> tuple[Decode, dict[str, Any]]:
    from moescope.engine import recording
    from moescope.engine.load import load_model
    from moescope.engine.protocol import Generate, LoadRequest, Sampling
    from moescope.engine.session import Session

    trace = folder / "run.moetrace"
    request = LoadRequest(
        str(folder), device="mlx", dtype=dtype, max_context=512, trace_path=str(trace), force=True
    )
    model = load_model(request)

    def decode(prompt: list[int], tokens: int) -> tuple[list[int], float]:
        trace.unlink(missing_ok=True)
        meta = recording.trace_meta(model, None, record="weights", redact=False)
        session = Session(model, None, recording.open_writer(request, meta, False), max_context=512)
        sampling = Sampling(temperature=0.0, max_new_tokens=tokens + 1)
        found: list[int] = []
        began = 0.0
        for frame in session.generate(Generate(prompt_ids=tuple(prompt), sampling=sampling)):
            if frame.position < len(prompt):
                began = time.perf_counter()
                continue
            found.append(frame.token_id)
            if len(found) == tokens:
                break
        seconds = time.perf_counter() - began
        session.stop()
        session.close()
        return found, tokens / seconds

    return decode, {"kernels": dict(model.interpreter.kernels), "weights": model.memory["weights"]}


def mlx_lm(folder: Path) -> tuple[Decode, dict[str, Any]]:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    model, _ = load_model(folder)

    def decode(prompt: list[int], tokens: int) -> tuple[list[int], float]:
        found: list[int] = []
        began = 0.0
        for token, _ in generate_step(mx.array(prompt), model, max_tokens=tokens + 1):
            if not found:
                began = time.perf_counter()  # the first comes out of the prompt
            found.append(int(token))
            if len(found) == tokens + 1:
                break
        return found[:-1], tokens / (time.perf_counter() - began)

    return decode, {}


def run(shapes: Shapes, dtype: str, rounds: int, tokens: int, folder: Path) -> dict[str, Any]:
    """Both engines, turn by turn; the order changes every round."""
    write(folder, shapes, dtype)
    ours, facts = moescope(folder, dtype)
    theirs, _ = mlx_lm(folder)
    engines = {"moescope": ours, "mlx-lm": theirs}
    prompt = [(7 * n) % shapes.vocab for n in range(16)]
    said = {name: decode(prompt, 2)[0] for name, decode in engines.items()}  # and warm
    rates: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds):
        for name in list(engines)[:: 1 if number % 2 else -1]:
            found, rate = engines[name](prompt, tokens)
            rates[name].append(rate)
            said[name] = found
    ratios = [a / b for a, b in zip(rates["moescope"], rates["mlx-lm"], strict=True)]
    return {
        "shapes": asdict(shapes),
        "dtype": dtype,
        "mib_read_per_token": round(
            shapes.read_per_token() * (4 if dtype == "float32" else 2) / 2**20
        ),
        "rounds": rounds,
        "tokens_per_round": tokens,
        "tokens_per_second": {name: round(statistics.median(r), 2) for name, r in rates.items()},
        "ratio": round(statistics.median(ratios), 4),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "same_tokens": said["moescope"] == said["mlx-lm"],
        **facts,
    }


def main() -> None:
    import mlx.core as mx

    metal = mx.metal.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    for name, default in asdict(Shapes()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=20 if not metal else 128)
    parser.add_argument("--dtype", default="bfloat16" if metal else "float32")
    asked = vars(parser.parse_args())
    shapes = Shapes(**{name: asked[name] for name in asdict(Shapes())})
    with tempfile.TemporaryDirectory() as folder:
        figures = run(shapes, asked["dtype"], asked["rounds"], asked["tokens"], Path(folder))
    where = "metal" if metal else "cpu"
    machine.save(f"mlx_decode_{where}{f'_{shapes.bits}bit' if shapes.bits else ''}", figures)


if __name__ == "__main__":
    main()
