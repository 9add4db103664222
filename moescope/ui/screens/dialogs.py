"""Small questions over a screen: a line of text, a choice, letters on panels.

Each dismisses with its answer, or None where the user left. Foreign text is shown without markup.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

from textual import on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Horizontal, Vertical
from textual.geometry import Region
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Button, Input, Label, OptionList, Static
from textual.widgets.option_list import Option

from moescope.safety import printable

Answer = TypeVar("Answer")
Check = Callable[[str], str]  # returns what is wrong, "" when it is right


class Question(ModalScreen[Answer]):
    """A box over a screen; where there are few rows it gives up its frame."""

    VERTICAL_BREAKPOINTS = [(0, "-short"), (14, "-tall")]  # noqa: RUF012 (as Textual declares it)


class AskScreen(Question[str | None]):
    """One line of text; `check` is asked on enter, and its answer stands below."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "Cancel")]

    def __init__(
        self, title: str, placeholder: str = "", value: str = "", check: Check | None = None
    ) -> None:
        super().__init__(classes="question")
        self._title, self._placeholder, self._value = title, placeholder, value
        self._check = check

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Label(self._title, markup=False, classes="title")
            yield Input(self._value, placeholder=self._placeholder, compact=True)
            yield Static("", markup=False, classes="wrong")
            yield Label("enter  accept    esc  leave", classes="hint", markup=False)

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        wrong = self._check(event.value) if self._check is not None else ""
        if wrong:
            self.query_one(".wrong", Static).update(printable(wrong, 300))
        else:
            self.dismiss(event.value)

    @on(Input.Changed)
    def _changed(self) -> None:
        self.query_one(".wrong", Static).update("")


class ChoiceScreen(Question[str | None]):
    """One of a few options, by arrow and enter."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,q", "dismiss(None)", "Cancel")]

    def __init__(self, title: str, options: tuple[tuple[str, str], ...]) -> None:
        super().__init__(classes="question")
        self._title, self._options = title, options

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Label(self._title, markup=False, classes="title")
            yield OptionList(*(Option(text, id=name) for name, text in self._options), markup=False)
            yield Label("enter  choose    esc  leave", classes="hint", markup=False)

    @on(OptionList.OptionSelected)
    def _chosen(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option_id)


class FormScreen(Question[dict[str, str] | None]):
    """A few named lines of text, checked together."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape", "dismiss(None)", "Cancel")]

    def __init__(
        self,
        title: str,
        fields: tuple[tuple[str, str, str], ...],  # (name, value, hint)
        check: Callable[[dict[str, str]], str],
    ) -> None:
        super().__init__(classes="question")
        self._title, self._fields, self._check = title, fields, check

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Label(self._title, markup=False, classes="title")
            for name, value, hint in self._fields:
                with Horizontal(classes="field"):
                    yield Label(name.replace("_", " "), classes="name")
                    yield Input(value, id=name, compact=True)
                    yield Label(hint, classes="hint", markup=False)
            yield Static("", markup=False, classes="wrong")
            yield Label("tab  next    enter  accept    esc  leave", classes="hint", markup=False)

    @on(Input.Submitted)
    def _submitted(self) -> None:
        values = {name: self.query_one(f"#{name}", Input).value for name, _, _ in self._fields}
        wrong = self._check(values)
        if wrong:
            self.query_one(".wrong", Static).update(printable(wrong, 300))
        else:
            self.dismiss(values)


class MessageScreen(Question[None]):
    """A text to read."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,q,enter", "dismiss(None)", "Close")]

    def __init__(self, title: str, text: str) -> None:
        super().__init__(classes="question")
        self._title, self._text = title, text

    def compose(self) -> ComposeResult:
        with Vertical(classes="box"):
            yield Label(self._title, markup=False, classes="title")
            yield Static(self._text, markup=False)
            yield Button("Close", compact=True)

    @on(Button.Pressed)
    def _pressed(self) -> None:
        self.dismiss(None)


class JumpScreen(ModalScreen[str | None]):
    """A letter on every panel; the letter pressed is the answer, as that panel's id."""

    LETTERS = "asdfghjkl"

    def __init__(self, panels: list[Widget]) -> None:
        super().__init__(classes="jump")
        self._panels = {letter: p for letter, p in zip(self.LETTERS, panels, strict=False)}

    def compose(self) -> ComposeResult:
        for letter, panel in self._panels.items():
            region: Region = panel.region
            label = Label(f" {letter} ", classes="letter")
            label.styles.offset = (region.x + 2, region.y)
            yield label

    def on_key(self, event: object) -> None:
        key = getattr(event, "key", "")
        panel = self._panels.get(key)
        self.dismiss(panel.id if panel is not None else None)
