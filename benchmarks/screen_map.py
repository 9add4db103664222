"""Time to draw the expert map: 48 routers × 128 experts, from new data to encoded bytes.

The whole paint path: comparing, strips, the compositor, encoding for a truecolor terminal. Kinds
of frames: `load` moves as a run's does, `picks` moves only the picks, `noise` changes every cell.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import statistics
import sys
import time

import machine
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from textual.app import App, ComposeResult

from moescope.ui.panels import LEVELS, MapData
from moescope.ui.widgets.expert_map import ExpertMap

ROUTERS, EXPERTS, TOP_K = 48, 128, 8
SIZE = (ROUTERS + 4, EXPERTS + 12)  # rows, columns: cells, ruler, gutter, sums, border
TARGET_MS = 8.0
KINDS = ("load", "picks", "noise")


class Bench(App[None]):
    colour_depth = "truecolor"

    def compose(self) -> ComposeResult:
        yield ExpertMap()


def frames(kind: str, count: int) -> list[MapData]:
    """Consecutive tokens, with load smoothed over the last ones."""
    random = np.random.default_rng(7)
    skew = random.gamma(0.7, 1.0, (ROUTERS, EXPERTS)) + 0.02
    load = np.zeros((ROUTERS, EXPERTS))
    made = []
    for _ in range(count):
        marks = picks(random, skew)
        load = 0.97 * load + 0.03 * marks
        levels = np.minimum(LEVELS - 1, LEVELS * load / load.max()).astype(np.uint8)
        if kind == "noise":
            levels = random.integers(0, LEVELS, load.shape).astype(np.uint8)
        if kind == "picks":
            levels = np.zeros_like(levels)
        made.append(frame(levels, marks, random))
    return made


def picks(random: np.random.Generator, skew: NDArray[np.float64]) -> NDArray[np.uint8]:
    keys = np.log(skew) + random.gumbel(size=skew.shape)
    marks = np.zeros(skew.shape, np.uint8)
    np.put_along_axis(marks, np.argsort(-keys, axis=1)[:, :TOP_K], 1, axis=1)
    return marks


def frame(
    levels: NDArray[np.uint8], marks: NDArray[np.uint8], random: np.random.Generator
) -> MapData:
    return MapData(
        levels=levels,
        marks=marks,
        num_experts=np.full(ROUTERS, EXPERTS, np.int16),
        gutter=tuple(f"{router:02d}" for router in range(ROUTERS)),
        score_sum=random.uniform(0.4, 0.8, ROUTERS).astype(np.float32),
        sum_wrong=np.zeros(ROUTERS, bool),
        cursor=(17, 62),
    )


async def measure(zoom: str, count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds and KiB a frame, by kind; kinds take turns, so noise hits them alike."""
    app = Bench()
    console = Console(color_system="truecolor", force_terminal=True, width=SIZE[1])
    made = {kind: frames(kind, count + 1) for kind in KINDS}
    times: dict[str, list[float]] = {kind: [] for kind in KINDS}
    busy: dict[str, list[float]] = {kind: [] for kind in KINDS}
    sizes: dict[str, list[int]] = {kind: [] for kind in KINDS}
    async with app.run_test(size=(SIZE[1], SIZE[0])) as pilot:
        await pilot.pause()
        widget = app.query_one(ExpertMap)
        widget.show(made["load"][0])
        widget.zoom = zoom
        await pilot.pause()
        gc.collect()
        gc.freeze()
        for _ in range(rounds):
            for kind in KINDS:
                wall, cpu = paint(app, console, made[kind], sizes[kind])
                times[kind].append(statistics.median(wall))
                busy[kind].append(statistics.median(cpu))
    return {
        kind: {
            "median_ms": round(statistics.median(times[kind]), 2),
            "least_disturbed_round_ms": round(min(times[kind]), 2),
            "cpu_median_ms": round(statistics.median(busy[kind]), 2),
            "kib": round(statistics.mean(sizes[kind]) / 1024, 1),
        }
        for kind in KINDS
    }


def paint(
    app: Bench, console: Console, made: list[MapData], sizes: list[int]
) -> tuple[list[float], list[float]]:
    """Draw every frame as the screen's timer would, and encode it. Wall and processor time."""
    widget, screen = app.query_one(ExpertMap), app.screen
    compositor = screen._compositor
    taken, used = [], []
    for data in made:
        start, busy = time.perf_counter(), time.thread_time()
        widget.show(data)
        compositor.update_widgets({widget})
        update = compositor.render_update(screen_stack=app._background_screens)
        text = update.render_segments(console) if update is not None else ""
        taken.append((time.perf_counter() - start) * 1e3)
        used.append((time.thread_time() - busy) * 1e3)
        sizes.append(len(text.encode()))
    return taken[1:], used[1:]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    zooms = {
        zoom: asyncio.run(measure(zoom, asked.frames, asked.rounds))
        for zoom in ("cell", "half", "braille")
    }
    met = zooms["cell"]["load"]["median_ms"] <= TARGET_MS
    figures = {
        "what": f"expert map, {ROUTERS} routers × {EXPERTS} experts, new data to encoded bytes",
        "frames": asked.frames,
        "rounds": asked.rounds,
        "target_ms": TARGET_MS,
        "met": met,
        **zooms,
    }
    machine.save("screen_map", figures)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
