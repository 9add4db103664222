"""The rules of `lint`, one function each; the table RULES is at the end. Those about weights are in
`lint_weights.py`.

Thresholds are set so that what a sound router does by chance stays below them: the docstrings say
how. Letters as in `lint.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from moescope.trace.frames import DECODE, PREFILL
from moescope.trace.lint import ERROR, NOTE, WARNING, Finding, Rows
from moescope.trace.lint_weights import (
    ranked_weights,
    recorded_sums,
    runner_up_picked,
    selection_scores,
    weight_sums,
    whole_sums,
)

ASCENDING = 0.95  # of rows: above it, rank order was lost
UNLIKELY = 1e-3  # times that something happens by chance in the whole trace
ENOUGH = 64  # rows before a share means something
PADDING = 8  # times one token id stands at an end of a prompt before it looks like padding


def positions(rows: Rows) -> Iterator[Finding]:
    """Tokens are missing: every position from the first on has a frame."""
    gaps = np.diff(rows.position) != 1
    yield from rows.found(
        "positions",
        ERROR,
        np.append(gaps, False),
        "positions jump",
        "tokens were dropped, so later rows stand beside the wrong token",
        "record without sampling of tokens, or import each part as its own sequence",
    )
    yield from rows.found(
        "positions",
        NOTE,
        np.array([rows.position[0] > 0] + [False] * (len(rows.position) - 1)),
        f"the first token is {int(rows.position[0])}",
        "the beginning was left out (a cached prefix?)",
        "diagnose and check need every token from the first on",
    )


def last_token(rows: Rows) -> Iterator[Finding]:
    """Engines route the last sampled token only if something follows it."""
    absent = np.array([not rows.meta.last_token_present])
    yield from rows.found(
        "last_token",
        NOTE,
        absent,
        "the last token has no row",
        "rows are tokens − 1, as vLLM and SGLang return them",
        "leave out the last token id when you align them yourself",
    )


def repeated_picks(rows: Rows) -> Iterator[Finding]:
    """K distinct experts in each row. Where many rows repeat, K and L were probably swapped."""
    ids = np.sort(rows.expert_ids, axis=2)
    repeated = ((ids[..., 1:] == ids[..., :-1]) & (ids[..., 1:] >= 0)).any(2)
    advice = "import it again with the right axis order"
    if repeated.mean() > 0.3 and rows.expert_ids.shape[1] > 1:
        transposed = np.sort(rows.expert_ids, axis=1)
        distinct = ~((transposed[:, 1:] == transposed[:, :-1]) & (transposed[:, 1:] >= 0)).any()
        advice = "the axes look swapped: [T, K, L] for [T, L, K]" if distinct else advice
    yield from rows.found(
        "repeated_picks",
        ERROR,
        repeated,
        "an expert stands twice in a row",
        "no router picks an expert twice: columns are mixed up, or a buffer was not cleared",
        advice,
    )


def wrapped_ids(rows: Rows) -> Iterator[Finding]:
    """E > 256 and no id above 255 in many rows: stored as 8 bits. By chance, T K picks all miss the
    upper experts with probability (256 / E)^(T K)."""
    bad = []
    for router in range(len(rows.routers)):
        ids = rows.expert_ids[:, router]
        picks, E = int((ids >= 0).sum()), rows.experts(router)
        unlikely = E > 256 and picks * math.log(E / 256) > math.log(1e6)
        bad.append(bool(unlikely and ids.max(initial=-1) <= 255))
    yield from rows.found(
        "wrapped_ids",
        ERROR,
        np.array(bad),
        "no id above 255 although there are more experts",
        "ids were cut to 8 bits: 256 became 0",
        "record with 16-bit ids",
    )


def zero_layers(rows: Rows) -> Iterator[Finding]:
    """A router whose every row is 0, 0, …: a dense layer, a hash layer, or a failed capture."""
    learned = np.isin(np.arange(len(rows.routers)), rows.learned)
    zero = (rows.expert_ids == 0).all(axis=(0, 2)) & learned
    zero &= rows.expert_ids.shape[2] > 1 or len(rows.position) >= ENOUGH
    yield from rows.found(
        "zero_layers",
        ERROR,
        zero,
        "every pick of a layer is expert 0",
        "a dense layer, a hash-routed one, or a capture that failed",
        "leave the layer out of the import; the model's config says which layers have experts",
    )


def zero_prompt(rows: Rows) -> Iterator[Finding]:
    """Prompt rows that are all 0 in every layer, beside decoded rows that are not."""
    zero = (rows.expert_ids == 0).all(axis=(1, 2)) & (rows.phase == PREFILL)
    others = (rows.expert_ids[rows.phase == DECODE] > 0).any()
    zero &= bool(others) and rows.expert_ids.shape[1] * rows.expert_ids.shape[2] > 1
    yield from rows.found(
        "zero_prompt",
        ERROR,
        zero,
        "rows of the prompt are all 0",
        "the engine recorded decoded tokens only (prefix cache, or a captured graph)",
        "ask it for the prompt too, or import the decoded part alone",
    )


def repeated_rows(rows: Rows) -> Iterator[Finding]:
    """The same experts in the same order in every layer as the token before, though the token is
    another. Looked for where picks repeat so seldom that whole rows would not by chance."""
    tokens, routers, ranks = rows.expert_ids.shape
    equal = rows.expert_ids[1:] == rows.expert_ids[:-1]
    if tokens < 2 or tokens * float(equal.mean()) ** (routers * ranks) > UNLIKELY:
        return
    same = equal.all(axis=(1, 2))
    decided = (rows.expert_ids[1:] >= 0).any(axis=(1, 2))
    other = rows.token_id[1:] != rows.token_id[:-1]
    bad = np.append(False, same & decided & other & (rows.phase[1:] == DECODE))
    yield from rows.found(
        "repeated_rows",
        ERROR,
        bad,
        "a decoded row repeats the one before, for another token",
        "a captured graph wrote into a buffer that was read once more",
        "record with graphs off, or with an engine that fixed it",
    )


def rank_order(rows: Rows) -> Iterator[Finding]:
    """Ids that ascend in nearly every row although they are said to be ranked: K! orders are alike
    likely, so 95 % is far above chance from K = 2 on."""
    ids = rows.expert_ids
    used = (ids >= 0).sum(2) > 1
    ascending = ((ids[..., 1:] > ids[..., :-1]) | (ids[..., 1:] < 0)).all(2) & used
    count = int(used.sum())
    lost = count >= ENOUGH and ascending.sum() > ASCENDING * count and rows.meta.rank_ordered
    yield from rows.found(
        "rank_order",
        ERROR,
        np.asarray(ascending & lost),
        "ids ascend in nearly every row",
        "rank order was lost (ids came from a map of booleans, or were sorted)",
        "do not read ranks from it: weights, margins and order say nothing",
    )


def id_space(rows: Rows) -> Iterator[Finding]:
    """Physical ids of an engine that moves experts about."""
    yield from rows.found(
        "id_space",
        WARNING,
        np.array([rows.meta.ids_space == "physical"]),
        "ids are physical",
        "replicas of one expert have different ids, and ids move when experts are balanced anew",
        "map them to logical ids with the engine's table",
    )


def beyond_experts(rows: Rows) -> Iterator[Finding]:
    """Ids at or above the number of expert classes: shared experts, or another model."""
    E = np.array([rows.experts(at) for at in range(len(rows.routers))])
    yield from rows.found(
        "beyond_experts",
        ERROR,
        np.any(rows.expert_ids >= E[None, :, None], axis=2),
        "an id is beyond the experts of its router",
        "shared experts were recorded as picks, or this is another model",
        "leave the shared experts out, or name the right model",
    )


def ordinals(rows: Rows) -> Iterator[Finding]:
    """Layers 0 to L − 1 of an import: MoE ordinals where absolute numbers are meant?"""
    layers = [router.layer for router in rows.routers if router.site == "mlp"]
    known = any(spec is not None for spec in rows.specs)
    yield from rows.found(
        "ordinals",
        NOTE,
        np.array([not known and layers == list(range(len(layers)))]),
        "layers are numbered 0 to L − 1",
        "these may be ordinals of the layers with experts, not layer numbers",
        "compare with the model's config (first_k_dense_replace, decoder_sparse_step)",
    )


def padding(rows: Rows) -> Iterator[Finding]:
    """One token id many times at an end of the prompt: padding that counts in every measure."""
    ids = rows.token_id[rows.phase == PREFILL]
    bad = np.zeros(len(rows.position), np.bool_)
    if len(ids) > PADDING:
        changes = np.flatnonzero(ids != ids[0])
        head = int(changes[0]) if len(changes) else 0
        changes = np.flatnonzero(ids[::-1] != ids[-1])
        tail = int(changes[0]) if len(changes) else 0
        bad[:head] = head >= PADDING
        bad[len(ids) - tail : len(ids)] |= tail >= PADDING
    yield from rows.found(
        "padding",
        WARNING,
        bad,
        "one token id stands many times at an end of the prompt",
        "padding was recorded as tokens; loads and losses count it",
        "moescope balance --padding ID leaves it out",
    )


def token_ids(rows: Rows) -> Iterator[Finding]:
    """Token ids that are missing."""
    missing = rows.token_id < 0
    redacted = rows.meta.redacted
    yield from rows.found(
        "token_ids",
        NOTE if redacted else ERROR,
        missing,
        "no token id",
        "the trace was redacted" if redacted else "rows and token ids have different lengths",
        "diagnose and check need token ids",
    )


def invalid_rows(rows: Rows) -> Iterator[Finding]:
    """Rows without a decision."""
    yield from rows.found(
        "invalid_rows",
        WARNING,
        np.all(rows.expert_ids < 0, axis=2),
        "a row has no expert",
        "router logits were not finite there, or nothing was captured",
        "look at the token before it: NaN spreads",
    )


RULES: tuple[Callable[[Rows], Iterator[Finding]], ...] = (
    *(positions, last_token, token_ids, invalid_rows, repeated_picks, beyond_experts),
    *(wrapped_ids, zero_layers, zero_prompt, repeated_rows, rank_order, id_space, ordinals),
    *(
        weight_sums,
        whole_sums,
        recorded_sums,
        selection_scores,
        ranked_weights,
        runner_up_picked,
        padding,
    ),
)
