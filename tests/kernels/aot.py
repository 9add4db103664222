"""Compiling Triton kernels ahead of time, for devices that are not here.

A module of `moescope.kernels.triton_ops` declares what to compile as

    AOT = {
        "copy bf16": (kernel, {"x": "*bf16", "n": "i32"}, {"BLOCK": 256}, {"num_warps": 1}),
    }

which is name -> (kernel, types of its run-time arguments, values of its constexprs, options). Types
are Triton's: `*fp32`, `i32`, `fp32`; `:16` after one says that it is a multiple of 16.

`python -m tests.kernels.aot TARGET [MODULE ...]` compiles the cases of those modules (without any:
of all) for `cuda`, or the first case of each for `hip`, and prints a line of JSON for each. It is a
program because a process that runs Triton's interpreter cannot compile.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

TARGETS = {"cuda": ("cuda", 90, 32), "hip": ("hip", "gfx942", 64)}
PACKAGE = "moescope.kernels.triton_ops"


@cache
def compiled(target: str, *modules: str) -> dict[tuple[str, str], dict[str, Any]]:
    """(module, case) -> `binary` and `shared` (bytes) or `error`, and on CUDA `registers` and
    `stack` (bytes, 0 where nothing spills). Compiled in a process of its own, once a test run."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.aot", target, *modules]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(row["module"], row["case"]): row for row in rows}


def module_names() -> list[str]:
    package = import_module(PACKAGE)
    return [m.name for m in iter_modules(package.__path__)]


def compile_all(target: str, names: list[str]) -> None:
    for name in names or module_names():
        module = import_module(f"{PACKAGE}.{name}")
        cases = list(getattr(module, "AOT", {}).items())
        for case, declared in cases if target == "cuda" else cases[:1]:
            row: dict[str, Any] = {"module": name, "case": case}
            try:
                row |= compile_one(target, *declared)
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:2000]
            print(json.dumps(row), flush=True)


def compile_one(
    target: str, kernel: Any, types: dict[str, str], constexprs: dict[str, Any], options: Any
) -> dict[str, Any]:
    """Sizes and resources of one specialisation."""
    binary = build(target, kernel, types, constexprs, options)
    image = binary.asm["cubin" if target == "cuda" else "hsaco"]
    row: dict[str, Any] = {"binary": len(image), "shared": binary.metadata.shared}
    return row | resources(image) if target == "cuda" else row


def build(
    target: str, kernel: Any, types: dict[str, str], constexprs: dict[str, Any], options: Any
) -> Any:
    """Triton's compiled kernel; `asm` holds `ttgir`, `ptx`, `cubin` or `amdgcn`, `hsaco`."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    wrong = set(names) ^ (set(types) | set(constexprs))
    assert not wrong, f"{kernel.__name__}: arguments declared and found differ in {sorted(wrong)}"
    aligned = {names.index(n) for n, t in types.items() if t.startswith("*") or t.endswith(":16")}
    source = ASTSource(
        fn=kernel,
        signature={n: types[n].removesuffix(":16") if n in types else "constexpr" for n in names},
        constexprs={(names.index(n),): value for n, value in constexprs.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=dict(options))


def resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack, which is where spilled registers go."""
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(program), "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(re.search(rf"{name}:(\d+)", said)[1]) for name in ("REG", "STACK", "LOCAL")}
    return {"registers": found["REG"], "stack": found["STACK"] + found["LOCAL"]}


if __name__ == "__main__":
    compile_all(sys.argv[1], sys.argv[2:])
