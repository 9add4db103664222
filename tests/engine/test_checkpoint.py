"""Checkpoint folders: what is read is what was written, and what is wrong is refused by name."""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moescope.engine import families, tensors
from moescope.engine.checkpoint import Checkpoint
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import printable
from tests.engine.folders import CONFIG, INDEX, ONE, TWO, error_of, write_model, write_shards

# --- reading --------------------------------------------------------------------------------------

STORED = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32),
    *(torch.int16, torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2),
    torch.uint32,
]


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    values = torch.randn(7, 5, 3) * 20
    wanted = {str(dtype): values.abs().to(dtype) for dtype in STORED}
    wanted |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4)}
    write_model(tmp_path)
    save_file(wanted, tmp_path / "model.safetensors")
    return tmp_path, wanted


@pytest.mark.parametrize("piece", [tensors.PIECE, 16])
def test_what_is_read_is_what_was_written(
    mixed: tuple[Path, dict[str, torch.Tensor]], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensors, "PIECE", piece)
    folder, wanted = mixed
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.tensors.keys() == wanted.keys()
        assert checkpoint.weights_bytes == sum(tensor.nbytes for tensor in wanted.values())
        for name, tensor in wanted.items():
            read: list[int] = []
            found = checkpoint.read_torch(name, progress=read.append)
            assert found.dtype == tensor.dtype and found.shape == tensor.shape
            assert sum(read) == tensor.nbytes
            raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
            assert found.reshape(-1).view(torch.uint8).numpy().tobytes() == raw
            assert checkpoint.read_bytes(name) == raw
            if tensor.dtype.is_floating_point:
                assert torch.equal(checkpoint.read_torch(name, dtype="float32"), tensor.float())
            if tensor.ndim == 3 and tensor.dtype.is_floating_point:
                rows = checkpoint.read_torch(name, rows=slice(2, 5), dtype=torch.float32)
                assert torch.equal(rows, tensor[2:5].float())
                wide = torch.zeros(7, 9, 3)
                checkpoint.read_torch(name, out=wide[:, 2:7])
                assert torch.equal(wide[:, 2:7], tensor.float())
                assert not wide[:, :2].any() and not wide[:, 7:].any()


def test_a_byte_of_a_bool_is_true_or_false(tmp_path: Path) -> None:
    write_model(tmp_path)
    save_file({"mask": torch.tensor([0, 1, 2, 255], dtype=torch.uint8)}, tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes().replace(b'"U8"', b'"BOOL"', 1)
    header = data[8:].split(b"}}")[0].strip() + b"}}"
    data = len(header).to_bytes(8, "little") + header + bytes([0, 1, 2, 255])
    (tmp_path / "x.safetensors").unlink()
    (tmp_path / "model.safetensors").write_bytes(data)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.read_torch("mask").tolist() == [False, True, True, True]


def test_values_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    write_model(tmp_path)
    values = torch.arange(200.0)
    values[[3, 50, 199]] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2)
    wanted = {str(dtype): values.to(dtype) for dtype in floats}
    wanted["integers"] = torch.full((9,), -1)
    wanted["e4m3"] = torch.tensor([448.0, float("nan"), -448.0]).to(torch.float8_e4m3fn)
    save_file(wanted, tmp_path / "model.safetensors")
    with Checkpoint.open(tmp_path) as checkpoint:
        for name, tensor in wanted.items():
            assert checkpoint.non_finite(name) == int((~tensor.float().isfinite()).sum()), name


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    with (
        Checkpoint.open(write_model(tmp_path)) as checkpoint,
        pytest.raises(MoescopeError, match="not-here: expected a tensor"),
    ):
        checkpoint.read_torch("not-here")


