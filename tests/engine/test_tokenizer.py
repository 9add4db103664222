"""Tokenizers: streamed text is the decoded text, and a hostile file harms nobody."""

from __future__ import annotations

import copy
import json
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.engine import tokenizer as module
from moescope.engine.checkpoint import Checkpoint
from moescope.engine.tokenizer import Tokenizer
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import LIMITS, printable
from tests.engine.vocabularies import CORPUS, KINDS, byte_level, sentencepiece, with_bos
from tests.tiny import write_tokenizer

Parts = dict[str, Any]


def write(folder: Path, tokenizer: Any, config: Any = None, **files: Any) -> Path:
    """A folder with a config and this tokenizer.json; other files by their stems."""
    (folder / "config.json").write_text(json.dumps(config or {}))
    text = tokenizer if isinstance(tokenizer, str) else json.dumps(tokenizer)
    (folder / "tokenizer.json").write_text(text)
    for stem, value in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(value))
    return folder


def open_folder(folder: Path, rows: int | None = None) -> Tokenizer:
    with Checkpoint.open(folder, weights=False) as checkpoint:
        return Tokenizer.open(checkpoint, rows)


@cache
def opened(kind: str) -> Tokenizer:
    with TemporaryDirectory() as folder:
        return open_folder(write(Path(folder), KINDS[kind]()))


def streamed(tokenizer: Tokenizer, ids: Sequence[int], after: Sequence[int] = ()) -> list[str]:
    stream = tokenizer.stream(after=after)
    return [*(stream.push(number) for number in ids), stream.flush()]


# --- text and ids ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_text_are_the_librarys(kind: str) -> None:
    from tokenizers import Tokenizer as Library

    library, mine = Library.from_str(json.dumps(KINDS[kind]())), opened(kind)
    for text in [*CORPUS[:4], "", " ", "a<s>b</s>"]:
        assert mine.encode(text) == library.encode(text).ids
        assert mine.decode(mine.encode(text)) == library.decode(library.encode(text).ids)
    assert len(mine.hash) == 64


def test_special_tokens_are_the_tokenizers_own(tmp_path: Path) -> None:
    tokenizer = open_folder(write(tmp_path, with_bos(sentencepiece())))
    begin = tokenizer.encode("<s>", special_tokens=False)
    assert tokenizer.encode("the fox")[:1] == begin
    assert tokenizer.encode("the fox", special_tokens=False) == tokenizer.encode("the fox")[1:]
    assert tokenizer.decode(tokenizer.encode("the fox")) == "the fox"
    assert tokenizer.decode(begin, special_tokens=True) == "<s>"


def test_a_prompt_that_is_too_long_or_no_text_is_refused() -> None:
    with pytest.raises(MoescopeError, match="expected at most"):
        opened("byte level").encode("x" * (LIMITS.encode_chars + 1))
    with pytest.raises(MoescopeError, match="prompt: character 1: expected valid Unicode"):
        opened("byte level").encode("a\udcff")


def test_one_id_for_display() -> None:
    tokenizer = opened("byte level")
    assert [tokenizer.piece(n) for n in tokenizer.encode("€\x1b")] == [
        "\\xe2",
        "\\x82",
        "\\xac",
        "\\x1b",
    ]
    assert tokenizer.piece(tokenizer.encode("</s>")[0]) == "</s>"
    assert tokenizer.piece(9999) == "<unused 9999>" and tokenizer.piece(-1) == "<unused -1>"
    tokenizer = opened("sentencepiece")
    assert [tokenizer.piece(n) for n in tokenizer.encode("the\n")] == [" the", "<0x0A>"]
    for kind in KINDS:
        for number in range(600):
            piece = opened(kind).piece(number)
            assert piece == printable(piece)


# --- streaming ------------------------------------------------------------------------------------

