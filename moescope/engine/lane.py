"""One lane of a session: its ids, how far they were fed, and its text. Data and small rules only.

The interpreter holds the lane's operator state under the same number; `session.py` decides what is
fed when. Prompts and turns become ids here, because only a lane knows its own answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from moescope.engine.protocol import Generate, Sampling
from moescope.engine.sampling import Expectation
from moescope.errors import MoescopeError
from moescope.kernels.spec import RouterPolicy

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
    told: list[tuple[float, int] | None] = field(default_factory=list)  # per id: logprob, rank
    texts: list[str] = field(default_factory=list)  # per fed id
    stream: Any = None  # of the tokenizer; None: begin again at the next token
    like_first: bool = True  # every id so far equals lane 0's

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

    def cut(self, length: int) -> None:
        """Forget the ids from `length` on; what came after them is no longer known."""
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


# --- prompts --------------------------------------------------------------------------------------


def prompt_of(tokenizer: Any, request: Generate) -> tuple[list[int], Messages | None]:
    """The ids a new sequence begins with, and its messages where it is a chat."""
    if request.prompt_ids is not None:
        return list(request.prompt_ids), None
    if tokenizer is None:
        raise MoescopeError("this model has no tokenizer", hint="--prompt-ids 1,2,3")
    if request.messages is not None:
        return rendered(tokenizer, request.messages), request.messages
    return list(tokenizer.encode(request.prompt)), None


def further(
    tokenizer: Any, lane: Lane, request: Generate, end_ids: Sequence[int]
) -> tuple[list[int], Messages | None]:
    """All ids of `lane` with a further turn. A chat is rendered as a whole, so ids may change.

    Of the messages, those after the last answer are new: each lane has an answer of its own.
    """
    if request.messages is None:
        if request.prompt_ids is not None:
            return [*lane.ids, *request.prompt_ids], None
        if not request.prompt:
            return list(lane.ids), None
        if tokenizer is None:
            raise MoescopeError("this model has no tokenizer", hint="--prompt-ids 1,2,3")
        return [*lane.ids, *tokenizer.encode(request.prompt, special_tokens=False)], None
    if not lane.turns or lane.turns[-1].messages is None:
        raise MoescopeError("the sequence is raw text, not a chat", hint="a new chat, or raw text")
    answer = lane.ids[lane.start :]
    if answer and answer[-1] in end_ids:
        answer = answer[:-1]
    answers = [i for i, (role, _) in enumerate(request.messages) if role == "assistant"]
    fresh = request.messages[answers[-1] + 1 :] if answers else request.messages
    messages = (*lane.turns[-1].messages, ("assistant", tokenizer.decode(answer)), *fresh)
    return rendered(tokenizer, messages), messages


def rendered(tokenizer: Any, messages: Messages) -> list[int]:
    """A chat as ids. The template writes its own special tokens, so none are added."""
    if tokenizer is None or not tokenizer.has_chat_template:
        raise MoescopeError("this model has no chat template", hint="raw text (--prompt)")
    listed = [{"role": role, "content": text} for role, text in messages]
    return list(tokenizer.encode(tokenizer.render_chat(listed), special_tokens=False))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return min(len(a), len(b))
