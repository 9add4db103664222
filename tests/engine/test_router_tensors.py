"""A router's learned vectors go with it, so that what was recorded of it can be routed again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.diagnosis.causes import LogitsJudge
from moescope.diagnosis.compare import Pairing
from moescope.diagnosis.compare_run import specs_under
from moescope.engine.load import load_model
from moescope.engine.protocol import Generate, LoadRequest, Sampling
from moescope.engine.session import Session
from moescope.kernels import route
from tests.tiny import tiny_checkpoint

IDS = np.random.default_rng(2).integers(0, 256, (1, 12))
VECTORS = {
    "deepseek_v3": "correction_bias",
    "zaya": "correction_bias",
    "gemma4_text": "per_expert_scale",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vectors")


def loaded(family: str, folder: Path, device: str = "cpu") -> Any:
    path = tiny_checkpoint(family, folder)
    return load_model(LoadRequest(str(path), device=device, dtype="float32"))


@pytest.mark.parametrize("device", ["cpu", "mlx"])
@pytest.mark.parametrize("family", VECTORS)
def test_recorded_logits_are_routed_again_by_what_a_router_holds(
    family: str, device: str, folder: Path
) -> None:
    model = loaded(family, folder, device).interpreter
    out = model.run([0], IDS, all_logits=True, record="logits")
    for number, router in enumerate(model.routers):
        assert set(router.tensors) == {VECTORS[family]}
        logits = out.router_logits[0, :, number, : router.spec.E]
        again = route(logits, router.spec, **router.tensors)
        K = router.spec.K
        assert (np.sort(again.expert_ids) == np.sort(out.expert_ids[0, :, number, :K])).all()
        assert np.abs(again.score_sum - out.score_sum[0, :, number]).max() < 1e-5


def test_a_plain_router_has_none(folder: Path) -> None:
    assert not any(router.tensors for router in loaded("olmoe", folder).interpreter.routers)


def test_flips_for_want_of_a_bias_are_the_gates(folder: Path) -> None:
    model = loaded("zaya", folder)
    session = Session(model, None, record="logits", variants=["trained", "selection_bias_dropped"])
    routers = model.interpreter.routers
    judge = LogitsJudge(specs_under(model), [router.tensors for router in routers])
    pairing = Pairing(0, 1, [router.layer for router in routers], judge)
    request = Generate(prompt_ids=tuple(IDS[0].tolist()), sampling=Sampling(max_new_tokens=0))
    for frame in session.generate(request):
        pairing.feed(frame)
    session.close()
    found = pairing.result()
    assert found.flips > 0 and found.causes.get("gate", 0) > 0
