"""What every key of the main screen does, one action each. Keys are bound to them in `keys.py`.

An action that means nothing now (a replay has nothing to stop, a model that loads nothing to show)
is refused by `check_action`, so the footer and the palette leave it out; `refusal` says why.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import Input

from moescope.engine import protocol as p
from moescope.ui import find, keys
from moescope.ui.routers import TRAINED
from moescope.ui.watch import Watch
from moescope.ui.widgets.expert_map import ExpertMap

if TYPE_CHECKING:
    from moescope.ui.clock import Clock
    from moescope.ui.looking import Looking
    from moescope.ui.pace import Pace

ZOOMS = ("braille", "half", "cell")
PANELS = {"map": "#map", "layer": "#layer", "sums": "#sums", "token": "#token"}
WHEN = {key.action.split("(")[0]: key.when for key in keys.MAIN}
PANEL_KEYS = ("panel", "jump", "zoom", "prompt")  # of what a failure covers

SETTLE = 0.1  # seconds until a panel that was closed has left the layout


class MainKeys(Screen[None]):
    """The actions; `MainScreen` holds the state they work on and draws."""

    KEYS = "main"
    BINDINGS = keys.bindings("main")
    subject: Watch
    look: Looking
    pace: Pace
    playing: bool
    clock: Clock

    def draw(self) -> None:
        raise NotImplementedError

    def say(self, text: str, severity: str = "information") -> None:
        raise NotImplementedError

    def _begin(self) -> None:
        raise NotImplementedError

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        when = WHEN.get(action, "always")
        if when == "always":
            return True
        if not self.is_mounted or self.subject.table is None:
            return False
        if self.subject.failed is not None and (when == "live" or action in PANEL_KEYS):
            return False
        return not self.refusal(action)

    def refusal(self, action: str) -> str:
        """Why an action means nothing with what is open; "" where it does."""
        when, replay = WHEN.get(action, "always"), self.subject.mode == "replay"
        if when == "live" and replay:
            return "this is a recording: that needs a model, which o opens"
        if when == "replay" and not replay:
            return "that is for a recording, which o opens"
        if action == "twin" and not self.subject.facts.get("router_twin"):
            return "no kernel routes here, so there is no slow twin to set beside it"
        return ""

    def why_not(self, key: str) -> None:
        """Tell what a key does not do here; nothing while there is nothing to do it with."""
        held = self._bindings.key_to_bindings.get(key, ())
        said = [self.refusal(binding.action.split("(")[0]) for binding in held]
        if self.is_mounted and self.subject.table is not None and any(said):
            self.say(next(filter(None, said)))

    @property
    def table(self) -> Any:
        return self.look.table

    # --- running

    def action_pause(self) -> None:
        watch = self.subject
        if watch.mode == "replay":
            lane = self.look.lane
            if not self.playing and lane is not None and self.look.at == lane.count - 1:
                self.look.seek(0)
            self.playing = not self.playing
        elif self.playing:
            self.playing = False
        elif watch.mode == "paused" and self.pace.rate is not None:
            self.playing = True
        else:
            watch.send(p.Resume() if watch.mode == "paused" else p.Pause())
        self.pace.rest()
        self.draw()

    def action_step(self) -> None:
        if self.subject.mode == "replay":
            self.playing = False
            self.look.move_token(1)
        else:
            if self.subject.mode == "running":
                self.subject.send(p.Pause())
            self.playing, self.look.row = False, None
            self.subject.send(p.Step(1))
        self.draw()

    def action_back(self) -> None:
        self._hold()
        self.look.move_token(-1)
        self.draw()

    def _hold(self) -> None:
        """Looking back stops what plays by itself."""
        if self.subject.mode == "replay":
            self.playing = False

    def action_stop(self) -> None:
        if self.subject.live or self.playing or self.subject.mode == "paused":
            self.playing = False
            self.subject.send(p.Stop())
        else:
            self.say("nothing is running; ctrl+q quits")

    def action_rerun(self, new_seed: bool) -> None:
        seed = secrets.randbelow(2**31) if new_seed else None
        if not self.subject.again(seed, paused=self.pace.rate is not None):
            self.say("no prompt yet: press i and type one")
            return
        if new_seed and self.subject.sampling.temperature == 0:
            self.say("temperature is 0, so every seed gives the same text; s changes that")
        self._begin()
        self.draw()

    def action_generate(self, letter: str) -> None:
        """From the next token on; a lane that is done starts over under it."""
        expression = self.look.letter(letter)
        if expression is None:
            self.say(f"{letter} is free: + puts a variant there")
            return
        self.subject.send(p.SetVariant(self.look.lane_number, expression))
        self.subject.lanes[self.look.lane_number] = expression
        self.look.shown = None
        if self.subject.mode == "idle" and self.subject.generate is not None:
            self.action_rerun(False)
        self.draw()

    def action_speed(self, direction: int) -> None:
        replay = self.subject.mode == "replay"
        self.pace.change(direction, can_be_full=not replay)
        if not replay and self.subject.live and self.pace.rate is not None:
            self.subject.send(p.Pause())
            self.playing = True
        elif not replay and self.playing and self.pace.rate is None:
            self.playing = False
            self.subject.send(p.Resume())
        rate = "as fast as it goes" if self.pace.rate is None else f"{self.pace.rate:g} tok/s"
        if not replay:
            self.say(f"pace: {rate}")
        self.draw()

    def action_twin(self) -> None:
        """The router's kernel, or its slow twin with the kernel beside it."""
        self.subject.send(p.SlowRouter(not self.subject.router_says))

    # --- asking

    def action_prompt(self) -> None:
        self.query_one("#prompt", Input).focus()

    def action_chat(self) -> None:
        if not self.subject.facts.get("has_chat_template"):
            self.say("this model has no chat template: prompts are raw text")
            return
        self.subject.chat = not self.subject.chat
        self.subject.turns.clear()
        self.draw()

    def action_sampling(self) -> None:
        from moescope.ui.screens.dialogs import FormScreen

        now = self.subject.sampling
        fields = tuple(
            (name, f"{getattr(now, name):g}", hint)
            for name, hint in (
                ("temperature", "0 is greedy"),
                ("top_k", "0: off"),
                ("top_p", "1: off"),
                ("min_p", "0: off"),
                ("seed", ""),
                ("max_new_tokens", ""),
            )
        )
        screen = FormScreen("sampling, from the next prompt on", fields, check_sampling)
        self.app.push_screen(screen, self._sampled)

    def _sampled(self, values: dict[str, str] | None) -> None:
        if values is not None:
            self.subject.sampling = sampling_of(values)

    # --- moving

    def action_layer(self, by: int) -> None:
        self.look.move_router(by)
        self.draw()

    def action_pick(self, by: int) -> None:
        self.look.move_pick(by)
        self.draw()

    def action_expert(self, by: int) -> None:
        self.look.move_expert(by)
        self.draw()

    def action_token(self, by: int) -> None:
        self._hold()
        self.look.move_token(by)
        self.draw()

    def action_change(self, by: int) -> None:
        self._hold()
        if not self.look.move_change(by):
            self.say("no further change of this router's first expert")
        self.draw()

    def action_edge(self, row: int) -> None:
        lane = self.look.lane
        self.look.seek(row if row >= 0 or lane is None else lane.count - 1)
        self.draw()

    def action_follow(self) -> None:
        self.look.row = None if self.look.row is not None else max(0, self.look.at)
        self.draw()

    def action_find(self) -> None:
        from moescope.ui.screens.dialogs import AskScreen

        self.app.push_screen(
            AskScreen("find", "L17, E062, L17E062, @412, or text", check=self.look.find),
            lambda _: self.draw(),
        )

    def action_hit(self, by: int) -> None:
        if not self.look.move_hit(by):
            self.say("no further hit" if self.look.hits else "/ finds text first")
        self.draw()

    def action_go_to(self) -> None:
        from moescope.ui.screens.dialogs import AskScreen

        def check(text: str) -> str:
            return self.look.find("@" + text.strip().lstrip("@"))

        self.app.push_screen(AskScreen("go to token", "412", check=check), lambda _: self.draw())

    def action_mark(self) -> None:
        lane, at = self.look.lane, self.look.at
        if lane is not None and at >= 0:
            self.look.marks ^= {int(lane.position[at])}
        self.draw()

    def go(self, place: find.Place) -> None:
        """To a place that the palette found."""
        if not self.look.go(place):
            self.say("that token is not in this lane")
        self.draw()

    def action_lane(self) -> None:
        number = self.look.next_lane()
        self.say(f"lane {number + 1}: {self.subject.lanes.get(number, TRAINED)}")
        self.draw()

    # --- showing

    def action_shown(self, by: int) -> None:
        self.look.next_shown(by)
        self.draw()

    def action_add_variant(self) -> None:
        from moescope.ui.screens.dialogs import AskScreen

        hint = "num_experts_per_tok=4   norm_topk_prob=true@3-7   a name from `moescope variants`"
        self.app.push_screen(
            AskScreen("variant", hint, check=self.look.add_variant), lambda _: self.draw()
        )

    def action_zoom(self, by: int) -> None:
        chart = self.query_one("#map", ExpertMap)
        at = ZOOMS.index(chart.zoom_shown) + by
        chart.zoom = ZOOMS[max(0, min(len(ZOOMS) - 1, at))] if 0 <= at < len(ZOOMS) else "auto"
        self.say(f"map: {chart.zoom}")
        self.place()
        self.draw()

    def place(self) -> None:
        raise NotImplementedError

    def action_tint(self) -> None:
        self.look.next_tint()
        self.draw()

    def action_panel(self, name: str) -> None:
        """Hide or show a panel; one that has no place at this size opens on the whole screen, and
        so does any while another one is on it."""
        panel = self.query_one(PANELS[name])
        if self.maximized is panel:
            self.minimize()
        elif self.maximized is not None or self._has_no_place(name):
            self._whole(panel)
        else:
            self.toggle_class(f"-no-{name}")

    def _has_no_place(self, name: str) -> bool:
        return name != "map" and (self.has_class("-column") or self.has_class(f"-out-{name}"))

    def action_jump(self) -> None:
        from moescope.ui.screens.dialogs import JumpScreen

        panels: list[Widget] = [
            widget
            for widget in self.query(
                "#map, #layer, #layer-right, #sums, #sums-right, #text, #token"
            )
            if widget.display and widget.region.area
        ]
        self.app.push_screen(JumpScreen(panels), self._jumped)

    def _jumped(self, name: str | None) -> None:
        if name is not None:
            self._whole(self.query_one(f"#{name}"))

    def _whole(self, panel: Widget) -> None:
        panel.ALLOW_MAXIMIZE = True  # type: ignore[misc]
        self.maximize(panel, container=False)

    def action_back_out(self) -> None:
        if self.focused is not None:
            self.set_focus(None)
        elif self.maximized is not None:
            self.minimize()
        elif self.query("HelpPanel"):
            self.app.action_hide_help_panel()
            self.set_timer(SETTLE, self.place)
        elif self.look.shown is not None:
            self.look.shown = None
            self.draw()
        else:
            self.say("ctrl+q quits")

    # --- other screens

    def action_inspect(self) -> None:
        from moescope.ui.screens.token import TokenScreen

        if self.look.at >= 0:
            self.app.push_screen(TokenScreen(self.look), lambda _: self.draw())

    def action_balance(self) -> None:
        from moescope.ui.screens.balance import BalanceScreen

        if self.look.at >= 0:
            self.app.push_screen(BalanceScreen(self), lambda _: self.draw())  # type: ignore[arg-type]

    def action_diagnose(self) -> None:
        """Ask which model the trace is of, once; the verdict comes when it comes."""
        from moescope.ui.diagnosing import ASKED
        from moescope.ui.screens.dialogs import AskScreen

        if self.subject.trace_path is None:
            self.say("only a trace that is in a file can be diagnosed")
        elif self.subject.model:
            self.run_worker(self._diagnose(self.subject.model), exclusive=True, group="diagnose")
        else:
            self.app.push_screen(AskScreen("model", ASKED), self._with_model)

    def _with_model(self, model: str | None) -> None:
        if model:
            self.subject.model = model
            self.action_diagnose()

    async def _diagnose(self, model: str) -> None:
        from moescope.ui.diagnosing import verdict
        from moescope.ui.screens.dialogs import MessageScreen

        assert self.subject.trace_path is not None
        self.say("diagnosing: a moment")
        title, text = await verdict(self.subject.trace_path, model, self.look.lane_number)
        self.app.push_screen(MessageScreen(title, text))

    def action_fork(self) -> None:
        """A lane that shares this one's tokens up to the cursor, under any lane expression."""
        from moescope.ui.screens.dialogs import AskScreen

        lane, table, at = self.look.lane, self.table, self.look.at
        if lane is None or at < 0:
            return
        if len(self.subject.lanes) >= p.MAX_LANES:
            self.say("no further lane can be opened here")
            return
        place = f"L{table.layers[self.look.router]}:{self.look.expert}"
        own, number, position = self.look.own(), self.look.lane_number, int(lane.position[at]) + 1
        value = f"{own}," if " with " in own else f"{own} with "
        hint = "forbid=L3:17   force=L3:17   scale=L3:17*0.5   min_p=0.2, or a variant"

        def answered(expression: str | None) -> None:
            if expression is not None:
                self.subject.send(p.AddLane(expression, fork_of=number, position=position))
                self._compare()

        self.app.push_screen(
            AskScreen(
                f"a lane forked after token {position - 1}",
                hint,
                f"{value}forbid={place}",
                check=self.look.check_lane,
            ),
            answered,
        )

    def _compare(self) -> None:
        from moescope.ui.screens.compare import CompareScreen

        self.app.push_screen(CompareScreen(self))  # type: ignore[arg-type]

    def compare_two(self) -> None:
        """Two checkpoints were opened: a lane of each, fed the same tokens, side by side."""
        self.subject.same_tokens = True
        self.subject.send(p.SameTokens(True))
        self.subject.send(p.AddLane(TRAINED, model=1))
        self._compare()

    def action_compare(self) -> None:
        history, watch = self.subject.history, self.subject
        lanes = set(watch.lanes) | set(history.lane_numbers() if history is not None else ())
        if len(lanes) < 2 and watch.mode == "replay":
            self.say("this trace holds one lane: there is nothing to compare it with")
            return
        if len(lanes) < 2:
            others = self.look.others()
            watch.send(p.AddLane(self.look.shown or (others[0] if others else TRAINED)))
            if watch.generate is not None:
                self.action_rerun(False)
        self._compare()

    def action_export(self) -> None:
        from moescope.ui.screens.export import ExportScreen

        if self.subject.trace_path is None:
            self.say("there is no trace to save yet")
            return
        self.app.push_screen(ExportScreen(self.subject), self._exported)

    def _exported(self, target: Path | None) -> None:
        if target is not None:
            self.say(f"saved {target}")

    def action_open(self) -> None:
        from moescope.ui.screens.open import OpenScreen

        change = getattr(self.app, "change", None)
        if change is not None:
            start = Path(self.subject.trace_path or Path.cwd())
            self.app.push_screen(
                OpenScreen(start.parent if start.is_file() else Path.cwd()),
                lambda path: change(path) if path is not None else None,
            )


def sampling_of(values: dict[str, str]) -> p.Sampling:
    """Raises ValueError for what is no number."""
    return replace(
        p.Sampling(),
        temperature=float(values["temperature"]),
        top_k=int(values["top_k"]),
        top_p=float(values["top_p"]),
        min_p=float(values["min_p"]),
        seed=int(float(values["seed"])),
        max_new_tokens=int(values["max_new_tokens"]),
    )


def check_sampling(values: dict[str, str]) -> str:
    """What is wrong with a filled form."""
    try:
        found = sampling_of(values)
    except (ValueError, OverflowError) as error:
        return f"expected numbers: {error}"
    rules = (
        ("temperature", 0 <= found.temperature < 1e3, "0 or more"),
        ("top_k", found.top_k >= 0, "0 or more"),
        ("top_p", 0 < found.top_p <= 1, "above 0, at most 1"),
        ("min_p", 0 <= found.min_p < 1, "0 to below 1"),
        ("seed", 0 <= found.seed < 2**63, "0 or more"),
        ("max_new_tokens", 0 < found.max_new_tokens < 2**31, "1 or more"),
    )
    return next((f"{name}: expected {want}" for name, good, want in rules if not good), "")
