"""A checkpoint in words and numbers, from its config and headers alone: what `inspect` prints.

Imports no torch and no mlx; nothing here depends on the machine it runs on.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from moescope.engine import families, limits, mlx_limits, parameters, quantised
from moescope.engine.checkpoint import Checkpoint
from moescope.engine.decoder import DecoderSpec, state_bytes
from moescope.engine.families.plans import Plan
from moescope.engine.layer_words import layer_kinds, spans
from moescope.engine.limits import Limits
from moescope.engine.stored import Stored, stored
from moescope.kernels.spec import RouterSpec
from moescope.safety import single_line

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
MEMORY_CONTEXT = 4096  # tokens of cache counted in the memory needed
DEVICES: dict[str, Limits] = {"cpu": limits.TORCH, "cuda": limits.TORCH, "mlx": mlx_limits.MLX}


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that can be said without reading a weight; JSON values only.

    Raises MoescopeError for configs that are not supported, or that do not fit the tensors.
    """
    config = checkpoint.config
    spec = families.build(config)
    scheme = quantised.read_scheme(config)
    plan = families.plan(config, spec, checkpoint.tensors) if checkpoint.tensors else None
    held = stored(spec, plan, checkpoint.tensors) if plan is not None else None
    routers = [router for _, _, router in spec.routers()]
    active = parameters.count_active(spec)
    return {
        "name": checkpoint.name,
        "model_type": str(config["model_type"]),
        "family": families.family_of(config).title,
        "router": routers[0].line(),
        "routers": _routers(spec),
        "num_layers": len(spec.layers),
        "num_routers": len(routers),
        "num_experts": routers[0].wiring.num_experts,
        "num_experts_per_tok": routers[0].policy.num_experts_per_tok,
        "hidden_size": spec.hidden,
        "vocab_size": spec.vocab_size,
        "context": spec.context,
        "parameters": parameters.count(spec),
        "active_parameters": active,
        "layers": [
            {"layers": spans(numbers), "numbers": numbers, "mixer": mixer, "feed_forward": rest}
            for (mixer, rest), numbers in layer_kinds(spec).items()
        ],
        "shards": len(checkpoint.shards),
        "weights_bytes": checkpoint.weights_bytes if held is not None else None,
        "layout": ", ".join(plan.layouts) if plan is not None else None,
        "quantisation": scheme.method if scheme is not None else None,
        "stored": _stored(held),
        "router_stored_as": held.router if held is not None else None,
        "unused_tensors": len(plan.unused) if plan is not None else None,
        "bytes_per_token": {
            **({"stored": held.bytes_per_token} if held is not None else {}),
            **{name: size * active for name, size in BYTES.items()},
        },
        **_memory(spec, held),
        "runs_on": {device: _runs(spec, covered) for device, covered in DEVICES.items()},
        "tokenizer": (checkpoint.folder / "tokenizer.json").is_file(),
        "notes": _notes(checkpoint, plan),
    }


def _routers(spec: DecoderSpec) -> list[dict[str, Any]]:
    """Each different router, with the layers it is in, in words and as fields."""
    found: dict[RouterSpec, list[int]] = {}
    for layer, _, router in spec.routers():
        found.setdefault(router, []).append(layer)
    return [
        {
            "layers": spans(sorted(set(layers))),
            "numbers": layers,
            "words": router.line(wiring=True),
            "fields": _unusual(router),
            "spec": router.to_json(),
        }
        for router, layers in found.items()
    ]


def _unusual(router: RouterSpec) -> dict[str, Any]:
    """The fields that are not at their defaults."""
    return {
        f.name: getattr(part, f.name)
        for part in (router.policy, router.wiring)
        for f in fields(part)
        if getattr(part, f.name) != f.default
    }


def _stored(held: Stored | None) -> list[dict[str, Any]] | None:
    if held is None:
        return None
    return [{"as": words, "parameters": count, "bytes": size} for words, count, size in held.kinds]


def _memory(spec: DecoderSpec, held: Stored | None) -> dict[str, Any]:
    """Bytes by device and dtype: weights and the cache of one lane. torch expands what is packed,
    MLX keeps what it multiplies as it is."""
    numbers, context = parameters.count(spec), min(spec.context, MEMORY_CONTEXT)
    kept_bytes, kept = (held.kept_on_mlx, held.kept_numbers) if held is not None else (0, 0)
    cache = {name: state_bytes(spec, context, size) for name, size in BYTES.items()}
    expanded = {name: size * numbers + cache[name] for name, size in BYTES.items()}
    on_mlx = {
        name: kept_bytes + size * (numbers - kept) + cache[name] for name, size in BYTES.items()
    }
    return {
        "memory_needed": {"cpu": expanded, "cuda": expanded, "mlx": on_mlx},
        "cache_bytes": cache,
        "cache_tokens": context,
        "packed_bytes": held.packed_bytes if held is not None else 0,
        "packed_expanded": {
            name: size * (held.packed if held is not None else 0) for name, size in BYTES.items()
        },
    }


def _runs(spec: DecoderSpec, covered: Limits) -> str:
    """Nothing where a device runs it; else the first thing that it does not do."""
    found = covered.first(spec)
    if found is None:
        return ""
    name, value = found[0].removeprefix("Branch.operator"), single_line(str(found[1]), 60)
    return f"{name} {value}".lstrip() + " is not implemented"


def _notes(checkpoint: Checkpoint, plan: Plan | None) -> list[str]:
    of_plan = plan.notes() if plan is not None else []
    return [*checkpoint.notes, *families.notes(checkpoint.config), *of_plan]
