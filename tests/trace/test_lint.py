"""Lint: a sound trace gives nothing, and each rule sees the defect it is named after."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moescope import cli
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels import route
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring
from moescope.trace.frames import Frame, RouterInfo, TraceMeta
from moescope.trace.lint import ERROR, Finding, lint
from moescope.trace.lint_rules import RULES
from moescope.trace.memory import MemoryTrace
from moescope.trace.store import TraceWriter

T, L = 96, 4


def spec_of(experts: int = 16, k: int = 4, **policy: Any) -> RouterSpec:
    return RouterSpec(
        RouterPolicy(num_experts_per_tok=k, **policy), RouterWiring(num_experts=experts)
    )


def sound(tokens: int = T, *, layers: tuple[int, ...] = (), **options: Any) -> MemoryTrace:
    """A trace as moescope records it: routed by the reference kernel."""
    spec = spec_of(**options)
    numbers = layers or tuple(range(1, L + 1))
    meta = TraceMeta(
        routers=tuple(RouterInfo(n, spec.E, 0, spec.K, spec.to_json()) for n in numbers),
        record="weights",
        engine={"dtype": "float32"},
    )
    trace = MemoryTrace(meta)
    draw = np.random.default_rng(3)
    for position in range(tokens):
        logits = (2 * draw.standard_normal((len(numbers), spec.E))).astype(np.float32)
        routing = route(logits, spec)
        trace.append(
            Frame(
                sequence=0,
                lane=0,
                position=position,
                token_id=int(draw.integers(0, 500)),
                text="",
                phase=0 if position < 20 else 1,
                variant="trained",
                expert_ids=routing.expert_ids.astype(np.int16),
                score_sum=routing.score_sum,
                mass=routing.mass,
                entropy=routing.entropy,
                margin=routing.margin,
                runner_up=routing.runner_up.astype(np.int16),
                weights=routing.weights,
                scores=routing.scores,
            )
        )
    return trace


def broken(trace: MemoryTrace, change: Any, start: int = 0, stop: int | None = None) -> MemoryTrace:
    """Every frame of a stretch as `change` makes it: fields of `Frame` by name."""
    frames = list(trace.frames())
    stop = len(frames) if stop is None else stop
    for at in range(start, stop):
        frames[at] = replace(frames[at], **change(frames[at], frames[at - 1]))
    found = MemoryTrace(trace.meta)
    for frame in frames:
        found.append(frame)
    return found


def seen(trace: MemoryTrace) -> dict[str, Finding]:
    return {finding.rule: finding for finding in lint(trace)}


def with_meta(trace: MemoryTrace, **fields: Any) -> MemoryTrace:
    trace.meta = replace(trace.meta, **fields)
    return trace


def ids(change: Any) -> Any:
    return lambda frame, _: {"expert_ids": change(frame.expert_ids.copy())}


def one(array: Any, place: Any, value: Any) -> Any:
    array[place] = value
    return array


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_topk_prob": True},
        {"scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        {"score_order": "topk_then_score"},
        {"experts": 300, "k": 8},
        {"experts": 4, "k": 1},
        {"weights_from": "logits"},
    ],
)
def test_a_sound_trace_gives_nothing(options: dict[str, Any]) -> None:
    assert lint(sound(**options)) == []


def unsorted(trace: MemoryTrace) -> MemoryTrace:
    def change(frame: Frame, _: Frame) -> dict[str, Any]:
        order = np.argsort(frame.expert_ids, axis=1)
        assert frame.weights is not None
        return {
            "expert_ids": np.take_along_axis(frame.expert_ids, order, 1),
            "weights": np.take_along_axis(frame.weights, order, 1),
        }

    return broken(trace, change)


def scaled(factor: float) -> Any:
    def change(frame: Frame, _: Frame) -> dict[str, Any]:
        return {"weights": frame.weights * factor, "score_sum": frame.score_sum * factor}

    return change


def normalised(frame: Frame, _: Frame) -> dict[str, Any]:
    assert frame.weights is not None
    total = frame.weights.sum(1, keepdims=True)
    return {"weights": frame.weights / total, "score_sum": np.ones(L, np.float32)}


DEFECTS: dict[str, Any] = {
    "positions": lambda: broken(
        sound(), lambda frame, _: {"position": frame.position + 5}, start=50
    ),
    "last_token": lambda: with_meta(sound(), last_token_present=False),
    "token_ids": lambda: broken(sound(), lambda *_: {"token_id": -1}, 90),
    "invalid_rows": lambda: broken(sound(), ids(lambda a: one(a, 2, -1)), 4, 6),
    "repeated_picks": lambda: broken(sound(), ids(lambda a: one(a, (1, 3), a[1, 0])), 7, 9),
    "beyond_experts": lambda: broken(sound(), ids(lambda a: one(a, (0, 3), 16)), 7, 8),
    "wrapped_ids": lambda: broken(sound(experts=400, k=8), ids(lambda a: a % 256)),
    "zero_layers": lambda: broken(sound(), ids(lambda a: one(a, 2, 0))),
    "zero_prompt": lambda: broken(sound(), ids(lambda a: one(a, slice(None), 0)), 0, 20),
    "repeated_rows": lambda: broken(
        sound(), lambda _, before: {"expert_ids": before.expert_ids}, 40, 41
    ),
    "rank_order": lambda: unsorted(sound()),
    "id_space": lambda: with_meta(sound(), ids_space="physical"),
    "weight_sums": lambda: broken(sound(norm_topk_prob=True), scaled(2.5)),
    "whole_sums": lambda: broken(sound(), normalised),
    "recorded_sums": lambda: broken(
        sound(), lambda frame, _: {"score_sum": frame.score_sum + np.float32(0.1)}, 3, 4
    ),
    "selection_scores": lambda: broken(
        sound(), lambda frame, _: {"weights": one(frame.weights.copy(), (1, 3), -0.2)}, 3, 60
    ),
    "ranked_weights": lambda: broken(
        sound(), lambda frame, _: {"weights": frame.weights[:, ::-1].copy()}
    ),
    "runner_up": lambda: broken(
        sound(), lambda frame, _: {"runner_up": frame.expert_ids[:, 0]}, 3, 4
    ),
    "padding": lambda: broken(sound(), lambda *_: {"token_id": 0}, 0, 12),
    "ordinals": lambda: with_meta(
        sound(layers=(0, 1, 2, 3)),
        routers=tuple(RouterInfo(n, 16, 0, 4, {}) for n in range(4)),
    ),
}


@pytest.mark.parametrize("rule", DEFECTS)
def test_each_defect_is_seen(rule: str) -> None:
    found = seen(DEFECTS[rule]())
    assert rule in found, sorted(found)
    finding = found[rule]
    assert 0 < finding.rows <= finding.of and finding.means and finding.advice
    assert finding.where


def test_every_rule_has_a_defect() -> None:
    names = {rule.__name__ for rule in RULES}
    assert {"runner_up" if name == "runner_up_picked" else name for name in names} == set(DEFECTS)


def test_a_constant_factor_is_called_a_factor() -> None:
    assert "2.5 times" in seen(DEFECTS["weight_sums"]())["weight_sums"].seen


def test_swapped_axes_are_recognised() -> None:
    """[T, K, L] read as [T, L, K]: rows repeat experts, columns do not."""
    trace = broken(sound(experts=5, k=4), lambda frame, _: {"expert_ids": frame.expert_ids.T})
    assert "axes look swapped" in seen(trace)["repeated_picks"].advice


def test_places_are_addresses() -> None:
    finding = seen(DEFECTS["beyond_experts"]())["beyond_experts"]
    assert finding.where == ("@7 L1",) and (finding.rows, finding.of) == (1, T * L)
    assert seen(DEFECTS["zero_layers"]())["zero_layers"].where == ("L3",)


def test_a_lane_is_judged_by_the_router_it_ran() -> None:
    spec = spec_of()
    trace = MemoryTrace(sound().meta)
    for frame in broken(sound(), normalised).frames():
        trace.append(replace(frame, variant="softmax_over_selected"))
    assert "whole_sums" not in seen(trace)
    assert spec.allowed_score_sum() == (0.0, 1.0)


def test_errors_come_first_and_nothing_is_refused_quietly() -> None:
    trace = with_meta(DEFECTS["beyond_experts"](), ids_space="physical", last_token_present=False)
    kinds = [finding.severity for finding in lint(trace)]
    assert kinds == sorted(kinds, key=["error", "warning", "note"].index)
    with pytest.raises(MoescopeError) as caught:
        lint(MemoryTrace(TraceMeta()))
    assert caught.value.code == ExitCode.TRACE
    with pytest.raises(MoescopeError, match="no token"):
        lint(MemoryTrace(sound().meta))


# --- the command ----------------------------------------------------------------------------------


def written(path: Path, trace: MemoryTrace) -> str:
    with TraceWriter(path, trace.meta) as writer:
        for frame in trace.frames():
            writer.append(frame)
    return str(path)


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command(capsys: Any, tmp_path: Path) -> None:
    good = written(tmp_path / "good.moetrace", sound())
    assert run(capsys, "lint", good) == (0, "good.moetrace: nothing found\n", "")
    bad = written(tmp_path / "bad.moetrace", DEFECTS["rank_order"]())
    code, out, _ = run(capsys, "lint", bad)
    assert code == ExitCode.FOUND and "error rank_order" in out and "Try: " in out
    code, out, _ = run(capsys, "lint", bad, "--json")
    document = json.loads(out)
    assert code == 1 and document["ok"] is False
    assert document["findings"][0]["severity"] == ERROR
    noted = written(tmp_path / "noted.moetrace", DEFECTS["last_token"]())
    assert run(capsys, "lint", noted)[0] == 0
    (tmp_path / "broken.moetrace").write_bytes(Path(good).read_bytes()[:7000])
    assert run(capsys, "lint", str(tmp_path / "broken.moetrace"))[0] == ExitCode.TRACE


def test_other_formats_too(capsys: Any, tmp_path: Path) -> None:
    good = written(tmp_path / "good.moetrace", sound())
    for name in ("x.csv", "x.jsonl"):
        assert run(capsys, "convert", good, str(tmp_path / name))[0] == 0
        code, out, _ = run(capsys, "lint", str(tmp_path / name))
        assert code == 0 and "nothing found" in out


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "position": st.integers(0, 6),
            "token_id": st.integers(-1, 4),
            "layer": st.integers(0, 2),
            "expert_ids": st.lists(st.sampled_from([-1, 0, 1, 2, 299]), min_size=2, max_size=2),
        },
        optional={
            "weights": st.lists(st.sampled_from([0.0, 0.5, -1.0, 1e30]), min_size=2, max_size=2),
            "score_sum": st.sampled_from([1.0, 0.2]),
            "lane": st.integers(0, 1),
            "phase": st.integers(0, 1),
        },
    ),
    min_size=1,
    max_size=12,
)


@given(ROWS)
@settings(max_examples=25, deadline=None)
def test_odd_imports_are_judged_or_refused_never_a_bug(rows: list[dict[str, Any]]) -> None:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder, "odd.jsonl")
        path.write_text("\n".join(map(json.dumps, rows)))
        for command in (["lint"], ["balance", "--json"], ["balance"], ["diff", str(path)]):
            assert cli.run([*command, str(path)]) in (0, ExitCode.FOUND, ExitCode.TRACE)
