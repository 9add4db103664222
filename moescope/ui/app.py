"""The terminal application: one engine or one trace, the screens over it, and its endings.

`run` is the entry. The first frame comes before anything slow is imported; then the engine's
process starts and the main screen takes over. Nothing here imports torch or a tokenizer. Signals
and crashes leave a clean terminal and an exit code.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text
from textual.app import App, SystemCommand
from textual.filter import LineFilter
from textual.screen import Screen
from textual.theme import Theme

from moescope.demo import CHECKPOINT
from moescope.engine.protocol import LoadRequest, Sampling
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import printable
from moescope.ui import keys
from moescope.ui.text import ControlFilter, in_turn

if TYPE_CHECKING:
    from textual.command import Provider

    from moescope.ui.screens.main import MainScreen
    from moescope.ui.watch import Watch

PARENT_EVERY = 1.0  # seconds between two looks at the process that started us
GIVE_UP = 1.5  # seconds a terminal may take to be put back
LOOK_AFTER = 1.0  # seconds: the first frame comes first
NICENESS = 10  # drawing may wait, the engine may not: with all cores taken the rate falls


def run(
    request: LoadRequest | None,
    replay: Path | None,
    *,
    prompt: str = "",
    sampling: Sampling | None = None,
    beside: str = "",
) -> int:
    """Open the screen on a model, a recorded trace, or (both None) the embedded demo model, and
    begin with `prompt` if there is one. `beside` is the model of the trace, for a diagnosis.
    Returns the exit code. Raises MoescopeError where a trace
    cannot be read."""
    request = request or LoadRequest(model=str(CHECKPOINT))
    # Engines are started from a thread of ordinary priority: a child inherits its starter's.
    with ThreadPoolExecutor(1) as starter:
        starter.submit(os.getpid).result()  # the thread is made before the priority falls
        with contextlib.suppress(OSError, AttributeError):
            os.nice(NICENESS)
        if replay is not None:
            watch = open_watch(None, replay, starter)
            watch.model = beside
            app = MoescopeApp(watch)
        else:
            begin = partial(first_watch, request, starter, prompt, sampling)
            app = MoescopeApp(None, begin=begin, name=_short(request.model))
            app.look_for_lost = True
        app.opener = partial(open_path, starter, request)
        try:
            app.run()
        finally:
            app.last_resort.cancel()
            if app.subject is not None:
                app.subject.close()
    if app.failure is not None:
        raise app.failure
    return app.return_code or 0


def first_watch(
    request: LoadRequest, starter: Any, prompt: str, sampling: Sampling | None
) -> Watch:
    watch = open_watch(request, None, starter)
    watch.opening = prompt
    watch.sampling = sampling or watch.sampling
    return watch


def open_watch(request: LoadRequest | None, replay: Path | None, starter: Any) -> Watch:
    from moescope.ui.watch import Watch, watch_trace

    if replay is not None:
        return watch_trace(replay)
    assert request is not None
    from moescope.engine import link

    # A child cannot be spawned while stderr is the application's own.
    with contextlib.redirect_stderr(sys.__stderr__):
        watch = Watch(starter.submit(link.start, request).result(), _short(request.model))
    watch.demo = request.model == str(CHECKPOINT)
    watch.private = request.trace_path is None
    return watch


def open_path(starter: Any, like: LoadRequest | None, path: Path) -> Watch:
    """Another model or trace from inside the application, loaded with the options of the first."""
    if path.suffix == ".moetrace" and path.is_file():
        return open_watch(None, path, starter)
    from dataclasses import replace

    request = replace(like or LoadRequest(model=""), model=str(path), beside="", trace_path=None)
    return open_watch(request, None, starter)


def _short(model: str) -> str:
    return "moescope demo" if model == str(CHECKPOINT) else printable(Path(model).name or model, 60)


def _places() -> type[Provider]:
    from moescope.ui.palette import Places

    return Places


class MoescopeApp(App[int]):
    """Everything on the screen. `subject` is what it looks at; `opener` finds another. Without a
    watch, `begin` is asked for one after the first frame, which shows `name`."""

    CSS_PATH = "app.tcss"
    TITLE = "moescope"
    TOOLTIP_DELAY = 0.15
    BINDINGS = keys.bindings("app")
    COMMANDS = App.COMMANDS | {_places}
    _theme_now: Theme | None = None

    def __init__(
        self,
        watch: Watch | None,
        opener: Callable[[Path], Watch] | None = None,
        clock: Callable[[], float] | None = None,
        *,
        begin: Callable[[], Watch] | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self._control = ControlFilter()
        self.subject = watch
        self.opener = opener
        self.now = clock
        self.begin = begin
        self.opening_name = name
        self.failure: MoescopeError | None = None  # why it never began
        self._begun: MainScreen | None = None
        self.last_resort = threading.Timer(0.0, lambda: None)  # started by a signal
        self.look_for_lost = False  # recordings of runs that ended badly

    def get_default_screen(self) -> Screen[Any]:
        if self.subject is None:
            from moescope.ui.screens.opening import OpeningScreen

            return OpeningScreen(self.opening_name)
        self._begun = self._main_screen(self.subject)
        return self._begun

    def _main_screen(self, watch: Watch) -> MainScreen:
        from moescope.ui.screens.main import MainScreen

        return MainScreen(watch, self.now)

    def arrive(self) -> None:
        """The first frame is on the terminal: start the engine, and the main screen."""
        assert self.begin is not None
        try:
            self.subject = self.begin()
        except MoescopeError as error:
            self.failure = error
            self.exit()
            return
        self._begun = self._main_screen(self.subject)
        self.push_screen(self._begun)  # a default screen cannot be switched
        gc.collect()
        gc.freeze()

    @property
    def current_theme(self) -> Theme:
        """Looked up once: every line that is drawn asks for it."""
        if self._theme_now is None or self._theme_now.name != self.theme:
            self._theme_now = super().current_theme
        return self._theme_now

    def get_line_filters(self) -> Sequence[LineFilter]:
        return [in_turn((*super().get_line_filters(), self._control))]

    def on_mount(self) -> None:
        loop = asyncio.get_running_loop()
        for name in ("SIGINT", "SIGTERM", "SIGHUP"):
            number = getattr(signal, name, None)
            if number is not None:
                with contextlib.suppress(NotImplementedError, ValueError, RuntimeError):
                    loop.add_signal_handler(number, self.end_by, number)
        self.set_interval(PARENT_EVERY, partial(self.outlive_nobody, os.getppid()))
        if self.subject is None:
            self.call_after_refresh(self.arrive)
        if self.look_for_lost:
            self.set_timer(LOOK_AFTER, self.offer_lost)

    def offer_lost(self) -> None:
        """A run that ended badly left its recording: open it, delete it, or decide later."""
        from moescope.engine import recording
        from moescope.ui.lines import human
        from moescope.ui.screens.dialogs import ChoiceScreen

        lost = recording.recoverable()
        if not lost or self.screen is not self._begun:
            return
        newest = lost[0]

        def answered(answer: str | None) -> None:
            if answer == "open":
                self.change(newest.path)
            elif answer == "delete":
                for run in lost:
                    recording.remove(run.path)

        when = time.strftime("%d %B, %H:%M", time.localtime(newest.modified))
        more = f", and {len(lost) - 1} more" if len(lost) > 1 else ""
        title = f"A run of {when} ended before it was saved ({human(newest.bytes)}){more}."
        options = (("open", "Open it (e saves)"), ("delete", "Delete"), ("later", "Later"))
        self.push_screen(ChoiceScreen(title, options), answered)

    def outlive_nobody(self, parent: int) -> None:
        """Whoever watches over the terminal is gone, and perhaps the terminal too: end."""
        if os.getppid() != parent:
            self.end_by(signal.SIGHUP)

    def end_by(self, number: int) -> None:
        """A signal asked us to end: put the terminal back, say so in the exit code. Where the
        terminal is gone, Textual waits for ever to write to it: then without it."""
        if not self.is_headless:
            self.last_resort = threading.Timer(GIVE_UP, self._end_without_terminal, [128 + number])
            self.last_resort.daemon = True
            self.last_resort.start()
        self.exit(return_code=128 + number)

    def _end_without_terminal(self, code: int) -> None:
        if self.subject is not None:
            self.subject.close()
        os._exit(code)

    def action_leave(self) -> None:
        """End, but ask first where a long recording would be lost."""
        from moescope.ui.watch import ASK_ABOVE

        count = self.subject.unsaved if self.subject is not None else 0
        if count <= ASK_ABOVE or self.screen.has_class("leaving"):  # asked twice: meant
            self.exit(return_code=self.failure_code())
            return
        from moescope.ui.screens.dialogs import ChoiceScreen

        def answered(answer: str | None) -> None:
            if answer == "save":
                self.main.action_export()
            elif answer == "leave":
                self.exit(return_code=self.failure_code())

        question = ChoiceScreen(
            f"{count:,} recorded tokens are not saved.",
            (("save", "Save…"), ("leave", "Quit without saving (ctrl+q)"), ("stay", "Stay")),
        )
        question.add_class("leaving")
        self.push_screen(question, answered)

    async def action_quit(self) -> None:
        self.action_leave()

    def action_help_keys(self) -> None:
        from textual.widgets import HelpPanel

        if self.screen.query(HelpPanel):
            self.action_hide_help_panel()
        else:
            self.action_show_help_panel()
        if self.begun:
            self.main.set_timer(0.1, self.main.place)  # once the panel has left the layout

    def failure_code(self) -> int:
        failed = self.subject.failed if self.subject is not None else None
        return failed.code if failed is not None else 0

    @property
    def begun(self) -> bool:
        """Whether the main screen is there."""
        return self._begun is not None

    @property
    def main(self) -> MainScreen:
        assert self._begun is not None
        return self._begun

    def change(self, path: Path) -> None:
        """Leave what is open and open `path`."""
        if self.opener is None or not self.begun:
            return
        try:
            fresh = self.opener(path)
        except MoescopeError as error:
            self.notify(printable(error.message), severity="error", markup=False, timeout=10)
            return
        old, self.subject = self.subject, fresh
        self.main.look_at(fresh)
        # Committing a trace may take seconds.
        if old is not None:
            threading.Thread(target=old.close, daemon=True).start()

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        if not self.begun:
            return
        where = getattr(screen, "KEYS", "main")
        for key in (*keys.TABLES[where], *keys.APP):
            if key.palette and screen.check_action(*_parsed(key.action)) is not False:
                yield SystemCommand(key.label, key.tip or key.label, partial(self._do, key.action))
        for command in super().get_system_commands(screen):
            if command.title not in ("Quit", "Keys"):
                yield command

    async def _do(self, action: str) -> None:
        target = self.screen if hasattr(self.screen, f"action_{action.split('(')[0]}") else self
        await self.run_action(action, default_namespace=target)

    def _fatal_error(self) -> None:
        """A bug of ours: one line and a report, instead of a stack with values in it."""
        from moescope import reports

        error = self._exception
        path = reports.write(error) if error is not None else None
        kind = type(error).__name__ if error is not None else "unknown error"
        where = f"; the report is {path}" if path is not None else ""
        self._return_code = int(ExitCode.BUG)
        self._exit_renderables.append(Text(f"moescope: a bug of ours ({kind}){where}"))
        self._close_messages_no_wait()

    def _print_error_renderables(self) -> None:
        """Only the first: what broke next broke because of it."""
        del self._exit_renderables[1:]
        super()._print_error_renderables()


def _parsed(action: str) -> tuple[str, tuple[object, ...]]:
    from textual.actions import parse

    _, name, parameters = parse(action)
    return name, parameters
