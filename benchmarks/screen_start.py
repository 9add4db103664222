"""From process start to the first frame on the terminal, before torch is imported."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import machine
from terminal import Terminal

ROUNDS = 10
FIRST_FRAME = b"moescope"  # the name in the top line


def main() -> None:
    program = str(Path(sys.executable).parent / "moescope")
    seconds = []
    for _ in range(ROUNDS):
        screen = Terminal([program])
        seconds.append(screen.wait_for(FIRST_FRAME))
        screen.end()
        time.sleep(0.3)  # let the engine of this round finish dying
    figures = {
        "rounds": ROUNDS,
        "seconds_median": round(statistics.median(seconds), 3),
        "seconds_best": round(min(seconds), 3),
        "seconds_worst": round(max(seconds), 3),
    }
    machine.save("screen_start", figures)


if __name__ == "__main__":
    main()