TEXTS = st.text(
    st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("the  ow\n🙂你"))
)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@settings(max_examples=300, deadline=None)
def test_streamed_text_is_the_decoded_text(kind: str, text: str) -> None:
    tokenizer = opened(kind)
    ids = tokenizer.encode(text)
    pieces = streamed(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if kind == "byte level" and "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_any_ids_stream_to_what_they_decode_to(kind: str, data: st.DataObject) -> None:
    tokenizer = opened(kind)
    some = st.one_of(st.integers(0, 12), st.integers(0, 450), st.sampled_from([4 + 0xE4, 4 + 0xBD]))
    ids = data.draw(st.lists(some, max_size=30))
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_stream_goes_on_where_another_stopped(kind: str, data: st.DataObject) -> None:
    tokenizer = opened(kind)
    ids = tokenizer.encode(data.draw(TEXTS))
    cut = data.draw(st.integers(0, len(ids)))
    first = tokenizer.stream()
    before = "".join(first.push(number) for number in ids[:cut])
    assert before + "".join(streamed(tokenizer, ids[cut:], ids[:cut])) == tokenizer.decode(ids)


def test_a_long_run_of_bytes_is_not_held_for_ever() -> None:
    for kind in ("byte level", "sentencepiece"):
        tokenizer = opened(kind)
        text = "🙂" * 100
        ids = tokenizer.encode(text, special_tokens=False)
        stream = tokenizer.stream()
        shown = "".join(stream.push(number) for number in ids)
        assert len(shown) > 80
        assert shown + stream.flush() == tokenizer.decode(ids)
    stream = opened("byte level").stream()
    lone = opened("byte level").encode("你")[0]
    assert len("".join(stream.push(lone) for _ in range(1000))) > 900


def test_streaming_costs_the_same_at_every_length() -> None:
    tokenizer = opened("byte level")
    ids = tokenizer.encode(CORPUS[0] * 200)
    stream = tokenizer.stream()
    started = time.perf_counter()
    for number in ids:
        stream.push(number)
    assert (time.perf_counter() - started) / len(ids) < 1e-3  # about 10 us


# --- end ids and other files ----------------------------------------------------------------------

END_IDS: dict[str, tuple[Parts, Parts, Parts, tuple[int, ...]]] = {
    "generation config first": ({"eos_token_id": 1}, {"eos_token_id": [2, 0, 2]}, {}, (2, 0)),
    "one number": ({}, {"eos_token_id": 2}, {}, (2,)),
    "config": ({"eos_token_id": 1}, {}, {"eos_token": "<s>"}, (1,)),
    "text config": ({"text_config": {"eos_token_id": 2}}, {}, {}, (2,)),
    "by name": ({}, {}, {"eos_token": "</s>"}, (1,)),
    "by object": ({}, {}, {"eos_token": {"content": "<|end|>"}}, (2,)),
    "not in range": ({}, {"eos_token_id": [1, 10**6, -1, "x", True]}, {}, (1,)),
    "none": ({}, {}, {"eos_token": "<nothing>"}, ()),
}


@pytest.mark.parametrize("config, generation, named, expected", END_IDS.values(), ids=END_IDS)
def test_end_ids_come_from_the_first_file_that_names_any(
    tmp_path: Path, config: Parts, generation: Parts, named: Parts, expected: tuple[int, ...]
) -> None:
    files = {"generation_config": generation, "tokenizer_config": named}
    tokenizer = open_folder(write(tmp_path, byte_level(), config, **files), 420)
    assert tokenizer.end_ids == expected
    assert bool(tokenizer.notes) == (expected == () or "x" in str(generation))


def test_no_tokenizer_json_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(MoescopeError, match=r"tokenizer\.json: expected a file, found nothing"):
        open_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(MoescopeError, match=r"found tokenizer\.model") as caught:
        open_folder(tmp_path)
    assert "save_pretrained" in caught.value.hint


def test_the_tokenizer_of_the_tiny_checkpoints_opens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    tokenizer = open_folder(tmp_path, 264)
    assert tokenizer.encode("Aé") == [65, 0xC3, 0xA9]
    assert tokenizer.end_ids == (256,) and tokenizer.has_chat_template


# --- hostile files --------------------------------------------------------------------------------


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One second for a child, so that tests of endless work end soon."""
    monkeypatch.setattr(module, "LIMITS", replace(LIMITS, tokenizer_seconds=1.0))
    yield


def with_parts(**parts: Any) -> Parts:
    return {**byte_level(), **parts}


def with_vocab(vocab: Parts) -> Parts:
    return with_parts(model={**byte_level()["model"], "vocab": vocab, "merges": []})


def expanding() -> Parts:
    step = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1000}
    return {"type": "Sequence", "normalizers": [step] * 4}


PADDING = {
    "strategy": {"Fixed": 4_000_000_000},
    "direction": "Right",
    "pad_to_multiple_of": 2**40,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "</s>",
}
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 99}
SPLIT = {"type": "Split", "behavior": "Isolated", "invert": False}
HOSTILE: dict[str, tuple[Any, str]] = {
    "not JSON": ("{,}", "tokenizer.json: line 1 column 2"),
    "a list": ("[]", "tokenizer.json: expected an object"),
    "empty": ({}, "tokenizer.json: the tokenizer failed: "),
    "a key twice": ('{"model": 1, "model": 2}', "model: expected one entry, found 2"),
    "deep": ('{"a":' * 100_000, "levels of nesting"),
    "unknown model": (with_parts(model={"type": "x"}), "the tokenizer failed: "),
    "empty vocabulary": (
        {**with_vocab({}), "added_tokens": []},
        "vocab: expected at least one token",
    ),
    "id beyond the embedding": (
        with_vocab({**byte_level()["model"]["vocab"], "zz": 4294967295}),
        'vocab: "zz": expected an id 0..499 (embedding rows), found 4294967295',
    ),
    "id beyond 32 bits": (with_vocab({"a": 2**32}), "the tokenizer failed: "),
    "id negative": (with_vocab({"a": -1}), "the tokenizer failed: "),
    "endless normaliser": (with_parts(normalizer=expanding()), "the tokenizer failed: "),
    "template without its token": (
        with_parts(
            post_processor={
                "type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<no>", "type_id": 0}}],
                "pair": [],
                "special_tokens": {},
            }
        ),
        "the tokenizer failed: ",
    ),
    "bad character map": (
        with_parts(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA/w=="}),
        "the tokenizer failed: ",
    ),
    "pattern that backtracks": (
        with_parts(pre_tokenizer={**SPLIT, "pattern": {"Regex": r"(?:a|aa)+\Z"}}),
        "the tokenizer failed: ",
    ),
    "slow normaliser": (
        with_parts(normalizer={"type": "Prepend", "prepend": "x" * 3_000_000}),
        "the tokenizer failed: took longer than 1 s",
    ),
    "escape in a message": (with_parts(model={"type": "\x1b[2J"}), "the tokenizer failed: "),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("tokenizer, message", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_tokenizer_is_an_error_in_time(
    tmp_path: Path, hurried: None, tokenizer: Any, message: str
) -> None:
    started = time.monotonic()
    with pytest.raises(MoescopeError) as caught:
        open_folder(write(tmp_path, tokenizer), 500)
    assert time.monotonic() - started < 6  # its clock stops the child after three
    assert message in caught.value.message
    assert caught.value.message == printable(caught.value.message)
    assert "\n" not in caught.value.message and "panicked" not in caught.value.message
    assert caught.value.code == ExitCode.CHECKPOINT


def test_what_is_for_training_is_left_out(tmp_path: Path) -> None:
    parts = with_parts(padding=PADDING, truncation=TRUNCATION)
    parts["model"]["dropout"] = 0.9
    tokenizer = open_folder(write(tmp_path, parts, {"eos_token_id": 1}))
    assert tokenizer.notes == [
        "tokenizer.json: padding, truncation, dropout left out; for training only"
    ]
    assert tokenizer.encode(CORPUS[0]) == opened("byte level").encode(CORPUS[0])


def test_an_added_token_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    parts = byte_level()
    entry = {**parts["added_tokens"][0], "id": 440, "content": "\x1b]0;owned\x07\u202e"}
    parts["added_tokens"].append(entry)
    tokenizer = open_folder(write(tmp_path, parts))
    (number,) = tokenizer.encode(entry["content"])
    assert tokenizer.piece(number) == "\\x1b]0;owned\\x07<U+202E>"


def test_the_child_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path, with_parts(version="1.0"))
    open_folder(folder)
    monkeypatch.setattr(module.guarded, "run", None)
    open_folder(folder)


def test_a_panic_is_an_error_and_an_interrupt_is_not() -> None:
    class Panic(BaseException):
        pass

    def fail(kind: type[BaseException]) -> None:
        raise kind("thread panicked \x1b[2J")

    with pytest.raises(MoescopeError, match=r"encode: the tokenizer failed: .*\\x1b\[2J"):
        module._guard("encode", lambda: fail(Panic))
    with pytest.raises(KeyboardInterrupt):
        module._guard("encode", lambda: fail(KeyboardInterrupt))


VALUES = [None, True, -1, 2**40, 1.5, "", "\x1b", "▁", [], {}, [None], {"type": "Replace"}]


def mutate(parts: Parts, rng: random.Random) -> Parts:
    """Change one value somewhere in the JSON."""
    parts = copy.deepcopy(parts)
    place: Any = parts
    while True:
        keys = sorted(place) if isinstance(place, dict) else range(len(place))
        key = rng.choice(list(keys))
        if isinstance(place[key], dict | list) and place[key] and rng.random() < 0.8:
            place = place[key]
            continue
        place[key] = rng.choice(VALUES)
        return parts


@pytest.mark.timeout(60)
def test_mutated_tokenizers_give_a_clear_error_or_a_tokenizer(
    tmp_path: Path, hurried: None
) -> None:
    rng = random.Random(3)
    kinds = [byte_level(), with_bos(sentencepiece())]
    opened_well = 0
    for number in range(24):
        write(tmp_path, mutate(kinds[number % 2], rng))
        try:
            tokenizer = open_folder(tmp_path)
            ids = tokenizer.encode("hello, world")
            assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)
            opened_well += 1
        except MoescopeError as error:
            assert error.message == printable(error.message)
    assert 0 < opened_well < 24
