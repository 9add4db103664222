"""How everything is measured: contestants take turns, and what else ran at that moment is metered.

A round asks every contestant once, each round beginning with another one. While a contestant runs,
the processor time of everything outside this process tree is taken from /proc/stat; where it is
more than a little, the turn is noisy, and is taken again a few times. Medians are over clean turns,
and over all turns only where no clean one was had, which is then said.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from asked import Asked

QUIET = 0.10  # foreign cores a turn may have had beside it
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
SLACK = 2  # ticks: what the two counts may differ by

Figures = dict[str, Any]


def summary(values: Iterable[float], digits: int = 4) -> Figures:
    """Median, quartiles and number."""
    found = list(values)
    low, _, high = statistics.quantiles(found, n=4) if len(found) > 1 else (found[0],) * 3
    return {
        "median": _short(statistics.median(found), digits),
        "quartiles": [_short(low, digits), _short(high, digits)],
        "n": len(found),
    }


def resampled(values: Iterable[float], draws: int = 2000) -> Figures:
    """Median, and from resampling its standard error and 95 % interval."""
    found = np.array(list(values))
    picked = np.random.default_rng(0).integers(0, len(found), (draws, len(found)))
    medians = np.median(found[picked], axis=1)
    low, high = np.percentile(medians, [2.5, 97.5])
    return {
        "median": _short(float(np.median(found)), 5),
        "interval": [_short(float(low), 5), _short(float(high), 5)],
        "standard_error": _short(float(medians.std()), 2),
        "n": len(found),
    }


def ratios(turns: Sequence[Figures], name: str, base: str, key: str) -> Figures:
    """`name` over `base`, paired by round; noisy turns only where no pair is clean."""
    held = {(turn["name"], turn["round"]): turn for turn in turns}
    rounds = sorted({turn["round"] for turn in turns})
    pairs = [
        (held[name, number], held[base, number])
        for number in rounds
        if (name, number) in held and (base, number) in held
    ]
    clean = [pair for pair in pairs if not any(turn["noisy"] for turn in pair)]
    found = summary(a[key] / b[key] for a, b in clean or pairs)
    return found if clean else {**found, "noisy": True}


def medians(turns: Sequence[Figures], name: str, keys: Sequence[str]) -> Figures:
    """Summaries of the turns of one contestant."""
    own = [turn for turn in turns if turn["name"] == name]
    clean = [turn for turn in own if not turn["noisy"]]
    found: Figures = {key: summary(turn[key] for turn in clean or own) for key in keys}
    found["turns_noisy"] = sum(turn["noisy"] for turn in own)
    found["turns"] = len(own)
    return found


class Meter:
    """Wall time, and cores used meanwhile by this process tree, by others, and by the host."""

    def __enter__(self) -> Meter:
        self._busy, self._stolen = _machine()
        self._own = _own()
        self._began = time.monotonic()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = max(time.monotonic() - self._began, 1e-9)
        busy, stolen = _machine()
        own = _own() - self._own
        self.own = own / self.seconds
        others = busy - self._busy - own - SLACK * TICK_S
        self.foreign = max(0.0, others) / self.seconds
        self.stolen = (stolen - self._stolen) / self.seconds

    def figures(self) -> Figures:
        return {
            "seconds": round(self.seconds, 3),
            "foreign_cores": round(self.foreign, 3),
            "stolen_cores": round(self.stolen, 3),
        }


def rounds(
    contestants: Mapping[str, Callable[[], Figures]], asked: Asked, count: int | None = None
) -> list[Figures]:
    """`count` turns of every contestant, taken in rounds; each with its meter and `noisy`."""
    names = list(contestants)
    count = asked.rounds if count is None else count
    turns: list[Figures] = []
    for number in range(count):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            turn = _turn(contestants[name], asked)
            turns.append({"name": name, "round": number, **turn})
            say(f"  round {number + 1} of {count}  {name:<34} {_mark(turn)}")
    return turns


def _turn(contestant: Callable[[], Figures], asked: Asked) -> Figures:
    """The quietest of up to 1 + `retries` tries; stops at the first that was quiet."""
    best: Figures | None = None
    for _ in range(1 + asked.retries):
        time.sleep(asked.settle)
        with Meter() as meter:
            figures = contestant()
        noise = meter.foreign + meter.stolen
        turn = {**figures, **meter.figures(), "noisy": noise > QUIET}
        if best is None or noise < best["foreign_cores"] + best["stolen_cores"]:
            best = turn
        if not turn["noisy"]:
            break
    assert best is not None
    return best


def say(text: str) -> None:
    """One line of progress on standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _mark(turn: Figures) -> str:
    noise = turn["foreign_cores"] + turn["stolen_cores"]
    return f"{turn['seconds']:6.1f} s" + (
        f"   noisy: {noise:.2f} cores elsewhere" if turn["noisy"] else ""
    )


def _short(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _machine() -> tuple[float, float]:
    """Seconds of processor time since boot: busy, and taken by the host of a virtual machine."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    except OSError:  # not Linux: noise is not metered
        return 0.0, 0.0
    user, nice, system, _, _, irq, softirq, steal = (int(part) for part in first[1:9])
    return (user + nice + system + irq + softirq) * TICK_S, steal * TICK_S


def _own() -> float:
    """Seconds of processor time of this process and all below it, ended ones included."""
    parents: dict[int, int] = {}
    used: dict[int, float] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:  # gone meanwhile
            continue
        pid = int(stat.parent.name)
        parents[pid] = int(fields[1])
        used[pid] = sum(int(part) for part in fields[11:15]) * TICK_S
    return sum(used[pid] for pid in used if _below(pid, os.getpid(), parents))


def _below(pid: int, root: int, parents: Mapping[int, int]) -> bool:
    while pid and pid != root:
        pid = parents.get(pid, 0)
    return pid == root
