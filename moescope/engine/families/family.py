"""`Family`: one supported model type, a row of a lineage's table `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families.names import Names


class NoteIf(str):
    """A note on some configs only: those that `applies` to."""

    applies: Callable[[Fields], bool]

    def __new__(cls, says: str, applies: Callable[[Fields], bool]) -> NoteIf:
        note = super().__new__(cls, says)
        note.applies = applies
        return note


@dataclass(frozen=True, slots=True)
class Family:
    """One supported model type. `keys` renames the words of `parameters.Slot.says` to this
    config's; `released` is what the published checkpoints do, for lists of families; `notes` are
    what a user should know of how other programs read the same checkpoint.
    """

    title: str
    build: Callable[[Fields], DecoderSpec]
    names: Names
    released: str
    keys: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def notes_on(self, config: Fields) -> tuple[str, ...]:
        """Those of its notes that are about a config."""
        return tuple(
            note for note in self.notes if not isinstance(note, NoteIf) or note.applies(config)
        )
