"""What the screen costs the engine: tokens per second with the screen drawing, and with it stopped.

A random OLMoE-shaped model generates in its own process while the screen draws to a terminal of
120×40. The screen's process is stopped and continued by turns (the engine never waits for it), so
that both rates come from one run; each pair of windows gives one ratio. Once with an engine of one
thread, which leaves the screen a core, and once with an engine of a thread per core.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

import machine
from terminal import Terminal

from moescope.demo import CHECKPOINT
from moescope.trace.store import TraceReader

LAYERS, HIDDEN, EXPERTS, WIDTH, TOP_K = 8, 512, 16, 512, 8
ALLOWED = {"one thread": 0.03, "a thread per core": 0.10}


def make_model(folder: Path) -> None:
    """Random weights in the shapes of OLMoE, bfloat16, with the demo's tokenizer."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        values = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5)
        return values.to(torch.bfloat16)

    config = json.loads((CHECKPOINT / "config.json").read_text())
    config |= {
        "num_hidden_layers": LAYERS,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 65536,
        "tie_word_embeddings": False,
        "eos_token_id": None,
    }
    tensors = {"model.embed_tokens.weight": random(config["vocab_size"], HIDDEN)}
    tensors["lm_head.weight"] = random(config["vocab_size"], HIDDEN)
    tensors["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    for layer in range(LAYERS):
        path = f"model.layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{path}.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        for name in ("q_norm", "k_norm"):
            tensors[f"{path}.self_attn.{name}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        for name in "qkvo":
            tensors[f"{path}.self_attn.{name}_proj.weight"] = random(HIDDEN, HIDDEN)
        tensors[f"{path}.mlp.gate.weight"] = random(EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for name, shape in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN))):
                tensors[f"{path}.mlp.experts.{expert}.{name}_proj.weight"] = random(*shape)
            tensors[f"{path}.mlp.experts.{expert}.down_proj.weight"] = random(HIDDEN, WIDTH)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(CHECKPOINT / "tokenizer.json", folder)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def measure(model: Path, trace: Path, threads: int, windows: int, seconds: float) -> list[float]:
    """Ratios of token rates, drawing to stopped, of `windows` pairs."""
    program = str(Path(sys.executable).parent / "moescope")
    command = [program, str(model), "--prompt", "Once upon a time", "-o", str(trace)]
    command += ["--max-new-tokens", "60000", "--max-context", "60000", "--record", "weights"]
    state = str(trace.parent / "state")
    screen = Terminal(command, OMP_NUM_THREADS=str(threads), MOESCOPE_STATE=state)
    try:
        while not trace.exists():
            screen.pump(0.2)
        screen.pump(5.0)
        (drawing,) = children(screen.pid)
        with TraceReader.open(trace, live=True, foreign=False) as reader:
            while reader.count < 50:
                screen.pump(0.2)
                reader.refresh()
            ratios = []
            for number in range(windows):
                order = ("drawing", "stopped") if number % 2 else ("stopped", "drawing")
                rates = {state: window(screen, drawing, reader, state, seconds) for state in order}
                ratios.append(rates["drawing"] / rates["stopped"])
        return ratios
    finally:
        os.kill(drawing, signal.SIGCONT)
        screen.end()


def window(
    screen: Terminal, drawing: int, reader: TraceReader, state: str, seconds: float
) -> float:
    """Tokens per second over one window."""
    os.kill(drawing, signal.SIGSTOP if state == "stopped" else signal.SIGCONT)
    screen.pump(0.5)  # let it settle
    reader.refresh()
    began, before = time.perf_counter(), reader.count
    end = began + seconds
    while time.perf_counter() < end:
        screen.pump(min(0.2, max(0.01, end - time.perf_counter())))
        time.sleep(0.02)
    reader.refresh()
    return (reader.count - before) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=3.0)
    asked = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder)
        cores = os.cpu_count() or 1
        for label, threads in (("one thread", 1), ("a thread per core", cores)):
            trace = folder / f"{threads}.moetrace"
            ratios = measure(folder, trace, threads, asked.windows, asked.seconds)
            cost = 1 - statistics.median(ratios)
            figures[label] = {
                "cost_median": round(cost, 3),
                "cost_quartiles": [round(1 - q, 3) for q in statistics.quantiles(ratios, n=4)],
                "windows": len(ratios),
                "allowed": ALLOWED[label],
                "met": cost <= ALLOWED[label],
            }
    machine.save("screen_cost", figures)


if __name__ == "__main__":
    main()
