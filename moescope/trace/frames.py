"""`Frame`: one token in one lane, and what every router decided for it. `TraceMeta`: what made it.

The schema of every trace, whatever produced it: the screen, exporters and measures read frames and
never reach into an engine. Letters: L routers, K largest top-k in use, E expert classes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

RecordLevel = Literal["ids", "weights", "logits"]
PREFILL, DECODE = 0, 1
ALTERNATIVES = 8


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """The routing of the token at `position`, and what the model expects after it.

    `logprob` and `rank` are what the model gave this token before it was chosen (None for the first
    token of a prompt). `text` is what the token added to the stream: empty while a character is
    incomplete, and where text was redacted. Absent arrays (None) were not recorded.
    """

    sequence: int
    lane: int
    position: int
    token_id: int
    text: str
    phase: int  # PREFILL or DECODE
    variant: str  # the variant expression in force
    expert_ids: NDArray[np.int16]  # [L, K], rank order, -1 unused
    score_sum: NDArray[np.float32]  # [L]
    mass: NDArray[np.float32]  # [L]
    entropy: NDArray[np.float32]  # [L] nats
    margin: NDArray[np.float32]  # [L]
    runner_up: NDArray[np.int16]  # [L]
    weights: NDArray[np.float32] | None = None  # [L, K] combine weights as applied
    scores: NDArray[np.float32] | None = None  # [L, K] unbiased scores
    logits: NDArray[np.float32] | None = None  # [L, E], NaN unused
    logprob: float | None = None
    rank: int | None = None  # 1 is the most likely
    alternatives: tuple[tuple[int, float], ...] = ()  # next tokens: (id, logprob), best first
    kl: float | None = None  # nats against lane 0, where lanes are fed the same tokens
    top1_agrees: bool | None = None
    shadow: dict[str, Any] | None = None  # variant -> {"expert_ids", "weights", "score_sum"}


@dataclass(frozen=True, slots=True)
class RouterInfo:
    """One of the L routers of a model. `spec` is `RouterSpec.to_json()`."""

    layer: int  # absolute layer number
    num_experts: int
    num_null_experts: int
    num_experts_per_tok: int
    spec: dict[str, Any]
    model: int = 0
    site: Literal["mlp", "attention"] = "mlp"
    kind: Literal["learned", "hash"] = "learned"


@dataclass(frozen=True, slots=True, eq=False)
class TraceMeta:
    """What made a trace. Everything is JSON except `router_tensors` (router -> name -> array)."""

    # name, family, config_hash, weights_hash, tokenizer_hash of each
    models: tuple[dict[str, Any], ...] = ()
    routers: tuple[RouterInfo, ...] = ()
    router_tensors: dict[int, dict[str, NDArray[np.float32]]] = field(default_factory=dict)
    record: RecordLevel = "weights"
    # name, version, device, dtype, quantisation, kernels and their configuration
    engine: dict[str, Any] = field(default_factory=dict)
    rank_ordered: bool = True
    ids_space: Literal["logical", "physical"] = "logical"
    weights_kind: Literal["applied", "selection", "absent"] = "applied"
    last_token_present: bool = True
    sampling: dict[str, Any] = field(default_factory=dict)
    prompt_ids: tuple[int, ...] | None = None  # None: redacted, or told by events only
    redacted: bool = False
    # fields of `Frame` that an import lacked: NaN, -1 or empty in every frame, shown "not recorded"
    absent: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """Something that happened beside the tokens: kinds are `prompt`, `variant`, `fork`, `turn`,
    `pieces` (token id -> text, for ids first seen here), `error`, `note`, `finished`, and `flips`
    (why this lane chose otherwise than lane 0, where gates differ: `engine/crossed.py`)."""

    kind: str
    data: dict[str, Any]
    lane: int = 0
    position: int = 0  # it took effect before this position
