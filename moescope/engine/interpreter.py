"""What a session asks of an interpreter of `DecoderSpec`: torch now, MLX beside it.

Arrays that cross this border are numpy. Letters: N lanes in a call, T tokens of each, L routers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from moescope.engine.decoder import DecoderSpec
from moescope.engine.kept import Kept
from moescope.engine.protocol import Sampling
from moescope.engine.sampling import Expectation
from moescope.kernels.spec import RouterPolicy, RouterSpec
from moescope.trace.frames import RecordLevel


@dataclass(frozen=True, slots=True, eq=False)
class StepOutput:
    """What one call computed for N lanes of T tokens each, in arrays of its own: frames are views
    of them, so nobody writes to them again."""

    logits: NDArray[np.float32]  # [N, T, V], or [N, 1, V] when only the last were asked for
    expert_ids: NDArray[np.int16]  # [N, T, L, K]
    score_sum: NDArray[np.float32]  # [N, T, L]; mass, entropy, margin alike
    mass: NDArray[np.float32]
    entropy: NDArray[np.float32]
    margin: NDArray[np.float32]
    runner_up: NDArray[np.int16]  # [N, T, L]
    weights: NDArray[np.float32] | None  # [N, T, L, K]
    scores: NDArray[np.float32] | None  # [N, T, L, K]
    router_logits: NDArray[np.float32] | None  # [N, T, L, E]
    invalid_router: int | None = None  # the first router that met logits that are not finite
    drawn: NDArray[np.int64] | None = None  # [N], tokens drawn on the device, where asked for
    # the same logits under the S shadow variants; None where there are none
    shadow_ids: NDArray[np.int16] | None = None  # [N, T, S, L, K]
    shadow_weights: NDArray[np.float32] | None = None  # [N, T, S, L, K]
    shadow_sums: NDArray[np.float32] | None = None  # [N, T, S, L], score sums
    # what each row of logits says of the next token, [N][T], where the interpreter found it
    expected: Sequence[Sequence[Expectation | None]] | None = None
    kept: Kept | None = None  # the block of memory that routing is views of, where there is one


@dataclass(frozen=True, slots=True, eq=False)
class Router:
    """One of the L routers in execution order, with the learned vectors its spec uses."""

    layer: int
    spec: RouterSpec  # dtypes resolved
    tensors: dict[str, NDArray[Any]]  # correction_bias, per_expert_scale, hash_table
    site: Literal["mlp", "attention"] = "mlp"


def routers_of(
    spec: DecoderSpec, dtype: str, vector: Callable[[str], NDArray[np.float32]]
) -> tuple[Router, ...]:
    """The routers of a decoder that runs in `dtype`; `vector` reads a tensor of ours by name."""
    found = []
    for layer, branch, router in spec.routers():
        policy = router.policy
        uses = {
            "correction_bias": policy.correction_bias != "none",
            "per_expert_scale": policy.per_expert_scale,
        }
        path = f"layers.{layer}.{branch}.gate"
        tensors = {name: vector(f"{path}.{name}").reshape(-1) for name in uses if uses[name]}
        found.append(Router(layer, router.resolved(dtype), tensors))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Draw:
    """How the token after this one will be drawn, for a step that can draw on its device."""

    sampling: Sampling
    position: int  # of the token that is drawn
    uniform: float  # in [0, 1), what `sampling.uniform` gives


class Interpreter(Protocol):
    """A loaded model. Lanes share its weights; each has its own rows of operator state."""

    routers: tuple[Router, ...]
    vocab_size: int
    device: str
    dtype: str
    kernels: dict[str, str]  # operator -> which implementation runs; the trace records it
    draws: bool  # whether it draws tokens itself where it is told how

    def open(self, lanes: int, capacity: int) -> None:
        """Allocate state for `lanes` lanes of `capacity` tokens; growing loses nothing."""

    def set_policies(self, lane: int, policies: Sequence[RouterPolicy]) -> None:
        """From the next call on, `lane` routes under these, one per router; K up to min(E, 32)."""

    def set_shadows(self, policies: Sequence[Sequence[RouterPolicy]]) -> None:
        """Route every row under these S variants too (one policy per router each), and execute
        nothing of it."""

    def run(
        self,
        lanes: Sequence[int],
        token_ids: NDArray[np.int64],  # [N, T]
        *,
        all_logits: bool = False,
        record: RecordLevel = "weights",
        draws: Sequence[Draw] | None = None,
    ) -> StepOutput:
        """Feed T tokens to each lane after what it already holds. Lanes may differ in length.

        With `draws`, a device that can draws the next token itself, and may begin to feed it: a
        later call with the same lanes and those tokens finds it done.
        """

    def length(self, lane: int) -> int:
        """Tokens the lane holds."""

    def truncate(self, lane: int, length: int) -> None:
        """Forget everything from `length` on."""

    def copy(self, source: int, target: int, length: int) -> None:
        """Make `target` hold the first `length` tokens of `source`."""

    # Where a router's kernel has a slow twin, an interpreter also has `twin`, its name ("" where
    # there is one way only), `use_slow_router(on)`: from the next call on the twin routes, and the
    # kernel beside it; and `router_difference()`, between the two since then.

    def cache_bytes(self, lanes: int, capacity: int) -> int:
        """Bytes of state `open` would allocate."""


class Expecting(Interpreter, Protocol):
    """An interpreter that need not keep the logits of a prompt."""

    expects: bool  # whether it takes `next_ids` now

    def run(
        self,
        lanes: Sequence[int],
        token_ids: NDArray[np.int64],  # [N, T]
        *,
        all_logits: bool = False,
        record: RecordLevel = "weights",
        draws: Sequence[Draw] | None = None,
        next_ids: NDArray[np.int64]
        | None = None,  # [N, T], what comes after each token, -1: nothing
    ) -> StepOutput:
        """As `Interpreter.run`; with `next_ids`, `logits` are those of the last tokens only, and
        `expected` says what the logits of every token say, also of the id that comes next."""