def test_hashes_follow_content_and_not_spelling(tmp_path: Path) -> None:
    write_model(tmp_path / "a")
    write_model(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text(json.dumps(CONFIG, indent=3, sort_keys=True))
    with Checkpoint.open(tmp_path / "a") as a, Checkpoint.open(tmp_path / "b") as b:
        assert a.config_hash == b.config_hash and a.weights_hash == b.weights_hash
        assert a.tokenizer_hash == ""
    save_file({"w": torch.zeros(3, 4)}, tmp_path / "b" / "model.safetensors")
    (tmp_path / "b" / "config.json").write_text(json.dumps(CONFIG | {"clip_qkv": 8.0}))
    with Checkpoint.open(tmp_path / "b") as b:
        assert a.config_hash != b.config_hash and a.weights_hash != b.weights_hash


# --- config.json ----------------------------------------------------------------------------------

BAD_CONFIGS = {
    "empty": (b"", "config.json: line 1 column 1: expected a value"),
    "cut": (b'{"a": 1,\n "b": ', "config.json: line 2 column 7: expected a value"),
    "trailing": (b'{"a": 1} x', "config.json: line 1 column 10: expected the end of the file"),
    "a list": (b"[1, 2]", "config.json: expected an object, found [1, 2]"),
    "UTF-16": ('{"a": 1}'.encode("utf-16"), "config.json: expected UTF-8, found UTF-16"),
    "UTF-16 without mark": ('{"a": 1}'.encode("utf-16-le"), "expected UTF-8, found UTF-16"),
    "UTF-32": ('{"a": 1}'.encode("utf-32"), "config.json: expected UTF-8, found UTF-32"),
    "Latin-1": (b'{"a": "\xe9"}', "config.json: byte 7: expected UTF-8"),
    "twice": (b'{"num_experts": 8, "num_experts": 9}', "num_experts: expected one entry, found 2"),
    "twice inside": (b'{"a": {"b": 1, "b": 1}}', "config.json: b: expected one entry, found 2"),
    "NaN": (b'{"rms_norm_eps": NaN}', "rms_norm_eps: expected a finite number, found NaN"),
    "infinite": (b'{"a": [1, -Infinity]}', "a: expected a finite number, found -Infinity"),
    "1e999": (b'{"a": {"b": 1e999}}', "b: expected a finite number, found 1e999"),
    "digits": (b'{"a": ' + b"9" * 5000 + b"}", "expected integers of fewer digits"),
    "deep": (b'{"a": ' + b"[" * 200_000, "levels of nesting"),
    "deep and whole": (b'{"a": ' + b"[" * 100 + b"]" * 100 + b"}", "at most 64 levels of nesting"),
    "escape in a key": (b'{"\\u001b[2J": 1, "\\u001b[2J": 1}', "\\x1b[2J: expected one entry"),
    "too large": (b" " * (4 << 20) + b"{}", "expected at most 4194304 bytes"),
}


@pytest.mark.parametrize("data, message", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_bad_config_is_named_with_the_place(tmp_path: Path, data: bytes, message: str) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_bytes(data)
    error = error_of(tmp_path)
    assert message in error.message and error.code == ExitCode.CHECKPOINT


def test_a_byte_order_mark_and_written_infinities_are_read(tmp_path: Path) -> None:
    write_model(tmp_path)
    text = '{"a": {"__float__": "Infinity"}, "b": [{"__float__": "-Infinity"}], "c": 1e3}'
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.config == {"a": np.inf, "b": [-np.inf], "c": 1000.0}
        assert len(checkpoint.config_hash) == 64


BAD_VALUES = [
    *(None, True, False, 0, -1, 1.5, 4096.0, 2**31, 2**63, 10**40, -(10**40), 1e308, -1e308),
    *(
        "",
        "8",
        "softmax",
        "\x1b[2J",
        "../x",
        "x" * 10_000,
        [],
        [1],
        {},
        {"a": 1},
        [[]],
        [None] * 99,
    ),
    *({"__float__": "Infinity"}, {"__float__": "NaN"}, {"rope_type": "x"}, {"rope_theta": -1}),
]


def mutate_config(rng: random.Random) -> bytes:
    """Another config: values changed, keys dropped or added, or bytes changed."""
    config: dict[str, Any] = dict(CONFIG)
    config["model_type"] = rng.choice(["olmoe", "qwen3_moe", "mixtral", "qwen2_moe", "flex_olmo"])
    extra = ["num_local_experts", "rope_parameters", "rope_scaling", "sliding_window", "head_dim"]
    extra += ["moe_intermediate_size", "mlp_only_layers", "auto_map", "quantization_config"]
    extra += [
        "shared_expert_intermediate_size",
        "decoder_sparse_step",
        "layer_types",
        "text_config",
    ]
    for _ in range(rng.randint(1, 3)):
        key = rng.choice([*CONFIG, *extra])
        if rng.random() < 0.2:
            config.pop(key, None)
        else:
            config[key] = rng.choice(BAD_VALUES)
    data = bytearray(json.dumps(config).encode())
    if rng.random() < 0.3:
        place = rng.randrange(len(data))
        data[place : place + rng.randint(0, 3)] = rng.choice(
            [b"\xff", b'"', b"}", b"9", b"\x1b", b""]
        )
    return bytes(data)


def test_500_mutated_configs_give_a_clear_error_or_a_decoder(tmp_path: Path) -> None:
    rng = random.Random(5)
    write_model(tmp_path)
    built, slowest = 0, 0.0
    for _ in range(500):
        (tmp_path / "config.json").write_bytes(data := mutate_config(rng))
        started = time.perf_counter()
        try:
            with Checkpoint.open(tmp_path) as checkpoint:
                families.build(checkpoint.config, "float32")
            built += 1
        except MoescopeError as error:
            assert error.message == printable(error.message), data
            assert "\n" not in error.message and len(error.message) < 600, data
            assert error.code in (ExitCode.CHECKPOINT, ExitCode.REFUSED), data
        slowest = max(slowest, time.perf_counter() - started)
    assert 20 < built < 480
    assert slowest < 0.5  # a few ms; the rest is for a busy machine


# --- odd files ------------------------------------------------------------------------------------


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        here = os.open(".", os.O_RDONLY)
        try:  # the name of a socket may have 107 bytes only
            os.chdir(path.parent)
            end.bind(path.name)
        finally:
            os.fchdir(here)
            os.close(here)


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "expected a regular file, found a pipe"),
    "folder": (os.mkdir, "expected a regular file, found a folder"),
    "socket": (make_socket, "expected a regular file, found a socket"),
    "link to zero": (lambda path: os.symlink("/dev/zero", path), "found a link to /dev/zero"),
    "link to outside": (
        lambda path: os.symlink("/etc/passwd", path),
        "found a link to /etc/passwd",
    ),
    "link to itself": (lambda path: os.symlink(path.name, path), "symbolic links"),
    "link to nothing": (lambda path: os.symlink("gone", path), "a link that leads nowhere"),
    "link up": (lambda path: os.symlink("../../x", path), "file"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("file", ["config.json", ONE, INDEX])
@pytest.mark.parametrize("make, message", ODD.values(), ids=ODD)
def test_odd_files_are_named_and_never_hang(
    tmp_path: Path, file: str, make: Callable[[Path], object], message: str
) -> None:
    write_shards(tmp_path)
    (tmp_path / file).unlink()
    make(tmp_path / file)
    error = error_of(tmp_path)
    assert error.message.startswith(f"{file}: ") and message in error.message


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    write_model(tmp_path / "m")
    os.rename(tmp_path / "m" / "model.safetensors", tmp_path / "m" / "data")
    os.symlink("data", tmp_path / "m" / "model.safetensors")
    os.symlink(tmp_path / "m", tmp_path / "alias")
    with Checkpoint.open(tmp_path / "alias") as checkpoint:
        assert checkpoint.read_torch("w").sum() == 66


# --- shards and index -----------------------------------------------------------------------------


def test_two_shards_and_their_index(tmp_path: Path) -> None:
    with Checkpoint.open(write_shards(tmp_path)) as checkpoint:
        assert checkpoint.notes == []
        assert checkpoint.read_torch("v").tolist() == [1.0] * 5
        assert checkpoint.tensors["w"].shard == ONE


BAD_NAMES = [
    *("../x.safetensors", "/etc/passwd", "a/b.safetensors", "C:\\x.safetensors", "a\0.safetensors"),
    *("", ".", "..", "n" * 4000 + ".safetensors", "é.safetensors", "a\x1b.safetensors"),
    *("\u202ex.safetensors", "pytorch_model.bin", "config.json", "\\\\host\\x.safetensors"),
    *(None, 3, ["x"], {"a": 1}),
]


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: ascii(name)[:20])
def test_an_index_names_files_of_the_folder_only(tmp_path: Path, name: Any) -> None:
    index = {"weight_map": {"w": ONE, "v": name}}
    error = error_of(write_shards(tmp_path, index))
    assert error.message.startswith(f'{INDEX}: weight_map["v"]: expected a ')
    assert error.code == ExitCode.REFUSED


BAD_INDEXES = {
    "no map": ({"metadata": {}}, f"{INDEX}: weight_map: expected an object"),
    "empty map": ({"weight_map": {}}, f"{INDEX}: weight_map: expected an object"),
    "map a list": ({"weight_map": ["w"]}, f"{INDEX}: weight_map: expected an object"),
    "missing shard": (
        {"weight_map": {"w": ONE, "v": "model-00003.safetensors", "u": "model-00003.safetensors"}},
        "model-00003.safetensors: missing (named by 2 tensors)",
    ),
    "wrong shard": ({"weight_map": {"w": TWO, "v": TWO}}, f"w: expected in {TWO}, found nowhere"),
    "swapped": ({"weight_map": {"w": TWO, "v": ONE}}, f"w: expected in {TWO}, found in {ONE}"),
    "no such tensor": (
        {"weight_map": {"w": ONE, "v": TWO, "\x1bx": ONE}},
        f"\\x1bx: expected in {ONE}, found nowhere",
    ),
}


@pytest.mark.parametrize("index, message", BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_an_index_that_disagrees_is_refused(tmp_path: Path, index: Any, message: str) -> None:
    assert message in error_of(write_shards(tmp_path, index)).message


def test_a_tensor_in_two_shards_is_named_with_both(tmp_path: Path) -> None:
    write_shards(tmp_path, False)
    save_file({"w": torch.ones(2)}, tmp_path / TWO)
    assert error_of(tmp_path).message == f"w: expected in one shard, found in {ONE} and {TWO}"


def test_oddities_of_an_index_are_notes(tmp_path: Path) -> None:
    index = {"metadata": {"total_size": 9}, "weight_map": {"w": ONE, "v": TWO}}
    write_shards(tmp_path, index)
    save_file({"v": torch.ones(5), "more": torch.ones(1)}, tmp_path / TWO)
    with Checkpoint.open(tmp_path) as checkpoint:
        assert f"{INDEX}: 1 tensors of the shards are not named in it" in checkpoint.notes
        assert f"{INDEX}: total_size says 9, the shards hold 72" in checkpoint.notes


def test_without_an_index_the_map_is_made_from_the_headers(tmp_path: Path) -> None:
    with Checkpoint.open(write_shards(tmp_path, False)) as checkpoint:
        assert sorted(checkpoint.tensors) == ["v", "w"]
        assert checkpoint.notes == [f"{INDEX}: absent; the map was made from 2 shards"]
    (tmp_path / TWO).unlink()
    assert f"{TWO}: missing" in error_of(tmp_path).message


def test_every_shard_is_checked_before_any_is_read(tmp_path: Path) -> None:
    write_shards(tmp_path)
    data = (tmp_path / TWO).read_bytes()
    (tmp_path / TWO).write_bytes(data[:-3])
    error = error_of(tmp_path)
    assert error.message.startswith(f"{TWO}: file size: expected {len(data)} bytes")
    assert error.hint == "download it again"
