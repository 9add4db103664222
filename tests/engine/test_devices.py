"""Layers over several devices: where they go, what is refused, and that tokens stay the same.

The several devices are the CPU under several names: nothing here has run on several GPUs.
"""

from __future__ import annotations

import mmap
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.engine import devices, families, load, parameters
from moescope.engine.checkpoint import Checkpoint
from moescope.engine.decoder import DecoderSpec
from moescope.engine.load import load_model
from moescope.engine.protocol import Generate, LoadRequest, Sampling
from moescope.engine.session import Session
from moescope.engine.torch_decoder import TorchDecoder
from moescope.errors import ExitCode, MoescopeError
from tests.tiny import tiny_checkpoint

IDS = np.random.default_rng(5).integers(0, 256, (2, 9))
GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("qwen2_moe", tmp_path_factory.mktemp("split"))


def spec_of(folder: Path) -> DecoderSpec:
    with Checkpoint.open(str(folder)) as checkpoint:
        return families.resolved(families.build(checkpoint.config), "float32")


def loaded(folder: Path, *names: str) -> TorchDecoder:
    model = load_model(LoadRequest(str(folder), device="cpu", devices=names)).interpreter
    assert isinstance(model, TorchDecoder)
    model.open(2, 64)
    return model


def test_a_split_model_computes_what_a_whole_one_does(folder: Path) -> None:
    split, whole = loaded(folder, "cpu:0", "cpu:1", "cpu:2"), loaded(folder)
    assert [stage.device for stage in split._stages] == ["cpu:0", "cpu:1", "cpu:1", "cpu:2"]
    assert split.step is None and split.why_no_step == "layers on several devices"
    for tokens in (IDS, IDS[:, :1]):
        a = split.run([0, 1], tokens, record="logits")
        b = whole.run([0, 1], tokens, record="logits")
        assert np.array_equal(a.expert_ids, b.expert_ids)
        assert np.allclose(a.logits, b.logits, atol=2e-5)
        assert np.allclose(a.weights, b.weights, atol=1e-6)  # type: ignore[arg-type]


def test_a_split_model_talks_and_forks(folder: Path) -> None:
    def texts(*names: str) -> list[list[int]]:
        model = load_model(LoadRequest(str(folder), device="cpu", devices=names))
        session = Session(model, variants=("trained", "num_experts_per_tok=1"))
        list(session.generate(Generate(prompt_ids=(3, 1, 4), sampling=Sampling(max_new_tokens=6))))
        session.add_lane("trained", fork_of=1, position=5)
        while session.running:
            session.step()
        return [lane.ids for lane in session.lanes.values()]

    assert texts("cpu:0", "cpu:1") == texts()


def test_layers_go_by_the_share_of_free_memory(folder: Path) -> None:
    spec = spec_of(folder)
    total = 4 * parameters.count(spec)
    split = devices.split_layers(spec, 4, 16, {"a": GB, "b": GB})
    assert split is not None and split.layers == ("a", "a", "b", "b")
    assert total < sum(split.needed.values()) < 1.2 * total
    uneven = devices.split_layers(spec, 4, 16, {"a": GB, "b": 9 * GB})
    assert uneven is not None and uneven.layers.count("b") >= 3


def test_what_fits_nowhere_is_refused_with_the_numbers(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert devices.split_layers(spec_of(folder), 4, 16, {"a": 1000, "b": 1000}) is None
    monkeypatch.setattr(devices, "free_bytes", lambda device: 100_000)
    with pytest.raises(MoescopeError, match=r"needs 0\.0 GB .*; free 0\.0 GB") as caught:
        load.inspect(LoadRequest(str(folder), devices=("cpu:0", "cpu:1")))
    assert caught.value.code == ExitCode.RESOURCES
    assert "cpu:0 0.0 GB, cpu:1 0.0 GB" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("gpu0",), "expected names such as cuda:0, found 'gpu0'"),
        (("cpu:0", "cpu:0"), "expected different ones of one kind"),
        (("cpu:0", "cuda:999"), "cuda:999: torch finds"),
        (tuple(f"cpu:{n}" for n in range(17)), "expected 1 to 16, found 17"),
    ],
)
def test_devices_are_checked(folder: Path, names: tuple[str, ...], says: str) -> None:
    with pytest.raises(MoescopeError, match=says):
        load.inspect(LoadRequest(str(folder), devices=names))


def test_where_tensors_live(folder: Path) -> None:
    found: Any = load.inspect(LoadRequest(str(folder), devices=("cpu:0", "cpu:1")))
    found.checkpoint.close()
    assert found.device_of("head.weight") == found.device_of("embed.weight") == "cpu:0"
    assert found.device_of("layers.3.mlp.gate.weight") == "cpu:1"
    assert found.facts["devices"] == ["cpu:0", "cpu:1"]


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without huge pages")
def test_huge_pages_are_asked_for_where_they_matter() -> None:
    """The system marks memory it was asked about (hg); small or odd requests do no harm."""
    memory = mmap.mmap(-1, 8 << 20)
    address = np.frombuffer(memory, np.uint8).ctypes.data
    devices.ask_for_huge_pages(address + 64, (8 << 20) - 64)
    devices.ask_for_huge_pages(address, 100)
    devices.ask_for_huge_pages(1 << 46, 16 << 20)  # nobody's
    regions = Path("/proc/self/smaps").read_text().split("VmFlags:")
    ours = [after for before, after in pairwise(regions) if _holds(before, address + 8192)]
    assert len(ours) == 1 and " hg" in ours[0].splitlines()[0]


def _holds(region: str, address: int) -> bool:
    head = next(line for line in region.splitlines() if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line))
    low, high = (int(part, 16) for part in head.split()[0].split("-"))
    return low <= address < high
