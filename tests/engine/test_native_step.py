"""The decode step in C against the torch operators: same ids, tokens and records."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

from moescope.engine.interpreter import StepOutput
from moescope.engine.load import load_model
from moescope.engine.native_limits import why_beside
from moescope.engine.native_step import NativeStep
from moescope.engine.protocol import LoadRequest
from moescope.engine.sampling import Expectation
from moescope.engine.torch_decoder import TorchDecoder
from moescope.kernels import native_ops as native
from moescope.kernels.spec import RouterPolicy
from moescope.trace.frames import Frame
from moescope.trace.record import record as trace_record
from tests.engine.native_cases import agree, walk
from tests.tiny import FAMILIES, tiny_checkpoint

IDS = np.random.default_rng(3).integers(0, 256, (4, 40))
needs_library = pytest.mark.skipif(native.library() is None, reason="no C library, no compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@cache
def weights(folder: Path, family: str, dtype: str, overrides: tuple[Any, ...]) -> TorchDecoder:
    path = tiny_checkpoint(family, folder / str(abs(hash(overrides))), **dict(overrides))
    model = load_model(LoadRequest(str(path), device="cpu", dtype=dtype)).interpreter
    assert isinstance(model, TorchDecoder)
    return model


def decoder(
    folder: Path,
    family: str = "olmoe",
    dtype: str = "float32",
    *,
    lanes: int = 1,
    capacity: int = 64,
    threads: int = 0,
    spec: Any = None,
    **overrides: Any,
) -> TorchDecoder:
    """A decoder on shared weights: torch operators alone where `threads` is 0."""
    loaded = weights(folder, family, dtype, tuple(overrides.items()))
    spec = loaded.spec if spec is None else spec
    made = TorchDecoder(spec, loaded.shared.weights, device="cpu", dtype=dtype, fused=False)
    if threads:
        assert NativeStep.why_not(made.shared) == ""
        made.step = NativeStep(made.shared, threads=threads)
    made.open(lanes, capacity)
    return made


def both(folder: Path, *args: Any, threads: int = 2, **options: Any) -> list[TorchDecoder]:
    """Torch operators, and the C step beside them."""
    return [decoder(folder, *args, threads=n, **options) for n in (0, threads)]


@needs_library
@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_that_of_the_torch_operators(folder: Path, family: str) -> None:
    """After a prompt, lanes of different lengths, in any order."""
    models = both(folder, family, lanes=4)
    for model in models:
        for lane, length in enumerate((3, 40, 1, 17)):
            model.run([lane], IDS[lane : lane + 1, :length])
    for lanes, record in (([0], "logits"), ([2, 1], "weights"), ([3, 0, 2, 1], "ids")):
        walk(models, lanes, 5, record)


@needs_library
def test_one_cpu_by_its_number_decodes_natively(folder: Path) -> None:
    path = tiny_checkpoint("olmoe", folder / "numbered")
    asked = LoadRequest(str(path), device="cpu", devices=("cpu:0",), dtype="float32")
    model, same = load_model(asked).interpreter, decoder(folder, threads=2)
    assert model.device == "cpu:0" and isinstance(model.step, NativeStep)
    model.open(1, 64)
    model.run([0], IDS[:1, :9]), same.run([0], IDS[:1, :9])
    walk([model, same], [0], 5)


@needs_library
@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_has_the_same_rounding_points(
    folder: Path, isa: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums in another order move a few values to a neighbour, and now and then a choice; the errors
    against float32 must be those of the torch operators, no more."""
    monkeypatch.setenv("MOESCOPE_ISA", isa)
    torch_model, model = both(folder, "olmoe", dtype)
    exact = decoder(folder, "olmoe")
    errors, differences, same = [], [], []
    for i in range(30):
        token = IDS[:1, i : i + 1]
        outs = [m.run([0], token, record="logits") for m in (exact, torch_model, model)]
        errors.append([np.abs(out.logits - outs[0].logits).mean() for out in outs[1:]])
        differences.append(np.abs(outs[1].logits - outs[2].logits).mean())
        same.append(outs[1].expert_ids == outs[2].expert_ids)
    of_torch, own = np.mean(errors, 0)
    assert own < 1.25 * of_torch + 1e-4
    assert np.mean(differences) < of_torch
    assert np.mean(same) > 0.95


