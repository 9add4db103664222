"""The router on MLX arrays: a Metal kernel where Metal is present, plain operators elsewhere.

`route_mlx` takes policies as rows of numbers, so that nothing is compiled again when one changes.
The Metal kernels' text and how they are launched is `metal/`; the plain operators are
`mlx_plain.py`, which is also the kernels' slow twin.
"""

from __future__ import annotations

import mlx.core as mx

from moescope.kernels.mlx_plain import ALL, fields_of, route_plain
from moescope.kernels.policy_rows import WIDTH
from moescope.kernels.spec import Routing

__all__ = ["fields_of", "route_mlx"]


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

    `fields` may leave steps out of the plain form that no row needs (`fields_of` the rows); the
    Metal kernel reads what a row says. Works inside `mx.compile`. ValueError for other shapes.
    """
    T, E, P = _checked(logits, rows, K_max)
    R = T * P if rows.ndim == 3 else T
    spread = _Spread(T, P)
    flat = mx.broadcast_to(rows.reshape(-1, WIDTH), (R, WIDTH))
    routing = route_plain(
        spread(logits),
        flat,
        K_max,
        spread(_vectors("correction_bias", correction_bias, T, E)),
        spread(_vectors("per_expert_scale", per_expert_scale, T, E)),
        spread(hash_ids),
        fields,
    )
    return _shaped(routing, rows, T, P, logits if keep_logits else None)


class _Spread:
    """What a token has, repeated for each of its P policies."""

    def __init__(self, T: int, P: int) -> None:
        self.T, self.P = T, P

    def __call__(self, x: mx.array | None) -> mx.array | None:
        if x is None or self.P == 1 or len(x) == 1:
            return x
        return mx.repeat(x, self.P, axis=0)


def _checked(logits: mx.array, rows: mx.array, K_max: int) -> tuple[int, int, int]:
    """T, E and P. ValueError for arrays that a kernel would read beyond."""
    if logits.ndim != 2 or logits.shape[1] < 1:
        raise ValueError(f"logits: expected [T, E], found {list(logits.shape)}")
    T, E = logits.shape
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
