"""The router on MLX arrays: a Metal kernel where Metal is present, plain operators elsewhere.

`route_mlx` takes policies as rows of numbers, so that nothing is compiled again when one changes.
The kernels' text and how they are launched is `metal/`; the plain operators are `mlx_plain.py`,
which is also the kernels' slow twin. Metal has no float64: there pairs of float32 hold what is
yet to be rounded (`metal/numbers.metal`), 48 bits of it, so that scores and weights are rounded as
the reference rounds them except where the exact value lies within some 2^-20 of its last bit of a
boundary. That is how ids agree wherever selection values are more than 8 ulp apart.

A row is float32. Its integers and dtypes are exact; of its real numbers `norm_eps`, `norm_p` and
the scales differ from the spec's by half an ulp at most, which reaches weights alone, except for
`router_logit_scale` and `router_logit_softcapping`: where float32 does not hold those (0.1; not
0.125, 3 or 30), a logit may be scaled or capped one ulp off. Of a `norm_p` far below 1, about 0.1
and less, Metal's powers are too coarse for the fifth digit of a weight.

Nothing here has run on a Mac: the text runs in tests, compiled for this machine's CPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import mlx.core as mx

from moescope.kernels.metal.launch import (
    Kernel,
    Launch,
    covers,
    gate_router_launch,
    router_launch,
)
from moescope.kernels.mlx_numbers import E_MAX
from moescope.kernels.mlx_plain import route_plain
from moescope.kernels.mlx_policy import ALL, fields_of
from moescope.kernels.policy_rows import WIDTH
from moescope.kernels.spec import MODEL_DTYPES, Routing
from moescope.kernels.twins import Difference, difference

__all__ = ["compare_twins", "fields_of", "gate_and_route_mlx", "route_mlx", "uses_metal"]

_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def uses_metal(E: int, K_max: int) -> bool:
    """Whether `route_mlx` launches the Metal kernel for E classes and K_max picks: Metal is here,
    is the device in use, and the kernel is made for as many."""
    on_gpu = mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu
    return on_gpu and not covers(E, K_max)


def route_mlx(
    logits: mx.array,
    rows: mx.array,
    K_max: int,
    *,
    correction_bias: mx.array | None = None,
    per_expert_scale: mx.array | None = None,
    hash_ids: mx.array | None = None,
    keep_logits: bool = False,
    use_metal: bool | None = None,
    fields: frozenset[str] = ALL,
) -> Routing:
    """Route logits [T, E] under rows [T, 32] of policies (`policy_rows.pack`, as float32).

    Rows may also be [1, 32], one for all tokens, or [T, P, 32], P policies for each: results are
    then [T, P, ...]. `correction_bias` and `per_expert_scale` are [E] or [T, E], `hash_ids`
    [T, K_max or more] int32, the experts a hash table names. Ids are int32 [T, K_max], -1 where
    unused; the other fields as `Routing` says. A row whose policy does not fit (K over K_max or E,
    an input it needs that is None, a hash id out of range) is invalid. `logits`, where kept, are
    float32 [T, E].

    `use_metal` None: where `uses_metal`. `fields` may leave steps out of the plain form that no row
    needs (`fields_of` the rows); the Metal kernel reads what a row says. Works inside `mx.compile`.
    ValueError for other shapes, and for sizes that `use_metal` True does not cover.
    """
    T, E, P = _checked(logits, rows, K_max)
    bias = _vectors("correction_bias", correction_bias, T, E)
    scale = _vectors("per_expert_scale", per_expert_scale, T, E)
    if hash_ids is not None and (hash_ids.ndim != 2 or hash_ids.shape[0] != T):
        raise ValueError(f"hash_ids: expected [{T}, {K_max}], found {list(hash_ids.shape)}")
    route = _on_metal if _wanted(use_metal, E, K_max) and T * P > 0 else _in_operators
    routing = route(logits, rows.reshape(-1, WIDTH), T, P, K_max, bias, scale, hash_ids, fields)
    return _shaped(routing, rows, T, P, logits if keep_logits else None)


def gate_and_route_mlx(
    hidden: mx.array,
    gate: mx.array,
    rows: mx.array,
    K_max: int,
    *,
    router_dtype: str,
    gate_bias: mx.array | None = None,
    correction_bias: mx.array | None = None,
    per_expert_scale: mx.array | None = None,
    hash_ids: mx.array | None = None,
    keep_logits: bool = False,
    use_metal: bool | None = None,
    simdgroups: int = 16,
) -> Routing:
    """Route hidden [1, H] through the gate [E, H] (and its bias [E]) under rows [1, 32] or
    [1, P, 32], in one launch where Metal is used.

    As `route_mlx` of hidden @ gate.T + `gate_bias`, all rounded to `router_dtype` first and the sum
    once more. One threadgroup of `simdgroups` times 32 threads reads the whole gate: that saves a
    launch and suits small gates; which sizes gain is for a Mac to say (`make metal`).
    """
    (T, H), E = hidden.shape, gate.shape[0]
    if T != 1 or tuple(gate.shape) != (E, H):
        raise ValueError(f"gate: expected one token and [E, {H}], found {T} and {list(gate.shape)}")
    if not _wanted(use_metal, E, K_max):
        logits = _gate_logits(hidden, gate, gate_bias, router_dtype)
        return route_mlx(
            logits,
            rows,
            K_max,
            correction_bias=correction_bias,
            per_expert_scale=per_expert_scale,
            hash_ids=hash_ids,
            keep_logits=keep_logits,
            use_metal=False,
        )
    _, _, P = _checked(mx.zeros((1, E)), rows, K_max)
    narrow = _DTYPES[router_dtype]
    flat = rows.reshape(-1, WIDTH)
    launch = gate_router_launch(
        P,
        E,
        H,
        K_max,
        router_dtype=MODEL_DTYPES.index(router_dtype),
        casts=narrow != mx.float32 and {hidden.dtype, gate.dtype} != {narrow},
        one_row=len(flat) == 1,
        has_gate_bias=gate_bias is not None,
        has_bias=correction_bias is not None,
        has_scale=per_expert_scale is not None,
        hash_picks=0 if hash_ids is None else hash_ids.shape[1],
        simdgroups=simdgroups,
    )
    *fields, logits = _launched(
        launch,
        [hidden, gate, gate_bias, flat, correction_bias, per_expert_scale, hash_ids],
    )
    routing = Routing(*fields)
    return _shaped(routing, rows, 1, P, logits[None] if keep_logits else None)


def compare_twins(logits: mx.array, rows: mx.array, K_max: int, **inputs: Any) -> Difference:
    """How far the routing that `route_mlx` would give and the plain one are apart on these logits;
    `inputs` are those of `route_mlx`. Waits for both."""
    routings = [
        route_mlx(logits, rows, K_max, **inputs),
        route_mlx(logits, rows, K_max, **{**inputs, "use_metal": False, "fields": ALL}),
    ]
    mx.eval([[r.expert_ids, r.weights] for r in routings])
    return difference(*routings)


# --- in plain operators, and on Metal -------------------------------------------------------------


def _in_operators(
    logits: mx.array,
    rows: mx.array,
    T: int,
    P: int,
    K_max: int,
    bias: mx.array | None,
    scale: mx.array | None,
    hash_ids: mx.array | None,
    fields: frozenset[str],
) -> Routing:
    def spread(x: mx.array) -> mx.array:
        """What each token has, repeated for each of its P policies."""
        return x if P == 1 else mx.repeat(x, P, axis=0)

    def vectors(x: mx.array | None) -> mx.array | None:
        return x if x is None or len(x) == 1 else spread(x)

    rows = mx.broadcast_to(rows, (T * P, WIDTH))
    hashed = None if hash_ids is None else spread(hash_ids)
    return route_plain(spread(logits), rows, K_max, vectors(bias), vectors(scale), hashed, fields)


def _on_metal(
    logits: mx.array,
    rows: mx.array,
    T: int,
    P: int,
    K_max: int,
    bias: mx.array | None,
    scale: mx.array | None,
    hash_ids: mx.array | None,
    fields: frozenset[str],
) -> Routing:
    launch = router_launch(
        T,
        P,
        logits.shape[1],
        K_max,
        one_row=len(rows) == 1,
        bias_rows=0 if bias is None else len(bias),
        scale_rows=0 if scale is None else len(scale),
        hash_picks=0 if hash_ids is None else hash_ids.shape[1],
    )
    return Routing(*_launched(launch, [logits, rows, bias, scale, hash_ids]))


def _launched(launch: Launch, inputs: list[mx.array | None], **options: Any) -> list[mx.array]:
    """The outputs of `launch`. `sizes` say which inputs there are; for the others stands something
    of their dtype, which is not read."""
    names = launch.kernel.input_names
    sizes = mx.array(launch.sizes, dtype=mx.int32)
    table = inputs[names.index("rows")]
    assert table is not None
    rows = table.astype(mx.float32)
    given = []
    for name, array in zip(names, [*inputs, sizes], strict=True):
        if name in ("rows", "bias", "scale", "gate_bias"):
            array = rows if array is None else array.astype(mx.float32)
        elif name in ("hashed", "sizes"):
            array = sizes if array is None else array.astype(mx.int32)
        given.append(rows if array is None else array)
    outputs: list[mx.array] = _kernel(launch.kernel)(
        inputs=given,
        template=list(launch.template),
        grid=launch.grid,
        threadgroup=launch.threadgroup,
        output_shapes=list(launch.output_shapes),
        output_dtypes=[getattr(mx, name) for name in launch.output_dtypes],
        **options,
    )
    return outputs


@lru_cache(maxsize=4)
def _kernel(kernel: Kernel) -> Any:
    return mx.fast.metal_kernel(
        name=kernel.name,
        input_names=list(kernel.input_names),
        output_names=list(kernel.output_names),
        header=kernel.header,
        source=kernel.source,
    )


def _gate_logits(
    hidden: mx.array, gate: mx.array, gate_bias: mx.array | None, router_dtype: str
) -> mx.array:
    """Router logits [1, E] float32, rounded to `router_dtype` once."""
    narrow = _DTYPES[router_dtype]
    x, w = (a.astype(narrow).astype(mx.float32) for a in (hidden, gate))
    logits = x @ w.T
    if gate_bias is not None:
        logits = logits + gate_bias.astype(narrow).astype(mx.float32)
    return logits.astype(narrow).astype(mx.float32)


# --- shapes ---------------------------------------------------------------------------------------


def _wanted(use_metal: bool | None, E: int, K_max: int) -> bool:
    if use_metal and (why := covers(E, K_max)):
        raise ValueError(why)
    return uses_metal(E, K_max) if use_metal is None else use_metal


def _checked(logits: mx.array, rows: mx.array, K_max: int) -> tuple[int, int, int]:
    """T, E and P. ValueError for arrays that a kernel would read beyond."""
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: expected [T, E], found {list(logits.shape)}")
    T, E = logits.shape
    if E > E_MAX:
        raise ValueError(f"num_experts {E} is more than {E_MAX}")
    if rows.ndim == 2 and rows.shape in {(T, WIDTH), (1, WIDTH)}:
        P = 1
    elif rows.ndim == 3 and rows.shape[0] == T and rows.shape[2] == WIDTH:
        P = rows.shape[1]
    else:
        raise ValueError(f"rows: expected [{T}, {WIDTH}], found {list(rows.shape)}")
    if K_max < 1:
        raise ValueError(f"K_max: expected at least 1, found {K_max}")
    return T, E, P


def _vectors(name: str, value: mx.array | None, T: int, E: int) -> mx.array | None:
    if value is None:
        return None
    if tuple(value.shape) not in {(E,), (1, E), (T, E)}:
        raise ValueError(f"{name}: expected [{E}] or [{T}, {E}], found {list(value.shape)}")
    return value.reshape(-1, E)


def _shaped(routing: Routing, rows: mx.array, T: int, P: int, logits: mx.array | None) -> Routing:
    fields = {name: getattr(routing, name) for name in Routing.__slots__}
    if rows.ndim == 3:
        fields = {
            name: None if a is None else a.reshape(T, P, *a.shape[1:]) for name, a in fields.items()
        }
    fields["logits"] = None if logits is None else logits.astype(mx.float32)
    return Routing(**fields)
