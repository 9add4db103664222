"""From a request to a model and its tokenizer: what an engine's process loads.

Loading itself is `load.py`; here a checkpoint without a usable tokenizer becomes a note.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from moescope.engine.protocol import Loading, LoadRequest
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import single_line


def open_model(
    request: LoadRequest, progress: Callable[[Loading], None] = lambda event: None
) -> tuple[Any, Any]:
    """Load what `request` names: a `LoadedModel`, and its tokenizer. A model without a tokenizer
    that can be used has None and a note: prompts are ids then. With `request.beside` the model is
    two (`beside.TwoModels`)."""
    if request.beside:
        return _open_two(request, progress)
    return _open_one(request, progress)


def _open_one(request: LoadRequest, progress: Callable[[Loading], None]) -> tuple[Any, Any]:
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


# --- two -----------------------------------------------------------------------------------------

UNLIKE = 256  # ids that two tokenizers may spell otherwise: special ones that a tuning renamed


def _open_two(request: LoadRequest, progress: Callable[[Loading], None]) -> tuple[Any, Any]:
    """Both models, checked and found to fit beside each other before a weight is read."""
    from moescope.engine import beside

    requests = replace(request, beside=""), replace(request, model=request.beside, beside="")
    _refuse_unfit(requests)
    first, tokenizer = _open_one(requests[0], progress)
    name = str(first.facts["name"])
    try:
        second, other = _open_one(requests[1], progress)
    except MoescopeError as error:
        if error.code != ExitCode.RESOURCES:
            raise
        message = f"{single_line(Path(request.beside).name)} beside {name}: {error.message}"
        raise MoescopeError(message, hint=error.hint, code=error.code) from None
    both = beside.beside(first, second)
    unlike = beside.unlike_ids(tokenizer, other, first.interpreter.vocab_size)
    if len(unlike) > UNLIKE:
        at = min(unlike)
        texts = " and ".join(repr(single_line(piece, 40)) for piece in unlike[at])
        raise MoescopeError(
            f"{both.facts['beside']}: tokenizer: expected the ids of {name}, found {len(unlike):,} "
            f"that stand for other text, id {at} for {texts}",
            hint="two checkpoints with one tokenizer",
        )
    both.interpreter.unlike = unlike
    if unlike:
        both.facts["notes"].append(
            f"{both.facts['beside']}: {len(unlike)} ids stand for other text than in {name}"
        )
    return both, tokenizer if tokenizer is not None else other


def _refuse_unfit(requests: tuple[LoadRequest, LoadRequest]) -> None:
    """Raise for what does not correspond or does not fit, from the headers alone."""
    from moescope.engine import devices
    from moescope.engine.beside import Outline, correspond
    from moescope.engine.load import check_memory, inspect

    found = []
    for request in requests:
        inspected = inspect(request)
        inspected.checkpoint.close()
        found.append(inspected)
    outlines = (
        Outline(
            str(one.facts["name"]),
            one.spec.vocab_size,
            tuple((layer, router.E) for layer, _, router in one.spec.routers()),
        )
        for one in found
    )
    correspond(*outlines)
    check_memory(found[0])
    free = min(one.memory["free"] for one in found)
    both = {name: sum(one.memory[name] for one in found) for name in ("weights", "cache", "needed")}
    if both["needed"] > free:
        error = devices.out_of_memory({**found[0].memory, **both, "free": free})
        names = " beside ".join(str(one.facts["name"]) for one in reversed(found))
        raise MoescopeError(f"{names}: {error.message}", hint=error.hint, code=error.code)
