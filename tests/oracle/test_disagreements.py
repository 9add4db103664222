"""Where moescope parts from transformers on purpose: with that one thing put right over there, the
two agree, and without it they do not. What a user is told of it is a note of the family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moescope.engine.families import SUPPORTED
from tests.families.kit import Case
from tests.oracle import harness
from tests.oracle.matrix import BY_ID, PROMPTS

_LONG = BY_ID["phimoe-long-window"]
_FACTORS = _LONG.overrides["rope_parameters"]["short_factor"]
_DBRX = BY_ID["dbrx-released"]


def _long_frequencies(model: Any) -> None:
    """Of Phi-3.5-MoE: the factors for long lanes, in lanes longer than the original context."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    of = ROPE_INIT_FUNCTIONS["longrope"]
    model.model.rotary_emb.rope_init_fn = lambda config: of(config, "cpu", seq_len=5)


def _base_of_attention(model: Any) -> None:
    """Of DBRX: the base of its ropes that `attn_config` names."""
    theta = model.config.attn_config.rope_theta
    dims = model.config.d_model // model.config.n_heads
    powers = np.arange(0, dims, 2, dtype=np.float32) / np.float32(dims)
    rope = model.transformer.rotary_emb
    rope.inv_freq.copy_(rope.inv_freq.new_tensor(1.0 / theta**powers))


@pytest.mark.parametrize(
    ("case", "edits", "put_right", "told"),
    [
        (
            _LONG,
            {
                "rope_parameters": {
                    **_LONG.overrides["rope_parameters"],
                    "long_factor": [3 * factor for factor in _FACTORS],
                }
            },
            _long_frequencies,
            "goes on with the short frequencies",
        ),
        (
            _DBRX,
            {"rope_parameters": {"rope_type": "default", "rope_theta": 300.0}},
            _base_of_attention,
            "ignores the rope_theta of attn_config",
        ),
    ],
    ids=["phimoe", "dbrx"],
)
def test_what_transformers_does_otherwise(
    case: Case,
    edits: dict[str, Any],
    put_right: Callable[[Any], None],
    told: str,
    folder: Path,
) -> None:
    case = replace(case, name=f"{case.name}-otherwise", overrides={**case.overrides, **edits})
    prompt = PROMPTS["longer-than-window"]
    found = harness.ours_forced(harness.load(harness.write(case, folder)), prompt)
    model = harness.model_of(case)
    apart = harness.difference(harness.Oracle(model).teacher_forced(prompt), found)
    put_right(model)
    together = harness.difference(harness.Oracle(model).teacher_forced(prompt), found)
    assert harness.agrees(together) and not harness.agrees(apart), (together, apart)
    assert any(told in note for note in SUPPORTED[case.family].notes)
