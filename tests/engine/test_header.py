"""Headers of safetensors: what is wrong is named, and what passes every reader reads alike."""

from __future__ import annotations

import json
import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError, deserialize

from moescope.engine import header
from moescope.engine.checkpoint import Checkpoint
from moescope.engine.header import ITEM_BYTES, check_header, header_length
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import LIMITS, printable

Entries = dict[str, Any]
GOOD: Entries = {
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "I64", "shape": [0, 5], "data_offsets": [32, 32]},
    "scalar": {"dtype": "F16", "shape": [], "data_offsets": [32, 34]},
}


def assemble(entries: Entries | str | bytes, data: int | bytes = 34) -> bytes:
    """A file with this header and so many bytes of data."""
    text = json.dumps(entries) if isinstance(entries, dict) else entries
    raw = text.encode() if isinstance(text, str) else text
    return len(raw).to_bytes(8, "little") + raw + (bytes(data) if isinstance(data, int) else data)


def changed(name: str, **fields: Any) -> Entries:
    """`GOOD` with some fields of one tensor changed."""
    return {**GOOD, name: {**GOOD[name], **fields}}


def check(data: bytes) -> Any:
    length = header_length(data[:32], len(data), "x.safetensors")
    return check_header(data[8 : 8 + length], len(data), "x.safetensors")


def test_a_good_file_reads_as_the_library_reads_it() -> None:
    data = assemble({"__metadata__": {"format": "pt"}, **GOOD}, bytes(range(34)))
    mine = check(data)
    assert mine.metadata == {"format": "pt"}
    for name, found in deserialize(data):
        info = mine.tensors[name]
        assert (info.dtype, list(info.shape)) == (found["dtype"], found["shape"])
        assert data[info.offset : info.offset + info.nbytes] == bytes(found["data"])


def test_metadata_of_null_is_none() -> None:
    """As MLX saves a file without any; the library reads it too."""
    data = assemble({"__metadata__": None, **GOOD}, bytes(range(34)))
    assert check(data).metadata == {}
    assert {name for name, _ in deserialize(data)} == set(GOOD)


def test_every_dtype_of_the_table_has_the_size_the_library_takes() -> None:
    for dtype, size in ITEM_BYTES.items():
        data = assemble(
            {"x": {"dtype": dtype, "shape": [3], "data_offsets": [0, 3 * size]}}, 3 * size
        )
        check(data)
        assert len(deserialize(data)) == 1


def test_a_length_that_looks_like_a_pickle_is_only_a_length() -> None:
    data = assemble(json.dumps(GOOD).ljust(0x0280))
    assert data.startswith(b"\x80\x02")
    assert len(check(data).tensors) == 4


