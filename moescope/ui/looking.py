"""What is looked at: lane, token, router, expert, variant, tint; and how each key moves it.

The state behind the main screen, shared with the screens opened over it. No widgets and no clock.
"""

from __future__ import annotations

import numpy as np

from moescope.errors import MoescopeError
from moescope.ui import find, routers, view
from moescope.ui.cells import TINTS
from moescope.ui.history import Lane
from moescope.ui.routers import Decision, RouterTable
from moescope.ui.view import LETTERS, Cursor
from moescope.ui.watch import Watch

NEEDS_MODEL = "not on the same logits: this variant acts before them"
NOT_RECORDED = "not recorded: this trace holds no router logits"


class Looking:
    """A cursor over a watch. `row` None follows the newest token."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.lane_number = 0
        self.router = 0
        self.expert = 0
        self.row: int | None = None
        self.shown: str | None = None  # a variant expression; None: as generated
        self.tint = "sum"
        self.marks: set[int] = set()  # bookmarked positions
        self.hits: list[int] = []
        self.sequence = -1
        self._decided: tuple[object, Decision] | None = None

    # --- where we are

    @property
    def table(self) -> RouterTable | None:
        return self.watch.table_for(self.lane)

    @property
    def lane(self) -> Lane | None:
        history = self.watch.history
        if history is None:
            return None
        if history.sequence != self.sequence:
            self.sequence, self.row, self.hits = history.sequence, None, []
        return history.lane(self.lane_number)

    @property
    def at(self) -> int:
        """The row looked at; -1 where the lane is empty."""
        lane = self.lane
        if lane is None or not lane.count:
            return -1
        return lane.count - 1 if self.row is None else min(self.row, lane.count - 1)

    @property
    def cursor(self) -> Cursor:
        return Cursor(self.router, self.expert, self.row)

    def decision(self) -> Decision | None:
        """What is drawn: the token's own routing, or the shown variant's on the same logits."""
        lane, row, table = self.lane, self.at, self.table
        if lane is None or row < 0 or table is None:
            return None
        key = (id(lane), row, int(lane.position[row]), self.shown)
        if self._decided is None or self._decided[0] != key:
            self._decided = (key, self._decide(lane, row, table))
        return self._decided[1]

    def _decide(self, lane: Lane, row: int, table: RouterTable) -> Decision:
        if self.shown is None:
            return routers.as_generated(table, lane, row)
        from moescope.variants import parse
        from moescope.variants.steering import split

        assert self.watch.history is not None
        variant, steered = split(self.shown)
        logits = self.watch.history.logits(lane, row)
        if logits is None:
            return routers.not_recorded(table.count, NOT_RECORDED)
        if steered or not parse(variant).on_logits:
            return routers.not_recorded(table.count, NEEDS_MODEL)
        return routers.reroute(table, self.shown, logits, int(lane.token_id[row]))

    def address(self) -> str:
        """Where the cursor is, in the notation of `find`."""
        table, lane, row = self.table, self.lane, self.at
        if table is None:
            return ""
        at = f" @{int(lane.position[row])}" if lane is not None and row >= 0 else ""
        return f"L{table.labels[self.router]} E{self.expert:03d}{at}"

    # --- moving

    def move_router(self, by: int) -> None:
        if self.table is not None:
            self.router = max(0, min(self.table.count - 1, self.router + by))
            self.expert = min(self.expert, int(self.table.num_experts[self.router]) - 1)

    def move_expert(self, by: int) -> None:
        if self.table is not None:
            most = int(self.table.num_experts[self.router])
            self.expert = (self.expert + by) % most

    def move_pick(self, by: int) -> None:
        """To the next picked expert in this direction, round the end."""
        decision = self.decision()
        if decision is None:
            return
        ids = np.sort(decision.expert_ids[self.router])
        ids = ids[ids >= 0]
        if not len(ids):
            return
        beyond = ids[ids > self.expert] if by > 0 else ids[ids < self.expert][::-1]
        self.expert = int(beyond[0] if len(beyond) else (ids[0] if by > 0 else ids[-1]))

    def move_token(self, by: int) -> None:
        if self.at >= 0:
            self.seek(self.at + by)

    def seek(self, row: int, following: bool = True) -> None:
        """To a row; the newest one follows, unless the trace is a finished one."""
        lane = self.lane
        if lane is None or not lane.count:
            return
        row = max(0, min(lane.count - 1, row))
        newest = row == lane.count - 1 and following and self.watch.mode != "replay"
        self.row = None if newest else row

    def go(self, place: find.Place) -> bool:
        """To a place; False where the token is not there."""
        if place.router is not None:
            self.router = place.router
        if place.expert is not None:
            self.expert = place.expert
        self.move_expert(0)
        if place.position is not None:
            row = self.lane.row_of(place.position) if self.lane is not None else None
            if row is None:
                return False
            self.seek(row)
        return True

    def move_change(self, by: int) -> bool:
        """To the next token where this router's first pick or the variant changed."""
        lane, row = self.lane, self.at
        if lane is None or row < 0:
            return False
        first = lane.expert_ids[:, self.router, 0]
        changed = np.flatnonzero(first[1:] != first[:-1]) + 1
        forced = [i for i in range(1, lane.count) if lane.variants[i] != lane.variants[i - 1]]
        places = np.union1d(changed, np.array(forced, np.int64))
        beyond = places[places > row] if by > 0 else places[places < row][::-1]
        if len(beyond):
            self.seek(int(beyond[0]))
        return bool(len(beyond))

    def move_hit(self, by: int) -> bool:
        beyond = [h for h in self.hits if (h > self.at if by > 0 else h < self.at)]
        if beyond:
            self.seek(min(beyond) if by > 0 else max(beyond))
        return bool(beyond)

    def find(self, text: str) -> str:
        """Go where `text` says; what to tell the user, "" when it was found."""
        if self.table is None or self.lane is None:
            return "nothing is loaded"
        place = find.parse(text, self.table)
        if isinstance(place, str):
            return place
        if place is not None:
            return "" if self.go(place) else f"{text.strip()} is not in this lane"
        self.hits = find.hits(self.lane, text)
        if not self.hits:
            return f"“{text}” is not in the text of this lane"
        later = [hit for hit in self.hits if hit > self.at]
        self.seek(later[0] if later else self.hits[0])
        return ""

    def next_shown(self, by: int) -> None:
        """The next variant on the same logits; after the last one, as generated."""
        ring: list[str | None] = [None, *self.others()]
        at = ring.index(self.shown) if self.shown in ring else 0
        self.shown = ring[(at + by) % len(ring)]

    def own(self) -> str:
        """The variant the lane looked at generates under, or did for this token."""
        lane, row = self.lane, self.at
        if self.watch.mode == "replay":
            return lane.variants[row] if lane is not None and row >= 0 else routers.TRAINED
        return self.watch.lanes.get(self.lane_number, routers.TRAINED)

    def generating(self) -> frozenset[str]:
        """The variants that some lane generates under."""
        live = self.watch.mode != "replay"
        return frozenset(self.watch.lanes.values()) if live else frozenset({self.own()})

    def others(self) -> list[str]:
        """The variants of the bar that the lane does not generate under."""
        own = self.own()
        return [expression for expression in self.watch.variants if expression != own]

    def next_tint(self) -> None:
        names = list(TINTS)
        self.tint = names[(names.index(self.tint) + 1) % len(names)]

    def next_lane(self) -> int:
        numbers = self.watch.history.lane_numbers() if self.watch.history is not None else []
        if numbers:
            later = [n for n in numbers if n > self.lane_number]
            self.lane_number = later[0] if later else numbers[0]
        return self.lane_number

    def add_variant(self, expression: str) -> str:
        """Put an expression on the bar; returns what is wrong with it, "" when it stands."""
        if self.table is None:
            return "nothing is loaded"
        from moescope.variants.steering import canonical

        try:
            expression = canonical(expression)
            routers.specs_under(self.table, expression)
        except MoescopeError as error:
            return error.message
        if expression not in self.watch.variants:
            if len(self.watch.variants) >= len(LETTERS):
                return f"the bar is full: {LETTERS[0]} to {LETTERS[-1]} are taken"
            self.watch.variants = (*self.watch.variants, expression)
        self.shown = expression if expression in self.others() else None
        return ""

    def check_lane(self, expression: str) -> str:
        """What is wrong with a lane expression, steering included; "" when a lane can run it."""
        if self.table is None:
            return "nothing is loaded"
        from moescope.variants.steering import canonical, of_routers, split

        try:
            specs = routers.specs_under(self.table, canonical(expression))
            of_routers(split(expression)[1], list(zip(self.table.layers, specs, strict=True)))
        except MoescopeError as error:
            return error.message
        return ""

    def letter(self, letter: str) -> str | None:
        """The expression a letter of the bar stands for."""
        index = LETTERS.index(letter)
        return self.watch.variants[index] if index < len(self.watch.variants) else None

    def lettered(self) -> tuple[tuple[str, str], ...]:
        """(letter, expression) of the variants the lane does not generate under."""
        from moescope.variants.steering import split

        wanted = {name for name in self.others() if not split(name)[1]}
        pairs = zip(view.LETTERS, self.watch.variants, strict=False)
        return tuple((letter, expression) for letter, expression in pairs if expression in wanted)
