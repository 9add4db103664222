"""Why two lanes chose other experts for the same token: the gate, or what the gate was shown.

Each lane's router is applied to the other's input. Of the four selections, those of A and B on
their own inputs differ; the other two tell why:

- `gate`: B's router on A's input already chooses otherwise, A's on B's input does not;
- `input`: A's router on B's input chooses otherwise, B's on A's input does not: the input drifted;
- `either`: each of the two is enough;
- `together`: neither is, only both.

Lanes over the same gate need the recorded logits only (`LogitsJudge`). Where gates differ (another
checkpoint, a gate that is quantised) the inputs are kept while the lanes run (`Watched`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.kernels import route
from moescope.kernels.spec import RouterSpec
from moescope.trace.frames import Frame
from moescope.variants import parse
from moescope.variants.steering import split

CAUSES = ("gate", "input", "either", "together")
TITLES = {
    "gate": "gate arithmetic",
    "input": "drifted input",
    "either": "either alone",
    "together": "only both together",
    "": "not known",
}
UNKNOWN = ""

Specs = Sequence[RouterSpec]
Tensors = Mapping[str, NDArray[Any]]


def cause(own_a: Any, b_on_a: Any, a_on_b: Any, own_b: Any) -> str:
    """From the experts [K] that A chose, B's router chooses on A's input, A's on B's, and B chose.
    `own_a` and `own_b` are different sets. -1 is no expert."""
    a, b = _set(own_a), _set(own_b)
    by_gate, by_input = _set(b_on_a) != a, _set(a_on_b) != a
    assert a != b, "no flip"
    if by_gate and by_input:
        return "either"
    if by_gate:
        return "gate"
    return "input" if by_input else "together"


def _set(ids: Any) -> frozenset[int]:
    return frozenset(int(expert) for expert in ids if expert >= 0)


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


def selected(
    logits: NDArray[Any], spec: RouterSpec, tensors: Sequence[Tensors]
) -> NDArray[np.int32]:
    """The experts [T, K] that `spec` chooses from rows of logits [T, E], each with its router's
    learned vectors."""

    def stacked(name: str, needed: bool) -> Any:
        return np.stack([held[name] for held in tensors]) if needed else None

    policy = spec.policy
    ids: NDArray[np.int32] = route(
        logits[:, : spec.E],
        spec,
        correction_bias=stacked("correction_bias", policy.correction_bias != "none"),
        per_expert_scale=stacked("per_expert_scale", policy.per_expert_scale),
    ).expert_ids
    return ids


@dataclass(slots=True, eq=False)
class Watched:
    """An intervention that changes nothing and keeps what every router read in the last call.
    `before` is the one it stands in front of."""

    before: Any = None
    routers: dict[int, Any] = field(default_factory=dict)  # running routers by index
    inputs: dict[tuple[int, int], tuple[int, Any]] = field(default_factory=dict)
    call: Any = None

    def __call__(self, router: Any, x: Any, routing: Any, call: Any) -> Any:
        if self.before is not None:
            routing = self.before(router, x, routing, call)
        self.routers[router.index], self.call = router, call
        for lane, start, rows in call.spans():
            self.inputs[lane, router.index] = start, x[rows]
        return routing

    def read(self, lane: int, router: int, position: int) -> Any:
        """What `router` read for one token [1, H]; None where the last call did not hold it."""
        start, x = self.inputs.get((lane, router), (0, ()))
        at = position - start
        return x[at : at + 1] if 0 <= at < len(x) else None

    def route(self, router: int, spec: RouterSpec, x: Any) -> Any:
        """The routing of one row under this model's gate, with its logits."""
        return self.routers[router].route(x, spec, self.call)


class InputsJudge:
    """Judges flips from what both routers read: for gates that differ.

    A and B are (`Watched`, lane in its interpreter, `specs_of`). `blamed` sees each flip that the
    gate alone explains: (router, experts A chose, B's logits and A's on A's input, B's spec).
    """

    def __init__(
        self,
        a: tuple[Watched, int, Callable[[str], Specs]],
        b: tuple[Watched, int, Callable[[str], Specs]],
        blamed: Callable[[int, Any, Any, Any, RouterSpec], None] | None = None,
    ) -> None:
        self.a, self.b, self.blamed = a, b, blamed

    def __call__(self, a: Frame, b: Frame, routers: Sequence[int]) -> list[str]:
        """One cause for each of `routers`; "" where an input is no longer held."""
        return [self._one(a, b, router) for router in routers]

    def _one(self, a: Frame, b: Frame, router: int) -> str:
        (seen_a, lane_a, specs_a), (seen_b, lane_b, specs_b) = self.a, self.b
        read_a = seen_a.read(lane_a, router, a.position)
        read_b = seen_b.read(lane_b, router, b.position)
        of_a, of_b = specs_a(a.variant)[router], specs_b(b.variant)[router]
        if read_a is None or read_b is None or of_a.wiring.hash_table or of_b.wiring.hash_table:
            return UNKNOWN
        if read_a.shape != read_b.shape:
            return UNKNOWN
        b_on_a = seen_b.route(router, of_b, _like(read_a, read_b))
        a_on_b = seen_a.route(router, of_a, _like(read_b, read_a))
        found = cause(
            a.expert_ids[router],
            b_on_a.expert_ids[0].tolist(),
            a_on_b.expert_ids[0].tolist(),
            b.expert_ids[router],
        )
        if self.blamed is not None and found in ("gate", "either"):
            own = seen_a.route(router, of_a, read_a)
            logits, original = (r.logits[0].float().cpu().numpy() for r in (b_on_a, own))
            self.blamed(router, a.expert_ids[router], logits, original, of_b)
        return found


def _like(x: Any, other: Any) -> Any:
    """One model's row where, and as what, the other's are."""
    return x.to(other.device, other.dtype)
