"""One token of a step's output as a `Frame`. Pure: reads a lane, changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moescope.engine import sampling
from moescope.engine.interpreter import StepOutput
from moescope.engine.lane import Lane
from moescope.engine.sampling import Expectation
from moescope.trace.frames import DECODE, PREFILL, Frame, RecordLevel


def frame_of(
    lane: Lane,
    output: StepOutput,
    at: tuple[int, int],
    *,
    sequence: int,
    record: RecordLevel,
    told: tuple[float, int] | None,
    text: str,
    after: Expectation | None,
    first: Expectation | None,
    shadows: Sequence[str] = (),
) -> Frame:
    """The frame of the id `lane` is fed next. `at` is its row and column in `output`; `told` is
    the log probability and rank of the id, `after` what the model expects after it (None: nothing
    finite), `first` what lane 0 expects after the same
    ids, where the two are to be compared; `shadows` the shadow variants in the output."""
    position, token = lane.fed, lane.ids[lane.fed]
    kl, agrees = None, None
    if first is not None and after is not None:
        kl = sampling.divergence(first, after)
        agrees = first.likeliest_id() == after.likeliest_id()
    return Frame(
        sequence=sequence,
        lane=lane.index,
        position=position,
        token_id=token,
        text=text,
        phase=PREFILL if lane.is_prompt(position) else DECODE,
        variant=lane.expression,
        logprob=told[0] if told else None,
        rank=told[1] if told else None,
        alternatives=after.likeliest() if after is not None else (),
        kl=kl,
        top1_agrees=agrees,
        shadow=_shadows(output, at, shadows) if shadows else None,
        **_decisions(output, at, record),
    )


def _decisions(output: StepOutput, at: tuple[int, int], record: RecordLevel) -> dict[str, Any]:
    """The router decisions of one token: views of the batch, which nobody writes to again."""
    found = {
        "expert_ids": output.expert_ids[at],
        "score_sum": output.score_sum[at],
        "mass": output.mass[at],
        "entropy": output.entropy[at],
        "margin": output.margin[at],
        "runner_up": output.runner_up[at],
    }
    if record != "ids" and output.weights is not None and output.scores is not None:
        found["weights"], found["scores"] = output.weights[at], output.scores[at]
    if record == "logits" and output.router_logits is not None:
        found["logits"] = output.router_logits[at]
    return found


def _shadows(
    output: StepOutput, at: tuple[int, int], names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """What each shadow variant would have picked for one token."""
    columns = {
        "expert_ids": output.shadow_ids,
        "weights": output.shadow_weights,
        "score_sum": output.shadow_sums,
    }
    return {
        name: {
            column: values[at][place] for column, values in columns.items() if values is not None
        }
        for place, name in enumerate(names)
    }
