"""The output head over a prompt: what the logits of every token say, without keeping them.

On a CPU with the C library. Logits stand in one buffer in the dtype of the model, which is used
again, and the C library looks at each row once: 128 tokens of a vocabulary of 50,000 have 26 MB of
logits in float32, which to store and to read again takes time that the first token waits for.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moescope.kernels import native_ops
from moescope.trace.frames import ALTERNATIVES


class PromptHead:
    """`weight` [V, H] of a decoder whose tensors are of `dtype`; `scaled` is what is done to its
    logits."""

    def __init__(self, weight: Tensor, dtype: str, scaled: Callable[[Tensor], Tensor]) -> None:
        self.weight, self.dtype, self.scaled = weight, dtype, scaled
        self._room = torch.empty((0, len(weight)), dtype=weight.dtype)

    @staticmethod
    def covers(weight: Tensor) -> bool:
        return weight.device.type == "cpu" and native_ops.library() is not None

    def __call__(self, h: Tensor, next_ids: NDArray[np.int64]) -> tuple[Tensor, native_ops.Answers]:
        """h [T, H], after the final norm; next_ids [T], -1 where nothing follows. Returns the
        logits of the last token [1, V] in float32, and what the logits of every token say."""
        T, V = len(h), len(self.weight)
        if len(self._room) < T:
            self._room = torch.empty((T, V), dtype=h.dtype)
        logits = self.scaled(torch.mm(h, self.weight.t(), out=self._room[:T]))
        answers = native_ops.expect(
            *(logits.data_ptr(), T, V, ALTERNATIVES),
            dtype=self.dtype,
            next_ids=np.ascontiguousarray(next_ids),
            threads=torch.get_num_threads(),
        )
        assert answers is not None, "the C library was there"
        return logits[-1:].to(torch.float32, copy=True), answers
