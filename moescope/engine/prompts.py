"""Prompts and further turns as ids. Pure but for the tokenizer; what is wrong with one is an error.

A chat is rendered as a whole at every turn, so ids that a lane was fed before can change.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moescope.engine.lane import Lane, Messages
from moescope.engine.protocol import Generate
from moescope.errors import MoescopeError


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


def check_ids(
    ids: Sequence[int], vocabulary: int, context: int, longest: int | None = None
) -> None:
    """Refuse a prompt that is empty, too long, or holds an id the model does not know. `longest`
    is the model's own context, which no option makes longer."""
    if not ids:
        raise MoescopeError("the prompt is empty: expected at least one token")
    for index, token in enumerate(ids):
        if not 0 <= token < vocabulary:
            raise MoescopeError(
                f"token {index} of the prompt: expected an id from 0 to {vocabulary - 1}, "
                f"found {token}"
            )
    if longest is not None and len(ids) > longest:
        raise MoescopeError(
            f"the prompt has {len(ids)} tokens: the model's context is {longest}",
            hint="a shorter prompt",
        )
    if len(ids) > context:
        raise MoescopeError(
            f"the prompt has {len(ids)} tokens: expected at most {context}",
            hint="a shorter prompt, or a larger --max-context",
        )
