"""One module per verb: `add_arguments(parser)` and `run(args) -> exit code`.

Thin: they parse, call and print. Heavy imports are inside `run`. The docstring is the help text.
"""
