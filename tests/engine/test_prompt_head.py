"""The head over a prompt says what whole rows of logits say, in every dtype, and keeps none."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moescope.engine.prompt_head import PromptHead
from moescope.engine.sampling import Expectation, expectations_of
from moescope.kernels import native_ops

pytestmark = pytest.mark.skipif(native_ops.library() is None, reason="no C library, no compiler")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_says_what_the_rows_say(dtype: str, threads: int) -> None:
    random = torch.Generator().manual_seed(7)
    kind = getattr(torch, dtype)
    weight = torch.randn(500, 64, generator=random).to(kind)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    head = PromptHead(weight, dtype, lambda logits: logits * 0.5)
    held = []
    for T in (7, 1, 12, 3):  # shorter and longer than the room there is
        h = torch.randn(T, 64, generator=random).to(kind)
        ids = torch.randint(-1, 500, (T,), generator=random).numpy()
        last, answers = head(h, ids)
        wanted = (F.linear(h, weight) * 0.5).float().numpy()
        tolerance = 1e-4 if dtype == "float32" else 0.1
        np.testing.assert_allclose(last[0].numpy(), wanted[-1], rtol=0, atol=tolerance)
        held.append((last, last.clone()))
        rows = [*(None for _ in range(T - 1)), last[0].numpy()]
        for row, token, found in zip(wanted, ids, expectations_of(rows, answers), strict=True):
            whole = Expectation.of(row)
            assert whole is not None and found is not None and len(found.likeliest()) == 8
            assert found.log_sum == pytest.approx(whole.log_sum, abs=0.02)
            if token >= 0:
                assert found.logprob(token) == pytest.approx(whole.logprob(token), abs=0.1)
                assert dtype != "float32" or found.rank(token) == whole.rank(token)
    torch.set_num_threads(before)
    for last, copied in held:
        assert torch.equal(last, copied), "the room is written over, what was given is not"


def test_only_weights_on_a_cpu_are_covered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert PromptHead.covers(torch.zeros(4, 4))
    assert not PromptHead.covers(torch.zeros(4, 4, device="meta"))
    monkeypatch.setenv("MOESCOPE_NATIVE", "0")
    assert not PromptHead.covers(torch.zeros(4, 4))
