"""What a diagnosis says of patched transformers models: every fault in every family.

`python -m tests.diagnosis.matrix [FAMILY ...]` runs families, writing a results file each; `make
diagnosis` runs all of them under pytest. A row is a plain dict. Whether a fault leaves a trace at
all is decided here, from both emulations, and not by the verdict.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moescope.diagnosis import hypotheses
from moescope.diagnosis.case import Case, Held
from moescope.diagnosis.decisions import differences
from moescope.diagnosis.evidence import Evidence, Level, Observed
from moescope.diagnosis.hypotheses import TRAINED
from moescope.diagnosis.verdict import Diagnosis, diagnose
from moescope.diagnosis.weighed import Steps
from moescope.engine.load import load_model
from moescope.engine.protocol import LoadRequest
from tests.diagnosis import patched
from tests.diagnosis.around import BIASES
from tests.diagnosis.described import DESCRIBE
from tests.tiny import save_checkpoint, tiny_model

RESULTS = Path(__file__).with_name("results")
PROMPTS, LENGTH, NEW = 3, 9, 48  # prompts, tokens of each, and new ones
LEVELS: tuple[Level, ...] = ("weights", "order")
DTYPES = ("float32", "bfloat16")
UNPATCHED = ("float32", "bfloat16", "experts in 8 bits")
# An error of logits that rounding does not make. Ids alone do not tell in what an engine computed:
# with them, what bfloat16 may flip says nothing.
ROUNDING = {
    ("weights", "float32"): 1e-4,
    ("weights", "bfloat16"): 0.1,
    ("order", "float32"): 0.1,
    ("order", "bfloat16"): 0.1,
}
ROWS = 2  # beyond rounding: one may be chance
# Config fields under which more faults mean something.
CONFIGS: dict[str, dict[str, Any]] = {
    "glm4_moe": {"n_routed_experts": 16, "routed_scaling_factor": 2.5},
    "minimax_m2": {"num_local_experts": 16},
    "deepseek_v2": {
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 4.0,
    },
    "mistral4": {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5},
}
# Correction biases by which chosen experts have values below 0, as masked groups at 0 show.
LOWERED = ("deepseek_v3", "deepseek_v32", "axk1", "bailing_hybrid", "beam", "exaone_moe")
FAMILIES = tuple(sorted(DESCRIBE))


@dataclass(frozen=True)
class Beside:
    """One family: the model in transformers, and ours beside it."""

    family: str
    theirs: Any
    ours: Any

    @property
    def faults(self) -> tuple[str, ...]:
        """Entries of the catalogue that mean something for it."""
        return tuple(h.names[0] for h in hypotheses.singles(self.ours.interpreter.spec))

    @property
    def written(self) -> tuple[str, ...]:
        return tuple(n for n in self.faults if n in patched.WRITTEN and n not in self._unwritten)

    @property
    def _unwritten(self) -> tuple[str, ...]:
        return UNWRITTEN.get(self.family, ())


# Faults that are not written for a family's modules.
UNWRITTEN: dict[str, tuple[str, ...]] = {
    "gemma4_text": ("router_reads_residual", "router_reads_normed"),
    "dbrx": ("router_reads_residual",),
}


@cache
def tested(family: str, folder: Path) -> Beside:
    model = tiny_model(family, **CONFIGS.get(family, {}))
    if family in LOWERED:
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(BIASES):
                tensor.data -= 0.8
    path = save_checkpoint(model, folder / f"diagnosed-{family}")
    return Beside(family, model, load_model(LoadRequest(str(path), device="cpu")))


def recorded(case: Beside, faults: tuple[str, ...], dtype: str, new: int = NEW) -> Evidence:
    """What the patched model decides while it writes; `dtype` may be one of `UNPATCHED`."""
    rng = np.random.default_rng(5)
    prompts = [tuple(int(i) for i in rng.integers(0, 256, LENGTH)) for _ in range(PROMPTS)]
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    model = patched.patched(case.theirs, case.family, *faults, dtype=kind)
    if dtype not in DTYPES:
        model = patched.round_experts(model, case.family)
    runs = patched.generate(model, case.family, prompts, new)
    return Evidence(
        tuple(
            Observed(np.array(r.token_ids), r.expert_ids.astype(np.int32), r.weights) for r in runs
        )
    )


def unlike(case: Case, fault: str, level: Level, dtype: str) -> int:
    """Rows in which the fault's emulation is not the trained one's, beyond rounding. Both are given
    the experts that were recorded, so that both judge the same states."""
    spec = case.model.interpreter.spec
    wrong = next(h for h in hypotheses.singles(spec) if h.names == (fault,))
    a, b = case.predicted(TRAINED), case.predicted(wrong)
    rows = 0
    for index, router in enumerate(a.routers):
        found = differences(
            a.logits[:, index, : router.spec.E],
            router.spec,
            router.tensors,
            b.expert_ids[:, index].astype(np.int32),
            b.weights[:, index] if level == "weights" else None,
            token_ids=a.token_ids,
        )
        if dtype == "bfloat16":  # a step of it either way
            found = replace(found, steps=Steps(2.0**-7))
        rows += int((found.error() > ROUNDING[level, dtype]).sum())
    return rows


def row(case: Beside, fault: str, dtype: str, new: int = NEW) -> dict[str, Any]:
    """One patched (or, with "", unpatched) model, diagnosed at each level of evidence."""
    evidence = recorded(case, (fault,) if fault else (), dtype, new)
    found: dict[str, Any] = {"family": case.family, "fault": fault, "dtype": dtype}
    held: Held = {}
    for level in LEVELS:
        made = diagnose(case.ours, evidence.reduced(level), held=held)
        beyond = unlike(Case(case.ours, evidence, held=held), fault, level, dtype) if fault else 0
        found[level] = {"beyond_rounding": beyond, **_short(made, fault)}
        found[level]["outcome"] = outcome(found[level], fault)
    return found


def _short(made: Diagnosis, fault: str) -> dict[str, Any]:
    variants = [expression.split("@")[0] for expression in made.variants]
    return {
        "verdict": made.verdict,
        "class": variants,
        "explained": round(made.explained, 4),
        "by_trained": round(made.explained_by_trained, 4),
        "indistinguishable": _reported(fault) in made.indistinguishable,
        "noise": float(f"{made.noise[0]:.0e}"),
    }


def _reported(fault: str) -> str:
    from moescope.variants import CATALOGUE

    return CATALOGUE[fault].reported if fault else ""


def outcome(found: dict[str, Any], fault: str) -> str:
    """`named`, `no trace`, `correct` (unpatched), or what went wrong."""
    if not fault:
        return "correct" if found["verdict"] == "trained" else "convicted"
    if fault in found["class"]:
        return "named"
    if found["verdict"] == "trained" and found["beyond_rounding"] < ROWS:
        return "no trace" if found["indistinguishable"] else "missed, not listed"
    return "missed" if found["verdict"] != "fault" else "misnamed"


def family_rows(case: Beside, known: list[dict[str, Any]] | None = None) -> Any:
    """Every row of a family, those already known first."""
    have = {(r["fault"], r["dtype"]) for r in known or ()}
    yield from known or ()
    wanted = [("", dtype) for dtype in UNPATCHED]
    wanted += [(fault, dtype) for fault in case.written for dtype in DTYPES]
    for fault, dtype in wanted:
        if (fault, dtype) not in have:
            yield row(case, fault, dtype)


def results(family: str) -> list[dict[str, Any]]:
    path = RESULTS / f"{family}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def write(family: str, rows: list[dict[str, Any]], unwritten: list[str]) -> None:
    RESULTS.mkdir(exist_ok=True)
    lines = ",\n  ".join(json.dumps(one) for one in rows)
    head = f'{{"family": "{family}", "not_written": {json.dumps(unwritten)},\n "rows": [\n  '
    (RESULTS / f"{family}.json").write_text(f"{head}{lines}\n]}}\n")


def main(families: list[str]) -> None:
    import tempfile

    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    for family in families or FAMILIES:
        case = tested(family, folder)
        rows: list[dict[str, Any]] = []
        unwritten = [name for name in case.faults if name not in case.written]
        for one in family_rows(case, results(family)):
            rows.append(one)
            print(
                family,
                one["fault"] or "-",
                one["dtype"],
                *(one[v]["outcome"] for v in LEVELS),
                flush=True,
            )
            write(family, rows, unwritten)


if __name__ == "__main__":
    main(sys.argv[1:])
