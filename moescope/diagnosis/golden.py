"""Making a golden trace: what `moescope check` needs, and nothing that costs more.

Ids, weights, margins and token ids of a few prompts, with the hashes of the model. Without prompts
of the user's, those below are taken: words, numbers, code and another script, because different
text goes to different experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moescope.engine.protocol import Generate, Sampling
from moescope.engine.session import Session

PROMPTS = (
    "Once upon a time there was a river that",
    "12 + 30 = 42\n18 - 5 = ",
    "def mean(values):\n    total = ",
    '{"name": "Ada", "year": 18',
    "Le chat est sur la table, et la souris",
)
NEW_TOKENS = 24
BARE_TOKENS = 24  # of each prompt for a model without a tokenizer


def record_golden(
    model: Any,
    tokenizer: Any,
    writer: Any,
    *,
    prompts: Sequence[dict[str, Any]] = (),
    variant: str = "trained",
    new_tokens: int = NEW_TOKENS,
    max_context: int = 4096,
) -> Session:
    """Record every prompt (keywords of `Generate`) as a sequence, decoded greedily; the session,
    closed."""
    session = Session(
        model, tokenizer, writer, record="weights", max_context=max_context, variants=(variant,)
    )
    try:
        for prompt in prompts or default_prompts(model, tokenizer):
            request = Generate(**prompt, sampling=Sampling(max_new_tokens=new_tokens))
            for _ in session.generate(request):
                pass
    finally:
        session.close()
    return session


def default_prompts(model: Any, tokenizer: Any) -> list[dict[str, Any]]:
    """The built-in prompts; spread-out ids where there is no tokenizer to read them."""
    if tokenizer is not None:
        return [{"prompt": text} for text in PROMPTS]
    vocabulary = int(model.interpreter.vocab_size)
    return [
        {"prompt_ids": tuple((7 + 31 * n + 97 * t) % vocabulary for t in range(BARE_TOKENS))}
        for n in range(len(PROMPTS))
    ]
