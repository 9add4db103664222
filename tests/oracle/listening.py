"""Models of others whose routers are listened to while they run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.families import READ
from tests.families.kit import TOP_K
from tests.oracle.matrix import STEPS


@dataclass(frozen=True, eq=False)
class Run:
    """What one engine did with one sequence. P positions, L routers, E experts, V vocabulary.

    `weights` stand at the place of their expert, 0 elsewhere, so rows compare as sets.
    """

    tokens: tuple[int, ...]  # the new ones
    logits: NDArray[np.float32]  # [P, V]
    chosen: NDArray[np.bool_]  # [P, L, E]
    weights: NDArray[np.float32]  # [P, L, E]
    router_logits: NDArray[np.float32]  # [P, L, E]


def dense(ids: NDArray[Any], weights: NDArray[Any], experts: int) -> tuple[Any, Any]:
    """ids and weights [..., K] as flags and weights [..., E]."""
    chosen = np.zeros((*ids.shape[:-1], experts), bool)
    spread = np.zeros(chosen.shape, np.float32)
    used = ids >= 0
    safe = np.where(used, ids, 0)
    for k in range(ids.shape[-1]):
        at = safe[..., k : k + 1]
        here = np.take_along_axis(chosen, at, -1) | used[..., k : k + 1]
        np.put_along_axis(chosen, at, here, -1)
        old = np.take_along_axis(spread, at, -1)
        new = np.where(used[..., k : k + 1], weights[..., k : k + 1], old)
        np.put_along_axis(spread, at, new, -1)
    return chosen, spread


class Oracle:
    """A transformers model whose routers are listened to."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.heard: list[list[Any]] = []
        read = READ.get(model.config.model_type, TOP_K)
        for module in model.modules():
            if re.search(read.modules, type(module).__name__):
                module._forward_hooks.clear()
                module.register_forward_hook(self._hook(read.listen))

    def _hook(self, listen: Any) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            logits, weights, ids = (part.float().numpy() for part in listen(module, inputs, output))
            flat = logits.reshape(-1, logits.shape[-1])
            ids = ids.reshape(len(flat), -1).astype(int)
            weights = weights.reshape(len(flat), -1)
            self.heard[-1].append((*dense(ids, weights, flat.shape[-1]), flat))

        return hook

    def forward(self, ids: NDArray[Any], cache: Any = None) -> tuple[Any, Any, list[Any]]:
        self.heard.append([])
        with torch.no_grad():
            out = self.model(
                torch.as_tensor(ids)[None],
                use_cache=cache is not False,
                past_key_values=cache or None,
            )
        return out.logits[0].float().numpy(), out.past_key_values, self.heard.pop()

    def greedy(self, prompt: tuple[int, ...]) -> Run:
        """The prompt, then STEPS - 1 fed-back tokens, through its own cache."""
        logits, cache, heard = self.forward(np.array(prompt))
        rows, routed, tokens = [logits], [heard], [int(logits[-1].argmax())]
        while len(tokens) < STEPS:
            logits, cache, heard = self.forward(np.array(tokens[-1:]), cache)
            rows.append(logits)
            routed.append(heard)
            tokens.append(int(logits[-1].argmax()))
        return self._run(tuple(tokens), rows, routed)

    def teacher_forced(self, ids: tuple[int, ...]) -> Run:
        logits, _, heard = self.forward(np.array(ids), False)
        return self._run((), [logits], [heard])

    def _run(self, tokens: tuple[int, ...], rows: list[Any], routed: list[Any]) -> Run:
        def stacked(index: int) -> NDArray[Any]:
            return np.concatenate([np.stack([out[index] for out in one], 1) for one in routed])

        return Run(tokens, np.concatenate(rows), stacked(0), stacked(1), stacked(2))
