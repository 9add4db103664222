"""States what the demo does on held-out text, routed as trained and under one fault, in figures.

The fault is `softmax_over_selected`: softmax over the picked logits only, so that the combine
weights sum to 1 where the checkpoint was trained with the smaller sum of a softmax over all
experts. The same weights, the same experts, larger steps: text that starts well and drifts.

    python -m moescope.demo.measure

Letters in shapes: T tokens, L layers, E experts, K picked, D domains, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from moescope.demo import CHECKPOINT, corpus

FIGURES = Path(__file__).parent / "figures.json"
TRAINED, FAULT = "trained", "softmax_over_selected"
SEED = 41
LINE = re.compile(r"\d+ [-+x] \d+ = \d+")


@dataclass(frozen=True, slots=True)
class Run:
    """One sequence through the model: the prompt, then what it wrote."""

    token_ids: list[int]  # the new ones, without the end token
    ended: bool  # it wrote the end token
    logits: np.ndarray  # [T, V] float32, of every prompt token
    scores: np.ndarray  # [L, T, E] float32, softmax over all experts, of every prompt token


Runner = Callable[[list[int], str, int], Run]
Line = tuple[str, str]  # what was written, under which heading


def engine_runner(folder: Path) -> Runner:
    """(prompt ids, variant, new tokens) -> `Run`, greedy, in float32, by moescope's own engine."""
    from moescope import variants
    from moescope.engine.load import load_model
    from moescope.engine.protocol import LoadRequest

    model = load_model(LoadRequest(str(folder), device="cpu", dtype="float32"))
    engine = model.interpreter
    end = model.checkpoint.config["eos_token_id"]

    def run(prompt: list[int], variant: str, new_tokens: int) -> Run:
        specs = [variants.apply(variant, router.spec, router.layer) for router in engine.routers]
        engine.open(1, len(prompt) + new_tokens)
        engine.truncate(0, 0)
        engine.set_policies(0, [spec.policy for spec in specs])
        out = engine.run([0], np.array([prompt]), all_logits=True, record="logits")
        odds = np.exp(out.router_logits[0] - out.router_logits[0].max(-1, keepdims=True))
        scores = (odds / odds.sum(-1, keepdims=True)).swapaxes(0, 1)  # [L, T, E]
        logits = out.logits[0].copy()
        written: list[int] = []
        token = int(logits[-1].argmax())
        while token != end and len(written) < new_tokens:
            written.append(token)
            token = int(engine.run([0], np.array([[token]])).logits[0, -1].argmax())
        return Run(written, token == end and new_tokens > 0, logits, scores)

    return run


# ------------------------------------------------------------------------------------ what is right


def arithmetic_form(line: str, heading: str) -> bool:
    return LINE.fullmatch(line) is not None


def arithmetic_true(line: str) -> bool:
    if not LINE.fullmatch(line):
        return False
    a, sign, b, _, c = line.split()
    return {"+": int(a) + int(b), "-": int(a) - int(b), "x": int(a) * int(b)}[sign] == int(c)


def json_form(line: str, heading: str) -> bool:
    """It parses, and its keys and their types are those of the schema that the heading names."""
    name = heading.removeprefix("JSON, ").removesuffix(", one a line:")
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return False
    return isinstance(value, dict) and shape_of(value) == SHAPES[name]


def shape_of(row: dict[str, Any]) -> dict[str, str]:
    return {k: "str | null" if k == "label" else type(v).__name__ for k, v in row.items()}


SHAPES = {name: shape_of(make(Random(0))) for name, make in corpus.SCHEMAS.items()}


def lines_written(text: str, ended: bool) -> list[str]:
    """Whole lines only: one that the token limit cut is neither right nor wrong."""
    lines = text.split("\n")
    return lines if ended else lines[:-1]


# ---------------------------------------------------------------------------------------- measures


def log_loss(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """Nats for each of ids[1:]. logits [T, V]."""
    x = logits[:-1].astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    picked = np.take_along_axis(x, np.array(ids[1:])[:, None], 1)[:, 0]
    return np.asarray(np.log(np.exp(x).sum(-1)) - picked)


def mutual_information(counts: np.ndarray) -> float:
    """Between domain and expert, in nats. counts [D, E]; every domain weighs the same."""
    joint = counts / counts.sum(1, keepdims=True) / len(counts)
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log(joint[seen] / product[seen])).sum())


