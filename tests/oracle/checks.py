"""What the rows of the conformance matrix check, and the numbers they saw.

A row is a plain dict that the results file keeps; `ok` says whether it holds. Default tests run
some of the rows, `make conformance` all of them.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from moescope.engine.torch_decoder import TorchDecoder
from tests.families.kit import Case, Mutant
from tests.oracle import harness
from tests.oracle.matrix import BF16_TOKENS, BY_ID, PROMPTS, STEPS, Row, mutants_of

BF16_SETS, BF16_KL, BF16_MARGIN = 0.97, 0.02, 2.0**-7


def run(row: Row, folder: Path) -> dict[str, Any]:
    """Do what a row says; checkpoints are written below `folder`."""
    case = BY_ID[row.case]
    found = _RUNNERS[row.kind](case, row.what, folder)
    return {"kind": row.kind, "case": row.case, "what": row.what, **found}


@cache
def reference(case: Case, prompt: str) -> harness.Run:
    return harness.oracle_of(case).greedy(PROMPTS[prompt])


@cache
def ours(case: Case, folder: Path) -> tuple[TorchDecoder, dict[str, Any]]:
    """The model and its weights by name."""
    return harness.loaded(case, folder)


def _float32(case: Case, prompt: str, folder: Path) -> dict[str, Any]:
    """Greedy through the cache, all at once, and in chunks: each as transformers does it."""
    wanted, (model, weights) = reference(case, prompt), ours(case, folder)
    routers = harness.selectors(model.spec, weights)
    found = harness.ours_greedy(model, PROMPTS[prompt])
    seen = harness.difference(wanted, found)
    fed = (*PROMPTS[prompt], *wanted.tokens[:-1])
    uncached = harness.difference(wanted, _with_tokens(harness.ours_forced(model, fed), wanted))
    chunked = harness.difference(wanted, _with_tokens(harness.ours_forced(model, fed, 5), wanted))
    choice, selection = harness.margins(wanted, routers)
    return {
        "ok": all(map(harness.agrees, (seen, uncached, chunked)))
        and harness.well_posed([wanted], routers),
        "checks": ["24 greedy tokens", "expert sets", "weights", "logits", "cached = uncached"],
        "largest_weight_difference": _short(seen["weights"]),
        "largest_logit_difference": _short(seen["logits"]),
        "largest_uncached_logit_difference": _short(max(uncached["logits"], chunked["logits"])),
        "distinct_tokens": len(set(wanted.tokens)),
        "closest_choice": _short(choice),
        "closest_selection": _short(selection),
        "router_logit_spread": _short(float(np.ptp(wanted.router_logits, axis=-1).mean(0).min())),
    }


def _mutant(case: Case, name: str, folder: Path) -> dict[str, Any]:
    """A wrong spec must be noticed, in the longer of the two sequences."""
    mutant = mutants_of(case)[name]
    wanted = reference(case, "longer-than-window")
    fed = (*PROMPTS["longer-than-window"], *wanted.tokens[:-1])
    model = wrong(case, mutant, folder)
    seen = harness.difference(wanted, _with_tokens(harness.ours_forced(model, fed), wanted))
    return {
        "ok": not harness.agrees(seen),
        "checks": ["the comparison fails"],
        "same_sets": seen["sets"],
        "largest_weight_difference": _short(seen["weights"]),
        "largest_logit_difference": _short(seen["logits"]),
    }


def wrong(case: Case, mutant: Mutant, folder: Path) -> TorchDecoder:
    model, weights = ours(case, folder)
    return harness.mutated(model, weights, mutant)


def _layout(case: Case, what: str, folder: Path) -> dict[str, Any]:
    """Every layout and dialect of one checkpoint loads to identical numbers."""
    layout, dialect = what.removesuffix(" config").split(", ")
    path = harness.write(case, folder / layout / dialect, layout=layout, dialect=dialect)
    fed = PROMPTS["longer-than-window"]
    wanted = harness.ours_forced(ours(case, folder)[0], fed)
    model, experts = harness.load_and_layout(path)
    found = harness.ours_forced(model, fed)
    same = bool((wanted.logits == found.logits).all() and (wanted.weights == found.weights).all())
    return {"ok": same, "checks": ["identical numbers"], "experts": experts}


def _bfloat16(case: Case, _: str, folder: Path) -> dict[str, Any]:
    """Teacher-forced in bfloat16 against transformers' default attention: expert sets where the
    margin is above rounding, and KL. Its two attentions differ from each other as well; that is
    the floor, and it stands beside: at most twice as many rows, and twice the KL, may differ."""
    path = harness.write(case, folder / "bfloat16", dtype="bfloat16")
    ids = tuple(int(i) for i in np.random.default_rng(7).integers(0, 256, BF16_TOKENS))
    routers = harness.selectors(*_spec_and_weights(case, folder))
    usual = "sdpa" if harness.model_of(case)._supports_sdpa else "eager"
    wanted, eager = (
        harness.Oracle(in_bfloat16(harness.model_of(case), kind)).teacher_forced(ids)
        for kind in (usual, "eager")
    )
    found = harness.ours_forced(harness.load(path, "bfloat16"), ids)
    same, kl = _close(wanted, found, routers)
    floor_same, floor_kl = _close(wanted, eager, routers)
    return {
        "ok": same >= min(BF16_SETS, 1 - 2 * (1 - floor_same)) and kl <= max(BF16_KL, 2 * floor_kl),
        "checks": ["expert sets in clear rows", "mean KL"],
        "same_sets": round(same, 4),
        "mean_kl": _short(kl),
        "transformers_eager_same_sets": round(floor_same, 4),
        "transformers_eager_mean_kl": _short(floor_kl),
    }


def _spec_and_weights(case: Case, folder: Path) -> tuple[Any, dict[str, Any]]:
    model, weights = ours(case, folder)
    return model.spec, weights


def _close(wanted: harness.Run, found: harness.Run, routers: Any) -> tuple[float, float]:
    """The share of clear rows with the same experts, and the mean KL of the logits."""
    gaps = [harness.gaps(wanted.router_logits[:, i], *each) for i, each in enumerate(routers)]
    same = (wanted.chosen == found.chosen).all(-1)[np.stack(gaps, 1) > BF16_MARGIN]
    return float(same.mean()), float(_kl(wanted.logits, found.logits).mean())


_RUNNERS = {"float32": _float32, "mutant": _mutant, "layout": _layout, "bfloat16": _bfloat16}


def _with_tokens(run: harness.Run, wanted: harness.Run) -> harness.Run:
    """A forced run chose nothing; its greedy choices are what its logits say."""
    chosen = tuple(int(i) for i in run.logits[-STEPS:].argmax(-1))
    return harness.Run(chosen, run.logits, run.chosen, run.weights, run.router_logits)


def in_bfloat16(model: Any, attention: str) -> Any:
    """As `from_pretrained` makes it: frequencies of ropes stay float32."""
    import copy

    import torch

    rounded = copy.deepcopy(model).to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        module, _, leaf = name.rpartition(".")
        if leaf.endswith("inv_freq"):
            rounded.get_submodule(module)._buffers[leaf] = buffer.clone()
    rounded.set_attn_implementation(attention)
    return rounded


def _kl(wanted: Any, found: Any) -> Any:
    def log_softmax(x: Any) -> Any:
        x = x.astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    p, q = log_softmax(wanted), log_softmax(found)
    return (np.exp(p) * (p - q)).sum(-1)


def _short(value: float) -> float:
    return float(f"{value:.1e}")
