"""One lane of a session: its ids, how far they were fed, and its text. Data and small rules only.

The interpreter holds the lane's operator state under the same number; `session.py` decides what is
fed when, `prompts.py` what a turn adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moescope.engine.interpreter import Router
from moescope.engine.protocol import MAX_LANES, Sampling
from moescope.engine.sampling import Expectation
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterPolicy, RouterSpec

Messages = tuple[tuple[str, str], ...]  # (role, text)


@dataclass(frozen=True, slots=True)
class Turn:
    """Ids [begin, end) of a lane were a prompt. `messages`: the chat up to here, None if raw."""

    begin: int
    end: int
    messages: Messages | None


@dataclass(slots=True, eq=False)
class Lane:
    """`ids` is what the lane was fed and is to be fed; the first `fed` of them are in the cache."""

    index: int
    expression: str
    policies: tuple[RouterPolicy, ...]
    ids: list[int] = field(default_factory=list)
    fed: int = 0
    turns: tuple[Turn, ...] = ()
    forced_until: int = 0  # ids before this are given, not drawn
    sampling: Sampling = field(default_factory=Sampling)
    running: bool = False
    reason: str = ""  # why it stopped
    expected: Expectation | None = None  # after the last fed token
    drawn: int | None = None  # what the device drew after it, where it did
    told: list[tuple[float, int] | None] = field(default_factory=list)  # per id: logprob, rank
    texts: list[str] = field(default_factory=list)  # per fed id
    stream: Any = None  # of the tokenizer; None: begin again at the next token
    like_first: bool = True  # every id so far equals lane 0's
    model: int = 0  # of two models beside each other, which

    @property
    def start(self) -> int:
        """Where the newest answer begins."""
        return self.turns[-1].end if self.turns else 0

    @property
    def pending(self) -> int:
        return len(self.ids) - self.fed

    @property
    def prompt_ids(self) -> list[int]:
        return self.ids[: self.start]

    @property
    def new_ids(self) -> list[int]:
        """What was generated since the newest prompt, a sampled end token included."""
        return self.ids[self.start : self.fed]

    @property
    def text(self) -> str:
        """The newest answer, without the end token that closed it."""
        last = self.fed - 1 if self.reason == "end_token" else self.fed
        return "".join(self.texts[self.start : last])

    def is_prompt(self, position: int) -> bool:
        return any(turn.begin <= position < turn.end for turn in self.turns)

    def ending(self, end_ids: Sequence[int], context: int) -> str:
        """Why nothing follows the last of `ids` ("" if something does), were all of them fed."""
        count = len(self.ids)
        if self.forced_until > self.start:
            return "length" if count >= self.forced_until else ""
        if count > self.start and self.ids[-1] in end_ids:
            return "end_token"
        if count - self.start >= self.sampling.max_new_tokens:
            return "length"
        return "context" if count >= context else ""

    def begin(
        self, ids: list[int], begin: int, end: int, messages: Messages | None, sampling: Sampling
    ) -> None:
        """Take ids [begin, end) as the newest prompt; what follows them in `ids` is given too."""
        kept = [Turn(t.begin, min(t.end, begin), t.messages) for t in self.turns if t.begin < begin]
        self.turns = (*kept, Turn(begin, end, messages))
        self.ids, self.forced_until = ids, len(ids) if len(ids) > end else 0
        self.sampling, self.reason = sampling, ""

    def told_of(self, token: int) -> tuple[float, int] | None:
        """Log probability and rank the model gave `token`, which is fed next, where known."""
        if self.expected is not None:
            return self.expected.logprob(token), self.expected.rank(token)
        return self.told[self.fed] if self.fed < len(self.told) else None

    def say(self, tokenizer: Any, token: int, is_last: bool) -> str:
        """What `token`, fed next, adds to the text; the last one brings what was held back."""
        if tokenizer is None:
            return ""
        if self.stream is None:
            self.stream = tokenizer.stream(after=self.ids[: self.fed])
        text = str(self.stream.push(token))
        if is_last:
            text += str(self.stream.flush())
            self.stream = None
        return text

    def took(self, text: str, told: tuple[float, int] | None, after: Expectation | None) -> None:
        """The next id was fed."""
        self.told[self.fed :] = [told]
        self.texts.append(text)
        self.expected = after
        self.fed += 1

    def cut(self, length: int) -> None:
        """Forget the ids from `length` on; what came after them is no longer known."""
        if length <= self.fed:
            self.drawn = None
        if length < self.fed:
            self.expected, self.stream = None, None
        self.fed = min(self.fed, length)
        del self.ids[length:], self.told[length:], self.texts[self.fed :]

    def take_over(self, source: Lane, position: int) -> None:
        """Become what `source` was before `position`, with what was to follow it there.

        What followed is the rest of the prompt, or the one token that was drawn: the same numbers
        would be drawn again, so this is what a rerun would arrive at.
        """
        inside = [turn.end for turn in source.turns if turn.begin <= position < turn.end]
        keep = max([position + 1, *inside])
        if position < source.forced_until:
            keep = source.forced_until
        self.turns = tuple(turn for turn in source.turns if turn.begin <= position)
        self.forced_until, self.sampling = source.forced_until, source.sampling
        self.ids, self.told = source.ids[:keep], source.told[:keep]
        self.texts = source.texts[:position]
        self.fed, self.stream = position, None
        self.expected = source.expected if position == source.fed else None


def policies_of(expression: str, routers: Sequence[Router], dtype: str) -> tuple[RouterPolicy, ...]:
    """The policy of each router under `expression`, its wiring and what it steers left aside."""
    from moescope import variants
    from moescope.variants import steering

    edits = variants.parse(steering.split(expression)[0])
    for group in edits.groups:
        if not any(group.holds(router.layer) for router in routers):
            raise MoescopeError(
                f"variant {str(group)!r}: expected layers with a router, "
                f"{routers[0].layer} to {routers[-1].layer}",
                code=ExitCode.USAGE,
            )
    specs = (variants.apply(edits, router.spec, router.layer) for router in routers)
    return tuple(spec.resolved(dtype).policy for spec in specs)


def specs_of(
    routers: Sequence[Router], policies: Sequence[RouterPolicy], dtype: str
) -> tuple[RouterSpec, ...]:
    """The routers under these policies, dtypes resolved."""
    return tuple(
        RouterSpec(policy, router.spec.wiring).resolved(dtype)
        for router, policy in zip(routers, policies, strict=True)
    )


Steered = tuple[tuple[Any, ...], tuple[RouterSpec, ...]]  # Steering or None, and spec, by router


def steering_of(
    expression: str, interpreter: Any, policies: Sequence[RouterPolicy]
) -> Steered | None:
    """What a lane expression steers in each router under these policies; None: nothing.

    Raises MoescopeError: USAGE for what a router cannot be told, RESOURCES for an interpreter that
    cannot be steered.
    """
    from moescope import variants
    from moescope.variants import steering

    variant, items = steering.split(expression)
    if not items:
        return None
    if not hasattr(interpreter, "set_intervention"):
        raise MoescopeError(
            "this interpreter cannot steer experts",
            hint="--device cpu, cuda or mlx",
            code=ExitCode.RESOURCES,
        )
    if variants.parse(variant).rebuilds:
        raise MoescopeError(f"{expression}: a rewired decoder cannot be steered")
    specs = specs_of(interpreter.routers, policies, interpreter.dtype)
    layers = [router.layer for router in interpreter.routers]
    return steering.of_routers(items, list(zip(layers, specs, strict=True))), specs


def refuse_rewiring(expression: str) -> None:
    """Raise for an expression that edits more than policies, where logits alone are looked at."""
    from moescope import variants
    from moescope.variants import steering

    variant, steered = steering.split(expression)
    if steered:
        raise MoescopeError(
            f"{expression}: expected a variant, found experts that are steered",
            hint="--variant steers a lane",
            code=ExitCode.USAGE,
        )
    if variants.parse(variant).rebuilds:
        raise MoescopeError(
            f"{expression}: expected fields of the router's policy, found one that rewires the "
            "decoder",
            hint="moescope variants, for what recorded logits can show",
            code=ExitCode.USAGE,
        )


def letter(lane: int) -> str:
    return chr(ord("A") + lane) if 0 <= lane < MAX_LANES else str(lane)
