"""The short texts around the panels: status, loading, failures, routers in words. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from moescope.engine.protocol import Failed
from moescope.errors import MoescopeError
from moescope.safety import printable
from moescope.ui import routers
from moescope.ui.history import Lane
from moescope.ui.panels import StatusData
from moescope.ui.routers import RouterTable
from moescope.ui.watch import Watch

Mode = Literal["loading", "idle", "prefill", "running", "paused", "replay", "failed"]
REASONS = {
    "end_token": "the model ended its text",
    "length": "the length asked for is reached",
    "stopped": "stopped",
    "context": "the context is full",
    "invalid_logits": "router logits are not finite",
}


def human(count: float) -> str:
    """Bytes in the unit that people say."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit != "MB" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def status(
    watch: Watch, mode: Mode, rate: float, lane: Lane | None, row: int, address: str, beats: float
) -> StatusData:
    """The line on top."""
    facts = watch.facts
    memory = sum(int(facts.get(key) or 0) for key in ("weights_bytes", "cache_bytes"))
    words = [str(facts.get("device") or ""), str(facts.get("dtype") or ""), step_word(facts)]
    backend = " ".join(printable(word, 20) for word in words if word)
    if watch.router_says:
        backend += f", router {printable(watch.router_says, 60)}"
    return StatusData(
        name=printable(watch.name, 60),
        shape=shape(watch.table),
        backend=backend,
        mode=mode,
        rate=f"{rate:.1f} tok/s" if rate > 0 else "",
        position=position(watch, lane, row),
        memory=f"memory {human(memory)}" if memory else "",
        cursor=address,
        frames_per_second=f"screen {beats:.0f} Hz" if beats else "",
        trouble=trouble(watch.problems),
    )


def trouble(problems: Sequence[str]) -> str:
    """What is wrong with a recording: the first problem, and how many there are."""
    if not problems:
        return ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"damaged: {printable(problems[0], 200)}{more}"


def step_word(facts: Mapping[str, Any]) -> str:
    """How single tokens are decoded: native, graph, or torch where there is no fused step."""
    kernels = facts.get("kernels")
    step = kernels.get("step") if isinstance(kernels, dict) else None
    return re.split(r"\W", step, maxsplit=1)[0] if isinstance(step, str) else ""


def shape(table: RouterTable | None) -> str:
    """`48L×128E top-8`."""
    if table is None:
        return ""
    return f"{table.count}L×{table.widest}E top-{int(table.top_k.max(initial=1))}"


def position(watch: Watch, lane: Lane | None, row: int) -> str:
    """`412/2048`: the token looked at, of how many there are or can be."""
    if lane is None or row < 0:
        return ""
    total = lane.count
    if watch.mode != "replay":
        total = int(watch.facts.get("context") or lane.count)
    return f"{int(lane.position[row]) + 1}/{total}"


def spec_line(table: RouterTable, router: int, expression: str | None) -> str:
    """The router at the cursor in words, under the variant that is in force or shown."""
    try:
        specs = routers.specs_under(table, expression or routers.TRAINED)
    except MoescopeError:  # a trace may name variants this version does not know
        return printable(expression or "", 60)
    return str(specs[router].line())


def failure(failed: Failed) -> str:
    """What happened, and what to try, on as many lines as they have."""
    lines = [printable(failed.message, 2000)]
    if failed.hint:
        lines += ["", f"Try: {printable(failed.hint, 1000)}"]
    lines += ["", "o opens another model or trace · ctrl+q quits"]
    return "\n".join(lines)


def ended(reason: str) -> str:
    return REASONS.get(reason, printable(reason, 60))
