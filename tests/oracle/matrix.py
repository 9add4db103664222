"""The matrix: every case of the families' tables with its prompts, wrong specs and layouts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np

from moescope.engine import families
from moescope.engine.config import parse_object
from moescope.engine.decoder import DecoderSpec
from tests.families import CASES, EXEMPT, LAYOUTS, MUTANTS
from tests.families.kit import Case, Mutant
from tests.oracle import mutants
from tests.tiny import tiny_config

STEPS = 24
BF16_TOKENS = 240
DIALECTS = ("v5", "hub")
BY_ID = {case.id: case for case in CASES}
ALL = tuple(BY_ID)
BY_FAMILY = {
    family: tuple(case for case in CASES if case.family == family)
    for family in dict.fromkeys(case.family for case in CASES)
}


def _prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(int(i) for i in np.random.default_rng(seed).integers(0, 256, length))


PROMPTS: dict[str, tuple[int, ...]] = {
    "short": _prompt(1, 9),
    "longer-than-window": _prompt(2, 33),
}


@dataclass(frozen=True)
class Row:
    """One line of the matrix."""

    kind: str  # float32 | mutant | layout | bfloat16
    case: str
    what: str  # the prompt, the mutant, the layout

    @property
    def id(self) -> str:
        return f"{self.kind}: {self.case}: {self.what}"


@cache
def spec_of(case: Case) -> DecoderSpec:
    """The spec of a case, from its config as transformers saves it."""
    config = tiny_config(case.family, **case.overrides)
    return families.build(
        parse_object(config.to_json_string(use_diff=False).encode(), "config.json")
    )


@cache
def mutants_of(case: Case) -> dict[str, Mutant]:
    """The wrong specs of a case by name, less the exempt."""
    found = mutants.of_case(spec_of(case), case.id, case.family, MUTANTS)
    exempt = {what for who, what in EXEMPT if who in (case.id, case.family)}
    return {m.name: m for m in found if not exempt & {m.name, *m.fields}}


def rows(cases: Iterable[Case] = CASES) -> Iterator[Row]:
    """The whole matrix of some cases."""
    for case in cases:
        for prompt in PROMPTS:
            yield Row("float32", case.id, prompt)
        for name in mutants_of(case):
            yield Row("mutant", case.id, name)
        for layout in ("hub", "fused", *LAYOUTS.get(case.family, ())):
            if (case.family, layout) in EXEMPT:
                continue
            for dialect in DIALECTS:
                yield Row("layout", case.id, f"{layout}, {dialect} config")
        if (case.family, "bfloat16") in EXEMPT:
            continue
        yield Row("bfloat16", case.id, f"{BF16_TOKENS} tokens, teacher-forced")
