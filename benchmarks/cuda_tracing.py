"""What watching costs: a loop that looks at nothing but the token, against records and sessions.

`run` is the interpreter with a record of that level taken to the host; `session` makes frames of
it and writes them into a trace, with everything else a session does for a token. All take turns on
one decoder and one lane; a cost is the median over rounds of the seconds over those of the bare
loop of the same round, less one.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
from typing import Any

import cuda_clock as clock
from cuda_loops import DRAWN, Lanes, Traced
from cuda_profile import graph_nodes
from cuda_shapes import Model, begin, make, parser, prompt

from moescope.engine.torch_decoder import TorchDecoder

LEVELS = ("ids", "weights", "logits")


def main() -> None:
    asked = parser(__doc__ or "").parse_args()
    report, shape = begin(asked)
    block, rounds, capacity = (3, 2, 256) if asked.tiny else (48, 8, 1024)
    model = make(shape, asked.device)
    decoder = model.decoder(capacity=capacity)
    report.put("step", {"why_none": decoder.why_no_step, "kernels": decoder.kernels})
    loops = make_loops(model, decoder)
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        for name in list(loops) if number % 2 else list(loops)[::-1]:
            loop = loops[name]
            loop.refill()
            loop.go(4)
            seconds[name].append(clock.timed(lambda loop=loop: loop.go(block), asked.device))
    rate = {name: block / statistics.median(found[1:]) for name, found in seconds.items()}
    report.put("tokens_per_second", rate)
    costs = {name: cost(found, seconds["bare"]) for name, found in seconds.items()}
    report.put("cost", {level: costs[f"session {level}"] for level in LEVELS})
    report.put("cost_of_the_record", {level: costs[f"run {level}"] for level in LEVELS})
    report.put("nodes", counted := nodes(loops["bare"]))
    if "ids" in counted:
        report.put("further_nodes", counted["weights"] - counted["ids"])
    loops["session weights"].refill()
    report.put("host", host_time(loops["session weights"], 4 if asked.tiny else 100))
    for loop in loops.values():
        if isinstance(loop, Traced):
            loop.close()
    report.finish()


def make_loops(model: Model, decoder: TorchDecoder) -> dict[str, Any]:
    ids = [prompt(model, 128)]
    return {
        "bare": Lanes(decoder, ids),
        **{f"run {level}": Lanes(decoder, ids, record=level) for level in LEVELS},
        "session": Traced(model, decoder, "ids", written=False),
        **{f"session {level}": Traced(model, decoder, level) for level in LEVELS},
        "session weights, drawn": Traced(model, decoder, sampling=DRAWN),
    }


def cost(seconds: list[float], bare: list[float]) -> float:
    """The first round warms up."""
    return statistics.median(a / b for a, b in zip(seconds[1:], bare[1:], strict=True)) - 1


def nodes(lanes: Lanes) -> dict[str, Any]:
    """Nodes of the step's graph by what it records; `says` why there are none to count."""
    if not isinstance(getattr(lanes.decoder.step, "captures", None), int):
        return {"says": "no graph here"}
    try:
        lanes.refill()
        found = {}
        for level in LEVELS:
            lanes.record = level
            lanes.go(2)
            found[level] = graph_nodes(lanes.decoder.step, logits=level == "logits")
        return found
    except Exception as error:
        return {"says": f"{type(error).__name__}: {error}"[:300]}


def host_time(loop: Traced, tokens: int) -> dict[str, Any]:
    """Where the host's time goes, microseconds a token, by function; the profiler adds to it."""
    profiler = cProfile.Profile()
    profiler.enable()
    loop.go(tokens)
    profiler.disable()
    table: Any = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    rows = sorted(table.items(), key=lambda item: -item[1][2])[:16]
    return {
        f"{where[0].rsplit('/', 1)[-1]}:{where[1]} {where[2]}": own * 1e6 / tokens
        for where, (_, _, own, _, _) in rows
    }


if __name__ == "__main__":
    main()
