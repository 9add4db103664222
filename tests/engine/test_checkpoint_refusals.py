"""Where a checkpoint may be and what is not opened: the Hub cache, other formats, code, files that
change."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from moescope.engine.checkpoint import Checkpoint
from moescope.errors import ExitCode, MoescopeError
from tests.engine.folders import CONFIG, TWO, error_of, write_model, write_shards

# --- the Hub cache --------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache with one model, laid out as the Hub's own tools lay it out."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--tiny-moe"
    snapshot = repository / "snapshots" / COMMIT
    write_model(tmp_path / "plain")
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted((tmp_path / "plain").iterdir())):
        file.rename(repository / "blobs" / f"{number:064}")
        os.symlink(f"../../blobs/{number:064}", snapshot / file.name)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    return cache


def test_a_model_of_the_hub_cache_opens_by_name(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoint.open("org/tiny-moe") as checkpoint:
        assert checkpoint.name == "org/tiny-moe"
        assert checkpoint.read_torch("w").shape == (3, 4)
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.setenv("HF_HOME", str(cache.parent))
    Checkpoint.open("org/tiny-moe").close()
    reference = cache / "models--org--tiny-moe" / "refs" / "main"
    reference.write_text("")
    Checkpoint.open("org/tiny-moe").close()
    reference.unlink()
    Checkpoint.open("org/tiny-moe").close()


@pytest.mark.parametrize("commit", ["../../../../etc", "x" * 40, COMMIT[:-1] + "0\n../x"])
def test_a_reference_that_is_no_commit_leads_nowhere(cache: Path, commit: str) -> None:
    (cache / "models--org--tiny-moe" / "refs" / "main").write_text(commit)
    assert error_of("org/tiny-moe").code == ExitCode.CHECKPOINT


def test_a_model_that_is_not_there_says_how_to_get_it(cache: Path) -> None:
    error = error_of("org/other")
    assert "org/other: no such folder, and not in the Hub cache" in error.message
    assert error.hint == "hf download org/other"
    assert "No such file" in error_of("/nowhere/at/all/x").message


def test_links_to_the_blobs_of_another_repository_are_refused(cache: Path) -> None:
    other = cache / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "x").write_text("{}")
    config = cache / "models--org--tiny-moe" / "snapshots" / COMMIT / "config.json"
    config.unlink()
    os.symlink(other / "x", config)
    error = error_of("org/tiny-moe")
    assert error.code == ExitCode.REFUSED and "found a link to" in error.message


# --- refusals -------------------------------------------------------------------------------------

FOREIGN = {
    "pytorch_model.bin": (ExitCode.REFUSED, "does not open .bin files, which can run code"),
    "model.pt": (ExitCode.REFUSED, "does not open .pt files"),
    "consolidated.00.pth": (ExitCode.REFUSED, "does not open .pth files"),
    "last.ckpt": (ExitCode.REFUSED, "does not open .ckpt files"),
    "weights.pkl": (ExitCode.REFUSED, "does not open .pkl files"),
    "model-Q4_K_M.gguf": (ExitCode.CHECKPOINT, "expected safetensors, found GGUF"),
    "adapter_model.safetensors": (ExitCode.CHECKPOINT, "found an adapter"),
    "consolidated.safetensors": (ExitCode.CHECKPOINT, "found Mistral's"),
}


@pytest.mark.parametrize("file", FOREIGN)
@pytest.mark.parametrize("with_config", [True, False])
def test_other_formats_are_refused_by_name(tmp_path: Path, file: str, with_config: bool) -> None:
    code, message = FOREIGN[file]
    (tmp_path / file).write_bytes(b"anything")
    if with_config:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    for given in (tmp_path, tmp_path / file):
        error = error_of(given)
        assert error.code == code and message in error.message and error.hint
        assert file in error.message


def test_a_folder_without_weights_is_for_inspection_only(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert "expected *.safetensors, found none" in error_of(tmp_path).message
    checkpoint = Checkpoint.open(tmp_path, weights=False)
    assert checkpoint.notes == ["no weights in this folder"] and not checkpoint.tensors
    assert "config.json: expected a file" in error_of(tmp_path / "..").message
    assert "expected a folder, found a file" in error_of(tmp_path / "config.json").message


ODD_PATHS = {
    "nobody": "~nobody-here/x",
    "NUL": "a\0b",
    "long": "x" * 5000,
    "device": "/dev/null",
    "escape": "\x1b[2J/a",
    "no UTF-8": "\udcff",
}


@pytest.mark.parametrize("given", ODD_PATHS.values(), ids=ODD_PATHS)
def test_odd_paths_are_errors(given: str) -> None:
    error_of(given)


def test_a_folder_that_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Any) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    write_model(tmp_path)
    monkeypatch.setattr(os, "listdir", denied)
    assert "Permission denied" in error_of(tmp_path).message


def test_code_in_the_folder_is_noted(tmp_path: Path) -> None:
    write_model(tmp_path, CONFIG | {"auto_map": {"AutoModel": "modeling_x.M"}})
    (tmp_path / "modeling_x.py").write_text("raise SystemExit")
    with Checkpoint.open(tmp_path) as checkpoint:
        assert checkpoint.notes == [
            "this folder contains code (modeling_x.py); moescope never runs it"
        ]


WATCH = """
import os, sys
sys.dont_write_bytecode = True
import numpy, torch
from moescope.engine import families, guarded
from moescope.engine.checkpoint import Checkpoint
from moescope.engine.tokenizer import Tokenizer
import tokenizers
folder = os.path.realpath(sys.argv[1])
own = tuple({sys.prefix, sys.base_prefix, os.path.dirname(os.path.dirname(guarded.__file__))})
seen = []
def watch(event, arguments):
    if event == "open":
        path = os.path.realpath(str(arguments[0]))
        if isinstance(arguments[0], int) or path.startswith(own) or path == os.devnull:
            return
        if not path.startswith(folder) or path.endswith((".py", ".pyc", ".bin", ".pkl")):
            seen.append((event, path))
    elif event in ("socket.connect", "os.system", "pickle.find_class", "os.remove", "os.rename"):
        seen.append((event, arguments))
    elif event == "subprocess.Popen" and arguments[0] != sys.executable:
        seen.append((event, arguments))
