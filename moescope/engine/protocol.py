"""The words spoken between a screen and an engine: small immutable values, nothing else.

Commands go down and are taken between tokens; events come up. A live engine in a child process, the
replay of a file, and a test double all speak this and are interchangeable (`Link`). No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:  # the words cost no numpy: a screen can draw before it imports any
    from moescope.trace.frames import Frame, RecordLevel, TraceMeta

MAX_LANES = 8  # A to H


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn; temperature 0 is greedy. 0 turns top_k and min_p off, 1 turns top_p."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_new_tokens: int = 256


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """What to load, where, and how to record it. `trace_path` None: a private unsaved file."""

    model: str
    device: str = "auto"  # auto | cpu | cuda | mlx
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    record: RecordLevel = "logits"
    trace_path: str | None = None
    redact: bool = False
    durable: bool = False
    force: bool = False  # replace `trace_path` if it exists
    max_context: int = 4096
    beside: str = ""  # another checkpoint, whose lanes run beside the first's
    devices: tuple[str, ...] = ()  # instead of `device`: layers split over cuda:0, cuda:1, ...


# --- commands, screen to engine -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Generate:
    """Start a new sequence on every open lane (each prefills under its own variant)."""

    prompt: str = ""
    prompt_ids: tuple[int, ...] | None = None  # instead of `prompt`
    messages: tuple[tuple[str, str], ...] | None = None  # (role, text): applies the chat template
    # a further turn: continue the lanes instead of starting over; of `messages`, those after the
    # last answer are new (each lane has an answer of its own)
    continues: bool = False
    sampling: Sampling = Sampling()
    paused: bool = False  # prefill, then wait


@dataclass(frozen=True, slots=True)
class Pause:
    pass


@dataclass(frozen=True, slots=True)
class Resume:
    pass


@dataclass(frozen=True, slots=True)
class Step:
    """`n` tokens in every running lane, then pause again."""

    n: int = 1


@dataclass(frozen=True, slots=True)
class SetVariant:
    """From the next token on, `lane` runs under this variant expression (`trained` restores)."""

    lane: int
    expression: str


@dataclass(frozen=True, slots=True)
class AddLane:
    """Open a lane under `expression`. With `fork_of`, it shares that lane's tokens before
    `position` (None: all of them) and goes on from there; else it joins at the next `Generate`."""

    expression: str
    fork_of: int | None = None
    position: int | None = None
    model: int = 0  # 1: the checkpoint beside the first; a fork stays with its lane's


@dataclass(frozen=True, slots=True)
class DropLane:
    lane: int


@dataclass(frozen=True, slots=True)
class SameTokens:
    """From the next token on, feed every lane what lane 0 draws, or let each draw its own."""

    on: bool


@dataclass(frozen=True, slots=True)
class SlowRouter:
    """From the next token on, route in the slow twin of the router's kernel, and the kernel beside
    it, to tell how far they are apart; or in the kernel again."""

    on: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """Stop generating; lanes and trace stay."""


@dataclass(frozen=True, slots=True)
class Close:
    """Commit the trace and end the engine."""


Command = (
    Generate
    | Pause
    | Resume
    | Step
    | SetVariant
    | AddLane
    | DropLane
    | SameTokens
    | SlowRouter
    | Stop
    | Close
)

# --- events, engine to screen -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Loading:
    """`stage` is `checking`, `reading`, `preparing` or `tokenizer`; done and total are bytes."""

    stage: str
    done: int
    total: int
    what: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Loaded:
    """The model is ready. `facts` holds what the screen prints: name, family, model_type,
    num_layers, num_routers, device, dtype, weights_bytes, cache_bytes, parameters,
    active_parameters, context, vocab_size, has_chat_template, chat_template_source, kernels,
    notes (list of str)."""

    facts: dict[str, Any]
    meta: TraceMeta
    trace_path: str | None


@dataclass(frozen=True, slots=True)
class Prompted:
    """A sequence began: the exact ids each lane was given, and the text they stand for."""

    sequence: int
    prompt_ids: tuple[int, ...]
    pieces: tuple[str, ...]  # one per id, for display
    note: str = ""  # e.g. the lane was re-filled from the first differing id
    lane: int | None = None  # None: every open lane was given these
    position: int = 0  # of the first id; more than 0 for a further turn


@dataclass(frozen=True, slots=True, eq=False)
class Newest:
    """The newest frame of each lane and how things go. Never queued: an unread one is replaced."""

    frames: tuple[Frame, ...]
    recorded: int  # frames acknowledged in the trace
    state: Literal["idle", "prefill", "running", "paused"]
    tokens_per_second: float
    pieces: tuple[tuple[int, str], ...] = ()  # texts of ids first seen since the last one
    router: str = ""  # while a slow twin routes: its name, and how far the kernel is from it


@dataclass(frozen=True, slots=True)
class LaneChanged:
    """A lane was opened, forked, dropped or given another variant, effective at `position`."""

    lane: int
    expression: str
    position: int
    state: Literal["open", "dropped"] = "open"
    fork_of: int | None = None
    model: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """A lane stopped: `end_token`, `length`, `stopped`, `context` or `invalid_logits`."""

    lane: int
    position: int
    reason: str


@dataclass(frozen=True, slots=True)
class Note:
    """One sentence for the user; `kind` is `note`, `warning` or `error`."""

    text: str
    kind: str = "note"


@dataclass(frozen=True, slots=True)
class Failed:
    """The engine cannot go on (or a command could not be done, when `fatal` is false)."""

    message: str
    hint: str
    code: int
    fatal: bool = True


Event = Loading | Loaded | Prompted | Newest | LaneChanged | Finished | Note | Failed


class Link(Protocol):
    """One engine as a screen sees it."""

    def send(self, command: Command) -> None:
        """Queue a command; returns at once."""

    def poll(self) -> list[Event]:
        """Everything that arrived since the last call, oldest first, at most one `Newest`; never
        blocks. After a `Failed(fatal=True)` nothing more comes."""

    def close(self, timeout: float = 5.0) -> None:
        """End the engine: commit the trace, join the process, kill it after `timeout` seconds."""

    @property
    def trace_path(self) -> Path | None:
        """Where history can be read while the engine writes it (None before `Loaded`)."""
