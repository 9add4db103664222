"""A child that measures what this machine can read: the limit everything is judged by.

Four ways over one buffer that no cache holds, every core at once; the fastest is the limit, so that
no engine looks better for want of a good way to read. C where there is a compiler, on huge pages
and on plain ones; torch's sum and its bfloat16 matrix-vector product.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import child
import numpy as np

Figures = dict[str, Any]


class Reader:
    def load(self, threads: int, size: int) -> Figures:
        self.threads, self.size = threads, size - size % (threads << 21)
        self.library = _compiled()
        self.pool = ThreadPoolExecutor(threads)
        self.ways: dict[str, Callable[[], Any]] = {}
        self.buffers = []
        if self.library is not None:
            for name, advice in (
                ("C, huge pages", "MADV_HUGEPAGE"),
                ("C, 4 KiB pages", "MADV_NOHUGEPAGE"),
            ):
                if hasattr(mmap, advice):
                    self.ways[name] = self._words(getattr(mmap, advice))
        self.ways |= self._torch(threads)
        for way in self.ways.values():
            way()
        return {"ways": list(self.ways), "bytes": self.size}

    def read(self, repeats: int) -> Figures:
        """GB/s of each way, the median of its repeats."""
        found = {}
        for name, way in self.ways.items():
            times = []
            for _ in range(repeats):
                began = time.perf_counter()
                way()
                times.append(time.perf_counter() - began)
            found[name] = self.size / statistics.median(times) / 1e9
        return {"gb_s": max(found.values()), "ways": found}

    def _words(self, advice: int) -> Callable[[], Any]:
        """Each thread reads a part of its own; the call releases Python's lock."""
        memory = mmap.mmap(-1, self.size)
        memory.madvise(advice)
        array = np.frombuffer(memory, np.uint64)
        array[:] = 1
        self.buffers.append((memory, array))
        part = self.size // self.threads
        parts = [array.ctypes.data + index * part for index in range(self.threads)]

        def way() -> Any:
            return list(self.pool.map(lambda at: self.library.read_words(at, part // 8), parts))

        return way

    def _torch(self, threads: int) -> dict[str, Callable[[], Any]]:
        import torch

        torch.set_num_threads(threads)
        columns = 2048
        matrix = torch.ones(self.size // 2 // columns, columns, dtype=torch.bfloat16)
        vector = torch.ones(columns, dtype=torch.bfloat16)
        floats = matrix.view(torch.float32)
        return {"torch sum": floats.sum, "torch bfloat16 mv": lambda: torch.mv(matrix, vector)}


def _compiled() -> Any:
    """`read.c` as a library; None where there is no compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        made = os.path.join(folder, "read.so")
        source = str(Path(__file__).with_name("read.c"))
        command = [compiler, "-O3", "-march=native", "-shared", "-fPIC", source, "-o", made]
        if subprocess.run(command, check=False).returncode:
            return None
        library = ctypes.CDLL(made)
    library.read_words.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    library.read_words.restype = ctypes.c_uint64
    return library


def main() -> None:
    reader = Reader()
    child.serve({"load": reader.load, "read": reader.read})


if __name__ == "__main__":
    main()