HUGE = 2**64 - 1
WRONG: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "at least 10 bytes, found 0"),
    "seven bytes": (b"1234567", "at least 10 bytes"),
    "length 0": (bytes(8) + b"{}", "header length: expected 2..2, found 0"),
    "length past the end": ((99).to_bytes(8, "little") + b"{}", "found 99 in a file of 10 bytes"),
    "length 2^64-1": (HUGE.to_bytes(8, "little") + b"{}  ", f"found {HUGE}"),
    "length 2^63": ((2**63).to_bytes(8, "little") + b"{}  ", f"found {2**63}"),
    "leading space": (assemble(" " + json.dumps(GOOD)), "expected to start with {"),
    "not JSON": (assemble("{nonsense}", 0), "header: line 1 column 2"),
    "bytes after JSON": (assemble(json.dumps(GOOD) + "x"), "expected the end of the file"),
    "a list": (assemble("[1, 2, 3]", 0), "expected to start with {"),
    "cut short": (assemble(GOOD, 30), "file size: expected"),
    "trailing bytes": (assemble(GOOD, 35), "bytes after the tensors"),
    "overlap": (
        assemble(changed("b.weight", data_offsets=[20, 28]), 28),
        "b.weight.data_offsets: expected begin 24, found 20 (overlap)",
    ),
    "gap": (assemble(changed("b.weight", data_offsets=[28, 36]), 38), "found 28 (gap)"),
    "starts late": (
        assemble({"x": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}}, 3),
        "gap",
    ),
    "reversed": (assemble(changed("b.weight", data_offsets=[32, 24])), "expected 8 bytes"),
    "negative": (assemble(changed("a.weight", data_offsets=[-24, 0])), "expected 24 bytes"),
    "past the end": (assemble(changed("scalar", data_offsets=[32, 99])), "expected 2 bytes"),
    "offsets no list": (assemble(changed("scalar", data_offsets="x")), "expected two integers"),
    "offsets as floats": (assemble(changed("scalar", data_offsets=[32.0, 34.0])), "two integers"),
    "three offsets": (assemble(changed("scalar", data_offsets=[32, 33, 34])), "two integers"),
    "negative dimension": (
        assemble(changed("empty", shape=[-1, 0])),
        "empty.shape: expected up to 8",
    ),
    "float dimension": (assemble(changed("empty", shape=[0.0])), "integers in 0..2147483647"),
    "true as dimension": (assemble(changed("scalar", shape=[True])), "scalar.shape"),
    "2^32 + 1": (assemble(changed("empty", shape=[2**32 + 1, 0])), "empty.shape"),
    "2^62 rows of nothing": (assemble(changed("empty", shape=[0, 2**62])), "empty.shape"),
    "strides overflow": (
        assemble(changed("empty", shape=[0, *[2**31 - 1] * 4])),
        "less than 2^62 bytes",
    ),
    "rank 9": (assemble(changed("empty", shape=[0] * 9)), "expected up to 8 integers"),
    "rank 1000": (assemble(changed("empty", shape=[0] * 1000)), "found a list of 1000"),
    "shape null": (assemble(changed("empty", shape=None)), "found null"),
    "unknown dtype": (
        assemble(changed("a.weight", dtype="F33")),
        "a.weight.dtype: expected one of F64",
    ),
    "dtype in small letters": (assemble(changed("a.weight", dtype="f32")), 'found "f32"'),
    "half a byte": (
        assemble({"x": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, 1),
        '"F4"',
    ),
    "dtype a list": (assemble(changed("a.weight", dtype=["F32"])), "a.weight.dtype"),
    "a field more": (assemble(changed("a.weight", x=1)), "expected dtype, shape and data_offsets"),
    "a field less": (assemble({"x": {"dtype": "F32", "shape": [1]}}, 4), "found dtype, shape"),
    "entry no object": (assemble({"x": [1]}, 4), "x: expected dtype, shape"),
    "the same name twice": (
        assemble('{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"y":[],"x":1}', 1),
        "x: expected one entry, found",
    ),
    "the same field twice": (
        assemble('{"x":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', 1),
        "dtype: expected one entry, found 2",
    ),
    "escape in a name": (assemble({"a\x1b[2J": GOOD["scalar"]}, 2), "a\\x1b[2J"),
    "NUL in a name": (assemble({"a\0b": GOOD["scalar"]}, 2), "printable ASCII"),
    "bidi in a name": (assemble({"a\u202eb": GOOD["scalar"]}, 2), "a<U+202E>b"),
    "accent in a name": (assemble({"é": GOOD["scalar"]}, 2), "printable ASCII"),
    "no name": (assemble({"": GOOD["scalar"]}, 2), "expected 1..512"),
    "a long name": (assemble({"n" * 70_000: GOOD["scalar"]}, 2), "expected 1..512"),
    "metadata of numbers": (assemble({"__metadata__": {"a": 1}}, 0), "an object of strings"),
    "metadata no object": (assemble({"__metadata__": "x"}, 0), "an object of strings"),
    "deep": (assemble('{"x":' + "[" * 5000 + "]" * 5000 + "}", 0), "levels of nesting"),
    "very deep": (assemble('{"x":' + "[" * 200_000, 0), "levels of nesting"),
    "many digits": (assemble('{"x":' + "9" * 5000 + "}", 0), "integers of fewer digits"),
    "infinite": (assemble('{"x":1e999}', 0), "x: expected a finite number"),
    "not UTF-8": (assemble(b'{"\xff":1}', 0), "expected UTF-8"),
    "a zip": (b"PK\x03\x04" + bytes(60), "does not open those"),
    "a pickle": (b"\x80\x02}q\x00." + bytes(60), "does not open those"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(60), "found GGUF"),
    "gzip": (b"\x1f\x8b\x08\x00" + bytes(60), "found gzip"),
    "an LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS"),
    "a web page": (b"<!DOCTYPE html><html>" + bytes(20), "found a web page"),
    "zip inside": ((40).to_bytes(8, "little") + b"PK\x03\x04" + bytes(60), "zip archive"),
}