@needs_library
@pytest.mark.parametrize("record", ["ids", "weights", "logits"])
def test_a_step_says_what_its_logits_say_and_is_not_written_over(folder: Path, record: Any) -> None:
    """Expectations are those of the rows; records are the same bytes as those made of arrays."""
    model = decoder(folder, lanes=3, threads=2)
    model.set_policies(1, [replace(r.spec.policy, num_experts_per_tok=5) for r in model.routers])
    outs, copies = [], []
    for position in range(4):
        out = model.run([2, 1, 0], IDS[:3, position : position + 1], record=record)
        outs.append(out)
        copies.append({n: np.copy(v) for n, v in asdict_arrays(out).items()})
        assert out.expected is not None and out.kept is not None
        for row, (found,) in enumerate(out.expected):
            wanted = Expectation.of(out.logits[row, 0])
            assert found is not None and wanted is not None
            assert found.log_sum == pytest.approx(wanted.log_sum, abs=1e-5)
            assert [i for i, _ in found.likeliest()] == [i for i, _ in wanted.likeliest()]
            for token in (*found.best, 0, 200):
                assert found.rank(token) == wanted.rank(token)
                assert found.logprob(token) == pytest.approx(wanted.logprob(token), abs=1e-5)
            frame = frame_like(out, row)
            made = trace_record(frame, record)
            assert made == trace_record(frame, record, arrays=out.kept.record(row, 0))
    for out, copied in zip(outs, copies, strict=True):
        for name, values in asdict_arrays(out).items():
            np.testing.assert_array_equal(values, copied[name], err_msg=name)


def asdict_arrays(out: StepOutput) -> dict[str, np.ndarray]:
    found = {name: getattr(out, name) for name in out.__dataclass_fields__}
    return {name: value for name, value in found.items() if isinstance(value, np.ndarray)}


def frame_like(out: StepOutput, row: int) -> Frame:
    names = ("expert_ids", "score_sum", "mass", "entropy", "margin", "runner_up")
    more = {"weights": out.weights, "scores": out.scores, "logits": out.router_logits}
    arrays = {name: getattr(out, name)[row, 0] for name in names}
    arrays |= {name: None if v is None else v[row, 0] for name, v in more.items()}
    return Frame(0, 0, 0, 5, "x", 1, "trained", **arrays)


@needs_library
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_operator_rounds_where_the_torch_operators_round(
    folder: Path, family: str, dtype: str
) -> None:
    """One layer: nearly all bits are equal, which one rounding more or less would spoil. Later
    tokens mix values, whose sums differ in the last bits; keys and values still must not."""
    spec = decoder(folder, family, dtype).spec
    spec = replace(spec, layers=spec.layers[:1])
    models = both(folder, family, dtype, spec=spec)
    for position in range(20):
        token = IDS[:1, position : position + 1]
        a, b = (model.run([0], token).logits for model in models)
        if position == 0:
            assert (a == b).mean() > 0.9
    caches = [model.shared.caches[0][:, :, :, :20] for model in models]
    assert (caches[0] == caches[1]).float().mean() > 0.98


