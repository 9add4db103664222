"""Which files of a folder hold its weights, and which tensor is in which.

The index (`model.safetensors.index.json`) is believed where the headers agree with it; without one
the map is made from the headers. Weights in formats moescope does not open are refused by name.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moescope.engine.config import bad, parse_object, shown
from moescope.engine.files import is_plain_name, names_in, read_member, refused
from moescope.engine.header import Header, TensorInfo
from moescope.errors import MoescopeError
from moescope.safety import LIMITS, single_line

INDEX = "model.safetensors.index.json"
_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".keras")


@dataclass(frozen=True, slots=True)
class Shards:
    """The files to open, and what the index says is in them (None without an index)."""

    files: tuple[str, ...]
    weight_map: Mapping[str, str] | None = None
    total_size: Any = None

    def merge(self, headers: Mapping[str, Header], notes: list[str]) -> dict[str, TensorInfo]:
        """All tensors by name, each in one shard, and in the shard the index names."""
        tensors: dict[str, TensorInfo] = {}
        for file, header in headers.items():
            for name, info in header.tensors.items():
                if name in tensors:
                    raise bad(
                        f"{name}: expected in one shard, found in {tensors[name].shard} and {file}"
                    )
                tensors[name] = info
        if self.weight_map is not None:
            self._check_index(tensors, self.weight_map, notes)
        return tensors

    def _check_index(
        self, tensors: dict[str, TensorInfo], weight_map: Mapping[str, str], notes: list[str]
    ) -> None:
        for name, file in weight_map.items():
            found = tensors.get(name)
            if found is None or found.shard != file:
                where = "nowhere" if found is None else f"in {found.shard}"
                raise bad(
                    f"{INDEX}: {single_line(name, 80)}: expected in {file}, found {where}",
                    "download the model again; index and shards are of different versions",
                )
        if extra := len(tensors) - len(weight_map):
            notes.append(f"{INDEX}: {extra} tensors of the shards are not named in it")
        size = sum(info.nbytes for info in tensors.values())
        if self.total_size is not None and self.total_size != size:
            notes.append(
                f"{INDEX}: total_size says {shown(self.total_size)}, the shards hold {size}"
            )


def list_shards(folder: Path, notes: list[str], *, required: bool) -> Shards:
    """Find the weights of `folder`; none are an error only where they are `required`."""
    present = names_in(folder)
    data = read_member(folder, INDEX, LIMITS.index_bytes)
    if data is not None:
        shards = _read_index(parse_object(data, INDEX))
        missing = [file for file in shards.files if file not in present]
        if missing and (required or len(missing) < len(shards.files)):
            assert shards.weight_map is not None
            count = Counter(shards.weight_map.values())[missing[0]]
            others = f"; {len(missing) - 1} more are missing" if len(missing) > 1 else ""
            raise bad(f"{missing[0]}: missing (named by {count} tensors){others}", "download again")
        if not missing:
            return shards
        notes.append("no weights in this folder")
        return Shards(())
    files = _without_index(present)
    if files:
        _check_numbers(files)
        if len(files) > 1:
            notes.append(f"{INDEX}: absent; the map was made from {len(files)} shards")
    elif required:
        raise foreign_weights(folder, present) or bad(
            f"{single_line(str(folder), 300)}: expected *.safetensors, found none",
            "give the folder of a model as published: config.json and *.safetensors",
        )
    else:
        notes.append("no weights in this folder")
    return Shards(tuple(files))


def _read_index(index: dict[str, Any]) -> Shards:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise bad(
            f"{INDEX}: weight_map: expected an object of file names, found {shown(weight_map)}"
        )
    for name, file in weight_map.items():
        if not isinstance(file, str) or not is_plain_name(file):
            raise refused(
                f'{INDEX}: weight_map["{single_line(name, 80)}"]: '
                f"expected a plain file name in the folder, found {shown(file)}"
            )
        if not file.endswith(".safetensors"):
            raise refused(
                f'{INDEX}: weight_map["{single_line(name, 80)}"]: '
                f"expected a .safetensors file, found {shown(file)}"
            )
    files = tuple(sorted(set(weight_map.values())))
    if len(files) > LIMITS.shards:
        raise bad(f"{INDEX}: expected at most {LIMITS.shards} shards, found {len(files)}")
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Shards(files, weight_map, total)


def _without_index(present: Sequence[str]) -> list[str]:
    """The weights among the files of a folder that has no index."""
    if "model.safetensors" in present:
        return ["model.safetensors"]
    found = [name for name in present if name.endswith(".safetensors") and is_plain_name(name)]
    whole = [name for name in found if not name.startswith((".", "consolidated", "adapter"))]
    return whole[: LIMITS.shards]


def _check_numbers(files: Sequence[str]) -> None:
    """`model-00002-of-00003` promises two more."""
    for file in files:
        match = _NUMBERED.fullmatch(file)
        if match is None:
            continue
        count = int(match[3])
        for number in range(1, count + 1):
            expected = f"{match[1]}-{number:05}-of-{match[3]}.safetensors"
            if expected not in files:
                raise bad(f"{expected}: missing ({file} says there are {count})", "download again")


def foreign_weights(folder: Path, present: Sequence[str]) -> MoescopeError | None:
    """The refusal for a folder (or file) whose weights are in another format, by name."""
    by_suffix = {os.path.splitext(name)[1].lower(): name for name in sorted(present, reverse=True)}
    if name := by_suffix.get(".gguf"):
        return bad(
            f"{single_line(name, 120)}: expected safetensors, found GGUF",
            "use the safetensors release that this GGUF was made from",
        )
    for suffix in _PICKLES:
        if name := by_suffix.get(suffix):
            return refused(
                f"{single_line(name, 120)}: expected safetensors; moescope does not open {suffix} "
                "files, which can run code",
                "use a safetensors release of this model",
            )
    for name in sorted(present):
        if name.endswith(".safetensors") and name.startswith("adapter"):
            return bad(
                f"{single_line(name, 120)}: expected a whole model, found an adapter",
                "merge the adapter into its base model first",
            )
        if name.endswith(".safetensors") and name.startswith("consolidated"):
            return bad(
                f"{single_line(name, 120)}: expected a Hugging Face layout, found Mistral's",
                "use the release with model-*.safetensors",
            )
    return None
