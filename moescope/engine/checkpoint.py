"""A checkpoint folder as published: its config, and its tensors by name.

`Checkpoint.open` checks everything that can be checked without reading weights: the config, the
index, and the header of every shard, so that a fault shows before the first gigabyte is read.
Which tensor means what is `families/`'s, quantised layouts stand beside this file, tokenizers in
`tokenizer.py`. Nothing in the folder is ever imported, unpickled or executed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from moescope.demo import CHECKPOINT
from moescope.engine import hub_cache, tensors
from moescope.engine.config import bad, parse_object
from moescope.engine.files import (
    names_in,
    open_member,
    pread,
    pread_into,
    read_member,
    resolve_folder,
)
from moescope.engine.header import Header, TensorInfo, read_header
from moescope.engine.quantised.scheme import MODELOPT_FILE
from moescope.engine.shards import foreign_weights, list_shards
from moescope.safety import LIMITS, single_line

if TYPE_CHECKING:
    import torch

_SAMPLES, _SAMPLE_BYTES = 16, 4096  # of each shard, for its hash
_CODE = ".py"
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Shard:
    """One open file of weights."""

    name: str
    descriptor: int
    found: os.stat_result  # when it was opened
    header: Header


@dataclass(eq=False)
class Checkpoint:
    """An open checkpoint. `notes` are warnings for the user; close it when the model is loaded."""

    name: str
    folder: Path
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    notes: list[str]
    shards: Mapping[str, Shard] = field(default_factory=dict)

    @classmethod
    def open(cls, path_or_hub_name: str | Path, *, weights: bool = True) -> Checkpoint:
        """Open a folder, or an `org/name` that is in the local Hub cache.

        With `weights=False` a folder without weights will do; weights that are there are checked
        all the same. Raises MoescopeError naming file and field for whatever is wrong.
        """
        folder = locate(path_or_hub_name)
        data = read_member(folder, "config.json", LIMITS.config_bytes)
        if data is None:
            raise foreign_weights(folder, names_in(folder)) or bad(
                f"{single_line(str(folder), 300)}: config.json: expected a file, found nothing",
                "give the folder of a model as published: config.json and *.safetensors",
            )
        config = parse_object(data, "config.json")
        beside = read_member(folder, MODELOPT_FILE, LIMITS.config_bytes)
        if beside is not None:
            config[MODELOPT_FILE] = parse_object(beside, MODELOPT_FILE)
        notes = _code_notes(folder, config)
        names = list_shards(folder, notes, required=weights)
        checkpoint = cls(hub_cache.name_of(folder), folder, config, {}, notes)
        opened: dict[str, Shard] = {}
        try:
            for name in names.files:
                opened[name] = _open_shard(folder, name)
            checkpoint.shards = opened
            checkpoint.tensors = names.merge({n: s.header for n, s in opened.items()}, notes)
        except BaseException:
            checkpoint.shards = opened
            checkpoint.close()
            raise
        return checkpoint

    # --- what it is -------------------------------------------------------------------------

    @property
    def quantisation(self) -> dict[str, Any] | None:
        """The config's own words on how weights are packed, None where they are not."""
        for name in ("quantization_config", "quantization"):
            if isinstance(found := self.config.get(name), dict):
                return found
        return None

    @property
    def weights_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def config_hash(self) -> str:
        """sha256 of the config as canonical JSON: spacing and order do not count."""
        text = json.dumps(self.config, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def weights_hash(self) -> str:
        """sha256 over each shard's header and 16 samples of its data; needs the open files.

        Headers alone would call two trainings of one architecture equal; all bytes take minutes.
        """
        digest = hashlib.sha256()
        for name in sorted(self.shards):
            shard = self.shards[name]
            digest.update(shard.header.text)
            start = 8 + len(shard.header.text)
            span = max(shard.found.st_size - start - _SAMPLE_BYTES, 0)
            for sample in range(_SAMPLES if span else 1):
                offset = start + span * sample // (_SAMPLES - 1)
                digest.update(pread(shard.descriptor, _SAMPLE_BYTES, offset, name, short=True))
        return digest.hexdigest() if self.shards else ""

    @cached_property
    def tokenizer_hash(self) -> str:
        """sha256 of tokenizer.json, empty where there is none."""
        data = self.file("tokenizer.json", LIMITS.tokenizer_bytes)
        return "" if data is None else hashlib.sha256(data).hexdigest()

    def file(self, name: str, limit: int = LIMITS.config_bytes) -> bytes | None:
        """The bytes of another file of the folder, None where there is none."""
        return read_member(self.folder, name, limit)

    def json(self, name: str, limit: int = LIMITS.config_bytes) -> dict[str, Any] | None:
        """Another JSON object of the folder, None where there is none."""
        data = self.file(name, limit)
        return None if data is None else parse_object(data, name)

    # --- its numbers ------------------------------------------------------------------------

    def info(self, name: str) -> TensorInfo:
        """What the header says of a tensor, or a MoescopeError that names it."""
        found = self.tensors.get(name)
        if found is None:
            raise bad(f"{self.name}: {single_line(name, 200)}: expected a tensor, found none")
        return found

    def read_bytes(self, name: str, rows: slice | None = None) -> bytearray:
        """The bytes of a tensor, or of some rows of its first dimension."""
        begin, count = _span(self.info(name), rows)
        data = bytearray(count)
        self._fill(name, begin, memoryview(data))
        return data

    def read_torch(
        self,
        name: str,
        *,
        rows: slice | None = None,
        dtype: torch.dtype | str | None = None,
        device: str = "cpu",
        out: torch.Tensor | None = None,
        progress: Progress | None = None,
    ) -> torch.Tensor:
        """A tensor, or some rows of it, as torch has it; converted to `dtype`, placed on `device`.

        `out` is written to instead and returned. Large tensors are read and converted in pieces: no
        more than 64 MiB is held beside the result, and `progress` hears of each piece's bytes.
        """
        begin, _ = _span(self.info(name), rows)
        return tensors.read_torch(
            self.info(name).dtype,
            _shape(self.info(name), rows),
            lambda offset, buffer: self._fill(name, begin + offset, buffer),
            dtype,
            device,
            out,
            progress,
        )

    def non_finite(self, name: str) -> int:
        """How many values of a tensor are NaN or infinite."""
        info, count = self.info(name), 0
        for start in range(0, info.nbytes, tensors.PIECE):
            piece = memoryview(bytearray(min(tensors.PIECE, info.nbytes - start)))
            self._fill(name, info.offset + start, piece)
            count += tensors.non_finite(info.dtype, piece)
        return count

    def _fill(self, name: str, offset: int, buffer: memoryview) -> None:
        shard = self.shards[self.info(name).shard]
        pread_into(shard.descriptor, buffer, offset, shard.name)

    # --- its end ----------------------------------------------------------------------------

    def verify_unchanged(self) -> None:
        """Raise where a file was written to since it was opened; note where it was replaced.

        Called when all is read. Takes `weights_hash` too, which stays after `close`.
        """
        for shard in self.shards.values():
            now, then = os.fstat(shard.descriptor), shard.found
            if (now.st_size, now.st_mtime_ns) != (then.st_size, then.st_mtime_ns):
                raise bad(
                    f"{shard.name}: the file was written to while it was read",
                    "load the model again when nothing writes to it",
                )
            try:
                path = os.stat(self.folder / shard.name)
                replaced = (path.st_dev, path.st_ino) != (then.st_dev, then.st_ino)
            except OSError:
                replaced = True
            if replaced:
                self.notes.append(f"{shard.name}: replaced on disk; the older file was loaded")
        _ = self.weights_hash

    def close(self) -> None:
        """Close the files; headers, config and notes stay."""
        for shard in self.shards.values():
            os.close(shard.descriptor)
        self.shards = {}

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def locate(path_or_hub_name: str | Path) -> Path:
    """The folder a user means."""
    given = str(path_or_hub_name)
    path = Path(os.path.expanduser(given))
    if given == "demo" and not os.path.lexists(path):
        return resolve_folder(CHECKPOINT)
    if not os.path.lexists(path) and hub_cache.is_hub_name(given):
        return resolve_folder(hub_cache.find(given))
    if os.path.isfile(path):
        raise foreign_weights(path.parent, [path.name]) or bad(
            f"{single_line(given, 300)}: expected a folder, found a file",
            f"moescope {single_line(str(path.parent), 300)}",
        )
    return resolve_folder(path)


def _open_shard(folder: Path, name: str) -> Shard:
    descriptor, found = open_member(folder, name)
    try:
        return Shard(name, descriptor, found, read_header(descriptor, found.st_size, name))
    except BaseException:
        os.close(descriptor)
        raise


def _code_notes(folder: Path, config: dict[str, Any]) -> list[str]:
    """A note where the folder brings code, which other programs might run."""
    code = [name for name in names_in(folder) if name.endswith(_CODE)]
    if not code and "auto_map" not in config:
        return []
    found = single_line(", ".join(code[:3]), 120) if code else "auto_map in config.json"
    return [f"this folder contains code ({found}); moescope never runs it"]


def _span(info: TensorInfo, rows: slice | None) -> tuple[int, int]:
    """Where in the file, and how many bytes."""
    if rows is None:
        return info.offset, info.nbytes
    start, stop = _row_range(info, rows)
    return info.offset + start * info.row_bytes, (stop - start) * info.row_bytes


def _shape(info: TensorInfo, rows: slice | None) -> tuple[int, ...]:
    if rows is None:
        return info.shape
    start, stop = _row_range(info, rows)
    return (stop - start, *info.shape[1:])


def _row_range(info: TensorInfo, rows: slice) -> tuple[int, int]:
    assert info.shape and rows.step in (None, 1), "rows are a plain slice of the first dimension"
    start, stop, _ = rows.indices(info.shape[0])
    return start, max(start, stop)