sys.addaudithook(watch)
with Checkpoint.open(folder) as checkpoint:
    families.build(checkpoint.config, "float32")
    for name in checkpoint.tensors:
        checkpoint.read_torch(name)
    tokenizer = Tokenizer.open(checkpoint, 264)
    tokenizer.decode(tokenizer.encode("hello"))
    tokenizer.render_chat([{"role": "user", "content": "x"}])
    checkpoint.verify_unchanged()
print(seen)
"""


def test_nothing_of_the_folder_is_run_and_nothing_outside_is_opened(tmp_path: Path) -> None:
    from tests.tiny import write_tokenizer

    write_model(tmp_path, CONFIG | {"auto_map": {"AutoConfig": "canary.C"}, "model_file": "canary"})
    write_tokenizer(tmp_path)
    canary = "import pathlib; pathlib.Path(__file__).with_name('ran').write_text('x')"
    for name in ("canary.py", "tokenizer.py", "torch.py", "sitecustomize.py", "__init__.py"):
        (tmp_path / name).write_text(canary)
    (tmp_path / "training_args.bin").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    done = subprocess.run(
        [sys.executable, "-c", WATCH, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
    assert not (tmp_path / "ran").exists()


# --- files that change ----------------------------------------------------------------------------


def test_a_file_written_to_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    with Checkpoint.open(write_model(tmp_path)) as checkpoint:
        checkpoint.verify_unchanged()
        file = tmp_path / "model.safetensors"
        data = file.read_bytes()
        with file.open("r+b") as handle:
            handle.write(data[:-1] + b"x")
        os.utime(file, ns=(1, 1))
        with pytest.raises(MoescopeError, match="written to while it was read"):
            checkpoint.verify_unchanged()
        os.truncate(file, len(data) - 20)
        with pytest.raises(MoescopeError, match="cut short"):
            checkpoint.read_torch("w")


def test_a_file_replaced_meanwhile_is_a_note(tmp_path: Path) -> None:
    with Checkpoint.open(write_model(tmp_path)) as checkpoint:
        save_file({"w": torch.zeros(1)}, tmp_path / "new")
        os.replace(tmp_path / "new", tmp_path / "model.safetensors")
        assert checkpoint.read_torch("w").sum() == 66
        checkpoint.verify_unchanged()
        assert checkpoint.notes == [
            "model.safetensors: replaced on disk; the older file was loaded"
        ]
    assert len(checkpoint.weights_hash) == 64  # taken before the files were closed


def test_descriptors_are_closed_whatever_happens(tmp_path: Path) -> None:
    write_shards(tmp_path)
    (tmp_path / TWO).write_bytes(b"rubbish")
    before = len(os.listdir("/dev/fd"))
    for _ in range(5):
        error_of(tmp_path)
        with Checkpoint.open(write_model(tmp_path / "good")):
            pass
    assert len(os.listdir("/dev/fd")) == before
