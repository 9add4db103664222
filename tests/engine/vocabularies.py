"""Small tokenizers of the kinds that published models have, as the JSON they would publish."""

from __future__ import annotations

import json
from typing import Any

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Ångström, naïve café, Füße.",
    "def main():\n\tprint('hello, world')\n\n    return 0",
    "你好，世界。こんにちは。 Привет, мир! 🙂🙃 👩‍👩‍👧 e\u0301",
    "   leading, and   inner   spaces\r\n",
] * 4
SPECIAL = ["<s>", "</s>", "<|end|>"]


def byte_level() -> dict[str, Any]:
    """Byte-level BPE, as GPT-2, OLMoE and Qwen have it; some merges end within a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return parsed(tokenizer)


def sentencepiece() -> dict[str, Any]:
    """BPE that falls back to bytes, as Llama 2 and Mixtral have it: a leading space is dropped."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    letters = sorted(set("▁" + "".join(CORPUS[0] + CORPUS[1]).replace(" ", "▁")) - set("\n\t"))
    pieces = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    merges = [("▁", "t"), ("h", "e"), ("▁", "▁"), ("▁▁", "▁▁"), ("o", "w"), ("▁t", "he")]
    pieces += ["".join(pair) for pair in merges]
    model = models.BPE(
        vocab={piece: number for number, piece in enumerate(pieces)},
        merges=merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return parsed(tokenizer)


def metaspace() -> dict[str, Any]:
    """The same pieces with the Metaspace decoder, which drops the space of the first token."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer.from_str(json.dumps(sentencepiece()))
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    return parsed(tokenizer)


def with_bos(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The same with a post-processor that begins every text with `<s>`."""
    from tokenizers import Tokenizer, processors

    changed = Tokenizer.from_str(json.dumps(tokenizer))
    number = changed.token_to_id("<s>")
    changed.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", number)]
    )
    return parsed(changed)


def parsed(tokenizer: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.to_str())
    return found


KINDS = {"byte level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}
