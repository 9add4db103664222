"""The router alone: from logits in memory to experts, weights and everything a trace records.

Each contender is captured many times over into one CUDA graph, so that no host is in the way, and
timed on the device's clock. The torch chain and torch.compile compute ids and weights only, which
is what a model needs; ours and `torch_ops` compute the whole `Routing`. The logits lie in the
cache, as they do behind the gate that made them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import cuda_clock as clock
import numpy as np
import torch
from cuda_shapes import begin, parser
from torch import Tensor

from moescope.kernels import agreement, route
from moescope.kernels.policy_rows import pack_rows
from moescope.kernels.spec import RouterPolicy, RouterSpec, RouterWiring, Routing
from moescope.kernels.torch_ops import route_torch

GROUPED: dict[str, Any] = {
    "scoring_func": "sigmoid",
    "correction_bias": "score",
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "norm_eps": 1e-20,
    "routed_scaling_factor": 2.5,
}
CASES: tuple[tuple[int, int, int, dict[str, Any]], ...] = (  # T, E, K, policy
    (1, 64, 8, {}),
    (1, 128, 8, {"norm_topk_prob": True}),
    (1, 256, 8, GROUPED),
    (512, 64, 8, {}),
    (4096, 128, 8, {"norm_topk_prob": True}),
    (8192, 512, 10, {"norm_topk_prob": True}),
)
FIRST = ("copy", "torch chain", "ours", "ours, 4 shadows", "gate, torch chain", "gate, ours")
LAST = ("torch.compile", "torch_ops")  # of what may fail in a capture, after everything else
GATED = ("gate, torch chain", "gate, ours")  # with the gate's product before it, for few rows
WIDTH, FEW = 2048, 8
SLOW_ON_CPU = ("ours, 4 shadows", "torch.compile")  # interpreted kernels, a compiler of C++
Work = Callable[[], Any]


def main() -> None:
    asked = parser(__doc__ or "").parse_args()
    report, _ = begin(asked)
    found: dict[str, dict[str, Any]] = {f"{T} {E} {K}": {} for T, E, K, _ in CASES}
    for contenders in (FIRST, LAST):
        for T, E, K, policy in CASES:
            name = f"{T} {E} {K}"
            rows = min(T, 2) if asked.tiny else T
            spec = RouterSpec(RouterPolicy(K, **policy), RouterWiring(E)).resolved("bfloat16")
            measure(found[name], contenders, rows, spec, asked.device)
            report.put(name, found[name])
    report.finish()


def measure(
    found: dict[str, Any], contenders: tuple[str, ...], T: int, spec: RouterSpec, device: str
) -> None:
    """Put microseconds of each contender into `found`, and what becomes of them."""
    logits, bias = inputs(T, spec, device)
    chain = grouped_chain if spec.policy.n_group > 1 else plain_chain
    target = torch.empty_like(logits)
    works: dict[str, Callable[[], Work]] = {
        "copy": lambda: lambda: target.copy_(logits),
        "torch chain": lambda: lambda: chain(logits, bias, spec.policy),
        "ours": lambda: ours(logits, bias, spec)[0],
        "ours, 4 shadows": lambda: ours(logits, bias, spec, places=5)[0],
        "gate, torch chain": lambda: gated_chain(T, bias, spec, device, chain),
        "gate, ours": lambda: gated(T, bias, spec, device),
        "torch.compile": lambda: compiled(chain, logits, bias, spec.policy),
        "torch_ops": lambda: lambda: route_torch(logits, spec, correction_bias=bias),
    }
    calls = (64 if T < 4096 else 16) if device == "cuda" else 1
    for name in contenders:
        if (device == "cpu" and name in SLOW_ON_CPU) or (name in GATED and T > FEW):
            continue
        try:
            found[name] = clock.in_graph(works[name](), device, calls=calls) * 1e6
        except Exception as error:
            found[f"{name}, why not"] = f"{type(error).__name__}: {error}"[:300]
    if "ours" in contenders and "ours" in found:
        found["speedup"] = found["torch chain"] / found["ours"]
        found["over_copy"] = found["ours"] / found["copy"]
        found["disagreements"] = disagreements(logits, bias, spec)


def inputs(T: int, spec: RouterSpec, device: str) -> tuple[Tensor, Tensor | None]:
    random = np.random.default_rng(T + spec.E)
    logits = torch.from_numpy(random.normal(0, 2, (T, spec.E)).astype(np.float32)).to(device)
    biased = spec.policy.correction_bias != "none"
    bias = torch.from_numpy(random.normal(0, 0.1, spec.E).astype(np.float32)).to(device)
    return logits, bias if biased else None


# --- contenders -----------------------------------------------------------------------------------


def plain_chain(logits: Tensor, bias: Tensor | None, p: RouterPolicy) -> tuple[Tensor, Tensor]:
    """What models write: softmax, top-k, and where they renormalise, a division."""
    scores = torch.softmax(logits, -1, dtype=torch.float32)
    weights, ids = torch.topk(scores, p.num_experts_per_tok, dim=-1)
    if p.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids, weights.to(torch.bfloat16)


def grouped_chain(logits: Tensor, bias: Tensor | None, p: RouterPolicy) -> tuple[Tensor, Tensor]:
    """The same with a correction bias and groups ranked by their best two."""
    scores = logits.sigmoid()
    biased = scores + bias
    groups = biased.view(len(logits), p.n_group, -1).topk(2, dim=-1).values.sum(-1)
    best = groups.topk(p.topk_group, dim=-1, sorted=False).indices
    mask = torch.zeros_like(groups).scatter_(1, best, 1).bool()
    admitted = mask.repeat_interleave(logits.shape[1] // p.n_group, dim=1)
    ids = biased.masked_fill(~admitted, -torch.inf).topk(p.num_experts_per_tok, dim=-1).indices
    weights = scores.gather(1, ids)
    weights = weights / (weights.sum(-1, keepdim=True) + p.norm_eps) * p.routed_scaling_factor
    return ids, weights.to(torch.bfloat16)


def compiled(chain: Any, logits: Tensor, bias: Tensor | None, p: RouterPolicy) -> Work:
    torch.compiler.reset()
    fast = torch.compile(lambda x: chain(x, bias, p), dynamic=False)
    return lambda: fast(logits)


def ours(
    logits: Tensor, bias: Tensor | None, spec: RouterSpec, *, places: int = 1
) -> tuple[Work, Routing]:
    """The fused kernel, and where its routing arrives: `places` policies a row, one place each."""
    from moescope.kernels.triton_ops.router import empty, route_rows

    T, device = len(logits), logits.device
    rows = torch.from_numpy(pack_rows([spec] * places)).float().to(device)
    row_of = torch.arange(places, dtype=torch.int32, device=device).repeat(T, 1)
    out = empty(T, places, spec.K, device)
    return lambda: route_rows(logits, rows, row_of, spec.K, bias, out=out), out


def gate_inputs(T: int, E: int, device: str) -> tuple[Tensor, Tensor]:
    """hidden [T, H] and the gate's weight [E, H]."""
    generator = torch.Generator(device).manual_seed(E)
    hidden = torch.randn(T, WIDTH, generator=generator, device=device)
    gate = torch.randn(E, WIDTH, generator=generator, device=device) * 2 * WIDTH**-0.5
    return hidden.bfloat16(), gate.bfloat16()


