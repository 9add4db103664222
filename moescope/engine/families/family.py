"""`Family`: one supported model type, a row of a lineage's table `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from moescope.engine.config import Fields
from moescope.engine.decoder import DecoderSpec
from moescope.engine.families.names import Names


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
