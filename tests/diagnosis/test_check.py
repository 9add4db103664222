"""Checking against a golden: what may flip and what may not, JUnit, exit codes, refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from moescope import cli
from moescope.diagnosis.check import TOLERANCES, CheckResult, Tolerance, check, tolerance_for
from moescope.diagnosis.check_junit import junit
from moescope.diagnosis.check_rows import KINDS, Golden, Rows, compare, relative_margin
from moescope.diagnosis.golden import record_golden
from moescope.engine.recording import trace_meta
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring
from moescope.trace.memory import MemoryTrace
from moescope.trace.store import TraceWriter
from tests.engine.fake import FakeTokenizer, fake
from tests.tiny import tiny_checkpoint
from tests.trace.samples import a_frame, a_meta

STRICT = TOLERANCES["float32"]
PROMPTS = [{"prompt": "once upon a time"}, {"prompt_ids": (3, 1, 4, 1, 5)}]


def golden_of(model: Any, variant: str = "trained") -> MemoryTrace:
    trace = MemoryTrace(trace_meta(model))
    record_golden(model, FakeTokenizer(), trace, prompts=PROMPTS, variant=variant, new_tokens=10)
    return trace


# --- whole runs on the toy model ------------------------------------------------------------------


@pytest.mark.parametrize("decode", [True, False])
def test_a_model_agrees_with_its_own_golden(decode: bool) -> None:
    golden = golden_of(fake())
    result = check(fake(), golden, decode=decode)
    assert result.passed and result.sequences == 2 and result.tokens == golden.count
    assert all(share == 1.0 for share in result.agreement.values())
    assert all(result.compared.values()) and not result.findings
    assert all(r.flips == 0 and r.largest_weight_error <= 1e-6 for r in result.routers)
    assert result.largest_logprob_difference < 1e-5
    json.dumps(result.to_json(), allow_nan=False)


@pytest.mark.parametrize(
    ("variant", "first"),
    [
        ("softmax_over_selected", "score_sum"),
        ("raw_logits_as_weights", "score_sum"),
        ("num_experts_per_tok-1", "experts"),
        ("norm_topk_prob=true@2", "score_sum"),
    ],
)
def test_a_wrong_router_is_seen_where_it_begins(variant: str, first: str) -> None:
    exact = replace(STRICT, score_sum=1e-6, weight=1e-6)
    result = check(fake(), golden_of(fake()), variant=variant, tolerance=exact)
    assert not result.passed
    found = result.findings[0]
    begins = 2 if variant.endswith("@2") else 0
    assert (found.kind, found.position, found.layer) == (first, 0, begins)


def test_an_equal_router_passes() -> None:
    assert check(fake(), golden_of(fake()), variant="norm_topk_prob=false").passed


def test_another_checkpoint_differs() -> None:
    assert not check(fake(seed=5), golden_of(fake())).passed


def test_logits_that_are_not_finite_fail() -> None:
    ids = golden_of(fake()).column("token_id").tolist()
    result = check(fake(poison=ids[-1]), golden_of(fake()))
    bad = result.routers[1]
    assert bad.failed["valid"] and not bad.passed["valid"] and not result.passed
    assert any(f.kind == "valid" and f.found == "no decision" for f in result.findings)


def test_an_ids_only_golden_compares_what_it_has() -> None:
    golden = golden_of(fake())
    golden.meta = replace(golden.meta, record="ids", rank_ordered=False)
    result = check(fake(), golden)
    assert result.passed and result.compared == {
        "experts": True,
        "order": False,
        "score_sum": False,
        "weights": False,
        "valid": True,
    }


# --- rows by hand ---------------------------------------------------------------------------------


def spec_of(**policy: Any) -> RouterSpec:
    return RouterSpec(RouterPolicy(num_experts_per_tok=2, **policy), RouterWiring(num_experts=8))


def rows_of(
    ids: Any,
    ours: Any,
    *,
    margin: float = 0.1,
    scores: Any = (0.4, 0.2),
    weights: Any = None,
    tolerance: Tolerance = STRICT,
    spec: RouterSpec | None = None,
    score_sum: float | None = None,
) -> Rows:
    """One row of one router compared; our weights are the golden's unless given."""
    golden_ids = np.array([[ids]], np.int16)
    held = np.array([[scores]], np.float32)
    golden = Golden(
        sequence=0,
        prompt=1,
        token_ids=np.zeros(1, np.int32),
        logprob=np.zeros(1),
        expert_ids=golden_ids,
        weights=held,
        scores=held,
        score_sum=held.sum(2),
        margin=np.array([[margin]], np.float32),
        ranked=True,
    )
    given = held if weights is None else np.array([[weights]], np.float32)
    total = given.sum(2) if score_sum is None else np.array([[score_sum]], np.float32)
    found = SimpleNamespace(expert_ids=np.array([[ours]], np.int16), weights=given, score_sum=total)
    rows = Rows(1, tolerance.margin)
    compare(rows, golden, found, [spec or spec_of()], tolerance)
    return rows


