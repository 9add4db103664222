"""What every key of the compare screen does. Keys are bound to actions in `keys.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.screen import Screen

from moescope.engine import protocol as p
from moescope.ui import compare_view, keys
from moescope.ui.compare_room import Room
from moescope.ui.compare_view import Pair
from moescope.ui.looking import Looking
from moescope.ui.routers import RouterTable
from moescope.ui.screens.dialogs import AskScreen
from moescope.ui.watch import Watch

if TYPE_CHECKING:
    from moescope.ui.screens.main import MainScreen


class CompareKeys(Screen[None]):
    """The actions; `CompareScreen` holds the state they work on and draws."""

    KEYS = "compare"
    BINDINGS = keys.bindings("compare")
    main: MainScreen
    subject: Watch
    look: Looking
    shown: tuple[int, int]
    view: str

    @property
    def pair(self) -> Pair | None:
        raise NotImplementedError

    @property
    def room(self) -> Room:
        raise NotImplementedError

    def numbers(self) -> list[int]:
        raise NotImplementedError

    def table_of(self, number: int) -> RouterTable:
        raise NotImplementedError

    def draw(self) -> None:
        raise NotImplementedError

    def place(self) -> None:
        raise NotImplementedError

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        live_only = ("same_tokens", "add_lane", "prompt", "rerun", "stop")
        return not (action in live_only and self.subject.mode == "replay")

    def action_pause(self) -> None:
        self.main.action_pause()

    def action_stop(self) -> None:
        self.main.action_stop()

    def action_rerun(self) -> None:
        self.main.action_rerun(False)

    def action_follow(self) -> None:
        self.main.action_follow()
        self.draw()

    def action_token(self, by: int) -> None:
        self.main.action_token(by)
        self.draw()

    def action_layer(self, by: int) -> None:
        self.look.move_router(by)
        self.draw()

    def action_difference(self, by: int) -> None:
        at = None
        if self.pair is not None:
            at = compare_view.next_difference(self.pair, self.look.at, by)
        if at is None:
            self.notify("no further difference", timeout=3)
        else:
            self.look.seek(at)
        self.draw()

    def action_first(self) -> None:
        """To the first flip on the same tokens: its token and its layer."""
        found = self.pair.comparison.first_divergence if self.pair is not None else None
        at = self.pair.a.row_of(found.position) if found is not None and self.pair else None
        if found is None or at is None:
            self.notify("the same experts everywhere, on the same tokens", timeout=3)
        else:
            self.look.seek(at, following=False)
            self.look.router = found.router
        self.draw()

    def action_same_tokens(self) -> None:
        """Feed every lane A's text, or let each write its own; from the prompt on."""
        self.subject.same_tokens = not self.subject.same_tokens
        self.subject.send(p.SameTokens(self.subject.same_tokens))
        if self.subject.generate is not None:
            self.main.action_rerun(False)
        self.draw()

    def action_swap(self) -> None:
        self.shown = (self.shown[1], self.shown[0])
        self.draw()

    def action_other(self) -> None:
        others = [n for n in self.numbers() if n != self.shown[0]]
        if others:
            later = [n for n in others if n > self.shown[1]]
            self.shown = (self.shown[0], later[0] if later else others[0])
        self.draw()

    def action_mode(self) -> None:
        views = self.room.views
        self.view = views[(views.index(self.view) + 1) % len(views)]
        self.place()
        self.draw()

    def action_add_lane(self) -> None:
        if len(self.subject.lanes) >= p.MAX_LANES:
            self.notify("no further lane can be opened here", timeout=4)
            return
        hint = "a variant: num_experts_per_tok=4   always_renormalised"
        mine, other = (self.table_of(number).model for number in self.shown)
        title = f"a lane of {mine}" + (f" · x first: of {other}" if mine != other else "")
        title = title if mine else "a lane"
        self.app.push_screen(AskScreen(title, hint, check=self.look.add_variant), self._add)

    def _add(self, expression: str | None) -> None:
        if expression is not None:
            history = self.subject.history
            model = 0 if history is None else history.models.get(self.shown[0], 0)
            self.subject.send(p.AddLane(expression, model=model))
            self.main.action_rerun(False)

    def action_prompt(self) -> None:
        hint = "what all lanes continue"
        self.app.push_screen(AskScreen("prompt", hint), self._ask)

    def _ask(self, prompt: str | None) -> None:
        if prompt:
            self.main.ask(prompt)
            self.draw()

    def action_leave(self) -> None:
        self.dismiss(None)
