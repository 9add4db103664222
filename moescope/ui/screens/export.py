"""Save what was recorded: as a trace, or converted to a table. Written beside and renamed."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.widgets import Input, Label, Static

from moescope.errors import MoescopeError
from moescope.safety import printable
from moescope.ui.screens.dialogs import Question
from moescope.ui.watch import Watch

SUFFIXES = {
    ".moetrace": "the whole recording; moescope replay opens it",
    ".parquet": "one row a token and layer",
    ".csv": "the same as text",
    ".jsonl": "the same as JSON lines",
}


def suggested(watch: Watch) -> str:
    """A name in the working folder that is not taken."""
    stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in watch.name.lower())[:40]
    stem = stem.strip("-.") or "recording"
    names = (f"{stem}{'' if n == 0 else f'-{n}'}.moetrace" for n in range(1000))
    return next((name for name in names if not Path(name).exists()), f"{stem}.moetrace")


def check(text: str) -> str:
    """What is wrong with a target path, "" when it can be written."""
    path = Path(text.strip()).expanduser()
    if not text.strip():
        return "type a file name"
    if path.suffix not in SUFFIXES:
        return f"{path.name}: expected a name ending in {', '.join(SUFFIXES)}"
    if path.exists():
        return f"{path}: exists already; choose another name"
    if not path.absolute().parent.is_dir():
        return f"{path.parent}: there is no such folder"
    return ""


class ExportScreen(Question[Path | None]):
    """Asks for a path and writes it in a thread; dismisses with what was written."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "Cancel")]

    def __init__(self, watch: Watch) -> None:
        super().__init__(classes="question")
        self.subject = watch

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Label("save the recording", classes="title")
            yield Input(suggested(self.subject), id="path", compact=True, select_on_focus=False)
            yield Static("", markup=False, classes="wrong")
            for suffix, meaning in SUFFIXES.items():
                yield Label(f"{suffix:<10}{meaning}", classes="hint", markup=False)
            yield Label("enter  save    esc  leave", classes="hint", markup=False)

    def say(self, text: str) -> None:
        self.query_one(".wrong", Static).update(printable(text, 400))

    @on(Input.Submitted)
    def _named(self, event: Input.Submitted) -> None:
        wrong = check(event.value)
        if wrong:
            self.say(wrong)
            return
        event.input.disabled = True
        self.say("writing…")
        self.write(Path(event.value.strip()).expanduser().absolute())

    @work(thread=True, exit_on_error=False)
    def write(self, target: Path) -> None:
        from moescope.trace.formats import convert

        source = self.subject.trace_path
        assert source is not None
        try:
            convert(source, target)
        except MoescopeError as error:
            self.app.call_from_thread(self._failed, error.message, error.hint)
        except OSError as error:
            self.app.call_from_thread(self._failed, f"{target}: {error.strerror or error}", "")
        else:
            self.app.call_from_thread(self._written, target)

    def _failed(self, message: str, hint: str) -> None:
        self.query_one(Input).disabled = False
        self.query_one(Input).focus()
        self.say(message + (f"\nTry: {hint}" if hint else ""))

    def _written(self, target: Path) -> None:
        if target.suffix == ".moetrace" and self.subject.history is not None:
            self.subject.saved = sum(lane.count for lane in self.subject.history.lanes.values())
        self.dismiss(target)