def failing(rows: Rows) -> list[str]:
    return [kind for kind in KINDS if rows.failed[kind][0]]


def test_a_flip_is_allowed_only_below_the_margin() -> None:
    loose = replace(STRICT, margin=0.05)
    assert failing(rows_of((1, 2), (1, 3), margin=0.011, tolerance=loose)) == ["experts"]
    near = rows_of((1, 2), (1, 3), margin=0.009, tolerance=loose)  # 0.009 of a score of 0.2
    assert failing(near) == [] and near.near_ties[0] == 1 and near.flips[0] == 1
    assert failing(rows_of((1, 2), (1, 3), margin=float("nan"), tolerance=loose)) == ["experts"]
    assert failing(rows_of((1, 2), (1, -1), margin=0.1)) == ["experts"]


def test_margins_of_logits_are_what_they_make_of_the_score() -> None:
    logit = spec_of(score_order="topk_then_score")
    ids, scores = np.array([[[1, 2]]], np.int16), np.array([[[0.8, 0.2]]])
    margin = np.array([[0.01]])
    assert relative_margin(margin, scores, ids, [logit])[0, 0] == pytest.approx(1 - np.exp(-0.01))
    assert relative_margin(margin, scores, ids, [spec_of()])[0, 0] == pytest.approx(0.05)
    assert relative_margin(margin, None, ids, [spec_of()])[0, 0] == 0.01
    biased = spec_of(correction_bias="score")
    tiny = np.where(scores == scores.min(), 1e-6, scores)
    mean = np.abs(tiny).mean()
    assert relative_margin(margin, tiny, ids, [biased])[0, 0] == pytest.approx(0.01 / mean)


def test_order_may_only_change_between_near_equals() -> None:
    swapped = {"weights": (0.2, 0.4)}
    assert failing(rows_of((1, 2), (2, 1), **swapped)) == ["order"]
    close = {"scores": (0.2001, 0.2), "weights": (0.2, 0.2001)}
    assert failing(rows_of((1, 2), (2, 1), **close)) == []
    biased = spec_of(correction_bias="score")
    assert failing(rows_of((1, 2), (2, 1), spec=biased, **close)) == ["order"]


def test_sums_and_weights_are_shares_of_the_golden_sum() -> None:
    assert failing(rows_of((1, 2), (1, 2), weights=(0.4004, 0.2))) == []
    assert failing(rows_of((1, 2), (1, 2), weights=(0.41, 0.19))) == ["weights"]
    assert failing(rows_of((1, 2), (1, 2), score_sum=0.7)) == ["score_sum"]
    assert failing(rows_of((1, 2), (1, 2), weights=(0.67, 0.33))) == ["score_sum", "weights"]
    assert failing(rows_of((1, 2), (1, 2), weights=(np.nan, 0.2))) == ["score_sum", "weights"]


def test_what_the_golden_could_not_decide_is_not_asked_for() -> None:
    rows = rows_of((-1, -1), (1, 2), margin=float("nan"))
    assert rows.rows[0] == 0 and failing(rows) == []
    assert failing(rows_of((1, 2), (-1, -1))) == ["valid"]


def test_the_coarser_dtype_counts() -> None:
    assert tolerance_for("float32", "bfloat16") == TOLERANCES["bfloat16"]
    assert tolerance_for("float32", "float32") == STRICT
    assert tolerance_for("float32", "int4") == TOLERANCES["bfloat16"]


def test_golden_traces_that_cannot_be_compared() -> None:
    redacted = MemoryTrace(a_meta())
    redacted.append(a_frame(0, token_id=-1))
    late = MemoryTrace(a_meta())
    late.append(a_frame(3, token_id=1))
    empty = MemoryTrace(a_meta())
    for trace in (redacted, late, empty):
        trace.meta = replace(trace.meta, routers=golden_of(fake()).meta.routers)
        with pytest.raises(MoescopeError) as caught:
            check(fake(), trace)
        assert caught.value.code == ExitCode.TRACE
    with pytest.raises(MoescopeError, match="found 3") as caught:
        trace = MemoryTrace(a_meta())
        trace.append(a_frame(0))
        check(fake(), trace)
    assert caught.value.code == ExitCode.FOUND
    with pytest.raises(MoescopeError, match="no lane 5"):
        check(fake(), golden_of(fake()), lane=5)


# --- JUnit ----------------------------------------------------------------------------------------


def result_of(variant: str = "softmax_over_selected") -> CheckResult:
    return check(fake(), golden_of(fake()), variant=variant)


