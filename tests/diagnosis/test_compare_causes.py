"""Why lanes choose otherwise: four selections, both judges, rows of a gate, two checkpoints."""

from __future__ import annotations

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope import cli
from moescope.diagnosis.causes import CAUSES, FlipsJudge, LogitsJudge
from moescope.diagnosis.compare import Pairing
from moescope.diagnosis.compare_run import run_compare, specs_under
from moescope.diagnosis.gate_rows import GateBlame
from moescope.diagnosis.two_models import Side, check_pair, run_two
from moescope.engine import crossed
from moescope.engine.beside import refuse_unlike, unlike_ids
from moescope.engine.crossed import Flip, blamed_rows, cause
from moescope.engine.opening import open_model
from moescope.engine.protocol import Generate, LoadRequest, Sampling
from moescope.engine.session import Session
from moescope.errors import ExitCode, MoescopeError
from moescope.kernels import route
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring
from moescope.trace.store import TraceReader
from tests.engine.fake import fake
from tests.tiny import save_checkpoint, tiny_model

TEXT = "The quick brown fox jumps over the lazy dog, and then it rests."


def folder_of(place: Path, name: str, change: Any = None, **more: Any) -> Path:
    model = tiny_model("olmoe", **more)
    if change is not None:
        change(model)
    return save_checkpoint(model, place / name)


def rounded(model: Any) -> None:
    """Every gate in 4 bits a row, stored as it was."""
    for name, tensor in model.named_parameters():
        if name.endswith("gate.weight"):
            step = tensor.data.abs().amax(1, keepdim=True) / 7
            tensor.data = (tensor.data / step).round() * step


def one_row(model: Any) -> None:
    """One row of one gate is noise beside what it was."""
    gate = model.model.layers[1].mlp.gate.weight
    gate.data[3] += 0.15 * gate.data[5]


