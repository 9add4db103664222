"""Feeding a model given tokens, and what its routers decide for them: the base of check, ladder and
of comparing two models. One lane of an interpreter, no session: nothing is drawn or recorded.

Letters: T tokens, L routers, K picked, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moescope.engine.interpreter import StepOutput
from moescope.engine.lane import policies_of, steering_of
from moescope.engine.prompts import check_ids
from moescope.engine.rewired_lanes import rewirable
from moescope.engine.sampling import Expectation, expectations
from moescope.trace.frames import RecordLevel
from moescope.variants.steering import split

CHUNK = 128  # tokens of a prompt fed at once
LOGITS_BYTES = 96 << 20  # next-token logits of one chunk


@dataclass(frozen=True, slots=True, eq=False)
class Fed:
    """What came of tokens `start` to `start + len(after)`; `after[t]` is what the model expects
    next (None: nothing finite). Arrays of `output` are [1, T, ...]."""

    start: int
    output: StepOutput
    after: list[Expectation | None]


@dataclass(frozen=True, slots=True, eq=False)
class Forced:
    """The decisions of a whole sequence. `logprob[t]` is what the model gave token t before it was
    fed (NaN for the first). Unused slots hold -1 and weight 0."""

    expert_ids: NDArray[np.int16]  # [T, L, K]
    weights: NDArray[np.float32]  # [T, L, K]
    score_sum: NDArray[np.float32]  # [T, L]
    margin: NDArray[np.float32]  # [T, L]
    logprob: NDArray[np.float64]  # [T]
    invalid_router: int | None  # the first that met logits that are not finite


def able(interpreter: Any, *expressions: str) -> Any:
    """`interpreter`, or one around it whose lanes can run under these lane expressions."""
    for expression in expressions:
        interpreter = rewirable(interpreter, split(expression)[0])
    return interpreter


def put_under(interpreter: Any, lane: int, expression: str) -> None:
    """Make a lane run under a lane expression; of one that rewires, what `able` gave."""
    variant, steered = split(expression)
    policies = policies_of(variant, interpreter.routers, interpreter.dtype)
    interpreter.set_policies(lane, policies)
    if hasattr(interpreter, "set_wiring"):
        interpreter.set_wiring(lane, variant)
    if steered or getattr(interpreter, "intervene", None) is not None:
        from moescope.engine.steered_lanes import steer

        steer(interpreter, lane, steering_of(expression, interpreter, policies))


def feed(
    model: Any,
    ids: Sequence[int],
    *,
    prompt: int | None = None,
    variant: str = "trained",
    record: RecordLevel = "weights",
    lane: int = 0,
) -> Iterator[Fed]:
    """Feed `ids` to an empty lane: the first `prompt` (None: all) in chunks, the others one by one,
    as they are decoded. Raises `MoescopeError` for ids or a variant the model does not know."""
    interpreter = able(model.interpreter, variant)
    context = int(model.facts.get("context") or len(ids))
    check_ids(ids, interpreter.vocab_size, context)
    interpreter.open(lane + 1, len(ids))
    interpreter.truncate(lane, 0)
    put_under(interpreter, lane, variant)
    room = max(1, min(CHUNK, LOGITS_BYTES // (4 * interpreter.vocab_size)))
    chunked = len(ids) if prompt is None else min(prompt, len(ids))
    start = 0
    while start < len(ids):
        width = min(room, chunked - start) if start < chunked else 1
        row = np.array([ids[start : start + width]], np.int64)
        output = interpreter.run([lane], row, all_logits=width > 1, record=record)
        yield Fed(start, output, expectations(output.logits[0]))
        start += width


def forced(
    model: Any, ids: Sequence[int], *, prompt: int | None = None, variant: str = "trained"
) -> Forced:
    """Everything `feed` yields, put together."""
    names = ("expert_ids", "weights", "score_sum", "margin")
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in names}
    logprob = np.full(len(ids), np.nan)
    invalid: int | None = None
    for fed in feed(model, ids, prompt=prompt, variant=variant):
        for name in names:
            parts[name].append(getattr(fed.output, name)[0].copy())
        if fed.output.invalid_router is not None:
            invalid = fed.output.invalid_router if invalid is None else invalid
        for at, after in enumerate(fed.after, start=fed.start + 1):
            if after is not None and at < len(ids):
                logprob[at] = after.logprob(int(ids[at]))
    return Forced(
        **{name: np.concatenate(parts[name]) for name in names},
        logprob=logprob,
        invalid_router=invalid,
    )
