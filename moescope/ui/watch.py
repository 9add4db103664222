"""What a screen knows: an engine's events folded into one state, and the history behind it.

`Watch.pump` takes what arrived since the last call and never blocks. A live engine and a recorded
trace give the same object; only `mode` tells them apart. No widgets here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from moescope.engine import protocol as p
from moescope.errors import ExitCode, MoescopeError
from moescope.trace.frames import PREFILL, TraceMeta
from moescope.ui.history import History, Lane, Source
from moescope.ui.panels import LoadingData
from moescope.ui.routers import TRAINED, RouterTable, bar_variants, tables_of

PULL = 256  # frames taken from the trace in one call
ASK_ABOVE = 50  # tokens of an unsaved trace that are worth a question


def open_live(path: Path) -> Source:
    from moescope.trace.store import TraceReader

    return TraceReader.open(path, live=True, foreign=False)


class Watch:
    """One engine, or one trace, as the screens see it."""

    def __init__(
        self,
        link: p.Link | None,
        name: str = "",
        open_trace: Callable[[Path], Source] = open_live,
    ) -> None:
        self.link = link
        self.name = name
        self.mode = "loading"
        self.rate = 0.0
        self.loading = LoadingData("starting", name, 0, 0)
        self.failed: p.Failed | None = None
        self.facts: dict[str, Any] = {}
        self.table: RouterTable | None = None
        self.tables: tuple[RouterTable, ...] = ()  # of every model, `table` the first
        self.history: History | None = None
        self.variants: tuple[str, ...] = (TRAINED,)
        self.lanes: dict[int, str] = {0: TRAINED}
        self.finished: dict[int, str] = {}
        self.notes: list[p.Note] = []
        self.generate: p.Generate | None = None
        self.sampling = p.Sampling(temperature=0.0)
        self.turns: list[tuple[str, str]] = []
        self.chat = False
        self.router_says = ""  # while the slow twin of the router's kernel routes
        self.same_tokens = False  # every lane is fed what lane 0 draws
        self.demo = False  # the embedded model: starts by itself
        self.opening = ""  # a prompt to begin with
        self.trace_path: Path | None = None
        self.model = ""  # the checkpoint beside a trace, where it is known
        self.private = True  # the trace is deleted on a clean exit unless saved
        self.saved = 0  # frames that were in the trace when it was saved
        self.version = 0  # goes up whenever anything above changed
        self._open_trace = open_trace

    # --- taking in

    def pump(self) -> bool:
        """Take everything that arrived; True when something changed."""
        before = self.version
        if self.link is not None:
            for event in self.link.poll():
                self._taken[type(event)](self, event)
                self.version += 1
        if self.history is not None and (self.version != before or self.history.behind):
            self.version += self.history.pull(PULL)
        return self.version != before

    def _on_loading(self, event: p.Loading) -> None:
        self.loading = LoadingData(
            event.stage, event.what, event.done, event.total, self.loading.notes
        )

    def _on_loaded(self, event: p.Loaded) -> None:
        self.facts = event.facts
        if not self.demo:  # its folder has no telling name
            self.name = str(event.facts.get("name", self.name))
        if event.facts.get("beside"):
            self.name = f"{self.name} beside {event.facts['beside']}"
        self.chat = bool(event.facts.get("has_chat_template"))
        self.trace_path = Path(event.trace_path) if event.trace_path else None
        source = self._open_trace(self.trace_path) if self.trace_path else None
        self.begin(event.meta, source)
        self.mode = "idle"
        for note in event.facts.get("notes", ()):
            self.notes.append(p.Note(str(note)))

    def begin(self, meta: TraceMeta, source: Source | None) -> None:
        """Start a history of `meta`'s routers, read from `source`."""
        self.tables = tables_of(meta)
        self.table = self.tables[0]
        self.history = History(meta, source)
        self.variants = bar_variants(self.table)
        self.history.pull(PULL)

    def _on_prompted(self, event: p.Prompted) -> None:
        if self.history is not None:
            self.history.pieces.update(zip(event.prompt_ids, event.pieces, strict=False))
            self.history.sequence = max(self.history.sequence, event.sequence)
        self.finished.clear()
        if event.note:
            self.notes.append(p.Note(event.note))

    def _on_newest(self, event: p.Newest) -> None:
        self.mode = event.state
        self.rate = event.tokens_per_second
        self.router_says = event.router
        if self.history is None:
            return
        self.history.pieces.update(event.pieces)
        if self.history.source is None:
            for frame in event.frames:
                self.history.add(frame)

    def _on_lane(self, event: p.LaneChanged) -> None:
        if event.state == "dropped":
            self.lanes.pop(event.lane, None)
            return
        self.lanes[event.lane] = event.expression
        if event.expression not in self.variants and len(self.variants) < p.MAX_LANES:
            self.variants = (*self.variants, event.expression)
        if self.history is not None:
            self.history.placed(event.lane, event.model)
        if event.fork_of is not None and self.history is not None:
            self.history.forked(self.history.sequence, event.lane, event.fork_of, event.position)

    def _on_finished(self, event: p.Finished) -> None:
        self.finished[event.lane] = event.reason

    def _on_note(self, event: p.Note) -> None:
        self.notes.append(event)

    def _on_failed(self, event: p.Failed) -> None:
        if event.fatal:
            self.failed = event
            self.mode = "failed"
        else:
            text = event.message + (f"  Try: {event.hint}" if event.hint else "")
            self.notes.append(p.Note(text, "error"))

    _taken: ClassVar[dict[type, Callable[[Any, Any], None]]] = {
        p.Loading: _on_loading,
        p.Loaded: _on_loaded,
        p.Prompted: _on_prompted,
        p.Newest: _on_newest,
        p.LaneChanged: _on_lane,
        p.Finished: _on_finished,
        p.Note: _on_note,
        p.Failed: _on_failed,
    }

    def table_for(self, lane: Lane | None) -> RouterTable | None:
        """The routers of the model that a lane is of."""
        if lane is None or lane.model >= len(self.tables):
            return self.table
        return self.tables[lane.model]

    # --- asking

    def send(self, command: p.Command) -> None:
        if self.link is not None and self.mode != "failed":
            self.link.send(command)

    def ask(self, prompt: str, paused: bool = False) -> None:
        """Generate from a prompt: a turn of the chat where the template is on, else raw text."""
        if self.chat:
            self._close_turn()
            self.turns.append(("user", prompt))
            continues = len(self.turns) > 1
            self.generate = p.Generate(
                messages=tuple(self.turns),
                continues=continues,
                sampling=self.sampling,
                paused=paused,
            )
        else:
            self.turns.clear()
            self.generate = p.Generate(prompt=prompt, sampling=self.sampling, paused=paused)
        self.finished.clear()
        self.send(self.generate)

    def again(self, seed: int | None = None, paused: bool = False) -> bool:
        """The last prompt once more, with the same seed or another; False where there is none."""
        if self.generate is None:
            return False
        if seed is not None:
            self.sampling = replace(self.sampling, seed=seed)
        self.generate = replace(
            self.generate, sampling=self.sampling, continues=False, paused=paused
        )
        self.finished.clear()
        self.send(self.generate)
        return True

    def _close_turn(self) -> None:
        """What lane 0 wrote since the last prompt becomes the assistant's turn."""
        lane = self.history.lane(0) if self.history is not None else None
        if lane is None or not self.turns or self.turns[-1][0] != "user":
            return
        prompted = [row for row in range(lane.count) if lane.phase[row] == PREFILL]
        start = prompted[-1] + 1 if prompted else 0
        self.turns.append(("assistant", "".join(lane.texts[start:])))

    @property
    def problems(self) -> tuple[str, ...]:
        """What is damaged in the recording, as far as it was read."""
        source = self.history.source if self.history is not None else None
        return tuple(source.problems) if source is not None and self.mode == "replay" else ()

    @property
    def live(self) -> bool:
        return self.mode in ("prefill", "running")

    @property
    def resting(self) -> bool:
        """Loaded, and nothing is being made or waits to be."""
        asked = self.generate is not None
        return self.mode == "idle" and (not asked or bool(self.finished))

    @property
    def unsaved(self) -> int:
        """Tokens that would be lost by closing now."""
        if self.history is None or self.link is None or not self.private:
            return 0
        return sum(lane.count for lane in self.history.lanes.values()) - self.saved

    def close(self) -> None:
        # The reader first: the writer folds its file into one when nobody reads it.
        if self.history is not None and self.history.source is not None:
            self.history.source.close()
        if self.link is not None:
            self.link.close()
            self.link = None


def watch_trace(path: Path) -> Watch:
    """A recorded trace, opened as foreign input; raises MoescopeError for a bad one."""
    from moescope.trace.store import TraceReader

    reader = TraceReader.open(path, foreign=True)
    return watch_source(reader.meta, reader, path.name, path)


def watch_source(meta: TraceMeta, source: Source, name: str, path: Path | None = None) -> Watch:
    """A trace that is already open."""
    if not meta.routers:
        raise MoescopeError(
            f"{name}: routers: expected at least one, found none", code=ExitCode.TRACE
        )
    watch = Watch(None, name)
    model = meta.models[0] if meta.models else {}
    watch.name = " beside ".join(str(one.get("name", name)) for one in meta.models[:2]) or name
    watch.facts = {**meta.engine, **model}
    watch.trace_path = path
    watch.begin(meta, source)
    watch.private = False
    watch.mode = "replay"
    return watch