def loaded(folder: Path) -> tuple[Any, Any]:
    return open_model(LoadRequest(str(folder), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("causes")


@pytest.fixture(scope="module")
def base(place: Path) -> tuple[Any, Any]:
    return loaded(folder_of(place, "base"))


@pytest.fixture(scope="module")
def quantised(place: Path, base: Any) -> tuple[Any, Any]:
    return loaded(folder_of(place, "quantised", rounded))


@pytest.fixture(scope="module")
def one_row_off(place: Path, base: Any) -> tuple[Any, Any]:
    return loaded(folder_of(place, "one_row", one_row))


def test_the_four_selections() -> None:
    a, b = [1, 2], [1, 3]
    assert cause(a, b, a, b) == "gate"
    assert cause(a, a, b, b) == "input"
    assert cause(a, b, b, b) == cause(a, [4, 5], [6, 7], b) == "either"
    assert cause(a, [2, 1], [1, 2, -1], b) == "together"  # order and -1 say nothing
    with pytest.raises(AssertionError):
        cause(a, b, b, [2, 1])


# --- lanes of one model ---------------------------------------------------------------------------


def flips_of(base: Any, variants: list[str], watched: bool) -> Any:
    """Two lanes on the same tokens; judged from logits, or by crossing what the routers read."""
    model, tokenizer = base
    session = Session(model, tokenizer, record="logits", variants=variants)
    session.crosses = watched
    specs = specs_under(model)
    tensors = [router.tensors for router in model.interpreter.routers]
    by_inputs = FlipsJudge(lambda: session.crossing.found)
    judge = by_inputs if watched else LogitsJudge(specs, tensors)
    pairing = Pairing(0, 1, [r.layer for r in model.interpreter.routers], judge)
    ids = tuple(tokenizer.encode(TEXT))
    request = Generate(prompt_ids=ids, sampling=Sampling(max_new_tokens=0))
    for frame in session.generate(request):
        pairing.feed(frame)
    assert session.crossing.active == watched
    session.close()
    assert model.interpreter.intervene is None
    return pairing.result()


@pytest.mark.parametrize(
    "variant", ["softmax_over_selected", "num_experts_per_tok-1", "logits_bf16", "double_softmax"]
)
def test_both_judges_agree(base: Any, variant: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(crossed, "_differ", lambda *_: True)  # though the gate is one
    by_logits = flips_of(base, ["trained", variant], watched=False)
    by_inputs = flips_of(base, ["trained", variant], watched=True)
    assert by_logits.causes == by_inputs.causes and by_logits.flips > 0
    assert set(by_logits.causes) <= set(CAUSES)
    assert [f.cause for f in by_logits.first_flips] == [f.cause for f in by_inputs.first_flips]


def test_a_router_that_selects_alike_flips_by_drifted_input_only(base: Any) -> None:
    found = flips_of(base, ["trained", "softmax_over_selected"], watched=False)
    assert set(found.causes) == {"input"} and found.flips_by_router[0] == {}
    assert found.first_divergence is not None and found.first_divergence.cause == "input"


def test_a_router_that_selects_otherwise_flips_by_its_arithmetic_first(base: Any) -> None:
    found = flips_of(base, ["trained", "num_experts_per_tok-1"], watched=False)
    assert set(found.flips_by_router[0]) == {"gate"}
    assert {"gate", "either"} & set(found.flips_by_router[3])


def test_a_quantised_gate_is_watched(base: Any) -> None:
    model, tokenizer = base
    request = Generate(prompt=TEXT, sampling=Sampling(max_new_tokens=4))
    run = run_compare(model, tokenizer, ["trained", "router_quantised_4_bits"], request)
    (found,) = run.comparisons
    assert set(found.flips_by_router[0]) == {"gate"} and "" not in found.causes
    assert model.interpreter.intervene is None
    by_logits = flips_of(base, ["trained", "router_quantised_4_bits"], watched=False)
    assert set(by_logits.causes) == {""}, "logits alone do not tell"


def test_flips_by_margin_add_up(base: Any) -> None:
    found = flips_of(base, ["trained", "logits_bf16"], watched=False)
    assert sum(bin_.flips for bin_ in found.margins) == found.flips == len(found.first_flips)
    assert sum(bin_.decisions for bin_ in found.margins) == 4 * found.tokens
    close, far = found.margins[:3], found.margins[4:]
    shares = [
        sum(b.flips for b in bins) / max(1, sum(b.decisions for b in bins)) for bins in (close, far)
    ]
    assert shares[0] > shares[1]
    places = [(flip.position, flip.router) for flip in found.first_flips]
    assert places == sorted(places)
    first = found.first_divergence
    assert first is not None and (first.position, first.router) == places[0]


def test_causes_without_logits_are_not_guessed() -> None:
    lanes: dict[int, list[Any]] = {0: [], 1: []}
    session = Session(fake(), None, record="weights", variants=["trained", "num_experts_per_tok-1"])
    for frame in session.generate(Generate(prompt_ids=(1, 2, 3)), force_ids=[4, 5]):
        lanes[frame.lane].append(frame)
    pairing = Pairing(0, 1, [0, 1, 2], LogitsJudge(specs_under(fake()), [{}] * 3))
    for frame in itertools.chain(*lanes.values()):
        pairing.feed(frame)
    found = pairing.result()
    assert found.flips and set(found.causes) == {""}
    json.dumps(found.to_json(), allow_nan=False)


# --- rows of a gate -------------------------------------------------------------------------------


def test_a_flip_is_blamed_on_the_row_that_undoes_it() -> None:
    spec = RouterSpec(RouterPolicy(num_experts_per_tok=2), RouterWiring(num_experts=4))
    spec = spec.resolved("float32")
    blame = GateBlame([7], hidden=64)
    original = np.array([3.0, 2.0, 1.9, 0.0], np.float32)

    def turned(*logits: float) -> None:
        rows = blamed_rows([0, 1], np.array(logits, np.float32), original, spec, {})
        blame.take([Flip(0, "gate", rows)])

    turned(3.0, 1.8, 1.9, 0.0)  # row 1 fell
    turned(3.0, 2.0, 2.2, 0.0)  # row 2 rose
    turned(3.0, 1.95, 1.98, 0.0)  # rows 1 and 2 both moved: mending either undoes it
    turned(2.5, 1.0, 1.9, 3.5)  # row 3 rose above all and row 1 fell below row 2: only together
    blame.take([Flip(0, "input")])  # no gate's doing
    found = blame.result()
    assert {(row.expert, row.flips) for row in found.rows} == {(1, 2), (2, 2)}
    assert (found.flips, found.shared, found.row_bytes) == (4, 1, 128)
    assert found.rows[0].layer == 7 and found.rows[0].error == pytest.approx(0.2)


def test_another_rule_is_no_rows_doing(place: Path, base: Any) -> None:
    """The same gate, and one expert fewer: no logit of the original undoes a flip."""
    fewer = loaded(folder_of(place, "picks_two", num_experts_per_tok=2))
    run = fed_both(Side(*base), Side(*fewer), base[1].encode(TEXT))
    assert run.comparisons[0].causes["gate"] > 100
    assert run.gate_rows is not None and run.gate_rows.flips == 0 and run.gate_rows.rows == ()


def test_the_one_row_that_is_off_is_found(base: Any, one_row_off: Any) -> None:
    ids = base[1].encode(3 * TEXT)
    run = fed_both(Side(*base), Side(*one_row_off), ids)
    (found,), gate = run.comparisons, run.gate_rows
    assert gate is not None and gate.flips >= 3 and gate.shared == 0
    blamed = Counter({(row.layer, row.expert): row.flips for row in gate.rows})
    assert blamed[1, 3] == gate.flips
    assert found.flips_by_router[0] == {} and set(found.flips_by_router[1]) == {"gate"}
    assert set(found.flips_by_router[2]) <= {"input"}


def fed_both(a: Side, b: Side, ids: list[int], **options: Any) -> Any:
    request = Generate(prompt_ids=tuple(ids), sampling=Sampling(max_new_tokens=0))
    return run_two(a, b, request, teacher_forced=True, **options)


# --- two checkpoints ------------------------------------------------------------------------------


def test_a_model_beside_itself_differs_in_nothing(base: Any) -> None:
    run = fed_both(Side(*base), Side(*base), base[1].encode(TEXT))
    (found,) = run.comparisons
    assert found.flips == 0 and found.kl_mean == 0.0 and found.top1_agrees == 1.0
    assert found.same_ids.all.weight_difference == 0.0 and found.kl_tokens == found.tokens
    assert run.gate_rows is not None and run.gate_rows.rows == ()


def test_a_quantised_gate_beside_its_original(base: Any, quantised: Any) -> None:
    ids = base[1].encode(TEXT)
    run = fed_both(Side(*base), Side(*quantised), ids, keep_rows=True)
    (found,) = run.comparisons
    assert set(found.flips_by_router[0]) == {"gate"}, "the first router reads the same"
    assert {"input", "either"} & set(found.causes) and found.kl_mean and found.kl_mean > 0
    assert found.tokens == len(ids) == len(run.rows[0])
    row = run.rows[0][5]
    assert row["same_ids"] and len(row["jaccard"]) == 4
    same = np.mean([row["same_set"] for row in run.rows[0]])
    assert same == pytest.approx(found.same_ids.all.same_set)


def test_models_that_do_not_correspond_are_refused(place: Path, base: Any) -> None:
    fewer = loaded(folder_of(place, "fewer", num_experts=6))
    shorter = loaded(folder_of(place, "shorter", num_hidden_layers=3))
    with pytest.raises(MoescopeError, match="layer 0: experts: expected 8 as in base, found 6"):
        check_pair(Side(*base), Side(*fewer))
    with pytest.raises(MoescopeError, match="routers: expected 4 as in base, found 3"):
        check_pair(Side(*base), Side(*shorter))


@pytest.fixture(scope="module")
def respelled(place: Path, base: Any) -> Path:
    """The same weights, and a tokenizer in which b and c changed places."""
    folder = place / "respelled"
    shutil.copytree(place / "base", folder)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["b"], vocabulary["c"] = vocabulary["c"], vocabulary["b"]
    path.write_text(json.dumps(tokenizer))
    return folder


def test_tokenizers_must_agree_on_what_is_fed(base: Any, respelled: Path) -> None:
    _, tokenizer = base
    _, other = loaded(respelled)
    unlike = unlike_ids(tokenizer, other, 264)
    assert unlike == {98: ("b", "c"), 99: ("c", "b")}
    refuse_unlike(unlike, tokenizer.encode("Hello"))
    with pytest.raises(MoescopeError, match="differ at token 1: id 98 is 'b' here and 'c' in"):
        refuse_unlike(unlike, [97, 98])
    assert unlike_ids(tokenizer, None, 264) == unlike_ids(tokenizer, tokenizer, 264) == {}


def run_cli(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.run(list(arguments))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_two_checkpoints_on_the_command_line(
    capsys: Any, place: Path, base: Any, quantised: Any, respelled: Path
) -> None:
    models = (str(place / "base"), str(place / "quantised"))
    common = ("--prompt", TEXT, "--max-new-tokens", "6", "--dtype", "float32")
    path = place / "two.moetrace"
    code, out, _ = run_cli(
        capsys, "compare", *models, *common, "--teacher-forced", "-o", str(path), "--json"
    )
    document = json.loads(out)
    assert code == 0 and (document["model"], document["model2"]) == ("base", "quantised")
    assert document["mode"] == "same tokens" and document["gate_rows"]["flips"] > 0
    (found,) = document["comparisons"]
    with TraceReader.open(path) as reader:
        assert reader.lanes == (0, 1) and reader.count == 2 * found["tokens"] and reader.complete
        assert [r.model for r in reader.meta.routers] == [0] * 4 + [1] * 4
        assert [m["name"] for m in reader.meta.models] == ["base", "quantised"]
    code, out, _ = run_cli(capsys, "compare", *models, *common, "--teacher-forced")
    assert code == 0 and "gate arithmetic" in out and "rows to keep in higher precision" in out
    code, out, _ = run_cli(capsys, "compare", *models, *common, "-o", str(path), "--force")
    assert code == 0 and "each lane writes its own text" in out
    with TraceReader.open(path) as reader:
        assert reader.lanes == (0, 1) and reader.complete
    code, _, err = run_cli(capsys, "compare", models[0], str(respelled), *common)
    assert code == ExitCode.USAGE and "tokenizers differ at token" in err


def test_a_text_file_is_fed_to_all(capsys: Any, place: Path, base: Any, quantised: Any) -> None:
    text = place / "text.txt"
    text.write_text(20 * TEXT)
    model = str(place / "base")
    options = ("--text", str(text), "--tokens", "40", "--json", "--dtype", "float32", "--rows")
    code, out, err = run_cli(capsys, "compare", model, "--variant", "logits_bf16", *options)
    document = json.loads(out)
    assert code == 0 and document["mode"] == "same tokens" and document["text"] == "text.txt"
    assert "the first 40 of 1260 tokens" in err
    (found,), (rows,) = document["comparisons"], document["rows"]
    assert found["tokens"] == len(rows) == 40 and found["ids_part_at"] is None
    assert all(row["kl"] is not None for row in rows)
    code, out, _ = run_cli(capsys, "compare", model, str(place / "quantised"), *options)
    assert code == 0 and json.loads(out)["comparisons"][0]["tokens"] == 40


def test_what_the_command_refuses(capsys: Any, place: Path, base: Any) -> None:
    model = ("compare", str(place / "base"))
    text = place / "latin.txt"
    text.write_bytes(b"\xff\xfe\x00")
    empty = place / "empty.txt"
    empty.write_text("")
    prompt = ("--prompt", "Hi")
    for arguments, words in (
        (prompt, "nothing to compare"),
        (("--variant", "logits_bf16", *prompt, "--text", str(text)), "--text and --prompt"),
        (("--variant", "logits_bf16", "--text", str(text)), "UTF-8"),
        (("--variant", "logits_bf16", "--text", str(empty)), "found none"),
        (("--variant", "logits_bf16", "--text", str(place / "no")), "no such file"),
        (("--variant", "logits_bf16", *prompt, "--rows"), "--json"),
        ((str(place / "base"), *["--variant", "trained"] * 3, *prompt), "at most two"),
    ):
        code, out, err = run_cli(capsys, *model, *arguments)
        assert code == ExitCode.USAGE and out == "" and words in err, words


def test_a_second_model_that_does_not_fit_is_refused_with_numbers(
    capsys: Any, place: Path, base: Any, monkeypatch: Any
) -> None:
    from moescope.engine import devices, load

    free = iter([10**12])
    monkeypatch.setattr(devices, "free_bytes", lambda _: next(free, 1000))
    monkeypatch.setattr(load.devices, "free_bytes", devices.free_bytes)
    code, out, err = run_cli(
        capsys, "compare", str(place / "base"), str(place / "base"), "--prompt", "Hi"
    )
    assert code == ExitCode.RESOURCES and out == ""
    assert "base beside base: needs" in err and "free 0.0 GB" in err


def test_selections_of_flips_are_those_of_the_reference(base: Any) -> None:
    """A flip's experts are what the recorded logits give under each lane's own spec."""
    model, tokenizer = base
    specs = specs_under(model)
    frames: dict[tuple[int, int], Any] = {}
    variants = ["trained", "num_experts_per_tok-1"]
    session = Session(model, tokenizer, record="logits", variants=variants)
    for frame in session.generate(Generate(prompt=TEXT, sampling=Sampling(max_new_tokens=0))):
        frames[frame.lane, frame.position] = frame
    pairing = Pairing(0, 1, [0, 1, 2, 3])
    for frame in frames.values():
        pairing.feed(frame)
    for flip in pairing.result().first_flips[:20]:
        for lane, experts in ((0, flip.experts_a), (1, flip.experts_b)):
            frame = frames[lane, flip.position]
            again = route(frame.logits[None, flip.router], specs(variants[lane])[flip.router])
            assert tuple(again.expert_ids[0].tolist()) == experts
