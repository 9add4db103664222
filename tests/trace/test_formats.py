"""The long form and back: the same frames, and a clear sentence for every bad file."""

from __future__ import annotations

import csv
import errno
import json
import os
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.errors import ExitCode, MoescopeError
from moescope.trace import formats
from moescope.trace.formats import convert, text
from moescope.trace.frames import Frame, TraceEvent
from moescope.trace.store import TraceReader, TraceWriter
from tests.trace.samples import a_frame, a_meta, differences, readable, record_trace, same_bits

LONG = ("csv", "jsonl", "parquet")
NOT_IN_THE_FORM = {"logprob", "rank", "alternatives", "kl", "top1_agrees", "shadow"}
TOKENS = [
    "",
    " a",
    "\n",
    "a,b\"c'",
    "#",
    "\\n",
    "=1+1",
    "'=1",
    "\x1b[2J",
    "\u202e",
    "é日😀",
    "\U000e0041",
]
ODD = np.array([np.nan, -0.0, 1e-45, 0.1], np.float32)


def odd_trace(path: Path, **meta: Any) -> list[Frame]:
    """Two lanes, several K, texts of every kind, invalid rows, and numbers at the edges."""
    frames = [
        a_frame(p, lane=lane, k=2 + lane, text=token, variant="trained" if lane else "k+1,a=b")
        for p, token in enumerate(TOKENS)
        for lane in (0, 1)
    ]
    invalid = np.full((4, 2), -1, np.int16)
    frames.append(
        a_frame(
            50,
            expert_ids=invalid,
            runner_up=invalid[:, 0],
            weights=np.zeros((4, 2), np.float32),
            scores=np.full((4, 2), np.nan, np.float32),
            **{name: np.full(4, np.nan, np.float32) for name in ("score_sum", "mass", "entropy")},
            margin=np.full(4, np.nan, np.float32),
        )
    )
    excluded = np.array(frames[0].logits)
    excluded[:, 5] = -np.inf
    frames.append(
        a_frame(51, logits=excluded, margin=ODD, runner_up=np.array([-1, 0, 1, 2], np.int16))
    )
    bias = {1: {"correction_bias": np.linspace(0, 1, 16, dtype=np.float32)}}
    with TraceWriter(path, a_meta(k=3, router_tensors=bias, **meta)) as writer:
        writer.event(TraceEvent("prompt", {"text": "Once\n", "ids": [1]}))
        for i, frame in enumerate(frames):
            writer.append(frame)
            if i == 9:
                writer.event(TraceEvent("variant", {"expression": "trained"}, 1, 4))
    return frames


@pytest.mark.parametrize("form", LONG)
@pytest.mark.parametrize("level", ["ids", "weights", "logits"])
def test_there_and_back_is_exact_for_what_the_form_holds(
    tmp_path: Path, form: str, level: Any
) -> None:
    odd_trace(tmp_path / "a.moetrace", record=level)
    recorded = readable(tmp_path / "a.moetrace")
    there = convert(tmp_path / "a.moetrace", tmp_path / f"b.{form}")
    back = convert(tmp_path / f"b.{form}", tmp_path / "c.moetrace")
    assert (there["frames"], there["lanes"], there["rows"]) == (26, 2, 26 * 4)
    assert (back["frames"], back["events"], back["to"]) == (26, 2, "moetrace")
    again = readable(tmp_path / "c.moetrace")
    for before, after in zip(recorded, again, strict=True):
        assert set(differences(before, after)) <= NOT_IN_THE_FORM
    with (
        TraceReader.open(tmp_path / "a.moetrace") as a,
        TraceReader.open(tmp_path / "c.moetrace") as c,
    ):
        assert a.placed_events() == c.placed_events()
        assert replace(a.meta, router_tensors={}).routers == c.meta.routers
        assert a.meta.models == c.meta.models and a.meta.record == c.meta.record
        tensors = a.meta.router_tensors[1]["correction_bias"], c.meta.router_tensors[1]
        assert same_bits(tensors[0], tensors[1]["correction_bias"])
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["a.moetrace", f"b.{form}", "c.moetrace"]
    )


