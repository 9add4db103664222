"""Loading: what is refused before a tensor is read, progress, memory, and what is said of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moescope.engine import devices, load, torch_weights
from moescope.engine.checkpoint import Checkpoint
from moescope.engine.describe import describe
from moescope.engine.load import inspect, load_model
from moescope.engine.protocol import Loading, LoadRequest
from moescope.errors import ExitCode, MoescopeError
from tests.tiny import tiny_checkpoint


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_checkpoint("olmoe", tmp_path)


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) drop tensors; `__` stands for a dot."""
    held = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        name = name.replace("__", ".")
        if tensor is None:
            del held[name]
        else:
            held[name] = tensor
    save_file(held, folder / "model.safetensors")


def refused(folder: Path, **request: Any) -> MoescopeError:
    with pytest.raises(MoescopeError) as caught:
        load_model(LoadRequest(str(folder), **{"device": "cpu", **request}))
    return caught.value


def test_facts(folder: Path) -> None:
    model = load_model(LoadRequest(str(folder), device="cpu"))
    facts = model.facts
    assert facts["name"] == folder.name and facts["family"] == "OLMoE"
    assert facts["model_type"] == "olmoe" and facts["context"] == 256
    assert (facts["num_layers"], facts["num_routers"], facts["vocab_size"]) == (4, 4, 264)
    assert (facts["device"], facts["dtype"]) == ("cpu", "float32")
    assert facts["parameters"] * 4 == facts["weights_bytes"] == model.memory["weights"]
    assert facts["active_parameters"] < facts["parameters"]
    assert facts["kernels"]["router"] and facts["layout"] == "hub, one tensor per expert"
    assert facts["notes"] == [] and facts["unused_tensors"] == 0
    assert model.interpreter.cache_bytes(1, 256) == facts["cache_bytes"]
    assert len(model.interpreter.routers) == 4


@pytest.mark.parametrize("shards", [None, "200KB"])
def test_progress_counts_every_byte_once(tmp_path: Path, shards: str | None) -> None:
    folder = tiny_checkpoint("qwen2_moe", tmp_path, max_shard_size=shards)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shards is not None)
    seen: list[Loading] = []
    load_model(LoadRequest(str(folder), device="cpu"), seen.append)
    assert [event.stage for event in seen if event.stage != "reading"] == ["checking", "preparing"]
    reading = [event for event in seen if event.stage == "reading"]
    assert [e.done for e in reading] == sorted({e.done for e in reading})
    assert reading[-1].done == reading[-1].total == 4 * 375104
    assert all(event.what.endswith(".safetensors") for event in reading)


def test_the_words_of_a_shape_that_does_not_fit(folder: Path) -> None:
    edit(folder, num_experts=128)
    error = refused(folder)
    assert error.message == (
        "config.json says num_experts 128; layer 0 gate.weight has 8 rows (model.safetensors)"
    )
    assert error.code == ExitCode.CHECKPOINT and error.hint


def test_columns_and_dimensions_that_do_not_fit(folder: Path) -> None:
    rewrite(folder, model__layers__2__mlp__experts__5__down_proj__weight=torch.zeros(64, 47))
    assert (
        "intermediate_size 48; layer 2 down_proj.weight has 47 columns" in refused(folder).message
    )
    rewrite(folder, model__layers__2__mlp__experts__5__down_proj__weight=torch.zeros(64 * 48))
    assert "down_proj.weight: expected 2 dimensions, found 1" in refused(folder).message


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, model__layers__3__mlp__experts__7__up_proj__weight=None)
    assert "model.layers.3.mlp.experts.7.up_proj.weight" in refused(folder).message


