"""A trace with damage in it, as every verb that reads traces meets it: nothing is a traceback, and
what is damaged is never called absent."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from moescope import cli
from moescope.diagnosis import evidence
from moescope.errors import ExitCode, MoescopeError
from moescope.trace.formats import open_trace
from tests.test_cli import check_error
from tests.trace.samples import record_trace

COLUMNS = ("flags", "position", "expert_ids", "weights", "score_sum", "runner_up", "logits")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two chunks, of 256 and 44 frames."""
    path = tmp_path_factory.mktemp("damaged") / "good.moetrace"
    record_trace(path)
    return path


def damaged(good: Path, target: Path, column: str, firsts: Sequence[int]) -> Path:
    """One bit of this column turned, in the chunks that begin at these frames."""
    shutil.copy(good, target)
    with sqlite3.connect(target) as db:
        for first in firsts:
            where = "WHERE name = ? AND first = ?"
            (blob,) = db.execute(f"SELECT b FROM chunk {where}", (column, first)).fetchone()
            turned = blob[:-1] + bytes([blob[-1] ^ 1])
            db.execute(f"UPDATE chunk SET b = ? {where}", (turned, column, first))
    db.close()
    return target


def commands(good: Path, bad: Path) -> dict[str, list[str]]:
    return {
        "lint": ["lint", str(bad)],
        "diff": ["diff", str(good), str(bad)],
        "balance": ["balance", str(bad)],
        "check": ["check", "demo", "--against", str(bad)],
        "replay": ["replay", str(bad)],
        "open": [str(bad)],
    }


VERBS = list(commands(Path(), Path()))


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("verb", VERBS)
def test_one_damaged_column_is_the_sentence_of_convert(
    good: Path, tmp_path: Path, capsys, monkeypatch, verb: str, column: str
) -> None:
    monkeypatch.setattr(cli, "_need_terminal", lambda: None)
    bad = damaged(good, tmp_path / "bad.moetrace", column, (0, 256))
    code = cli.run(commands(good, bad)[verb])
    words = ("nothing in it can be read", "checksum differs; 256 frames skipped")
    check_error(code, *capsys.readouterr(), ExitCode.TRACE, *words)


@pytest.mark.parametrize(("verb", "expected"), [("lint", 1), ("diff", 1), ("balance", 0)])
def test_the_rest_of_a_damaged_trace_is_read_and_the_damage_told(
    good: Path, tmp_path: Path, capsys, verb: str, expected: int
) -> None:
    bad = damaged(good, tmp_path / "bad.moetrace", "logits", (0,))
    assert cli.run(commands(good, bad)[verb]) == expected
    out, err = capsys.readouterr()
    assert "chunk at frame 0: checksum differs; 256 frames skipped" in err
    wanted = {"lint": "error damage", "diff": "256 only in A", "balance": "loss over 44 tokens"}
    assert wanted[verb] in out


def test_a_screen_says_what_is_damaged_before_it_opens(
    good: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr(cli, "_need_terminal", lambda: None)
    monkeypatch.setattr("moescope.ui.app.run", lambda *_, **__: 0)
    bad = damaged(good, tmp_path / "bad.moetrace", "weights", (256,))
    assert cli.run(["replay", str(bad)]) == 0
    assert "chunk at frame 256: checksum differs; 44 frames skipped" in capsys.readouterr().err
    assert cli.run(["replay", str(good)]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("column", ("weights", "logits"))
def test_a_damaged_chunk_is_left_out_of_every_column(
    good: Path, tmp_path: Path, column: str
) -> None:
    trace = open_trace(damaged(good, tmp_path / "bad.moetrace", column, (0,)))
    try:
        assert (trace.keys()[:256] == -1).all() and (trace.keys()[256:, 2] >= 256).all()
        assert len(trace.lane_frames(0)) == 44 and len(trace.problems) == 1
    finally:
        trace.close()


def test_a_diagnosis_is_told_of_damage(good: Path, tmp_path: Path) -> None:
    routers = [
        SimpleNamespace(layer=layer, site="mlp", spec=SimpleNamespace(E=16)) for layer in range(4)
    ]
    read = partial(evidence.read, routers=routers, layers=4, vocabulary=1 << 20)
    half = damaged(good, tmp_path / "half.moetrace", "weights", (256,))
    assert "checksum differs; 44 frames skipped" in read(half).notes[0]
    with pytest.raises(MoescopeError, match="0 is missing: chunk at frame 0: checksum differs"):
        read(damaged(good, tmp_path / "late.moetrace", "weights", (0,)))
    with pytest.raises(MoescopeError, match="nothing in it can be read"):
        read(damaged(good, tmp_path / "bad.moetrace", "weights", (0, 256)))
