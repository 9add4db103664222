"""Decode of families whose operators are not all Triton's: the graph step, torch operators one by
one, and transformers, on random weights in real shapes of a few layers.

Each family is measured by a process of its own, which tells what it has after every figure: one
that hangs or leaves the device unusable costs its family only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from typing import Any

import cuda_clock as clock
import torch
from cuda_decode import agreement
from cuda_family_shapes import FAMILIES, config_of
from cuda_loops import Lanes
from cuda_peers import environment, guarded
from cuda_shapes import begin, make_of, parser, prompt
from cuda_transformers import STEPS, Mode, per_token

MODES = (
    Mode("grouped_mm", "dynamic"),
    Mode("batched_mm", "dynamic"),
    Mode("eager", "dynamic"),
    Mode("batched_mm", "graph"),
)
ATTENTION = {"gpt_oss": "eager"}  # sinks are not in torch's own; others: sdpa
PROMPT, SPARE = 128, 15
GREETING = "figures: "


def main() -> None:
    asks = parser(__doc__ or "")
    asks.add_argument("--worker", choices=tuple(FAMILIES), help="measure this family")
    asked = asks.parse_args()
    if asked.worker:
        work(asked)
        return
    report, _ = begin(asked)
    ends = time.monotonic() + asked.limit - SPARE
    for number, name in enumerate(FAMILIES):
        share = (ends - time.monotonic()) / (len(FAMILIES) - number)
        found = watched(asked, name, share)
        report.put(name, found, says=words(found))
    report.finish()


def words(found: dict[str, Any]) -> str:
    """The ratios of a family, or what it says in their place."""
    ratios = {
        "of the bandwidth": found.get("share"),
        "× torch operators": found.get("over_torch"),
        "× transformers' best": found.get("over_best"),
    }
    said = [f"{value:.2f} {name}" for name, value in ratios.items() if value is not None]
    return ", ".join([*said, *([found["says"]] if "says" in found else [])])


def watched(asked: Namespace, name: str, seconds: float) -> dict[str, Any]:
    """The last figures that a family's process told, and how it ended if not well."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", name]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=seconds, env=environment()
        )
        said, ending = done.stdout, f"its process ended with {done.returncode}"
        wrong = done.returncode != 0
    except subprocess.TimeoutExpired as late:
        raw = late.stdout or b""
        said = raw.decode() if isinstance(raw, bytes) else raw
        ending, wrong = f"stopped after {seconds:.0f} s", True
    told = [line for line in said.splitlines() if line.startswith(GREETING)]
    found: dict[str, Any] = json.loads(told[-1].removeprefix(GREETING)) if told else {}
    return found | ({"says": ending} if wrong else {})


# --- the worker -----------------------------------------------------------------------------------


@torch.inference_mode()
def work(asked: Namespace) -> None:
    begin(asked)
    name, device = asked.worker, asked.device
    if device == "cpu":  # the kernels are interpreted, and the interpreter put right
        import_module("tests.kernels.interpreted")
    config = config_of(name, tiny=asked.tiny)
    figures: dict[str, Any] = {}

    def tell(**more: Any) -> None:
        figures.update(more)
        print(GREETING + json.dumps(figures), flush=True)

    tell(bandwidth=(best := clock.bandwidth(device)["best"]))
    tell(**guarded(lambda: ours(config, asked)))
    if device == "cuda":  # a peer makes weights of its own
        torch.cuda.empty_cache()
    rates = figures.get("tokens_per_second", {})
    if "graph" in rates:
        read = rates["graph"] * figures["bytes_per_token"] / 1e9
        tell(share=read / best, over_torch=rates["graph"] / rates["torch operators"])
    peers: dict[str, Any] = {}
    for mode in MODES[:2] if asked.tiny else MODES:
        peers[mode.name] = guarded(lambda mode=mode: peer_rate(name, config, mode, asked))
        fastest = max(found.get("tokens_per_second", 0.0) for found in peers.values())
        over = {"over_best": rates["graph"] / fastest} if fastest and "graph" in rates else {}
        tell(transformers=peers, **over)


def ours(config: dict[str, Any], asked: Namespace) -> dict[str, Any]:
    """Tokens per second of the graph and of torch operators one by one, which it agrees with."""
    tiny, device = asked.tiny, asked.device
    model = make_of(config, device, dtype_of(asked))
    decoder, twin = (model.decoder(capacity=1024, fused=fused) for fused in (True, False))
    if device == "cpu":  # the same kernels, not captured
        from moescope.engine.graph_step import GraphStep

        decoder.step = GraphStep(decoder.shared, graph=False)
        decoder.step.opened()
    if decoder.step is None:
        return {"says": f"no graph: {decoder.why_no_step}"}
    found: dict[str, Any] = {"bytes_per_token": model.token_bytes(PROMPT)}
    found["kernels"] = decoder.step.kernels
    found["agreement"] = agreement(model, decoder, 2 if tiny else 32)
    rates = {}
    for name, run in (("graph", decoder), ("torch operators", twin)):
        run.truncate(0, 0)
        loop = Lanes(run, [prompt(model, 8 if tiny else PROMPT)])
        rates[name] = rate(loop.step, asked)
    return found | {"tokens_per_second": rates}


def rate(step: Callable[[], Any], asked: Namespace) -> float:
    """Tokens per second."""
    if asked.tiny:  # a figure without worth, and an interpreted step takes its time
        return 1 / clock.timed(step, asked.device)
    return 1 / per_token(step, asked.device)


def dtype_of(asked: Namespace) -> str:
    return "float32" if asked.tiny else "bfloat16"


def peer_rate(name: str, config: dict[str, Any], mode: Mode, asked: Namespace) -> dict[str, float]:
    """Of transformers' own model of the config, with random weights of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in config.items() if key != "model_type"}
    ends = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    with torch.device(asked.device):
        peer = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(name, **fields, **ends),
            dtype=getattr(torch, dtype_of(asked)),
            attn_implementation=ATTENTION.get(name, "sdpa"),
            experts_implementation=mode.experts,
        )
    peer.requires_grad_(False).eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, config["vocab_size"], (1, PROMPT), generator=generator)
    return {"tokens_per_second": rate(STEPS[mode.runs](peer, ids.to(asked.device)), asked)}


if __name__ == "__main__":
    main()