def gated_chain(T: int, bias: Tensor | None, spec: RouterSpec, device: str, chain: Any) -> Work:
    hidden, gate = gate_inputs(T, spec.E, device)
    return lambda: chain(torch.nn.functional.linear(hidden, gate).float(), bias, spec.policy)


def gated(T: int, bias: Tensor | None, spec: RouterSpec, device: str) -> Work:
    """Both in one launch."""
    from moescope.kernels.triton_ops.gate_router import gate_and_route, scratch
    from moescope.kernels.triton_ops.router import empty

    hidden, gate = gate_inputs(T, spec.E, device)
    rows = torch.from_numpy(pack_rows([spec])).float().to(device)
    row_of = torch.zeros(T, 1, dtype=torch.int32, device=device)
    work, out = scratch(T, spec.E, WIDTH, 1, device), empty(T, 1, spec.K, device)
    copies = gate.unsqueeze(0)
    return lambda: gate_and_route(
        hidden, copies, rows, row_of, spec.K, work, torch.bfloat16, bias=bias, out=out
    )


def disagreements(logits: Tensor, bias: Tensor | None, spec: RouterSpec) -> int:
    """Rows in which the kernel decides otherwise than the definition."""
    work, out = ours(logits, bias, spec)
    work()
    fields = {f.name: getattr(out, f.name) for f in dataclasses.fields(out)}
    found = Routing(
        **{k: None if v is None or k == "logits" else v[:, 0].cpu() for k, v in fields.items()}
    )
    raw, vector = logits.cpu().numpy(), None if bias is None else bias.cpu().numpy()
    expected = route(raw, spec, correction_bias=vector)
    wrong = agreement.compare(expected, found, spec, raw, correction_bias=vector, limit=1 << 30)
    return len({item.row for item in wrong})


if __name__ == "__main__":
    main()