def test_between_the_long_forms(tmp_path: Path) -> None:
    odd_trace(tmp_path / "a.moetrace")
    for source, target in (("a.moetrace", "b.csv"), ("b.csv", "c.jsonl"), ("c.jsonl", "d.parquet")):
        convert(tmp_path / source, tmp_path / target)
    convert(tmp_path / "d.parquet", tmp_path / "e.csv")
    assert (tmp_path / "b.csv").read_bytes() == (tmp_path / "e.csv").read_bytes()


def test_other_tools_read_the_long_form(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    record_trace(tmp_path / "a.moetrace", 20, record="weights")
    convert(tmp_path / "a.moetrace", tmp_path / "a.parquet")
    convert(tmp_path / "a.moetrace", tmp_path / "a.csv")
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.num_rows == 80
    assert table.column_names[:4] == ["sequence", "lane", "position", "token_id"]
    assert "logits" not in table.column_names
    assert (
        pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).column(0).compression == "ZSTD"
    )
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    assert len(rows) == 80
    assert json.loads(rows[5]["expert_ids"]) == a_frame(1).expert_ids[1].tolist()
    assert np.float32(rows[5]["score_sum"]) == a_frame(1).score_sum[1]


def test_a_recording_can_be_saved_while_it_runs(tmp_path: Path) -> None:
    with TraceWriter(tmp_path / "a.moetrace", a_meta()) as writer:
        for position in range(270):
            writer.append(a_frame(position))
        writer.flush()
        for form in ("moetrace", "jsonl"):
            assert convert(tmp_path / "a.moetrace", tmp_path / f"b.{form}")["frames"] == 270
        writer.append(a_frame(270))
    assert not differences(readable(tmp_path / "b.moetrace")[269], a_frame(269))
    assert len(readable(tmp_path / "a.moetrace")) == 271


@pytest.mark.parametrize("form", LONG)
def test_a_trace_without_tokens_stays_one(tmp_path: Path, form: str) -> None:
    TraceWriter(tmp_path / "a.moetrace", a_meta()).close()
    convert(tmp_path / "a.moetrace", tmp_path / f"b.{form}")
    assert convert(tmp_path / f"b.{form}", tmp_path / "c.moetrace")["frames"] == 0
    with TraceReader.open(tmp_path / "c.moetrace") as reader:
        assert (reader.count, reader.lanes, list(reader.frames())) == (0, (), [])
        assert reader.column("score_sum").size == 0 and reader.find(0, 0) is None
        assert reader.meta.routers == a_meta().routers


# --- text -----------------------------------------------------------------------------------------

PAYLOADS = [
    "=cmd|' /C calc'!A0",
    "+1",
    "-1",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "\n=1",
    "＝1",
    "＋1",
    "－1",
]
PAYLOADS += ["＠x", " =1", "'=1", "\u00a0=1"]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_cell_of_a_csv_file_begins_a_formula(tmp_path: Path, payload: str) -> None:
    with TraceWriter(tmp_path / "a.moetrace", a_meta()) as writer:
        writer.append(a_frame(text=payload, variant=payload))
    convert(tmp_path / "a.moetrace", tmp_path / "a.csv")
    with (tmp_path / "a.csv").open(newline="") as file:
        cells = list(csv.DictReader(line for line in file if not line.startswith("#")))
    for cell in (cells[0]["token"], cells[0]["variant"]):
        assert cell.lstrip()[:1] not in set("=+-@＝＋－＠\t\r\n")
    convert(tmp_path / "a.csv", tmp_path / "b.moetrace")
    assert readable(tmp_path / "b.moetrace")[0].text == payload


@given(st.text(st.characters()))
@settings(max_examples=300, deadline=None)
def test_guarded_text_is_one_quiet_line_and_comes_back(token: str) -> None:
    shown = text.guarded(token)
    assert text.unguarded(shown) == token
    assert all(char.isprintable() or unicodedata.category(char) == "Zs" for char in shown)
    shown.encode()


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_no_control_byte_reaches_a_text_file(tmp_path: Path, form: str) -> None:
    everything = "".join(map(chr, [*range(32), *range(127, 160), 0x202E, 0x2066, 0xE0041]))
    with TraceWriter(tmp_path / "a.moetrace", a_meta()) as writer:
        writer.event(TraceEvent("prompt", {"text": everything}))
        writer.append(a_frame(text=everything, variant=everything))
    convert(tmp_path / "a.moetrace", tmp_path / f"a.{form}")
    content = (tmp_path / f"a.{form}").read_text()
    assert all(char.isprintable() or char == "\n" for char in content)


