"""Errors of an engine as `Failed` events: one sentence, what to try, and an exit code."""

from __future__ import annotations

from moescope import reports
from moescope.engine.protocol import Failed
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import single_line


def failure(error: BaseException, token: int | None = None) -> Failed:
    """An error in words; `token` is the one being computed. What nobody foresaw goes into a report,
    without its message, which may hold a prompt."""
    if isinstance(error, MoescopeError):
        return Failed(error.message, error.hint, int(error.code))
    where = "" if token is None else f" at token {token}; the trace is saved"
    if out_of_memory(error):
        return Failed(
            f"out of memory{where}",
            "a smaller --max-context, --dtype bfloat16, or fewer lanes",
            int(ExitCode.RESOURCES),
        )
    if device_lost(error):
        return Failed(
            f"the device was lost{where}", "open the model again", int(ExitCode.RESOURCES)
        )
    path = reports.write(error, ["engine"])
    report = f"; a report is in {single_line(str(path))}" if path else ""
    return Failed(
        f"a bug of ours: {single_line(type(error).__name__, 80)}{where}{report}",
        "send the report to the project",
        int(ExitCode.BUG),
    )


def out_of_memory(error: BaseException) -> bool:
    """Also torch's, which is its own type on a GPU and a plain RuntimeError on the CPU, and MLX's,
    which is a plain one everywhere."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()
    signs = (
        "can't allocate memory",
        "out of memory",
        "not enough memory",
        "insufficient memory",
        "attempting to allocate",
        "unable to allocate",
    )
    return isinstance(error, RuntimeError) and any(sign in text for sign in signs)


def device_lost(error: BaseException) -> bool:
    text = str(error).lower()
    accelerator = type(error).__name__ == "AcceleratorError"
    signs = ("cuda error", "command buffer execution failed")
    return accelerator or (isinstance(error, RuntimeError) and any(sign in text for sign in signs))
