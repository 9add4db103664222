"""Finding `org/name` among the models the Hugging Face tools have already downloaded.

Layout: `<cache>/models--org--name/refs/main` holds a commit, `snapshots/<commit>/` its files.
Nothing is ever fetched; a model that is not there is an error that says how to get it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from moescope.engine.config import bad
from moescope.engine.files import read_member, resolve_folder
from moescope.safety import single_line

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_SNAPSHOT = re.compile(r"models--(.+?)--(.+)")


def is_hub_name(text: str) -> bool:
    """Whether `text` reads `org/name`."""
    return _NAME.fullmatch(text) is not None and ".." not in text


def cache_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the Hugging Face tools keep models, by their own variables."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if environ.get(variable):
            return Path(environ[variable]).expanduser()
    if environ.get("HF_HOME"):
        return Path(environ["HF_HOME"]).expanduser() / "hub"
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def find(name: str, cache: Path | None = None) -> Path:
    """The newest downloaded snapshot of `org/name`: what `refs/main` names, or the only one."""
    cache = cache_folder() if cache is None else cache
    repository = cache / ("models--" + name.replace("/", "--"))
    missing = bad(
        f"{single_line(name)}: no such folder, and not in the Hub cache "
        f"({single_line(str(cache), 200)})",
        f"hf download {single_line(name)}",
    )
    if not repository.is_dir():
        raise missing
    commit = ""
    if (repository / "refs").is_dir():
        data = read_member(resolve_folder(repository / "refs"), "main", 256) or b""
        commit = data.decode("ascii", "replace").strip()
    snapshots = repository / "snapshots"
    if not commit and snapshots.is_dir():
        found = [entry.name for entry in os.scandir(snapshots) if entry.is_dir()]
        commit = found[0] if len(found) == 1 else ""
    if not _COMMIT.fullmatch(commit) or not (snapshots / commit).is_dir():
        raise missing
    return snapshots / commit


def name_of(folder: Path) -> str:
    """What to call the model in `folder`: `org/name` in a cache, else the folder's own name."""
    if folder.parent.name == "snapshots" and (
        match := _SNAPSHOT.fullmatch(folder.parent.parent.name)
    ):
        return single_line(f"{match[1]}/{match[2]}", 200)
    return single_line(folder.name, 200)