# --- strangers ------------------------------------------------------------------------------------


def test_four_columns_are_enough(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "position,token_id,layer,expert_ids\n"
        + "".join(f'{p},{p + 10},{layer},"[{p},{layer}]"\n' for p in range(5) for layer in (3, 7))
    )
    summary = convert(tmp_path / "a.csv", tmp_path / "a.moetrace")
    assert (summary["frames"], summary["rows"]) == (5, 5)
    with TraceReader.open(tmp_path / "a.moetrace") as reader:
        frames = list(reader.frames())
        assert reader.problems == []
        assert [(r.layer, r.num_experts, r.num_experts_per_tok) for r in reader.meta.routers] == [
            (3, 5, 2),
            (7, 8, 2),
        ]
        assert reader.meta.record == "ids" and reader.meta.weights_kind == "absent"
        assert {"score_sum", "margin", "runner_up", "text", "phase"} <= set(reader.meta.absent)
    assert frames[4].expert_ids.tolist() == [[4, 3], [4, 7]] and frames[4].token_id == 14
    assert frames[4].weights is None and np.isnan(frames[4].score_sum).all()


def test_a_score_sum_that_is_not_there_is_the_sum_of_the_weights(tmp_path: Path) -> None:
    row = {"position": 0, "token_id": 1, "layer": 0, "expert_ids": [1, 2], "weights": [0.5, 0.25]}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    convert(tmp_path / "a.jsonl", tmp_path / "a.moetrace")
    frame = readable(tmp_path / "a.moetrace")[0]
    assert frame.score_sum.tolist() == [0.75] and np.isnan(frame.mass).all()


def test_rows_in_any_order_and_with_gaps(tmp_path: Path) -> None:
    rows = [(p, layer) for layer in range(3) for p in range(4) if (p, layer) != (2, 1)]
    lines = [
        json.dumps({"position": p, "token_id": 0, "layer": layer, "expert_ids": [p]})
        for p, layer in rows
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    summary = convert(tmp_path / "a.jsonl", tmp_path / "a.moetrace")
    assert summary["notes"] == ["1 tokens lack 1 routers: those hold no experts"]
    frames = {frame.position: frame for frame in readable(tmp_path / "a.moetrace")}
    assert frames[1].expert_ids.tolist() == [[1], [1], [1]]
    assert frames[2].expert_ids.tolist() == [[2], [-1], [2]]


GOOD = '0,1,0,"[1]"\n'
HEAD = "position,token_id,layer,expert_ids\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEAD + GOOD + "1,2,3\n", "line 3: expected 4 columns, found 3"),
        (HEAD + '0,x,0,"[1]"\n', "line 2: token_id: expected a number, found 'x'"),
        (HEAD + '0,1,0,"[1"\n', "line 2: expert_ids: expected a number"),
        (
            HEAD + '0,1,0,"[70000]"\n',
            "line 2: expert_ids: expected a list of whole numbers in range",
        ),
        (HEAD + '0,1,0,"{}"\n', "line 2: expert_ids: expected a list"),
        (HEAD + f'0,1,0,"{"[" * 100_000}"\n', "line 2: expert_ids: expected a number"),
        (HEAD + '-1,1,0,"[1]"\n', "line 2: position: expected a whole number in range, found -1"),
        (HEAD + ',1,0,"[1]"\n', "line 2: position: expected a value, found none"),
        (HEAD + "9" * 5000 + ',1,0,"[1]"\n', "line 2: position: expected a whole number"),
        (HEAD, "rows: expected at least one, found none"),
        (HEAD + '0,1,0,"\x00"\n', "line 2: expected text, found a NUL byte"),
        (HEAD + '0,1,0,"' + "1" * 2_000_000 + '"\n', "line 2: longer than 1,048,576 bytes"),
        (HEAD[:-1] + ",layer\n" + GOOD[:-1] + ",1\n", "each once"),
        (HEAD[:-1] + ",weights\n" + '0,1,0,"[1]","[1e999]"\n', "position 0 of lane 0: weights"),
        (HEAD[:-1] + ",weights\n" + '0,1,0,"[1]","[1e60]"\n', "line 2: weights: expected a list"),
    ],
    ids=range(15),
)
def test_a_bad_csv_file_is_named_with_its_line(tmp_path: Path, content: str, message: str) -> None:
    if "weights" in content:
        content = content.replace(",weights", ",weights,score_sum").replace(']"\n', ']",0.5\n')
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(MoescopeError) as caught:
        convert(tmp_path / "a.csv", tmp_path / "a.moetrace")
    assert message in caught.value.message
    assert caught.value.code == ExitCode.TRACE and len(caught.value.message) < 400
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


