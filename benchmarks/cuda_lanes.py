"""Lanes and shadow variants: a step of N lanes against the bytes it must read.

N equal lanes have one prompt and one variant, so one set of experts; different ones have prompts
and variants of their own. `over_union` is the step's time over that of one lane, divided by what
the same ratio of bytes would be, with every distinct expert of a layer read once.
"""

from __future__ import annotations

import statistics
from typing import Any

import cuda_clock as clock
import numpy as np
from cuda_loops import DRAWN, Lanes
from cuda_shapes import Model, begin, make, parser, prompt

from moescope.engine.lane import policies_of
from moescope.engine.torch_decoder import TorchDecoder

COUNTS = (1, 2, 4, 8)
VARIANTS = (
    "trained",
    "softmax_over_selected",
    "always_renormalised",
    "scores_bf16",
    "double_softmax",
    "logits_bf16",
    "wrong_scoring_func",
    "tie_break",
)
TOKENS = 64


def main() -> None:
    asked = parser(__doc__ or "").parse_args()
    report, shape = begin(asked)
    block, rounds, capacity = (3, 2, 256) if asked.tiny else (24, 6, 1024)
    model = make(shape, asked.device)
    decoder = model.decoder(max(COUNTS), capacity)
    report.put("step", {"why_none": decoder.why_no_step, "kernels": decoder.kernels})
    found = {}
    for kind in ("equal", "different"):
        found[kind] = {str(n): batch(model, decoder, kind, n, block, rounds) for n in COUNTS}
        report.put(kind, found[kind])
    one = found["different"]["1"]
    for kind, rows in found.items():
        name = "over_union" if kind == "different" else "over_union_equal"
        over = {
            n: row["seconds"] / one["seconds"] / row["bytes"] * one["bytes"]
            for n, row in rows.items()
        }
        report.put(name, over)
    equal = found["equal"]
    report.put("equal_over_one", {n: equal[n]["seconds"] / equal["1"]["seconds"] for n in equal})
    report.put("shadows", shadows(model, decoder, block, rounds + 2))
    report.put("toggle", toggle(model, decoder, 8 if asked.tiny else 64))
    report.finish()


def batch(
    model: Model, decoder: TorchDecoder, kind: str, count: int, block: int, rounds: int
) -> dict[str, Any]:
    """Seconds of a step of `count` lanes, and the bytes it needs."""
    equal = kind == "equal"
    lanes = Lanes(
        decoder,
        [prompt(model, TOKENS, seed=1 if equal else lane + 1) for lane in range(count)],
        variants=("trained",) * count if equal else VARIANTS[:count],
        sampling=DRAWN,
    )
    lanes.go(4)
    ids = [lanes.step().expert_ids for _ in range(block)]  # [N, 1, L, K] each
    distinct = [distinct_experts(each) for each in ids]
    seconds = [clock.timed(lambda: lanes.go(block), decoder.device) for _ in range(rounds)]
    distinct += [distinct_experts(lanes.step().expert_ids) for _ in range(block)]
    per_step = statistics.median(seconds) / block
    return {
        "seconds": per_step,
        "tokens_per_second": count / per_step,
        "distinct_experts_a_layer": statistics.mean(distinct) / len(decoder.routers),
        "bytes": model.union_bytes(statistics.mean(distinct), count, lanes.position),
    }


def distinct_experts(ids: np.ndarray[Any, Any]) -> int:
    """Over the lanes, in all layers together; ids [N, 1, L, K], -1 unused."""
    by_layer = ids[:, 0].swapaxes(0, 1).reshape(ids.shape[2], -1)
    return sum(len(set(row[row >= 0].tolist())) for row in by_layer)


def shadows(model: Model, decoder: TorchDecoder, block: int, rounds: int) -> dict[str, Any]:
    """A lane without shadow variants and with four, by turns."""
    four = [policies_of(v, decoder.routers, decoder.dtype) for v in VARIANTS[1:5]]
    lanes = Lanes(decoder, [prompt(model, TOKENS)])
    seconds: dict[int, list[float]] = {0: [], 4: []}
    for _ in range(rounds + 1):
        for count in seconds:
            decoder.set_shadows(four[:count])
            lanes.refill()
            lanes.go(3)
            seconds[count].append(clock.timed(lambda: lanes.go(block), decoder.device))
    out = lanes.step()
    decoder.set_shadows([])
    pairs = zip(seconds[4][1:], seconds[0][1:], strict=True)
    return {
        "ratio": statistics.median(a / b for a, b in pairs),
        "recorded": None if out.shadow_ids is None else list(out.shadow_ids.shape),
    }


def toggle(model: Model, decoder: TorchDecoder, steps: int) -> dict[str, float]:
    """The step after a variant was toggled against the others: nothing is compiled for it."""
    lanes = Lanes(decoder, [prompt(model, TOKENS)])
    lanes.go(4)
    plain, after = [], []
    for number in range(steps):
        if number % 4 == 0:
            variant = VARIANTS[number // 4 % len(VARIANTS)]
            decoder.set_policies(0, policies_of(variant, decoder.routers, decoder.dtype))
        kept = after if number % 4 == 0 else plain
        kept.append(clock.timed(lanes.step, decoder.device))
    decoder.set_policies(0, policies_of("trained", decoder.routers, decoder.dtype))
    ordinary, first = statistics.median(plain), statistics.median(after)
    return {"seconds": ordinary, "after_a_toggle": first, "longest_after_a_toggle": max(after)}


if __name__ == "__main__":
    main()
