"""For every test: a state folder of its own, no network, and one thread per worker."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
for _name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ[_name] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device", choices=("cuda", "cpu"), default="cuda", help="of tests marked gpu"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Triton kernels run interpreted, on the CPU, except where tests that need a GPU were asked
    for. Triton reads this once, when it is first imported, so it is set before any test module."""
    selected = config.getoption("markexpr")
    if "gpu" not in selected or "not gpu" in selected or config.getoption("--device") == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session", autouse=True)
def _state_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    os.environ["MOESCOPE_STATE"] = str(tmp_path_factory.mktemp("state"))


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """Of tests marked `gpu` that can do with a CPU."""
    return str(request.config.getoption("--device"))
