"""The embedded model by its name, from Python as on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from moescope.demo import CHECKPOINT
from moescope.engine.checkpoint import locate
from moescope.errors import MoescopeError


def test_demo_is_the_embedded_model_unless_a_folder_has_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate("demo") == CHECKPOINT.resolve()
    with pytest.raises(MoescopeError):
        locate("demos")
    (tmp_path / "demo").mkdir()
    assert locate("demo").resolve() == tmp_path / "demo"
