"""Open another model or trace: a path, typed or picked from a tree of what can be opened."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.widgets import DirectoryTree, Input, Label, Static

from moescope.safety import printable
from moescope.ui.screens.dialogs import Question


def openable(path: Path) -> bool:
    """A trace, or a folder with a checkpoint in it."""
    if path.is_dir():
        return (path / "config.json").is_file()
    return path.suffix == ".moetrace"


class OpenTree(DirectoryTree):
    """Folders, and traces; hidden ones left out."""

    def filter_paths(self, paths: Iterable[Path]) -> Iterable[Path]:
        return [p for p in paths if not p.name.startswith(".") and (_is_folder(p) or openable(p))]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


class OpenScreen(Question[Path | None]):
    """Dismisses with the path chosen."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "Cancel")]
    AUTO_FOCUS = "#path"

    def __init__(self, folder: Path) -> None:
        super().__init__(classes="question")
        self.folder = folder

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Label("open a model or a trace", classes="title")
            yield Input(
                placeholder="a folder, a .moetrace file, or org/name", id="path", compact=True
            )
            yield Static("", markup=False, classes="wrong")
            yield OpenTree(self.folder, id="tree")
            yield Label("tab  tree    enter  open    esc  leave", classes="hint", markup=False)

    @on(Input.Submitted)
    def _typed(self, event: Input.Submitted) -> None:
        text = event.value.strip()
        path = Path(text).expanduser()
        local = "/" in text and not path.exists() and not text.startswith((".", "/", "~"))
        if not text:
            self._refuse("type a path, or pick one below")
        elif local or openable(path):
            self.dismiss(path)
        elif not path.exists():
            self._refuse(f"{text}: there is no such file or folder")
        else:
            self._refuse(f"{text}: expected a folder with config.json, or a .moetrace file")

    def _refuse(self, text: str) -> None:
        self.query_one(".wrong", Static).update(printable(text, 300))

    @on(DirectoryTree.FileSelected)
    def _file(self, event: DirectoryTree.FileSelected) -> None:
        self.dismiss(event.path)

    @on(DirectoryTree.DirectorySelected)
    def _folder(self, event: DirectoryTree.DirectorySelected) -> None:
        if openable(event.path):
            self.dismiss(event.path)
