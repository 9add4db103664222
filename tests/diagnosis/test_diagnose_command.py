"""`moescope diagnose` and `moescope variants` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from moescope import cli
from moescope.trace.formats import convert
from moescope.trace.store import TraceReader


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's routing, as trained and with the fault of its story."""
    folder = tmp_path_factory.mktemp("traces")
    for name, variant in (("right", "trained"), ("wrong", "softmax_over_selected")):
        arguments = ["trace", "demo", "--prompt", "Once upon a time", "--max-new-tokens", "24"]
        place = str(folder / f"{name}.moetrace")
        assert cli.run([*arguments, "--variant", variant, "-o", place]) == 0
    return folder


def diagnosed(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run(["diagnose", *arguments, "--model", "demo"])
    seen = capsys.readouterr()
    return code, seen.out, seen.err


def test_a_trace_that_is_right(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = diagnosed(capsys, str(traces / "right.moetrace"))
    assert code == 0
    assert out.startswith("routed correctly: 100.0 % of ")
    assert "Σ" in out and "experts and weights of" in out


def test_a_trace_that_is_wrong(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = diagnosed(capsys, str(traces / "wrong.moetrace"))
    assert code == 1
    assert out.startswith("routed wrong: softmax_over_selected (softmax over the selected) ")
    assert "fix" in out and "https://github.com/lablup/mlxcel/issues/391" in out
    assert "1.000 seen" in out and "not told apart from   always_renormalised" in out


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_the_same_verdict_of_any_form(
    traces: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = traces / f"wrong.{form}"
    convert(traces / "wrong.moetrace", target)
    code, out, _ = diagnosed(capsys, str(target), "--json")
    document = json.loads(out)
    assert code == 1 and document["faults"][0] == "softmax_over_selected"
    assert set(document) == {
        *("schema", "verdict", "faults", "explained", "explained_by_trained"),
        *("score_sum_expected", "score_sum_seen", "indistinguishable"),
    }


def test_an_array_and_a_file_of_tokens(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """vLLM's form: ids of all layers, the last token absent."""
    with TraceReader.open(traces / "right.moetrace") as trace:
        ids, tokens = trace.column("expert_ids"), trace.column("token_id")
    np.save(traces / "ids.npy", ids[:-1].astype(np.uint8))
    (traces / "tokens.txt").write_text(" ".join(map(str, tokens.tolist())))
    code, out, _ = diagnosed(
        capsys, str(traces / "ids.npy"), "--tokens", str(traces / "tokens.txt"), "--json"
    )
    document = json.loads(out)
    assert code == 0 and document["verdict"] == "trained" and document["score_sum_seen"] is None
    code, _, err = diagnosed(capsys, str(traces / "ids.npy"))
    assert code == 2 and err.startswith("moescope: ids.npy: holds no token ids\nTry: --tokens")


def test_what_cannot_be_used_ends_in_two_lines(
    tmp_path: Path, traces: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.moetrace").write_bytes(b"nothing of the kind")
    code, out, err = diagnosed(capsys, str(tmp_path / "x.moetrace"))
    assert code == 4 and not out and err.count("\n") <= 2 and "Traceback" not in err
    code, _, err = diagnosed(capsys, str(traces / "right.moetrace"), "--lane", "3")
    assert code == 4 and "lane 3" in err
    assert cli.run(["diagnose", "x", "--model", str(tmp_path)]) == 3


def test_the_catalogue_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["variants"]) == 0
    out = capsys.readouterr().out
    for name in ("group_mask_zero", "experts_shifted", "aux_loss_not_over_k"):
        assert f"\n{name}\n" in out


def test_what_each_entry_would_change_for_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["variants", "demo", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["variants"]}
    shifted, selected = rows["experts_shifted"], rows["softmax_over_selected"]
    assert shifted["applies"] and shifted["rebuilds"] and shifted["seen"] == "downstream"
    assert "expert e + 1" in shifted["changes"][0]
    assert selected["applies"] and not selected["rebuilds"] and selected["layers"] == [0, 5]
    assert not rows["group_mask_zero"]["applies"]
    assert not rows["aux_loss_not_over_k"]["applies"]
    assert selected["links"][0].startswith("https://github.com/lablup")
