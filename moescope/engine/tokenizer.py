"""Text to ids and back, through the `tokenizers` library and a checkpoint's tokenizer.json.

The library panics, aborts or hangs on some files, so a file is loaded and tried in a throw-away
child first (`guarded.py`), once per content. What a chat looks like is `chat.py`'s, giving text out
piece by piece `streaming.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from moescope.engine import guarded
from moescope.engine.chat import (
    FILE,
    SETTINGS,
    ChatTemplate,
    Message,
    find_template,
    special_tokens,
)
from moescope.engine.config import bad, parse_object, shown
from moescope.engine.streaming import MARK, ByteStream, Stream, WindowStream
from moescope.errors import MoescopeError
from moescope.safety import LIMITS, printable, single_line

if TYPE_CHECKING:
    from moescope.engine.checkpoint import Checkpoint

T = TypeVar("T")
NAME = "tokenizer.json"
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_OTHER = ("tokenizer.model", "tokenizer.model.v3", "tekken.json", "vocab.json", "tokenizer.py")
_HINT = "give the prompt as ids (--prompt-ids 1,2,3)"
_CONTEXT = 64  # ids: enough to know how what follows them decodes
_verdicts: dict[str, str] = {}  # sha256 of a tokenizer.json -> what the child said, "" when fine


@dataclass(eq=False)
class Tokenizer:
    """A checked tokenizer; `notes` are warnings for the user."""

    hash: str
    end_ids: tuple[int, ...]
    template: ChatTemplate | None
    notes: list[str]
    _library: Any
    _added: Mapping[int, bool]  # ids of added tokens -> whether special
    _letters: Mapping[str, int] | None  # of a byte-level vocabulary: letter -> byte
    _bytes_only: bool  # decoding is no more than those bytes
    _byte_ids: frozenset[int]  # of a vocabulary that falls back to bytes
    _pieces: dict[int, str] = field(default_factory=dict)

    @classmethod
    def open(cls, checkpoint: Checkpoint, vocab_rows: int | None = None) -> Tokenizer:
        """Read and check the tokenizer of a checkpoint whose embedding has `vocab_rows` rows.

        Raises MoescopeError where there is none, where the library fails on it, or where it makes
        ids beyond the embedding.
        """
        data = checkpoint.file(NAME, LIMITS.tokenizer_bytes)
        if data is None:
            raise _absent(checkpoint)
        notes: list[str] = []
        settings = checkpoint.json(SETTINGS) or {}
        parsed, clean = _sanitise(data, notes)
        _check_in_child(clean)
        library = _guard("load", lambda: _load(clean))
        vocabulary: dict[str, int] = _guard("vocab", lambda: library.get_vocab(True))
        _check_ids(vocabulary, vocab_rows)
        kinds = _kinds(parsed.get("decoder"))
        added = library.get_added_tokens_decoder()
        return cls(
            hash=hashlib.sha256(data).hexdigest(),
            end_ids=_end_ids(checkpoint, settings, vocabulary, vocab_rows, notes),
            template=find_template(checkpoint.file(FILE), settings, notes),
            notes=notes,
            _library=library,
            _added={number: bool(token.special) for number, token in added.items()},
            _letters=_byte_letters() if "ByteLevel" in kinds else None,
            _bytes_only=kinds == {"ByteLevel"},
            _byte_ids=frozenset(
                number
                for token, number in vocabulary.items()
                if "ByteFallback" in kinds and _BYTE.fullmatch(token)
            ),
        )

    def encode(self, text: str, special_tokens: bool = True) -> list[int]:
        """The ids of a text; `special_tokens` adds what the tokenizer itself puts around one."""
        if len(text) > LIMITS.encode_chars:
            raise MoescopeError(
                f"prompt: expected at most {LIMITS.encode_chars} characters, found {len(text)}"
            )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise MoescopeError(
                f"prompt: character {error.start}: expected valid Unicode"
            ) from None
        ids: list[int] = _guard(
            "encode", lambda: self._library.encode(text, add_special_tokens=special_tokens).ids
        )
        return ids

    def decode(self, ids: Sequence[int], special_tokens: bool = False) -> str:
        """The text of some ids, not yet printable; special tokens have none unless asked for."""
        text: str = _guard(
            "decode",
            lambda: self._library.decode(list(ids), skip_special_tokens=not special_tokens),
        )
        return text

    def stream(self, special_tokens: bool = False, after: Sequence[int] = ()) -> Stream:
        """Decode a sequence as it comes; joined, the pieces are what `decode` gives.

        `after`: ids before it, whose text was given out already (a fork, a further turn).
        """
        stream: Stream
        if self._bytes_only:
            stream = ByteStream(lambda number: self._bytes_of(number, special_tokens))
        else:
            stream = WindowStream(
                lambda ids: self.decode(ids, special_tokens),
                self._byte_ids.__contains__,
                lambda number: self._is_silent(number, special_tokens),
            )
        start = max(len(after) - _CONTEXT, 0)
        while start > 0 and not self._stands_alone(after[start], special_tokens):
            start -= 1
        for number in after[start:]:
            stream.push(number)
        return stream

    def _stands_alone(self, token_id: int, special_tokens: bool) -> bool:
        """Whether text is certain as soon as this id has come, whatever was before."""
        text = self.decode([token_id], special_tokens)
        return bool(text) and not text.endswith(MARK) and token_id not in self._byte_ids

    def _is_silent(self, token_id: int, special_tokens: bool) -> bool:
        special = self._added.get(token_id, False)
        return (special and not special_tokens) or self._token(token_id) is None

    def _token(self, token_id: int) -> str | None:
        """How the vocabulary writes an id, None where it has none."""
        if not 0 <= token_id < 2**32:
            return None
        token: str | None = _guard("vocab", lambda: self._library.id_to_token(token_id))
        return token

    def _bytes_of(self, token_id: int, special_tokens: bool) -> bytes:
        if self._is_silent(token_id, special_tokens):
            return b""
        token, letters = self._token(token_id) or "", self._letters or {}
        if all(letter in letters for letter in token):
            return bytes(letters[letter] for letter in token)
        return token.encode()

    def piece(self, token_id: int) -> str:
        """One id for display: its text, with special tokens and lone bytes visible; printable."""
        if token_id not in self._pieces:
            self._pieces[token_id] = printable(self._piece(token_id), 200)
        return self._pieces[token_id]

    def _piece(self, token_id: int) -> str:
        token = self._token(token_id)
        if token is None:
            return f"<unused {token_id}>"
        if token_id in self._added or token_id in self._byte_ids:
            return token
        if self._letters is None:
            return token.replace("▁", " ")
        try:
            return bytes(self._letters[letter] for letter in token).decode(
                errors="backslashreplace"
            )
        except KeyError:
            return token

    @property
    def has_chat_template(self) -> bool:
        return self.template is not None

    @property
    def chat_template_source(self) -> str:
        """The file the chat template is from, empty where there is none."""
        return "" if self.template is None else self.template.source

    def render_chat(self, messages: Sequence[Message], system: str | None = None) -> str:
        """Messages (`role`, `content`) as the model was taught to read them, up to its turn."""
        if self.template is None:
            raise MoescopeError("this model has no chat template", hint="raw text (--prompt)")
        first = [{"role": "system", "content": system}] if system is not None else []
        return self.template.render([*first, *messages])


def _absent(checkpoint: Checkpoint) -> MoescopeError:
    found = next((name for name in _OTHER if (checkpoint.folder / name).is_file()), "nothing")
    hint = _HINT
    if found != "nothing":
        hint = "save it once with transformers (AutoTokenizer, save_pretrained), or " + _HINT
    return bad(f"{NAME}: expected a file, found {found}", hint)


def _sanitise(data: bytes, notes: list[str]) -> tuple[dict[str, Any], bytes]:
    """The tokenizer as JSON without what is for training: padding and truncation shape batches, and
    sizes in them can end the process; dropout makes ids random."""
    parsed = parse_object(data, NAME)
    model = parsed.get("model")
    parts = ((parsed, "padding"), (parsed, "truncation"), (model, "dropout"))
    dropped = [(part, name) for part, name in parts if isinstance(part, dict) and part.get(name)]
    if not dropped:
        return parsed, data.removeprefix(b"\xef\xbb\xbf")
    for part, name in dropped:
        part[name] = None
    notes.append(f"{NAME}: {', '.join(name for _, name in dropped)} left out; for training only")
    return parsed, json.dumps(parsed).encode()


def _check_in_child(clean: bytes) -> None:
    key = hashlib.sha256(clean).hexdigest()
    if key not in _verdicts:
        answer = guarded.run(
            "tokenizer",
            clean,
            seconds=LIMITS.tokenizer_seconds,
            memory=LIMITS.tokenizer_memory,
        )
        _verdicts[key] = answer.trouble
    if _verdicts[key]:
        raise bad(f"{NAME}: the tokenizer failed: {_verdicts[key]}", _HINT)


def _load(clean: bytes) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_str(clean.decode())


def _guard(what: str, call: Callable[[], T]) -> T:
    """Call into the library; its panics, which are no Exception, become errors of ours."""
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        text = single_line(str(error) or type(error).__name__, 300)
        raise bad(f"{NAME}: {what}: the tokenizer failed: {text}", _HINT) from None


def _check_ids(vocabulary: Mapping[str, int], rows: int | None) -> None:
    if not vocabulary:
        raise bad(f"{NAME}: vocab: expected at least one token, found none")
    token = max(vocabulary, key=vocabulary.__getitem__)
    if rows is not None and vocabulary[token] >= rows:
        raise bad(
            f"{NAME}: vocab: {shown(token, 40)}: expected an id 0..{rows - 1} (embedding rows), "
            f"found {vocabulary[token]}",
            "the tokenizer is of another model; download both again",
        )


def _kinds(part: Any) -> set[str]:
    """The types of a decoder and of those inside it."""
    kinds: set[str] = set()
    parts = [part]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            kinds.add(str(part.get("type")))
            parts += part.values()
        elif isinstance(part, list):
            parts += part
    return kinds


def _byte_letters() -> dict[str, int]:
    """Byte-level vocabularies write bytes as letters: printable Latin-1 as itself, the others in
    order from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = {chr(byte): byte for byte in plain}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _end_ids(
    checkpoint: Checkpoint,
    settings: Mapping[str, Any],
    vocabulary: Mapping[str, int],
    rows: int | None,
    notes: list[str],
) -> tuple[int, ...]:
    """The ids that end a text: of the first file that names any, as transformers decides."""
    generation = checkpoint.json("generation_config.json") or {}
    text_config = checkpoint.config.get("text_config")
    end_token = special_tokens(settings).get("eos_token", "")
    for file, value in (
        ("generation_config.json", generation.get("eos_token_id")),
        ("config.json", checkpoint.config.get("eos_token_id")),
        ("config.json", text_config.get("eos_token_id") if isinstance(text_config, dict) else None),
        (SETTINGS, vocabulary.get(end_token)),
    ):
        listed = value if isinstance(value, list) else [] if value is None else [value]
        most = 2**32 if rows is None else rows
        ids = [number for number in listed if type(number) is int and 0 <= number < most]
        if len(ids) != len(listed):
            notes.append(f"{file}: eos_token_id: expected ids below {most}, found {shown(value)}")
        if ids:
            return tuple(dict.fromkeys(ids))
    notes.append("no end token is known; generation stops at its length")
    return ()
