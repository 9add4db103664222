"""The catalogue: every entry by name, in the order in which it is listed."""

from __future__ import annotations

from moescope.variants import around, choosing, rounding, weighing
from moescope.variants.entry import Variant

TRAINED = Variant(
    "trained", "as trained", "The router that the checkpoint was trained with.", fix="Nothing."
)
CATALOGUE: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        TRAINED,
        *weighing.VARIANTS,
        *choosing.VARIANTS,
        *rounding.VARIANTS,
        *around.DOWNSTREAM,
        *around.UNSEEN,
    )
}
# What can be put into a router or around it; the others are listed only.
EXECUTABLE: tuple[str, ...] = tuple(
    name for name, variant in CATALOGUE.items() if variant.seen != "none"
)
FAULTS: tuple[str, ...] = tuple(
    dict.fromkeys(v.reported for v in CATALOGUE.values() if v.name != "trained")
)