@pytest.mark.parametrize("data, message", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_named(data: bytes, message: str) -> None:
    with pytest.raises(MoescopeError) as caught:
        check(data)
    assert message in caught.value.message
    assert caught.value.message.startswith("x.safetensors: ")
    assert caught.value.message == printable(caught.value.message)
    assert len(caught.value.message) < 400
    assert caught.value.code in (ExitCode.CHECKPOINT, ExitCode.REFUSED)


def test_a_file_cut_anywhere_is_refused() -> None:
    data = assemble(GOOD)
    for length in range(len(data)):
        with pytest.raises(MoescopeError):
            check(data[:length])


def test_limits_of_count_and_size_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {str(n): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(9)}
    data = assemble(entries, 0)
    assert len(check(data).tensors) == 9
    monkeypatch.setattr(header, "LIMITS", replace(LIMITS, tensors_per_shard=8))
    with pytest.raises(MoescopeError, match="expected at most 8 tensors, found 9"):
        check(data)
    monkeypatch.setattr(header, "LIMITS", replace(LIMITS, header_bytes=99))
    with pytest.raises(MoescopeError, match=r"header length: expected 2\.\.99"):
        check(data)


# --- mutants --------------------------------------------------------------------------------------

VALUES = [
    *(None, True, 0, 1, -1, 7, 2**31, 2**32 + 1, 2**62, 2**64, 10**30, 0.0, 1.5, "", "8", "F32"),
    *("BF16", "\x1b]0;x\x07", "é", [], {}, [0], [2, 3], [0, 0], [-1], [[0]], {"dtype": "F32"}),
]


def mutate_structure(rng: random.Random) -> bytes:
    """Change, drop, add or repeat something in the header's JSON."""
    entries: Entries = json.loads(json.dumps(GOOD))
    for _ in range(rng.randint(1, 2)):
        name = rng.choice(sorted(entries))
        entry = entries[name]
        kind = rng.randrange(10)
        if kind == 0:
            entries[name] = rng.choice(VALUES)
        elif kind == 1 and isinstance(entry, dict) and entry:
            entry[rng.choice(sorted(entry))] = rng.choice(VALUES)
        elif kind == 2 and isinstance(entry, dict) and entry:
            del entry[rng.choice(sorted(entry))]
        elif kind == 3 and isinstance(entry, dict):
            offsets = [rng.choice([0, 24, 32, 34, 33, 2**40]) for _ in range(2)]
            entry["data_offsets"] = offsets
        elif kind == 4 and isinstance(entry, dict):
            entry["shape"] = [rng.choice([0, 1, 2, 3, 4, 6]) for _ in range(rng.randint(0, 4))]
        elif kind == 5:
            entries[rng.choice(["__metadata__", "\x1b", "n" * 600, "a b"])] = rng.choice(VALUES)
        elif kind == 6:
            entries[name + "2"] = json.loads(json.dumps(entry))
        elif kind == 7:
            entries = dict(rng.sample(sorted(entries.items()), len(entries)))
        elif kind == 8 and name in GOOD and isinstance(entry, dict):
            entry["dtype"] = rng.choice(sorted(ITEM_BYTES))
        else:
            entries["renamed." + name] = entries.pop(name)
    text = json.dumps(entries, ensure_ascii=rng.random() < 0.5)
    if rng.random() < 0.1:
        text = text.replace("}", "}" + rng.choice([" ", ",", "}", "\n"]), 1)
    return assemble(text, rng.choice([34, 34, 34, 34, 33, 35, 0]))


def mutate_bytes(rng: random.Random) -> bytes:
    """Change, insert, drop or cut some bytes of a good file."""
    data = bytearray(assemble({"__metadata__": {"format": "pt"}, **GOOD}))
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(data))
        kind = rng.randrange(5)
        if kind == 0:
            data[place] = rng.randrange(256)
        elif kind == 1:
            data[place:place] = rng.choice([b"\x1b", b"9", b"[", b'"', b"\xff", b"-", b"e9"])
        elif kind == 2:
            del data[place : place + rng.randint(1, 4)]
        elif kind == 3:
            data[:8] = rng.choice([0, 1, 2, 8, 300, 2**20, 2**63, 2**64 - 1]).to_bytes(8, "little")
        else:
            data = data[: max(place, 1)]
    return bytes(data)


def test_2000_mutated_headers_give_a_clear_error_or_a_file_every_reader_reads_alike(
    tmp_path: Path,
) -> None:
    rng = random.Random(20)
    (tmp_path / "config.json").write_text("{}")
    file = os.open(tmp_path / "model.safetensors", os.O_CREAT | os.O_RDWR)
    accepted, slowest = 0, 0.0
    for number in range(2000):
        data = (mutate_structure if number % 2 else mutate_bytes)(rng)
        os.pwrite(file, data, 0)
        os.ftruncate(file, len(data))
        started = time.perf_counter()
        try:
            with Checkpoint.open(tmp_path) as checkpoint:
                found = {name: checkpoint.read_bytes(name) for name in checkpoint.tensors}
                tensors = dict(checkpoint.tensors)
        except MoescopeError as error:
            assert error.message.startswith("model.safetensors: ")
            assert error.message == printable(error.message) and len(error.message) < 400
            assert error.code in (ExitCode.CHECKPOINT, ExitCode.REFUSED)
        else:
            accepted += 1
            try:
                expected = dict(deserialize(data))
            except SafetensorError as error:
                pytest.fail(f"the library refuses what we accept: {error}: {data!r}")
            assert expected.keys() == found.keys()
            for name, entry in expected.items():
                assert (tensors[name].dtype, list(tensors[name].shape)) == (
                    entry["dtype"],
                    entry["shape"],
                )
                assert bytes(entry["data"]) == bytes(found[name])
        slowest = max(slowest, time.perf_counter() - started)
    os.close(file)
    assert accepted > 50
    assert slowest < 0.5  # about 1 ms; the rest is for a busy machine
