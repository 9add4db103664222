"""moescope without torch: what `pip install moescope` brings on Apple silicon, and that it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from moescope.engine import devices
from moescope.engine.failures import failure
from moescope.errors import MoescopeError
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[2]
# environment markers of a Mac with Apple's chips, one with Intel's, and a Linux server
MACHINES = {
    "apple": {"sys_platform": "darwin", "platform_machine": "arm64"},
    "intel mac": {"sys_platform": "darwin", "platform_machine": "x86_64"},
    "linux": {"sys_platform": "linux", "platform_machine": "x86_64"},
    "linux arm": {"sys_platform": "linux", "platform_machine": "aarch64"},
}


def installed_on(machine: str, extra: str = "") -> set[str]:
    """Names of what `pip install moescope` (or with an extra) asks for there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["dependencies"] + project["optional-dependencies"].get(extra, [])
    environment = {**MACHINES[machine], "extra": extra}
    wanted = map(Requirement, listed)
    return {r.name for r in wanted if r.marker is None or r.marker.evaluate(environment)}


def test_apple_silicon_needs_no_torch() -> None:
    assert "mlx" in installed_on("apple") and "torch" not in installed_on("apple")
    for machine in ("intel mac", "linux", "linux arm"):
        assert "torch" in installed_on(machine) and "mlx" not in installed_on(machine)
    assert {"mlx", "mlx-lm"} <= installed_on("linux", "test")


def test_what_needs_torch_is_the_same_everywhere() -> None:
    """Nothing else that moescope brings asks for torch: only the two interpreters differ."""
    assert installed_on("apple") - {"mlx"} == installed_on("linux") - {"torch"}


NO_TORCH = "import sys; sys.modules['torch'] = None\n"
SESSION = """
import json
from moescope.engine.opening import open_model
from moescope.engine.protocol import Generate, LoadRequest, Sampling
from moescope.engine.session import Session
model, tokenizer = open_model(LoadRequest(sys.argv[1], device="mlx"))
session = Session(model, tokenizer, variants=("trained", "norm_topk_prob=true"),
                  shadows=("num_experts_per_tok=2",), record="logits")
frames = list(session.generate(Generate(prompt="Hello", sampling=Sampling(max_new_tokens=4))))
print(json.dumps([len(frames), type(frames[-1].expert_ids).__module__, frames[-1].lane]))
"""
WORKER = """
import json, threading
from moescope.engine import worker
from moescope.engine.mailbox import Inbox
from moescope.engine.protocol import Close, Failed, Finished, Generate, LoadRequest, Sampling
class Out:
    def __init__(self): self.seen = []
    def put(self, event):
        self.seen.append(event)
        if isinstance(event, Finished | Failed): inbox.put(Close())
    def __getattr__(self, name): return lambda *a, **k: None
inbox, out = Inbox(), Out()
inbox.put(Generate(prompt="Hello", sampling=Sampling(max_new_tokens=3)))
worker.serve(LoadRequest(sys.argv[1], device="mlx"), inbox, out)
print(json.dumps([type(event).__name__ for event in out.seen]))
"""
COMMAND = """
from moescope.cli import run
sys.exit(run(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("olmoe", tmp_path_factory.mktemp("alone"))


def without_torch(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", NO_TORCH + program, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ,
        check=False,
    )


def test_a_session_runs_without_torch(checkpoint: Path) -> None:
    done = without_torch(SESSION, str(checkpoint))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [18, "numpy", 1]


def test_the_engines_process_runs_without_torch(checkpoint: Path) -> None:
    done = without_torch(WORKER, str(checkpoint))
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert "Loaded" in seen and "Finished" in seen and "Failed" not in seen


def test_a_trace_is_recorded_without_torch(checkpoint: Path, tmp_path: Path) -> None:
    trace = tmp_path / "run.moetrace"
    options = ("--device", "mlx", "--prompt", "Hi", "--max-new-tokens", "3", "-o", str(trace))
    done = without_torch(COMMAND, "-", "trace", str(checkpoint), *options)
    assert done.returncode == 0 and trace.stat().st_size > 0, done.stderr


def test_a_device_that_needs_torch_says_so(checkpoint: Path) -> None:
    options = ("--prompt", "Hi", "--device", "cpu")
    done = without_torch(COMMAND, "-", "generate", str(checkpoint), *options)
    assert done.returncode == 2 and "device cpu: torch is not installed" in done.stderr
    assert "Traceback" not in done.stderr


# --- which device -------------------------------------------------------------------------------


def test_auto_is_mlx_on_apple_silicon_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.choose_device("mlx") == "mlx"
    assert devices.choose_device("auto") != "mlx"
    monkeypatch.setattr(devices, "has_metal", lambda: True)
    assert devices.choose_device("auto") != "mlx"
    monkeypatch.setattr(devices.sys, "platform", "darwin")
    monkeypatch.setattr(devices.platform, "machine", lambda: "arm64")
    assert devices.choose_device("auto") == "mlx"
    assert devices.choose_device("cpu") == "cpu"


def test_mlx_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    with pytest.raises(MoescopeError, match="device mlx: mlx is not installed"):
        devices.choose_device("mlx")


def test_small_models_widen_on_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.widens_small_models("mlx") and devices.widens_small_models("cpu")
    monkeypatch.setattr(devices, "has_metal", lambda: True)
    assert not devices.widens_small_models("mlx") and not devices.widens_small_models("cuda")


# --- how it fails -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("[metal::malloc] Attempting to allocate 99 bytes which is greater than", "out of memory"),
        ("[METAL] Command buffer execution failed: Insufficient Memory (00000008", "out of memory"),
        ("[malloc] Unable to allocate 99 bytes.", "out of memory"),
        (
            "[METAL] Command buffer execution failed: Caused GPU Timeout Error",
            "the device was lost",
        ),
    ],
)
def test_what_mlx_says_when_it_fails_is_understood(said: str, told: str) -> None:
    failed = failure(RuntimeError(said), token=7)
    assert failed.message == f"{told} at token 7; the trace is saved" and failed.code == 5