@needs_library
@pytest.mark.parametrize("isa", native.instruction_sets())
def test_every_instruction_set_decodes(
    folder: Path, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESCOPE_ISA", isa)
    models = both(folder, "qwen2_moe", lanes=2, threads=3)
    assert isa.removesuffix("-bf16") in models[1].step.kernels["experts"]  # type: ignore[union-attr]
    walk(models, [1, 0], 4)


@needs_library
def test_a_long_context_in_blocks_of_keys(folder: Path) -> None:
    """Contexts around the size of a block, several blocks, and a window that cuts them."""
    ids = np.random.default_rng(8).integers(0, 256, (1, 600))
    for window in (None, 5, 300):
        models = both(
            folder,
            "mixtral",
            lanes=3,
            capacity=620,
            sliding_window=window,
            max_position_embeddings=1024,
        )
        for model in models:
            for lane, length in enumerate((255, 511, 600)):
                model.run([lane], ids[:, :length])
        walk(models, [0, 1, 2], 4)


@needs_library
def test_lanes_under_different_policies_with_shadows(folder: Path) -> None:
    """Each lane its own K, gate and scale; shadows recorded; changed between tokens."""
    models = both(folder, "qwen3_moe", lanes=3)
    trained = [router.spec.policy for router in models[0].routers]

    def edited(**edits: Any) -> list[RouterPolicy]:
        return [replace(policy, **edits) for policy in trained]

    variants = [
        edited(num_experts_per_tok=1),
        edited(num_experts_per_tok=8, norm_topk_prob=False),
        edited(gate_quant_bits=3, routed_scaling_factor=2.5, scale_site="routed_output"),
        edited(scoring_func="sigmoid", tie_break="higher_id", num_experts_per_tok=2),
    ]
    for model in models:
        model.run([0, 1, 2], IDS[:3, :6])
    walk(models, [0, 1, 2], 2)
    for shadows in ([], variants, variants[2:3]):
        for model in models:
            model.set_shadows(shadows)
            for lane in range(3):
                model.set_policies(lane, variants[(lane + len(shadows)) % 4])
        walk(models, [2, 0], 2, "weights")
        walk(models, [0, 1, 2], 2, "ids")
    for model in models:
        for lane in range(3):
            model.set_policies(lane, trained)
        model.set_shadows([])
    walk(models, [1], 2)


@needs_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 3])
def test_lanes_that_do_the_same_get_the_same_bits(folder: Path, dtype: str, threads: int) -> None:
    """Whatever their number and place, and whatever a lane beside them does."""
    model = decoder(folder, "qwen2_moe", dtype, lanes=10, threads=threads)
    alone = decoder(folder, "qwen2_moe", dtype, lanes=1, threads=1)
    for lane in range(9):
        model.run([lane], IDS[:1, :8])
    model.run([9], IDS[1:2, :8])
    alone.run([0], IDS[:1, :8])
    other = [replace(r.spec.policy, num_experts_per_tok=1) for r in model.routers]
    model.set_policies(9, other)
    for step, lanes in enumerate(([0], [1, 2], [3, 9, 4], [5, 6, 9, 7, 8])):
        token = np.array([[11 if lane == 9 else 7] for lane in lanes])
        out = model.run(lanes, token, record="logits")
        alone.truncate(0, 8)
        wanted = alone.run([0], np.array([[7]]), record="logits")
        for place, lane in enumerate(lanes):
            if lane == 9:
                continue
            assert (out.logits[place] == wanted.logits[0]).all(), step
            assert (out.expert_ids[place, ..., :3] == wanted.expert_ids[0, ..., :3]).all()


@needs_library
def test_caches_are_shared_with_prompts(folder: Path) -> None:
    """Cut back, forked, grown: the step reads and writes what the torch operators do."""
    models = both(folder, "olmoe", lanes=2)
    for model in models:
        model.run([0], IDS[:1, :9])
    walk(models, [0], 3)
    for model in models:
        model.copy(0, 1, 7)
        model.truncate(0, 10)
        model.open(4, 100)
        model.run([1], IDS[1:2, :5])
        model.copy(1, 3, 12)
    walk(models, [3, 0, 1], 3)


@needs_library
def test_other_wirings(folder: Path) -> None:
    """What no family here asks for: weights on the input, logits in the model's dtype, clipping,
    multipliers, a tap of its own, a layer without norms."""
    spec = decoder(folder).spec
    layers = []
    for number, layer in enumerate(spec.layers):
        attention, mlp = layer.branches
        moe: Any = mlp.operator
        router = moe.router.with_wiring(apply_router_weight_on_input=number % 2 == 0)
        mlp = replace(mlp, operator=replace(moe, router=router), multiplier=0.5)
        attention = replace(
            attention,
            operator=replace(attention.operator, clip_qkv=0.8),  # type: ignore[type-var]
            adds_to="residual" if number % 2 else "side",
        )
        if number % 2 == 0:
            mlp = replace(mlp, reads="side")
        layers.append(replace(layer, branches=(attention, mlp)))
    models = both(folder, lanes=2, spec=replace(spec, layers=tuple(layers)))
    walk(models, [1, 0], 4)


