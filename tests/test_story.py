"""The story that the README tells is what its command prints."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from moescope import cli

README = Path(__file__).parents[1] / "README.md"
ELLIPSIS = "…"
NUMBER = re.compile(r"\d+\.\d+|\d+ ?%")


def told() -> tuple[list[str], list[str]]:
    """The command as arguments, and the lines below it."""
    story = README.read_text().partition("<!-- story -->\n")[2].partition("<!-- end story -->")[0]
    lines = [line[4:] for line in story.splitlines() if line.startswith("    ")]
    command = lines[0] + (lines[1] if lines[0].endswith("\\") else "")
    shown = lines[2:] if lines[0].endswith("\\") else lines[1:]
    words = re.sub(
        r"\$'([^']*)'",
        lambda m: shlex.quote(m[1].encode().decode("unicode_escape")),
        command.removeprefix("$ ").replace("\\", " ", 1),
    )
    return shlex.split(words)[1:], shown


def alike(line: str, printed: str) -> bool:
    """The same words and whole numbers; other numbers within 5 % or two in the last place."""
    if NUMBER.sub("#", " ".join(line.split())) != NUMBER.sub("#", " ".join(printed.split())):
        return False
    pairs = zip(NUMBER.findall(line), NUMBER.findall(printed), strict=True)
    return all(
        float(a.rstrip(" %")) == pytest.approx(float(b.rstrip(" %")), rel=0.05, abs=0.002)
        for a, b in pairs
    )


def test_the_story_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    arguments, shown = told()
    assert arguments[:2] == ["compare", "demo"] and len(shown) > 12
    assert cli.run(arguments) == 0
    printed = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    at, skipping = 0, False
    for line in shown:
        if line.strip() == ELLIPSIS:
            skipping = True
            continue
        while skipping and at < len(printed) and not alike(line, printed[at]):
            at += 1
        assert at < len(printed) and alike(line, printed[at]), line
        at, skipping = at + 1, False
    assert skipping or at == len(printed), printed[at:]


def test_the_story_is_about_sums_that_differ_where_experts_do_not() -> None:
    _, shown = told()
    first = next(line.split() for line in shown if line.split()[:1] == ["0"])
    assert first[1:5] == ["100.0", "%", "100.0", "%"]
    assert first[-2] == "1.000" and float(first[-3]) < 0.5