def test_nothing_is_read_before_all_is_checked(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is wrong with the last tensor is said before the first is read."""
    from moescope.engine.checkpoint import Checkpoint

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(Checkpoint, "read_torch", never)
    rewrite(folder, lm_head__weight=torch.zeros(264, 63))
    assert "lm_head.weight has 63 columns" in refused(folder).message


def test_packed_dtypes_are_refused(folder: Path) -> None:
    rewrite(folder, lm_head__weight=torch.zeros(264, 64, dtype=torch.int8))
    for dtype in ("auto", "float32"):
        error = refused(folder, dtype=dtype)
        assert "lm_head.weight: expected F32, BF16 or F16, found I8" in error.message


def test_tensors_that_nothing_reads_are_counted(folder: Path) -> None:
    rewrite(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.zeros(8))
    facts = load_model(LoadRequest(str(folder), device="cpu")).facts
    assert facts["unused_tensors"] == 1 and facts["notes"] == []


def test_a_bias_that_nothing_reads_is_told(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(folder, **{name: torch.zeros(64), name.replace("q_", "k_"): torch.zeros(32)})
    note = "model.layers.0.self_attn.k_proj.bias and 1 more: not read, config.json asks for no such"
    assert load_model(LoadRequest(str(folder), device="cpu")).facts["notes"] == [f"{note} tensor"]
    with Checkpoint.open(folder) as checkpoint:
        assert describe(checkpoint)["notes"] == [f"{note} tensor"]


def test_a_router_with_nan_loads_with_a_note(folder: Path) -> None:
    gate = load_file(folder / "model.safetensors")["model.layers.1.mlp.gate.weight"]
    gate[2, 3], gate[4, 5] = float("nan"), float("inf")
    rewrite(folder, model__layers__1__mlp__gate__weight=gate)
    notes = load_model(LoadRequest(str(folder), device="cpu")).facts["notes"]
    assert notes == ["layer 1: the router holds 2 values that are not finite"]


def test_nan_that_a_softmax_would_swallow_is_told(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU's attention makes 0 of queries that are NaN: text goes on, and is not the model's."""
    held = load_file(folder / "model.safetensors")
    query, embed = (
        held[f"model.{n}.weight"] for n in ("layers.0.self_attn.q_proj", "embed_tokens")
    )
    query[:2], embed[7] = float("nan"), float("inf")
    rewrite(
        folder,
        model__layers__0__self_attn__q_proj__weight=query,
        model__embed_tokens__weight=embed,
    )
    monkeypatch.setattr(torch_weights, "PIECE", 1000)
    told = [
        "embed.weight holds 64 values that are not finite",
        "layer 0: attention.qkv.weight holds 128 values that are not finite",
    ]
    assert load_model(LoadRequest(str(folder), device="cpu")).facts["notes"] == told
    monkeypatch.setattr(load, "NOTES", 1)
    notes = load_model(LoadRequest(str(folder), device="cpu")).facts["notes"]
    assert notes == [told[0], "and 1 more tensors with values that are not finite"]


def test_too_little_memory_is_told_before_reading(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = {"weights": 58_900_000_000, "cache": 2_200_000_000, "needed": 61_100_000_000}
    monkeypatch.setattr(load, "memory_needed", lambda *_: {**memory, "free": 23_400_000_000})
    error = refused(folder)
    assert error.message == "needs 61.1 GB (weights 58.9 + cache 2.2); free 23.4 GB"
    assert error.code == ExitCode.RESOURCES and error.hint


def test_free_memory_is_plausible() -> None:
    assert 1 << 26 < devices.free_bytes("cpu") < 1 << 50


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"device": "tpu"}, "device: expected auto, cpu, cuda or mlx, found 'tpu'"),
        ({"dtype": "int4"}, "dtype: expected auto, float32, bfloat16 or float16, found 'int4'"),
    ],
)
def test_devices_and_dtypes_are_refused_by_name(
    folder: Path, request_: dict[str, str], says: str
) -> None:
    error = refused(folder, **request_)
    assert error.message == says and error.code == ExitCode.USAGE


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device(folder: Path) -> None:
    assert refused(folder, device="cuda").message.startswith("device cuda: torch finds no CUDA")


def test_auto_dtype(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As stored, but float32 for small models on a CPU."""
    folder = tiny_checkpoint("mixtral", tmp_path, dtype="bfloat16")

    def chosen(dtype: str = "auto") -> str:
        found = inspect(LoadRequest(str(folder), device="cpu", dtype=dtype))
        found.checkpoint.close()
        return found.dtype

    assert chosen() == "float32" and chosen("bfloat16") == "bfloat16"
    monkeypatch.setattr(load, "SMALL", 1000)
    assert chosen() == "bfloat16" and chosen("float16") == "float16"


def test_the_context_asked_for_bounds_the_cache(folder: Path) -> None:
    found = inspect(LoadRequest(str(folder), device="cpu", max_context=100))
    found.checkpoint.close()
    assert found.memory["cache_tokens"] == 100
    assert (
        found.memory["cache"] == 100 * 4 * 2 * 2 * 16 * 4
    )  # tokens, layers, k v, heads, dim, bytes


_MEASURE = """
import resource, sys
import torch
from moescope.engine.load import load_model
from moescope.engine.protocol import LoadRequest
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
load_model(LoadRequest(sys.argv[1], device="cpu", max_context=16))
before = peak()
model = load_model(LoadRequest(sys.argv[2], device="cpu", max_context=16, dtype=sys.argv[3]))
print(peak() - before, model.memory["weights"])
"""


def peak_and_weights(small: Path, large: Path, dtype: str) -> tuple[int, int]:
    """By how many bytes a process grows that loads `large` after `small`; what its weights are."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(small), str(large), dtype],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    grown, weights = map(int, done.stdout.split())
    return grown, weights


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
@pytest.mark.parametrize(("layout", "dtype"), [("hub", "float32"), ("mlx", "bfloat16")])
def test_loading_holds_little_more_than_the_weights(
    folder: Path, tmp_path: Path, layout: str, dtype: str
) -> None:
    """At most 1.1 × the weights, measured in a process of its own; also where dtypes are cast and
    stacked tensors are taken apart."""
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_experts": 12}
    large = tiny_checkpoint(
        "olmoe", tmp_path / "large", layout=layout, num_hidden_layers=16, **shape
    )
    grown, weights = peak_and_weights(folder, large, dtype)
    assert weights > 90e6 / (2 if dtype == "bfloat16" else 1)
    assert grown <= 1.1 * weights, (grown, weights)


class _Left(Exception):
    pass


def test_a_listener_that_raises_ends_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where several threads read: nothing goes on behind a load that was given up."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(load, "_REPORT_SECONDS", 0.0)
    heard: list[int] = []

    def progress(event: Loading) -> None:
        if event.stage == "reading":
            heard.append(event.done)
            if len(heard) > 5:
                raise _Left

    with pytest.raises(_Left):
        load_model(LoadRequest(str(folder), device="cpu"), progress)
    assert not [t for t in threading.enumerate() if t.name.startswith("reading")]
    assert len(heard) < 20
