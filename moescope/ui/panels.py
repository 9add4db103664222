"""What each panel draws, as plain frozen values: computed once a tick, compared, then drawn.

Widgets know nothing of frames, traces or engines; they take one of these and draw it. Screens
compute them (see `view.py`). Letters: L routers, E expert classes. All text is printable already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LEVELS = 8  # load is drawn at 8 levels, 0 the lowest


@dataclass(frozen=True, slots=True, eq=False)
class MapData:
    """The expert map. `marks` is shape and reads without colour; `levels` is colour."""

    levels: NDArray[np.uint8]  # [L, E] recent load, quantised to 0..LEVELS-1
    marks: NDArray[np.uint8]  # [L, E] 0 nothing, 1 picked (by lane A only), 2 by B only, 3 both
    num_experts: NDArray[np.int16]  # [L] classes of each router; columns beyond do not exist
    gutter: tuple[str, ...]  # [L] layer labels, "00", "17", "17a" for an attention router
    score_sum: NDArray[np.float32]  # [L] of this token, NaN where unknown
    sum_wrong: NDArray[np.bool_]  # [L] the trained spec does not allow this sum
    cursor: tuple[int, int]  # (router index, expert)
    right: tuple[str, ...] | None = None  # instead of the sum column, e.g. "2/4"
    heading: str = "differ"  # of that column
    title: str = "experts · dots = this token · colour = recent load"


@dataclass(frozen=True, slots=True)
class ExpertRow:
    """One line of the layer panel. `rank` 0 is the first expert that was not chosen."""

    rank: int
    expert: int
    score: float | None
    weight: float | None
    load: float  # share of the last tokens that used it, relative to the busiest expert (0..1)


@dataclass(frozen=True, slots=True)
class LayerData:
    """The layer under the cursor: ranks, the runner-up, the sums. None reads "not recorded"."""

    title: str  # "layer 17"
    router: str  # the spec in words
    rows: tuple[ExpertRow, ...]
    runner_up: ExpertRow | None
    margin: float | None
    margin_unit: str  # "score" or "logit"
    near_tie: bool
    score_sum: float | None  # sum of combine weights
    sum_range: tuple[float, float] | None  # p10, p90 over the last tokens
    sum_expected: str  # "trained: 1", "trained: below 1", "" where nothing is known
    sum_wrong: bool
    mass: float | None  # before normalisation and scaling
    entropy: float | None  # nats
    load_cv: float | None
    dead: int | None
    window: int  # tokens the load was counted over
    basis: str  # "as generated" or "on the same logits: <variant>"


@dataclass(frozen=True, slots=True, eq=False)
class PlotData:
    """One or two lines over positions. NaN is a gap."""

    title: str
    x: NDArray[np.int64]
    series: tuple[tuple[str, NDArray[np.float32]], ...]  # (label, values)
    guide: float | None = None  # a horizontal line, e.g. the sum the spec demands
    cursor: int | None = None  # x under the cursor
    bounds: tuple[float, float] | None = None  # what no value can be beyond


@dataclass(frozen=True, slots=True)
class TokenCell:
    """One token of a transcript: its text, tint level (0..LEVELS-1) and state."""

    text: str
    level: int
    position: int
    kind: Literal["prompt", "text", "special"] = "text"
    marked: bool = False  # its score sum is not one the trained spec allows, or the text parts here


@dataclass(frozen=True, slots=True)
class TranscriptData:
    """A lane's text. `cells` only ever grows, unless `epoch` changes (another sequence or lane)."""

    cells: tuple[TokenCell, ...]
    cursor: int | None  # index into cells
    follow: bool
    epoch: int
    title: str  # "tokens · tinted by Σ at L17"
    subtitle: str = ""  # "follow", "paused"
    tint_epoch: int = 0  # changes when levels of old cells changed


@dataclass(frozen=True, slots=True)
class TokenData:
    """The token under the cursor."""

    title: str  # 'token 412 " a"'
    token_id: int
    probability: float | None
    rank: int | None
    alternatives: tuple[tuple[str, float], ...]  # (text, probability)
    shared_with_previous: tuple[int, int] | None  # picks shared with the token before, of how many
    near_ties: tuple[int, int] | None  # routers with a near tie, of how many
    near_tie_below: float  # relative to the value at the cut
    new_experts: int | None  # experts first used here
    variants: tuple[str, ...] = ()  # "same logits under B: same ids, Σ 1.000"


@dataclass(frozen=True, slots=True)
class VariantItem:
    """One entry of the variant bar."""

    letter: str
    title: str  # "trained  softmax → top-8, not renormalised"
    state: Literal["generating", "same_logits"]
    equal_to: str = ""  # letter of the variant it is algebraically equal to
    shown: bool = False  # the one the panels show now


@dataclass(frozen=True, slots=True)
class VariantBarData:
    items: tuple[VariantItem, ...]


@dataclass(frozen=True, slots=True)
class StatusData:
    """The line on top. `mode` is drawn with a glyph so that it reads without colour."""

    name: str
    shape: str  # "48L×128E top-8"
    backend: str  # "cpu float32 torch"
    mode: Literal["loading", "idle", "prefill", "running", "paused", "replay", "failed"]
    rate: str  # "31.4 tok/s", "-"
    position: str  # "412/2048"
    memory: str  # "memory 17.2 GB": of weights and cache
    cursor: str  # "L17 E062 @412"
    frames_per_second: str = ""
    trouble: str = ""  # what is damaged in what is replayed


@dataclass(frozen=True, slots=True)
class TransportData:
    """The line under a replay: where we are, and how fast it plays."""

    position: int
    total: int
    playing: bool
    speed: float
    bookmarks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class LoadingData:
    """What is being read, and how far. `total` 0: unknown."""

    stage: str
    what: str
    done: int
    total: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AgreementRow:
    label: str  # "same top-8"
    this_token: str
    run: str


@dataclass(frozen=True, slots=True)
class AgreementData:
    """The numbers beside two lanes."""

    title: str
    rows: tuple[AgreementRow, ...]
    verdict: str