ROW = '{"position": 0, "token_id": 1, "layer": 0, "expert_ids": [1]}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (ROW + "{\n", "line 2: expected one JSON object"),
        (ROW + "[1]\n", "line 2: expected one JSON object"),
        (ROW + '{"position": 0, "position": 1}\n', "line 2: expected one JSON object"),
        (ROW + "[" * 200_000 + "\n", "line 2: expected one JSON object"),
        (ROW + '{"position": 1}\n', "line 2: token_id: expected a value, found none"),
        (ROW.replace("[1]", "[true]"), "line 1: expert_ids: expected a list of whole numbers"),
        (ROW.replace(": 0", ": 1" + "0" * 400, 1), "line 1: position: expected a whole number"),
        (ROW + " " * 2_000_000 + "\n", "line 2: longer than 1,048,576 bytes"),
        ('{"moescope_meta": {"meta": {"routers": 7}}}\n' + ROW, "meta.routers: expected a list"),
        ('{"moescope_meta": {"meta": {}, "events": [{}]}}\n' + ROW, "events: expected a kind"),
        (
            '{"moescope_meta": {"meta": {}}}\n' + ROW,
            "layer 0 (mlp): expected a router of the trace",
        ),
        (
            '{"moescope_meta": {"meta": {}, "router_tensors": {"0": {"b": "?"}}}}\n',
            "expected arrays",
        ),
    ],
    ids=range(12),
)
def test_a_bad_jsonl_file_is_named_with_its_line(
    tmp_path: Path, content: str, message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(MoescopeError) as caught:
        convert(tmp_path / "a.jsonl", tmp_path / "a.moetrace", from_="jsonl")
    assert message in caught.value.message and caught.value.code == ExitCode.TRACE
    assert caught.value.message.isprintable()


def test_a_bad_parquet_file_is_refused_from_its_metadata(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def refused(columns: dict[str, Any], message: str) -> None:
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        with pytest.raises(MoescopeError, match=message) as caught:
            convert(tmp_path / "a.parquet", tmp_path / "a.moetrace")
        assert caught.value.code == ExitCode.TRACE

    rows = pa.array([0, 1], pa.int32())
    good = {"position": rows, "token_id": rows, "layer": rows, "expert_ids": pa.array([[1], [1]])}
    refused(
        good | {"expert_ids": pa.array(["1", "2"])}, "expert_ids: expected wholes, found string"
    )
    refused(good | {"position": pa.array([0.5, 1])}, "position: expected whole, found double")
    refused({"position": rows}, "token_id: expected one column")
    refused(good | {"expert_ids": pa.array([[0] * 4_000_000, [1]])}, "declares 4,000,001 values")
    refused(good | {"layer": pa.array([None, 1], pa.int32())}, "row 1: layer: expected a value")
    refused(good | {"position": pa.array([-1, 2])}, "row 1: position: expected a whole number")
    wide = {f"c{i}": rows for i in range(300)}
    refused(good | wide, "304 columns; limit 256")


def test_a_parquet_bomb_of_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moescope.trace.formats import parquet

    record_trace(tmp_path / "a.moetrace", 20)
    convert(tmp_path / "a.moetrace", tmp_path / "a.parquet")
    monkeypatch.setattr(parquet, "LIMITS", replace(parquet.LIMITS, import_rows=79))
    with pytest.raises(MoescopeError, match="declares 80 rows; limit 79"):
        convert(tmp_path / "a.parquet", tmp_path / "b.moetrace")


@pytest.mark.parametrize("form", LONG)
def test_mutated_files_give_a_sentence_or_a_trace(tmp_path: Path, form: str) -> None:
    record_trace(tmp_path / "a.moetrace", 12)
    convert(tmp_path / "a.moetrace", tmp_path / f"good.{form}")
    good = (tmp_path / f"good.{form}").read_bytes()
    chance = np.random.default_rng(5)
    refused = 0
    for _ in range(80):
        data = bytearray(good)
        for at in chance.integers(0, len(data), 3):
            data[at] = chance.integers(0, 256)
        bad = tmp_path / "bad"
        bad.write_bytes(
            data[: len(data) if chance.random() < 0.7 else int(chance.integers(len(data)))]
        )
        try:
            frames = list(formats.FORMATS[form].read(bad).frames)
        except MoescopeError as error:
            assert error.code == ExitCode.TRACE, error.message
            assert error.message.isprintable()
            refused += 1
        else:
            assert len(frames) <= 40
    assert refused > 10


# --- places ---------------------------------------------------------------------------------------


def test_a_format_is_known_by_content_and_not_by_name(tmp_path: Path) -> None:
    record_trace(tmp_path / "a.moetrace", 3)
    for form in LONG:
        convert(tmp_path / "a.moetrace", tmp_path / "x.bin", to=form, force=True)
        assert formats.detect(tmp_path / "x.bin") == form
    (tmp_path / "y.csv").write_text("layer,expert\n0,1\n")
    with pytest.raises(MoescopeError, match="expected moetrace, parquet, csv, jsonl, found none"):
        convert(tmp_path / "y.csv", tmp_path / "y.moetrace")
    with pytest.raises(MoescopeError, match=r"ends in \.moetrace") as caught:
        convert(tmp_path / "a.moetrace", tmp_path / "a.xlsx")
    assert caught.value.code == ExitCode.USAGE


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    record_trace(tmp_path / "a.moetrace", 3)
    (tmp_path / "a.csv").write_text("mine")
    with pytest.raises(MoescopeError, match="already exists") as caught:
        convert(tmp_path / "a.moetrace", tmp_path / "a.csv")
    assert caught.value.code == ExitCode.OUTPUT
    assert (tmp_path / "a.csv").read_text() == "mine"
    with pytest.raises(MoescopeError, match="is the source itself"):
        convert(tmp_path / "a.moetrace", tmp_path / "a.moetrace", force=True)
    convert(tmp_path / "a.moetrace", tmp_path / "a.csv", force=True)
    assert (tmp_path / "a.csv").stat().st_size > 1000


@pytest.mark.parametrize("form", ("moetrace", *LONG))
def test_a_full_disk_leaves_no_partial_export(tmp_path: Path, form: str) -> None:
    import resource

    record_trace(tmp_path / "a.moetrace", 300)
    convert(tmp_path / "a.moetrace", tmp_path / "a.jsonl")
    (tmp_path / f"x.{form}").write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        with pytest.raises(MoescopeError, match=r"export failed: .*; no file written") as caught:
            convert(tmp_path / "a.jsonl", tmp_path / f"x.{form}", force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.code == ExitCode.OUTPUT
    assert (tmp_path / f"x.{form}").read_text() == "old"
    assert len(os.listdir(tmp_path)) == 3


def test_without_pyarrow_the_way_to_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_trace(tmp_path / "a.moetrace", 3)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MoescopeError, match="needs pyarrow") as caught:
        convert(tmp_path / "a.moetrace", tmp_path / "a.parquet")
    assert "pip install pyarrow" in caught.value.hint
    assert os.listdir(tmp_path) == ["a.moetrace"]


def test_a_folder_that_takes_no_file_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a drive mounted read-only even deleting what was never written is an error."""
    source = tmp_path / "a.moetrace"
    record_trace(source, 3)

    def refused(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refused)
    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(MoescopeError, match="export failed: read-only file system") as caught:
        convert(source, tmp_path / "x.csv")
    assert caught.value.code == ExitCode.OUTPUT
