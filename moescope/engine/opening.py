"""From a request to a model and its tokenizer: what an engine's process loads.

Loading itself is `load.py`; here a checkpoint without a usable tokenizer becomes a note.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moescope.engine.protocol import Loading, LoadRequest
from moescope.errors import MoescopeError


def open_model(
    request: LoadRequest, progress: Callable[[Loading], None] = lambda event: None
) -> tuple[Any, Any]:
    """Load what `request` names: a `LoadedModel`, and its tokenizer. A model without a tokenizer
    that can be used has None and a note: prompts are ids then."""
    from moescope.engine.load import load_model
    from moescope.engine.tokenizer import Tokenizer

    model = load_model(request, progress)
    progress(Loading("tokenizer", 0, 0))
    notes = list(model.facts.get("notes", []))
    tokenizer = None
    try:
        tokenizer = Tokenizer.open(model.checkpoint, model.interpreter.vocab_size)
        notes += tokenizer.notes
    except MoescopeError as error:
        notes.append(error.message)
    model.facts["notes"] = notes
    model.facts["has_chat_template"] = tokenizer is not None and tokenizer.has_chat_template
    source = tokenizer.chat_template_source if tokenizer is not None else ""
    model.facts["chat_template_source"] = source
    return model, tokenizer
