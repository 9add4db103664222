"""A made-up recording: a text, routers whose loads drift, logits for every token.

Every number comes from the seed, and routing from the reference kernel, so frames are consistent.
"""

from __future__ import annotations

import numpy as np

from moescope.kernels import route
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring
from moescope.trace.frames import DECODE, PREFILL, Frame, RouterInfo, TraceEvent, TraceMeta
from moescope.trace.memory import MemoryTrace
from moescope.variants import apply

STORY = [
    "Once",
    "upon",
    "a",
    "time",
    "there",
    "was",
    "a",
    "small",
    "router",
    "that",
    "never",
    "renormalised",
    ".",
    "It",
    "picked",
    "its",
    "experts",
    "by",
    "score",
    ",",
    "and",
    "the",
    "scores",
    "it",
    "gave",
    "them",
    "did",
    "not",
    "add",
    "up",
    "to",
    "one",
    ".",
    "One",
    "day",
    "a",
    "loader",
    "came",
    "along",
    "and",
    "divided",
    "every",
    "weight",
    "by",
    "the",
    "sum",
    ".",
    "Nothing",
    "crashed",
    ".",
    "The",
    "words",
    "still",
    "came",
    ",",
    "one",
    "after",
    "another",
    ",",
    "but",
    "slowly",
    "the",
    "story",
    "forgot",
    "where",
    "it",
    "was",
    "going",
    ".",
]


def spec_of(experts: int = 16, top_k: int = 4, **policy: object) -> RouterSpec:
    return RouterSpec(
        RouterPolicy(num_experts_per_tok=top_k, **policy),  # type: ignore[arg-type]
        RouterWiring(num_experts=experts),
    )


def meta_of(
    layers: int = 6, experts: int = 16, top_k: int = 4, name: str = "tiny-olmoe", **policy: object
) -> TraceMeta:
    spec = spec_of(experts, top_k, **policy)
    return TraceMeta(
        models=({"name": name, "family": "olmoe"},),
        routers=tuple(
            RouterInfo(layer, experts, 0, top_k, spec.to_json()) for layer in range(layers)
        ),
        record="logits",
        engine={"name": "moescope", "device": "cpu", "dtype": "float32"},
    )


def frames_of(
    meta: TraceMeta,
    tokens: int = 80,
    lane: int = 0,
    variant: str = "trained",
    sequence: int = 0,
    words: list[str] | None = None,
    prompt: int = 4,
    seed: int = 1,
    logits: bool = True,
) -> list[Frame]:
    """One lane of one sequence."""
    draw = np.random.default_rng(seed)
    layers, experts = len(meta.routers), meta.routers[0].num_experts
    trained = RouterSpec.from_json(meta.routers[0].spec)
    spec = apply(variant, trained, 0).resolved("float32")
    taste = draw.normal(0, 1.0, (layers, experts))
    drift = np.zeros((layers, experts))
    words = words or STORY
    frames = []
    for position in range(tokens):
        drift = 0.8 * drift + draw.normal(0, 0.7, (layers, experts))
        rows = (taste + drift).astype(np.float32)
        routing = route(rows, spec)
        word = words[position % len(words)]
        frames.append(
            Frame(
                sequence=sequence,
                lane=lane,
                position=position,
                token_id=sum(map(ord, word)) % 500,
                text=word if position == 0 else f" {word}",
                phase=PREFILL if position < prompt else DECODE,
                variant=variant,
                expert_ids=routing.expert_ids.astype(np.int16),
                score_sum=routing.score_sum,
                mass=routing.mass,
                entropy=routing.entropy,
                margin=routing.margin,
                runner_up=routing.runner_up.astype(np.int16),
                weights=routing.weights,
                scores=routing.scores,
                logits=rows if logits else None,
                logprob=None if position == 0 else float(-draw.exponential(0.8)),
                rank=None if position == 0 else int(draw.integers(1, 4)),
                alternatives=tuple((int(i), float(-1 - i / 2)) for i in range(3)),
            )
        )
    return frames


def recorded(
    tokens: int = 80, lanes: tuple[str, ...] = ("trained",), **options: object
) -> MemoryTrace:
    """A recording with one lane for each variant."""
    meta = meta_of(**options)  # type: ignore[arg-type]
    trace = MemoryTrace(meta)
    trace.event(TraceEvent("pieces", {"pieces": {"0": " the", "1": " a", "2": " small"}}))
    columns = [
        frames_of(meta, tokens, lane, variant, seed=1 + (lane > 0))
        for lane, variant in enumerate(lanes)
    ]
    for row in range(tokens):
        for column in columns:
            trace.append(column[row])
    return trace
