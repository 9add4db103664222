"""Why two lanes chose other experts for the same token: the gate, or what the gate was shown.

What the causes mean is in `engine/crossed.py`. Lanes over the same gate need the recorded logits
only (`LogitsJudge`). Where gates differ (another checkpoint, a gate that is quantised) the session
crosses them while it runs, and tells what it found (`FlipsJudge`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.engine.crossed import UNKNOWN, Flip, Tensors, cause, selected
from moescope.kernels.spec import RouterSpec
from moescope.trace.frames import Frame
from moescope.variants import parse
from moescope.variants.steering import split

__all__ = ["CAUSES", "TITLES", "UNKNOWN", "Flip", "FlipsJudge", "LogitsJudge", "on_logits"]

CAUSES = ("gate", "input", "either", "together")
TITLES = {
    "gate": "gate arithmetic",
    "input": "drifted input",
    "either": "either alone",
    "together": "only both together",
    "": "not known",
}

Specs = Sequence[RouterSpec]


class LogitsJudge:
    """Judges flips from the router logits of both frames: for variants over the same gate.

    `specs_of` gives the resolved specs of a variant expression; `tensors` the learned vectors of
    each router. Frames without logits, hash routers and quantised gates give "".
    """

    def __init__(self, specs_of: Callable[[str], Specs], tensors: Sequence[Tensors]) -> None:
        self.specs_of, self.tensors = specs_of, tensors

    def __call__(self, a: Frame, b: Frame, routers: Sequence[int]) -> list[str]:
        """One cause for each of `routers`."""
        if (
            a.logits is None
            or b.logits is None
            or not (on_logits(a.variant) and on_logits(b.variant))
        ):
            return [UNKNOWN] * len(routers)
        of_a, of_b = self.specs_of(a.variant), self.specs_of(b.variant)
        told = [router for router in routers if _tells(of_a[router], of_b[router])]
        b_on_a = self._selected(a.logits, of_b, told)
        a_on_b = self._selected(b.logits, of_a, told)
        found = {
            router: cause(a.expert_ids[router], mine, others, b.expert_ids[router])
            for router, mine, others in zip(told, b_on_a, a_on_b, strict=True)
        }
        return [found.get(router, UNKNOWN) for router in routers]

    def _selected(
        self, logits: NDArray[Any], specs: Specs, routers: Sequence[int]
    ) -> list[NDArray[np.int32]]:
        """What each of `routers` chooses from its row of logits [L, E]; equal specs in one call."""
        groups: dict[RouterSpec, list[int]] = {}
        for router in routers:
            groups.setdefault(specs[router], []).append(router)
        found: dict[int, NDArray[np.int32]] = {}
        for spec, members in groups.items():
            ids = selected(logits[members], spec, [self.tensors[router] for router in members])
            found.update(zip(members, ids, strict=True))
        return [found[router] for router in routers]


@lru_cache(maxsize=64)
def on_logits(expression: str) -> bool:
    """Whether logits and policies are all that decides under a lane expression: no experts are
    steered, nothing is rewired, the gate is the trained one."""
    variant, items = split(expression)
    return not items and parse(variant).on_logits


def _tells(a: RouterSpec, b: RouterSpec) -> bool:
    """Whether logits are all that the two routers choose from."""
    hashed = a.wiring.hash_table or b.wiring.hash_table
    return not hashed and a.policy.gate_quant_bits == b.policy.gate_quant_bits


class FlipsJudge:
    """Judges flips by what a session found as it ran; `found` gives the flips of its last step, by
    (lane, position). `taken` sees those of a token once it is judged."""

    def __init__(
        self,
        found: Callable[[], Mapping[tuple[int, int], Sequence[Flip]]],
        taken: Callable[[Sequence[Flip]], None] = lambda flips: None,
    ) -> None:
        self.found, self.taken = found, taken

    def __call__(self, a: Frame, b: Frame, routers: Sequence[int]) -> list[str]:
        """One cause for each of `routers`."""
        flips = self.found().get((b.lane, b.position), ())
        self.taken(flips)
        causes = {flip.router: flip.cause for flip in flips}
        return [causes.get(router, UNKNOWN) for router in routers]