def test_junit_says_what_failed_and_survives_any_name() -> None:
    result = result_of()
    data = junit(result, 'a<b>&"c"\x1b[31m\ud800', "golden\x00", 1.5)
    root = ElementTree.fromstring(data)
    (suite,) = root
    cases = suite.findall("testcase")
    assert len(cases) == int(root.get("tests", "0")) == 3 * len(KINDS)
    failed = suite.findall("testcase/failure")
    expected = sum(not ok for r in result.routers for ok in r.passed.values())
    assert len(failed) == int(suite.get("failures", "0")) == expected > 0
    sums = [f.text for f in failed if f.get("type") == "score_sum"]
    assert sums[0] is not None and "score_sum: expected 0." in sums[0]
    assert "\x1b" not in data.decode() and suite.get("name", "").startswith('a<b>&"c"')


def test_junit_skips_what_was_not_recorded() -> None:
    golden = golden_of(fake())
    golden.meta = replace(golden.meta, record="ids")
    root = ElementTree.fromstring(junit(check(fake(), golden), "m", "g", 0.0))
    assert root.get("failures") == "0" and len(root.findall(".//skipped")) == 6


# --- the commands ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint("olmoe", tmp_path_factory.mktemp("check")))


@pytest.fixture(scope="module")
def golden(model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("golden") / "golden.moetrace"
    assert cli.run(["trace", model, "--golden", "-o", str(path)]) == 0
    return str(path)


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_from_golden_to_verdict(capsys: Any, model: str, golden: str, tmp_path: Path) -> None:
    code, out, _ = run(capsys, "check", model, "--against", golden)
    assert code == 0 and "agrees with golden.moetrace" in out and "5 sequences" in out
    junit_path = tmp_path / "junit.xml"
    wrong = ("--variant", "softmax_over_selected", "--junit", str(junit_path))
    code, out, _ = run(capsys, "check", model, "--against", golden, *wrong)
    assert code == ExitCode.FOUND and "differs from" in out
    assert "sequence 0 @0 L00  score_sum: expected 0." in out
    assert ElementTree.parse(junit_path).getroot().get("failures") != "0"
    code, out, _ = run(capsys, "check", model, "--against", golden, *wrong, "--json")
    document = json.loads(out)
    assert code == 1 and document["passed"] is False and document["same"]["weights"] is True
    assert document["routers"][0]["passed"]["experts"] is True


def test_bfloat16_passes_against_a_float32_golden(capsys: Any, model: str, golden: str) -> None:
    for extra in ((), ("--prefill",)):
        code, out, _ = run(
            capsys, "check", model, "--against", golden, "--dtype", "bfloat16", *extra
        )
        assert code == 0, out
    strict = ("--margin", "0", "--min-agree", "1", "--max-weight-err", "0.0001")
    assert run(capsys, "check", model, "--against", golden, "--dtype", "bfloat16", *strict)[0] == 1


def test_what_the_command_refuses(capsys: Any, model: str, golden: str, tmp_path: Path) -> None:
    check_model = ("check", model, "--against")
    assert run(capsys, *check_model, str(tmp_path / "absent"))[0] == ExitCode.TRACE
    hostile = tmp_path / "hostile.moetrace"
    hostile.write_bytes(Path(golden).read_bytes()[:9000])
    assert run(capsys, *check_model, str(hostile))[0] == ExitCode.TRACE
    code, out, err = run(capsys, *check_model, golden, "--junit", golden)
    assert code == ExitCode.OUTPUT and out == "" and "no XML" in err
    assert run(capsys, *check_model, golden, "--junit", "/no/such/folder/x")[0] == ExitCode.OUTPUT
    assert run(capsys, *check_model, golden, "--margin", "x")[0] == ExitCode.USAGE
    other = tmp_path / "other.moetrace"
    with TraceWriter(other, a_meta()) as writer:
        writer.append(a_frame(0))
    code, _, err = run(capsys, *check_model, str(other))
    assert code == ExitCode.FOUND and "router 0: experts: expected 16" in err
    for option in (("--redact",), ("--record", "logits"), ("--temperature", "1")):
        place = str(tmp_path / "x.moetrace")
        assert run(capsys, "trace", model, "--golden", "-o", place, *option)[0] == ExitCode.USAGE


def test_a_golden_of_ones_own_prompt(capsys: Any, model: str, tmp_path: Path) -> None:
    path = str(tmp_path / "own.moetrace")
    prompt = ("--prompt-ids", "5,6,7", "--max-new-tokens", "4")
    code, out, _ = run(capsys, "trace", model, "--golden", "-o", path, *prompt, "--json")
    assert code == 0 and json.loads(out)["sequences"] == 1 and json.loads(out)["tokens"] == 7
    assert run(capsys, "check", model, "--against", path)[0] == 0


def test_built_in_prompts_for_a_model_without_a_tokenizer() -> None:
    model = fake()
    trace = MemoryTrace(trace_meta(model))
    record_golden(model, None, trace, new_tokens=3)
    assert len(np.unique(trace.keys()[:, 0])) == 5 and trace.count == 5 * 27
    assert check(fake(), trace).passed
