"""What another engine recorded, read from every form it may come in; and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope.diagnosis.arrays import read_tokens
from moescope.diagnosis.evidence import Evidence, Observed, of_trace, read
from moescope.engine.interpreter import Router
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring
from moescope.trace.formats import convert
from moescope.trace.memory import MemoryTrace
from moescope.trace.store import TraceWriter
from tests.trace.samples import a_frame, a_meta

T, LAYERS, E, K = 12, 5, 8, 3
SPEC = RouterSpec(RouterPolicy(K), RouterWiring(E)).resolved("float32")
ROUTERS = tuple(Router(layer, SPEC, {}) for layer in (1, 2, 4))


def arrays(seed: int = 0) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((T, 3, E)), axis=2)[:, :, :K]
    return ids.astype(np.uint8), rng.integers(0, 200, T)


def reading(path: Path, **more: Any) -> Evidence:
    return read(path, ROUTERS, layers=LAYERS, vocabulary=256, **more)


def refused(path: Path, message: str, code: ExitCode = ExitCode.TRACE, **more: Any) -> None:
    with pytest.raises(MoescopeError, match=message) as caught:
        reading(path, **more)
    assert caught.value.code == code and caught.value.message.isprintable()


def tokens_file(folder: Path, tokens: Any) -> Path:
    path = folder / "tokens.json"
    path.write_text(json.dumps([int(t) for t in tokens]))
    return path


# --- arrays ---------------------------------------------------------------------------------------


def test_an_array_of_moe_layers_only(tmp_path: Path) -> None:
    ids, tokens = arrays()
    np.save(tmp_path / "a.npy", ids)
    found = reading(tmp_path / "a.npy", tokens=tokens_file(tmp_path, tokens))
    (one,) = found.sequences
    assert (one.expert_ids == ids).all() and (one.token_ids == tokens).all()
    assert found.level == "order" and found.ordered is None and one.weights is None


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.int64])
def test_an_array_of_all_layers_without_the_last_token(tmp_path: Path, dtype: Any) -> None:
    """As vLLM gives it: dense layers are zero rows, the last token has none."""
    ids, tokens = arrays()
    whole = np.zeros((T - 1, LAYERS, K), dtype)
    whole[:, [1, 2, 4]] = ids[:-1]
    np.save(tmp_path / "a.npy", whole)
    found = reading(tmp_path / "a.npy", tokens=tokens_file(tmp_path, tokens))
    (one,) = found.sequences
    assert (one.expert_ids[:-1] == ids[:-1]).all() and (one.expert_ids[-1] == -1).all()


def test_rows_from_a_later_token_on(tmp_path: Path) -> None:
    ids, tokens = arrays()
    np.save(tmp_path / "a.npy", ids[4:-1])
    found = reading(tmp_path / "a.npy", tokens=tokens_file(tmp_path, tokens))
    (one,) = found.sequences
    assert (one.expert_ids[:4] == -1).all() and (one.expert_ids[4:-1] == ids[4:-1]).all()
    assert "tokens 4 to 10" in found.notes[0]


def test_an_archive_with_weights_and_tokens(tmp_path: Path) -> None:
    ids, tokens = arrays()
    weights = np.random.default_rng(1).random(ids.shape).astype(np.float32)
    np.savez(tmp_path / "a.npz", expert_ids=ids, weights=weights, token_ids=tokens)
    found = reading(tmp_path / "a.npz")
    assert found.level == "weights" and (found.sequences[0].weights == weights).all()
    assert found.reduced("order").level == "order" and found.reduced("sets").level == "sets"


def test_counts_as_an_array_and_as_llama_cpp_writes_them(tmp_path: Path) -> None:
    ids, tokens = arrays()
    counts = np.stack([np.bincount(ids[:, r].ravel(), minlength=E) for r in range(3)])
    np.save(tmp_path / "a.npy", counts)
    pairs = [(layer, e) for r, layer in enumerate((1, 2, 4)) for e in ids[:, r].ravel()]
    lines = "\n".join(f"{layer},{e}" for layer, e in pairs)
    (tmp_path / "a.csv").write_text(f"layer,expert\n{lines}\n")
    for name in ("a.npy", "a.csv"):
        found = reading(tmp_path / name, tokens=tokens_file(tmp_path, tokens))
        assert found.level == "counts" and (found.counts == counts).all()


def test_rows_that_are_no_decision_are_left_out_and_said(tmp_path: Path) -> None:
    ids, tokens = arrays()
    ids[3, 1] = 0
    ids[5, 2, 2] = 200
    np.save(tmp_path / "a.npy", ids)
    found = reading(tmp_path / "a.npy", tokens=tokens_file(tmp_path, tokens))
    assert (found.sequences[0].expert_ids[3, 1] == -1).all()
    assert found.sequences[0].expert_ids[5, 2].tolist()[2] == -1
    assert len(found.notes) == 2


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("1,2,3", [1, 2, 3]), ("[1, 2, 3]\n", [1, 2, 3]), ("7\n8\n9\n", [7, 8, 9])],
)
def test_token_files(tmp_path: Path, text: str, wanted: list[int]) -> None:
    path = tmp_path / "t.txt"
    path.write_text(text)
    assert read_tokens(path).tolist() == wanted
    np.save(tmp_path / "t.npy", np.array(wanted))
    assert read_tokens(tmp_path / "t.npy").tolist() == wanted


def test_what_is_wrong_with_an_array_is_named(tmp_path: Path) -> None:
    ids, tokens = arrays()
    given_tokens = tokens_file(tmp_path, tokens)
    path = tmp_path / "a.npy"
    np.save(path, ids)
    refused(path, "holds no token ids", ExitCode.USAGE)
    refused(path, "12 rows: expected at most", tokens=tokens_file(tmp_path, tokens[:5]))
    tokens_file(tmp_path, tokens)
    np.save(path, ids[:, :2])
    refused(path, "expected 3 routers or 5 layers, found 2", tokens=given_tokens)
    np.save(path, ids.astype(np.float32))
    refused(path, "expected ids", tokens=given_tokens)
    np.save(path, np.array([{}], object), allow_pickle=True)
    refused(path, "expected numbers, found object", tokens=given_tokens)
    np.save(path, ids)
    path.write_bytes(path.read_bytes()[:-20])
    refused(path, "declares 108 values", tokens=given_tokens)
    path.write_bytes(b"\x93NUMPY\x01\x00\xff\xff")
    refused(path, "not a good .npy header", tokens=given_tokens)
    path.write_bytes(b"PK\x03\x04garbage")
    refused(path, r"not a good \.npz file", tokens=given_tokens)
    (tmp_path / "x.csv").write_text("layer,expert\n1,2\nnonsense\n")
    refused(tmp_path / "x.csv", "two whole numbers", tokens=given_tokens)
    refused(tmp_path / "none.npy", "no such file", tokens=given_tokens)


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    ids, tokens = arrays()
    np.save(tmp_path / "a.npy", ids)
    tokens[4] = 256
    refused(tmp_path / "a.npy", "token_id: expected 0..255", tokens=tokens_file(tmp_path, tokens))
    (tmp_path / "t").write_text("1, 2, x")
    refused(tmp_path / "a.npy", "expected whole numbers", tokens=tmp_path / "t")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.binary(max_size=200), start=st.sampled_from([b"\x93NUMPY\x01\x00", b"PK\x03\x04"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory: Any, data: bytes, start: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    path = folder / "a.bin"
    path.write_bytes(start + data)
    (folder / "t").write_text("1 2 3")
    with pytest.raises(MoescopeError):
        reading(path, tokens=folder / "t")


# --- traces ---------------------------------------------------------------------------------------


def test_the_same_evidence_from_every_form_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "a.moetrace"
    with TraceWriter(path, a_meta()) as writer:
        for position in range(9):
            writer.append(a_frame(position))
    found = []
    for suffix in ("moetrace", "parquet", "csv", "jsonl"):
        target = tmp_path / f"a.{suffix}"
        if suffix != "moetrace":
            convert(path, target)
        found.append(read(target, MADE_UP, layers=4, vocabulary=50_000))
    for other in found[1:]:
        for a, b in zip(found[0].sequences, other.sequences, strict=True):
            assert (a.expert_ids == b.expert_ids).all() and (a.token_ids == b.token_ids).all()
            assert np.allclose(a.weights, b.weights, equal_nan=True)
    assert found[0].level == "weights" and found[0].ordered is True


def test_rows_with_the_required_columns_only(tmp_path: Path) -> None:
    ids, tokens = arrays()
    rows = [
        {"position": t, "token_id": int(tokens[t]), "layer": layer, "expert_ids": ids[t, r]}
        for t in range(T)
        for r, layer in enumerate((1, 2, 4))
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(r, default=lambda x: x.tolist()) for r in rows))
    found = reading(path)
    assert (found.sequences[0].expert_ids == ids).all()
    assert found.ordered is None and found.dtype is None and found.level == "order"
    assert reading(path, limit=5).tokens == 5


def test_layers_counted_from_the_first_moe_layer_are_taken_in_order(tmp_path: Path) -> None:
    ids, tokens = arrays()
    rows = [
        {"position": t, "token_id": int(tokens[t]), "layer": r, "expert_ids": ids[t, r].tolist()}
        for t in range(T)
        for r in range(3)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = reading(path)
    assert (found.sequences[0].expert_ids == ids).all()
    assert "numbered otherwise" in found.notes[0]


SIXTEEN = RouterSpec(RouterPolicy(2), RouterWiring(16)).resolved("float32")
MADE_UP = tuple(Router(layer, SIXTEEN, {}) for layer in range(4))


def trace_of(positions: Any = range(6), frame: Any = a_frame, **changes: Any) -> MemoryTrace:
    trace = MemoryTrace(replace(a_meta(), **changes))
    for position in positions:
        trace.append(frame(position))
    return trace


def test_what_the_meta_of_a_trace_says_is_believed() -> None:
    assert of_trace(trace_of(), MADE_UP).level == "weights"
    unordered = of_trace(trace_of(rank_ordered=False), MADE_UP)
    assert unordered.ordered is False and unordered.reduced("order").level == "sets"
    scores = of_trace(trace_of(weights_kind="selection"), MADE_UP)
    assert scores.level == "order" and "selection scores" in scores.notes[0]
    told = of_trace(trace_of(engine={"name": "x", "dtype": "bfloat16"}), MADE_UP)
    assert told.dtype == "bfloat16"


def test_a_trace_with_gaps_or_without_tokens_is_refused() -> None:
    with pytest.raises(MoescopeError, match=r"position 2 .* is missing"):
        of_trace(trace_of([0, 1, 3, 4]), MADE_UP)
    redacted = trace_of(frame=lambda position: a_frame(position, token_id=-1))
    with pytest.raises(MoescopeError, match="redacted"):
        of_trace(redacted, MADE_UP)
    with pytest.raises(MoescopeError, match="lane 3: expected one of 0"):
        of_trace(trace_of(), MADE_UP, lane=3)
    with pytest.raises(MoescopeError, match="expected those of the model's 3 routers"):
        of_trace(trace_of(), MADE_UP[:3])


def test_evidence_is_cut_across_sequences() -> None:
    one = Observed(np.arange(5), np.zeros((5, 1, 2), np.int32), np.ones((5, 1, 2), np.float32))
    cut = Evidence((one, one, one)).cut(7)
    assert [len(s.token_ids) for s in cut.sequences] == [5, 2]
    assert cut.sequences[1].weights is not None and len(cut.sequences[1].weights) == 2
