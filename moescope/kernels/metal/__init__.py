"""The Metal kernels: their text, and how they are launched. No MLX here.

`numbers.metal`, `scores.metal` and `routing.metal` are what both kernels share, `router.metal` and
`gate_router.metal` (with `gate.metal`) the bodies that MLX wraps in a function. A `Launch` is all
that MLX is told, so that a test can compile the same text and walk the same grid without a Mac.
"""
