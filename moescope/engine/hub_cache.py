"""Finding `org/name` among the models the Hugging Face tools have already downloaded.

Layout: `<cache>/models--org--name/refs/main` holds a commit, `snapshots/<commit>/` its files.
Nothing is ever fetched; a model that is not there is an error that says how to get it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from moescope.demo import CHECKPOINT
from moescope.engine.config import bad
from moescope.engine.files import names_in, read_member, resolve_folder
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
            return Path(os.path.expanduser(environ[variable]))
    if environ.get("HF_HOME"):
        return Path(os.path.expanduser(environ["HF_HOME"])) / "hub"
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(base)) / "huggingface" / "hub"


def find(name: str, cache: Path | None = None) -> Path:
    """The newest downloaded snapshot of `org/name`: what `refs/main` names, or the only one."""
    cache = cache_folder() if cache is None else cache
    repository = cache / ("models--" + name.replace("/", "--"))
    missing = bad(
        f"{single_line(name, 300)}: no such folder, and not in the Hub cache "
        f"({single_line(str(cache), 200)})",
        f"hf download {single_line(name, 300)}",
    )
    commit = ""
    if os.path.isdir(repository / "refs"):
        data = read_member(resolve_folder(repository / "refs"), "main", 256) or b""
        commit = data.decode("ascii", "replace").strip()
    snapshots = repository / "snapshots"
    if not commit and os.path.isdir(snapshots):
        found = names_in(snapshots)
        commit = found[0] if len(found) == 1 else ""
    if not _COMMIT.fullmatch(commit) or not os.path.isdir(snapshots / commit):
        raise missing
    return snapshots / commit


def name_of(folder: Path) -> str:
    """What to call the model in `folder`: `org/name` in a cache, `demo` for the embedded one, else
    the folder's own name."""
    if folder == CHECKPOINT:
        return "demo"
    if folder.parent.name == "snapshots" and (
        match := _SNAPSHOT.fullmatch(folder.parent.parent.name)
    ):
        return single_line(f"{match[1]}/{match[2]}", 200)
    return single_line(folder.name, 200)
