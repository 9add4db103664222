"""The one error type a user sees, and the exit codes every command shares.

`MoescopeError` carries a sentence, a next step and an exit code; the command line prints it as two
lines and never as a traceback. Anything else that escapes is a bug of ours (`ExitCode.BUG`).
"""

from __future__ import annotations

from enum import IntEnum


class ExitCode(IntEnum):
    """Process exit codes; 128 + n means ended by signal n."""

    DONE = 0
    FOUND = 1
    USAGE = 2
    CHECKPOINT = 3
    TRACE = 4
    RESOURCES = 5
    OUTPUT = 6
    REFUSED = 7
    BUG = 70


class MoescopeError(Exception):
    """Something the user can act on.

    `message` reads `<file>: <field>: expected <X>, found <Y>` where a file is at fault; `hint` is
    the text after `Try:` (empty when there is nothing to try); `code` is the exit code.
    """

    def __init__(self, message: str, *, hint: str = "", code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        return (_rebuild, (self.message, self.hint, int(self.code)))


def _rebuild(message: str, hint: str, code: int) -> MoescopeError:
    return MoescopeError(message, hint=hint, code=ExitCode(code))
