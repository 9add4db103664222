"""Pictures of the running application, as SVG and (where cairosvg is installed) PNG.

Run by `make shots`. The embedded demo model generates, without sampling, in this very process; the
prompts are fixed, so the pictures change only when the model or the screen does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.pop("NO_COLOR", None)
os.environ["COLORTERM"] = "truecolor"
os.environ["TEXTUAL_ANIMATIONS"] = "none"

from moescope.demo import CHECKPOINT
from moescope.engine import protocol as p
from moescope.engine.link import InProcess
from moescope.ui.app import MoescopeApp
from moescope.ui.tour import PROMPTS
from moescope.ui.watch import Watch

HERE = Path(__file__).parent
TOKENS = 96
WRONG = "softmax_over_selected"


@dataclass(frozen=True, slots=True)
class Shot:
    """One picture: size, the tour's prompt, keys pressed when all lanes are done."""

    name: str
    size: tuple[int, int]
    prompt: int
    keys: tuple[str, ...] = ()
    lanes: int = 1
    back: int = 12  # tokens before the end that are looked at


SHOTS = (
    Shot("main-80x24", (80, 24), 1),
    Shot("main-120x40", (120, 40), 0, ("down", "down", "right")),
    Shot("main-200x60", (200, 60), 1, ("down", "right")),
    Shot("variant-120x40", (120, 40), 0, ("down", "down", "right", "v")),
    Shot("compare-120x40", (120, 40), 1, ("c", "d"), lanes=2, back=40),
    Shot("balance-120x40", (120, 40), 1, ("b", "down", "down")),
    Shot("token-120x40", (120, 40), 3, ("enter", "down", "down")),
)


def wait(watch: Watch, condition: Callable[[], bool], seconds: float = 300.0) -> None:
    """Take news until `condition` holds."""
    end = time.monotonic() + seconds
    while not condition():
        watch.pump()
        if watch.failed is not None:
            sys.exit(f"{watch.failed.message}\n{watch.failed.hint}")
        if time.monotonic() > end:
            sys.exit("the engine never finished")
        time.sleep(0.01)


def written(watch: Watch, shot: Shot) -> None:
    """Let the engine write the text of one picture."""
    if shot.lanes > 1 and len(watch.lanes) < shot.lanes:
        watch.send(p.AddLane(WRONG))
        wait(watch, lambda: len(watch.lanes) == shot.lanes)
    if shot.lanes == 1 and len(watch.lanes) > 1:
        watch.send(p.DropLane(1))
        wait(watch, lambda: len(watch.lanes) == 1)
    watch.chat = False
    watch.sampling = p.Sampling(max_new_tokens=TOKENS)
    watch.ask(PROMPTS[shot.prompt])
    wait(watch, lambda: len(watch.finished) >= shot.lanes and watch.mode == "idle")
    wait(watch, lambda: watch.history is not None and not watch.history.behind)


async def take(watch: Watch, shot: Shot) -> str:
    app = MoescopeApp(watch)
    async with app.run_test(size=shot.size) as pilot:
        main = app.main
        await pilot.pause(0.2)
        main.look.seek(main.look.at - shot.back)
        main.draw()
        for key in shot.keys:
            await pilot.press(key)
        main.clock.measured = 15.0  # what a picture shows must not depend on this machine
        main.draw()
        await pilot.pause(0.2)
        return app.export_screenshot(title="moescope")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(CHECKPOINT))
    parser.add_argument("--out", type=Path, default=HERE)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = str(Path(folder, "run.moetrace"))
        request = p.LoadRequest(asked.model, device="cpu", trace_path=trace)
        watch = Watch(InProcess(request), "moescope demo")
        wait(watch, lambda: watch.table is not None)
        watch.name = "moescope demo"
        for shot in SHOTS:
            written(watch, shot)
            path = asked.out / f"{shot.name}.svg"
            path.write_text(asyncio.run(take(watch, shot)), encoding="utf-8")
            print(path, png(path))
        watch.close()
    return 0


def png(path: Path) -> str:
    """The same picture as PNG, where a converter is installed."""
    try:
        import cairosvg
    except ImportError:
        return ""
    target = path.with_suffix(".png")
    cairosvg.svg2png(url=str(path), write_to=str(target))
    return str(target)


if __name__ == "__main__":
    sys.exit(main())
