"""Decode at batch 1: tokens per second as a share of the bandwidth measured in the same run.

Traced is a session that records every router's weights into a file; bare is a loop that looks at
nothing but the token. Both read one decoder and take turns. The torch operators run without a
graph, for the gap, and are what the fused step's tokens are compared with.
"""

from __future__ import annotations

import statistics
import time

import cuda_clock as clock
import numpy as np
from cuda_loops import Lanes, Traced
from cuda_profile import profile
from cuda_shapes import Model, begin, make, parser, prompt

from moescope.engine import parameters
from moescope.engine.torch_decoder import TorchDecoder


def main() -> None:
    asked = parser(__doc__ or "").parse_args()
    report, shape = begin(asked)
    block, rounds, capacity = (4, 2, 256) if asked.tiny else (64, 8, 2048)
    report.put("bandwidth", bandwidth := clock.bandwidth(asked.device))
    began = time.perf_counter()
    model = make(shape, asked.device)
    decoder = model.decoder(capacity=capacity)
    clock.synchronize(asked.device)
    report.put(
        "model",
        {
            "shape": shape,
            "parameters": parameters.count(model.spec),
            "bytes_per_token": model.token_bytes(0),
            "made_in_seconds": time.perf_counter() - began,
        },
    )
    report.put("step", {"why_none": decoder.why_no_step, "kernels": decoder.kernels})

    bare = Lanes(decoder, [prompt(model, 16)])
    began = time.perf_counter()
    bare.step()
    report.put("first_step_seconds", time.perf_counter() - began)  # kernels compiled, graph made
    report.put("agreement", agreement(model, decoder, 8 if asked.tiny else 48))

    rates, shares = compare(model, decoder, asked.device, block, rounds)
    report.put("tokens_per_second", rates)
    report.put("share", {name: share / bandwidth["best"] for name, share in shares.items()})
    report.put("gigabytes_per_second", shares)
    slow = Lanes(model.decoder(capacity=256, fused=False), [prompt(model, 16)])
    seconds = clock.median_time(lambda: slow.go(4), asked.device, repeats=3, warm=1) / 4
    report.put("torch_operators_tokens_per_second", 1 / seconds)
    report.put("profile", profile(bare, len(model.spec.layers), 2 if asked.tiny else 6))
    report.finish()


def compare(
    model: Model, decoder: TorchDecoder, device: str, block: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Tokens per second and GB/s, bare and traced, in blocks that take turns.

    They share lane 0, so each begins its blocks by filling in its own prompt, off the clock.
    """
    loops = {"bare": Lanes(decoder, [prompt(model, 128)]), "traced": Traced(model, decoder)}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    moved: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds + 1):
        for name, loop in loops.items():
            loop.refill()
            loop.go(4)
            seconds[name].append(clock.timed(lambda loop=loop: loop.go(block), device))
            moved[name].append(block * model.token_bytes(loop.position - block // 2))
    loops["traced"].close()  # type: ignore[union-attr]
    middle = {name: statistics.median(list_[1:]) for name, list_ in seconds.items()}
    rates = {name: block / value for name, value in middle.items()}
    shares = {name: moved[name][-1] / value / 1e9 for name, value in middle.items()}
    return rates, shares


def agreement(model: Model, decoder: TorchDecoder, tokens: int) -> dict[str, float]:
    """The same ids fed to the fused step and to the torch operators: how much of what comes out is
    the same. In bfloat16 near ties part; a float32 twin of this is among the tests."""
    ids = prompt(model, 8 + tokens, seed=5)
    twin = model.decoder(capacity=256, fused=False)
    outs = []
    for each in (decoder, twin):
        each.truncate(0, 0)
        each.run([0], np.array([ids[:8]]))
        outs.append([each.run([0], np.array([[i]])) for i in ids[8:]])
    pairs = list(zip(*outs, strict=True))
    same = [a.logits.argmax() == b.logits.argmax() for a, b in pairs]
    experts = [(np.sort(a.expert_ids, -1) == np.sort(b.expert_ids, -1)).mean() for a, b in pairs]
    apart = [np.linalg.norm(a.logits - b.logits) / np.linalg.norm(b.logits) for a, b in pairs]
    return {
        "tokens": float(np.mean(same)),
        "experts": float(np.mean(experts)),
        "logits_relative_error": float(np.median(apart)),
    }


if __name__ == "__main__":
    main()
