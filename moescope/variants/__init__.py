"""Router variants: the catalogue of known faults (data), and the expressions users write.

A variant is edits of a `RouterSpec` and, for some, of what is around it. Themes of the catalogue
are files here; `expressions.py` reads and applies what users write.
"""

from moescope.variants.catalogue import CATALOGUE, EXECUTABLE, FAULTS
from moescope.variants.decoder_edits import DECODER_EDITS, FACTS
from moescope.variants.entry import By, Signature, Variant
from moescope.variants.expressions import (
    HINT,
    Edit,
    Edits,
    Group,
    applicable,
    apply,
    canonical,
    describe,
    parse,
    title,
)

__all__ = [
    "CATALOGUE",
    "DECODER_EDITS",
    "EXECUTABLE",
    "FACTS",
    "FAULTS",
    "HINT",
    "By",
    "Edit",
    "Edits",
    "Group",
    "Signature",
    "Variant",
    "applicable",
    "apply",
    "canonical",
    "describe",
    "parse",
    "title",
]
