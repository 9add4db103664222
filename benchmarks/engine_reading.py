"""A child that only reads the files of a model, as fast as plain reads go: what loading is held to.

`into place` fills fresh memory as large as the model, which is what a loader cannot avoid;
`through a buffer` reads the same bytes into one small buffer. `forget` asks the system to drop the
files from its cache, so that the next read comes from the disk.
"""

from __future__ import annotations

import mmap
import os
import time
from pathlib import Path
from typing import Any

import child

PIECE = 16 << 20
Figures = dict[str, Any]


def read(folder: str, place: bool) -> Figures:
    files = sorted(Path(folder).glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    began = time.perf_counter()
    memory = mmap.mmap(-1, size if place else PIECE)
    view, at = memoryview(memory), 0
    for file in files:
        with open(file, "rb", buffering=0) as source:
            while count := source.readinto(view[at : at + PIECE]):
                at += count if place else 0
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "bytes": size}


def forget(folder: str) -> Figures:
    for file in Path(folder).glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return {}


if __name__ == "__main__":
    child.serve({"read": read, "forget": forget})