def by_label(counts: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Expert counts of documents [N, E] summed by label -> [D, E]."""
    return np.stack([counts[labels == label].sum(0) for label in np.unique(labels)])


def share(right: list[bool]) -> float:
    return round(sum(right) / max(1, len(right)), 4)


def rounded(values: Iterable[float], digits: int = 4) -> list[float]:
    return [round(float(value), digits) for value in values]


def continued(
    run: Runner, tokenizer: Any, variant: str, held: list[str], new_tokens: int
) -> tuple[list[Run], list[Line]]:
    """The greedy continuation of every prompt, and the lines in it with their heading."""
    runs = [run(tokenizer.encode(prompt).ids, variant, new_tokens) for prompt in held]
    lines = [
        (line, prompt.split("\n")[0])
        for prompt, result in zip(held, runs, strict=True)
        for line in lines_written(tokenizer.decode(result.token_ids), result.ended)
    ]
    return runs, lines


def first_difference(a: list[int], b: list[int]) -> int:
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def writing(run: Runner, tokenizer: Any, prompts: int, new_tokens: int) -> dict[str, Any]:
    """Greedy continuations of held-out prompts, both ways: right lines, and where they part."""
    out: dict[str, Any] = {TRAINED: {}, FAULT: {}}
    everything: dict[str, list[Run]] = {TRAINED: [], FAULT: []}
    for variant in (TRAINED, FAULT):
        tally: list[bool] = []
        for domain, is_right in (("arithmetic", arithmetic_form), ("json", json_form)):
            held = corpus.prompts(domain, prompts)
            runs, lines = continued(run, tokenizer, variant, held, new_tokens)
            right = [is_right(line, heading) for line, heading in lines]
            figures = {"lines": len(lines), "right": share(right)}
            figures["prompts_ended"] = sum(result.ended for result in runs)
            if domain == "arithmetic":
                figures["sums_true"] = share([arithmetic_true(line) for line, _ in lines])
            out[variant][domain] = figures
            tally += right
            everything[variant] += runs
        out[variant]["lines_right"] = share(tally)
    out["first_difference_median"] = float(
        np.median(
            [
                first_difference(one.token_ids, other.token_ids)
                for one, other in zip(everything[TRAINED], everything[FAULT], strict=True)
            ]
        )
    )
    return out


def reading(run: Runner, tokenizer: Any, documents: int, top_k: int, end: int) -> dict[str, Any]:
    """Held-out documents given whole: loss both ways, score sums, experts against domains."""
    losses: dict[str, dict[str, float]] = {TRAINED: {}, FAULT: {}}
    nats: dict[str, list[np.ndarray]] = {TRAINED: [], FAULT: []}
    sums, counts, labels = [], [], []
    for number, domain in enumerate(corpus.DOMAINS):
        held = list(islice(corpus.documents(SEED, held=True, domain=domain), documents))
        for variant in (TRAINED, FAULT):
            here = []
            for document in held:
                ids = [*tokenizer.encode(document.text).ids, end]
                result = run(ids, variant, 0)
                here.append(log_loss(result.logits, ids))
                if variant == TRAINED:
                    picked = np.argsort(-result.scores, -1, kind="stable")[..., :top_k]
                    sums.append(np.take_along_axis(result.scores, picked, -1).sum(-1))  # [L, T]
                    experts = result.scores.shape[-1]
                    counts.append([np.bincount(p.ravel(), minlength=experts) for p in picked])
                    labels.append(number)
            nats[variant] += here
            losses[variant][domain] = round(float(np.concatenate(here).mean()), 4)
    by_layer = np.array(counts).swapaxes(0, 1)  # [L, N, E]
    label_row, rng = np.array(labels), np.random.default_rng(SEED)
    shuffles = [rng.permutation(label_row) for _ in range(50)]
    load = by_layer.sum(1) / by_layer.sum((1, 2))[:, None]  # [L, E]
    return {
        "loss": {v: round(float(np.concatenate(nats[v]).mean()), 4) for v in nats},
        "loss_by_domain": losses,
        "score_sum": rounded(np.concatenate(sums, 1).mean(1)),
        "mutual_information": rounded(mutual_information(by_label(c, label_row)) for c in by_layer),
        "mutual_information_shuffled": rounded(
            float(np.mean([mutual_information(by_label(c, row)) for row in shuffles]))
            for c in by_layer
        ),
        "busiest_expert_share": rounded(load.max(1)),
        "idlest_expert_share": rounded(load.min(1)),
    }


def targets(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the demo has to be, beside what it is."""
    ratios = [
        own / shuffled
        for own, shuffled in zip(
            figures["mutual_information"], figures["mutual_information_shuffled"], strict=True
        )
    ]
    gap = figures["loss"][FAULT] - figures["loss"][TRAINED]
    right = {variant: figures["writing"][variant]["lines_right"] for variant in (TRAINED, FAULT)}
    layers = sum(ratio >= 3 for ratio in ratios)
    return {
        "lines_right_trained": _target(right[TRAINED], ">=", 0.95),
        "lines_right_fault": _target(right[FAULT], "<=", 0.70),
        "loss_gap_nats": _target(gap, ">=", 0.2),
        "score_sum_highest_layer": _target(max(figures["score_sum"]), "<=", 0.75),
        "layers_with_information_3x_shuffled": _target(layers, ">=", len(ratios) // 2 + 1),
    }


def _target(value: float, sign: str, bound: float) -> dict[str, Any]:
    met = value >= bound if sign == ">=" else value <= bound
    return {"value": round(value, 4), "target": f"{sign} {bound:g}", "met": bool(met)}


def measure(folder: Path, prompts: int, documents: int, new_tokens: int) -> dict[str, Any]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    config = json.loads((folder / "config.json").read_text())
    weights = (folder / "model.safetensors").read_bytes()
    run = engine_runner(folder)
    figures: dict[str, Any] = {
        "model_sha256": hashlib.sha256(weights).hexdigest(),
        "prompts_per_domain": prompts,
        "documents_per_domain": documents,
        "new_tokens": new_tokens,
        "writing": writing(run, tokenizer, prompts, new_tokens),
        **reading(run, tokenizer, documents, config["num_experts_per_tok"], config["eos_token_id"]),
    }
    return {**figures, "targets": targets(figures)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--out", type=Path, default=FIGURES)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--documents", type=int, default=24)
    parser.add_argument("--new-tokens", type=int, default=112)
    given = parser.parse_args()
    figures = measure(given.model, given.prompts, given.documents, given.new_tokens)
    given.out.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures["targets"], indent=2))


if __name__ == "__main__":
    main()
