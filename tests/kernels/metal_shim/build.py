"""The Metal kernels' very text as a C++ library or program, wrapped as MLX wraps it.

`signature` writes the function that `mx.fast.metal_kernel` would (a test compares the two); the
address spaces are empty words here, and threadgroup memory of a body is static.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moescope.kernels.metal.launch import Kernel, Launch

HERE = Path(__file__).parent
MLX_TYPES = {
    "float32": "float",
    "float16": "float16_t",
    "bfloat16": "bfloat16_t",
    "int32": "int32_t",
}
ATTRIBUTES = {
    "simdgroup_index_in_threadgroup": "uint",
    "simdgroups_per_threadgroup": "uint",
    "thread_index_in_simdgroup": "uint",
    "thread_index_in_threadgroup": "uint",
    "threadgroup_position_in_grid": "uint3",
    "threadgroups_per_grid": "uint3",
    "threads_per_threadgroup": "uint3",
}
SMALL = 8  # arrays of fewer numbers are in the constant address space
FLAGS = ("-std=c++14", "-O1", "-g1", "-pthread", "-fno-math-errno", "-fno-trapping-math")
WARNINGS = (
    *("-Wall", "-Wextra", "-Werror", "-Wdouble-promotion", "-Wfloat-conversion"),
    *("-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-multichar", "-Wno-parentheses"),
)


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel for one instantiation, and types of its inputs; `small` of them are constant."""

    kernel: Kernel
    template: tuple[tuple[str, int], ...]
    inputs: tuple[str, ...]
    small: tuple[bool, ...]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, launch: Launch, inputs: Sequence[str], small: Sequence[bool] = ()) -> Variant:
        few = tuple(small) or (False,) * len(inputs)
        return cls(launch.kernel, launch.template, tuple(inputs), few, launch.output_dtypes)

    def changed(self, old: str, new: str) -> Variant:
        """With a planted fault: `old`, which stands once in header or body, is `new`."""
        k = self.kernel
        assert k.header.count(old) + k.source.count(old) == 1, old
        text = {n: getattr(k, n).replace(old, new) for n in ("header", "source")}
        return replace(self, kernel=replace(k, **text))


def signature(variant: Variant, name: str) -> str:
    """Template line and parameters up to the opening brace, as MLX writes them."""
    template = ", ".join(f"int {name}" for name, _ in variant.template)
    return f"template <{template}>\n[[kernel]] void {name}({parameters(variant)}) {{\n"


def parameters(variant: Variant) -> str:
    kernel = variant.kernel
    params = []
    for input, dtype, small in zip(kernel.input_names, variant.inputs, variant.small, strict=True):
        assert f"{input}_shape" not in kernel.source and f"{input}_strides" not in kernel.source
        space = "constant" if small else "device"
        params.append(f"const {space} {MLX_TYPES[dtype]}* {input}")
    for output, dtype in zip(kernel.output_names, variant.outputs, strict=True):
        params.append(f"device {MLX_TYPES[dtype]}* {output}")
    lines = [f"  {param} [[buffer({place})]]" for place, param in enumerate(params)]
    lines += [f"  {ATTRIBUTES[a]} {a} [[{a}]]" for a in attributes(kernel)]
    return "\n" + ",\n".join(lines)


def attributes(kernel: Kernel) -> list[str]:
    return [name for name in ATTRIBUTES if name in kernel.source]


def text(variants: Sequence[Variant]) -> str:
    """A whole translation unit: each header once, in a namespace of its own, and each variant as a
    plain function, for sanitisers guard the static memory of no template."""
    headers = list(dict.fromkeys(variant.kernel.header for variant in variants))
    parts = ['#include "engine.h"', "#define device", "#define constant", "#define thread"]
    for place, header in enumerate(headers):
        mine = [(n, v) for n, v in enumerate(variants) if v.kernel.header == header]
        parts += [f"#define moescope moescope_{place}", "#define threadgroup", header]
        parts += ["#undef threadgroup", "#define threadgroup static"]
        parts += [_function(variant, n) for n, variant in mine]
        parts += ["#undef threadgroup", "#undef moescope"]
    parts += ["#undef device", "#undef constant", "#undef thread"]
    parts += [_call(variant, n) for n, variant in enumerate(variants)]
    table = ", ".join(f"call_{n}" for n in range(len(variants)))
    parts += ['#include "harness.h"']
    parts += [f"static std::vector<Kernel *> variants() {{ return {{{table}}}; }}"]
    return "\n".join(parts)


def _function(variant: Variant, place: int) -> str:
    constants = "".join(f"constexpr int {name} = {value};\n" for name, value in variant.template)
    head = f"[[kernel]] static void kernel_{place}({parameters(variant)}) {{\n"
    return f"{head}{constants}{variant.kernel.source}\n}}"


def _call(variant: Variant, place: int) -> str:
    pointers = [f"(const {MLX_TYPES[t]} *)inputs[{i}]" for i, t in enumerate(variant.inputs)]
    pointers += [f"({MLX_TYPES[t]} *)outputs[{i}]" for i, t in enumerate(variant.outputs)]
    pointers += [f"place.{name}" for name in attributes(variant.kernel)]
    return (
        f"static void call_{place}(void **inputs, void **outputs, const Place &place) {{\n"
        f"    kernel_{place}({', '.join(pointers)});\n}}\n"
    )


def compiled(
    source: str, target: Path, *flags: str, optimised: str = "-O1", program: bool = False
) -> Path:
    """Compile with g++; the compiler's words are the error."""
    file = target.with_suffix(".cc")
    file.write_text(source)
    made = ["-DPROGRAM"] if program else ["-fPIC", "-shared"]
    command = ["g++", *FLAGS, optimised, *WARNINGS, *flags, *made, f"-I{HERE}", str(file)]
    done = subprocess.run(
        [*command, "-o", str(target)], capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr[:4000]
    return target
