"""Data flows one way: which package may import which, and what an import may not bring with it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "moescope"
BASE = {"errors", "safety"}
MAY_IMPORT = {
    "__init__": {"errors", "kernels", "variants", "trace", "engine", "diagnosis"},
    "errors": set(),
    "safety": {"errors"},
    "reports": {"__init__"},
    "variants": {*BASE, "kernels"},
    "kernels": set(),
    "trace": {*BASE, "kernels", "variants", "__init__"},
    "engine": {*BASE, "kernels", "variants", "trace", "reports", "demo", "__init__"},
    "diagnosis": {*BASE, "kernels", "variants", "trace", "engine"},
    "ui": {*BASE, "kernels", "variants", "trace", "engine", "diagnosis", "reports", "demo"},
    "demo": {*BASE, "kernels", "variants", "trace", "engine"},
    "commands": {
        *BASE,
        *("kernels", "variants", "trace", "engine", "diagnosis", "ui", "reports", "demo"),
        *("__init__", "cli"),
    },
    "cli": {*BASE, "commands", "reports", "__init__"},
    "supervisor": {"cli"},
    "__main__": {"supervisor"},
}
# What the screen may know of the engine: the words, the links that speak them, and lists of files.
ENGINE_FOR_UI = {"link", "protocol", "recording", "hub_cache"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> set[tuple[str, ...]]:
    """Every moescope module this file imports anywhere, as a tuple of names below the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            base = tuple(node.module.split("."))
            found |= {(*base, alias.name) for alias in node.names}
    return {names[1:] for names in found if names[0] == "moescope"}


def top(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    layer = top(path)
    allowed = MAY_IMPORT[layer] | {layer} | ({"__init__"} if layer == "ui" else set())
    for names in imports_of(path):
        target = names[0] if names and (PACKAGE / names[0]).exists() else None
        if target is None:
            is_module = bool(names) and (PACKAGE / f"{names[0]}.py").exists()
            target = names[0] if is_module else "__init__"
        assert target in allowed, f"{path.name} imports moescope.{'.'.join(names)}"
        if layer == "ui" and target == "engine":
            assert names[1] in ENGINE_FOR_UI, f"{path.name} reaches into engine.{names[1]}"


HEAVY = ("torch", "mlx", "tokenizers", "transformers", "textual", "pyarrow", "jinja2", "triton")


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import moescope", (*HEAVY, "numpy")),
        ("import moescope.cli, moescope.supervisor", (*HEAVY, "numpy")),
        ("import moescope.kernels, moescope.variants", HEAVY),
        ("import moescope.trace.store, moescope.trace.formats, moescope.trace.measures", HEAVY),
        ("import moescope.engine.link, moescope.engine.protocol", HEAVY),
        (
            "import moescope.engine.session, moescope.engine.load, moescope.engine.torch_decoder",
            ("textual", "mlx", "transformers", "pyarrow", "plotext"),
        ),
        ("import moescope.ui.app", ("torch", "mlx", "tokenizers", "transformers", "pyarrow")),
        ("import moescope.demo", HEAVY),
    ],
)
def test_an_import_brings_no_more_than_it_needs(statement: str, forbidden: tuple[str, ...]) -> None:
    code = f"import sys\n{statement}\nprint(*sorted(m for m in {forbidden!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_transformers_is_only_a_test_dependency() -> None:
    for path in modules():
        tree = ast.parse(path.read_text())
        roots = {
            alias.name.split(".")[0]
            for n in ast.walk(tree)
            if isinstance(n, ast.Import)
            for alias in n.names
        }
        roots |= {
            n.module.split(".")[0]
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and n.module
        }
        assert "transformers" not in roots, path