@needs_library
@pytest.mark.parametrize("position", [0, 5])
def test_invalid_router_is_named(folder: Path, position: int) -> None:
    """A NaN logit: nothing is executed for that router, and the record says which was the first."""
    models = both(folder, "qwen2_moe", lanes=2)
    gate = models[0].shared.weights["layers.2.mlp.gate.weight"]
    kept = gate.clone()
    for model in models:
        if position:
            model.run([0], IDS[:1, :position])
    gate[3, 7] = float("nan")
    try:
        outs = [model.run([0, 1], IDS[:2, :1], record="logits") for model in models]
    finally:
        gate.copy_(kept)
    for out in outs:
        assert out.invalid_router == 2
        assert (out.expert_ids[:, 0, 2] == -1).all() and np.isnan(out.score_sum[:, 0, 2]).all()
        assert (out.expert_ids[:, 0, :2] >= 0).all()
    agree(*outs)


@needs_library
def test_calls_from_two_threads_wait_for_each_other(folder: Path) -> None:
    """Two decoders on one pool, driven at once: each gets what it gets alone."""
    models = [decoder(folder, lanes=2, threads=2) for _ in range(2)]
    wanted = decoder(folder, lanes=2, threads=2)
    expected = [wanted.run([0], IDS[:1, i : i + 1]).logits for i in range(30)]
    failures: list[int] = []

    def drive(model: TorchDecoder) -> None:
        for i in range(30):
            if not (model.run([0], IDS[:1, i : i + 1]).logits == expected[i]).all():
                failures.append(i)

    threads = [Thread(target=drive, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@needs_library
def test_a_forked_process_decodes_on_threads_of_its_own(folder: Path) -> None:
    """The child of a fork has none of its parent's threads."""
    model = decoder(folder, lanes=1, threads=2)
    model.run([0], IDS[:1, :1])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with os.fdopen(writer, "wb") as pipe:
                pipe.write(model.run([0], IDS[:1, 1:2]).logits.tobytes())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        found = pipe.read()
    os.waitpid(child, 0)
    assert found == model.run([0], IDS[:1, 1:2]).logits.tobytes()


@needs_library
def test_many_short_steps_beside_a_busy_process(folder: Path) -> None:
    """More threads than cores, and one more that computes: every token arrives, and is the same."""
    model = decoder(folder, lanes=1, threads=5)
    done = False

    def compete() -> None:
        x = torch.randn(200, 200)
        while not done:
            torch.mm(x, x)

    busy = Thread(target=compete)
    busy.start()
    try:
        first = model.run([0], IDS[:1, :1]).logits
        for _ in range(300):
            model.truncate(0, 0)
            assert (model.run([0], IDS[:1, :1], record="ids").logits == first).all()
    finally:
        done = True
        busy.join()


def test_switched_off_the_torch_operators_decode(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOESCOPE_NATIVE", "0")
    path = tiny_checkpoint("olmoe", folder / "off")
    model = load_model(LoadRequest(str(path), device="cpu")).interpreter
    assert isinstance(model, TorchDecoder)
    assert model.step is None and model.why_no_step == "MOESCOPE_NATIVE=0"
    assert model.kernels["experts"] == "torch"
    plain = decoder(folder)
    model.open(1, 64)
    for i in range(3):
        token = IDS[:1, i : i + 1]
        assert (model.run([0], token).logits == plain.run([0], token).logits).all()


@needs_library
def test_what_is_not_covered_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = decoder(folder).shared
    assert NativeStep.why_not(shared) == ""
    assert "device cuda:0" in NativeStep.why_not(replace(shared, device="cuda:0"))
    gate = shared.routers[0].spec.with_wiring(router_dtype="bfloat16")
    asked = replace(shared, routers=(replace(shared.routers[0], spec=gate),))
    moe = shared.spec.layers[0].branches[1].operator
    assert why_beside(shared, moe, 0) == ""
    assert "router_dtype bfloat16" in why_beside(asked, moe, 0)
    apart = {"gate": torch.zeros(4, 4).T}
    assert NativeStep.why_not(replace(shared, weights=apart)) == "weights are not contiguous"
    monkeypatch.setenv("MOESCOPE_ISA", "z80")
    assert NativeStep.why_not(shared) == "MOESCOPE_ISA=z80: this CPU lacks it"
