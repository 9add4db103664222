"""Opening files of a folder that somebody else filled: regular files only, and only in the folder.

A name taken from a file is a plain name or refused; a link may lead inside the folder or, as the
Hugging Face cache lays its snapshots out, to the `blobs` of the same repository. Reading is
positioned (`pread`) on a descriptor that stays open, so that a file cut short or replaced meanwhile
is an error or harmless, where a memory map would end the process.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from moescope.engine.config import bad
from moescope.errors import ExitCode, MoescopeError
from moescope.safety import LIMITS, single_line

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_FLAGS = (
    os.O_RDONLY
    | getattr(os, "O_NONBLOCK", 0)  # a pipe put in place after the check must not block
    | getattr(os, "O_NOCTTY", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_NOFOLLOW", 0)  # links were followed, and judged, before
)


def refused(message: str, hint: str = "") -> MoescopeError:
    """The error for something moescope will not do for safety's sake."""
    return MoescopeError(message, hint=hint, code=ExitCode.REFUSED)


def is_plain_name(name: str) -> bool:
    """Whether `name` can only mean a file directly in the folder, on every system."""
    return (
        0 < len(name) <= LIMITS.file_name
        and name.isascii()
        and name.isprintable()
        and name not in (".", "..")
        and not any(char in name for char in "/\\:")
    )


def resolve_folder(path: Path) -> Path:
    """The folder itself, links followed; a MoescopeError where there is none."""
    try:
        folder = Path(os.path.realpath(path, strict=True))
        mode = os.stat(folder).st_mode
    except (OSError, ValueError) as error:
        raise bad(f"{single_line(str(path), 300)}: {reason(error)}") from None
    if not stat.S_ISDIR(mode):
        raise bad(f"{single_line(str(path), 300)}: expected a folder, found {kind(mode)}")
    return folder


def names_in(folder: Path) -> list[str]:
    """The names of what is in a folder, sorted."""
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise bad(f"{single_line(str(folder), 300)}: {reason(error)}") from None


def kind(mode: int) -> str:
    """What a file mode says, in words."""
    return next((words for test, words in _KINDS if test(mode)), "a file")


def reason(error: OSError | ValueError) -> str:
    """Why the system would not, in its own words."""
    text = error.strerror if isinstance(error, OSError) else "not a valid path"
    return single_line(text or "cannot be read", 200)


def _target(folder: Path, name: str) -> Path:
    """Where `folder/name` leads, or an error where that is none of this folder's business."""
    if not is_plain_name(name):
        raise refused(f"{single_line(name, 80)}: expected a plain file name in the folder")
    target = Path(os.path.realpath(folder / name, strict=True))
    if target.is_relative_to(folder) or any(
        target.is_relative_to(repository / "blobs")
        for repository in folder.parents[1:4]
        if repository.name.startswith("models--") and repository / "snapshots" in folder.parents
    ):
        return target
    raise refused(
        f"{name}: expected a file in the folder, found a link to {single_line(str(target), 200)}",
        "copy the file into the folder",
    )


def open_member(folder: Path, name: str) -> tuple[int, os.stat_result]:
    """Open `name` in `folder` (as `resolve_folder` gives it) for reading; the caller closes it.

    Raises FileNotFoundError where there is no such file, MoescopeError for all other trouble.
    """
    try:
        target = _target(folder, name)
        found = os.stat(target)
        if not stat.S_ISREG(found.st_mode):
            raise bad(f"{name}: expected a regular file, found {kind(found.st_mode)}")
        descriptor = os.open(target, _FLAGS)
    except FileNotFoundError:
        if not os.path.islink(folder / name):
            raise
        raise bad(f"{name}: expected a file, found a link that leads nowhere") from None
    except (OSError, ValueError) as error:
        raise bad(f"{single_line(name, 80)}: {reason(error)}") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise bad(f"{name}: expected a regular file, found {kind(found.st_mode)}")
    return descriptor, found


def read_member(folder: Path, name: str, limit: int) -> bytes | None:
    """The bytes of a small file, None where there is none; refused beyond `limit` bytes."""
    try:
        descriptor, found = open_member(folder, name)
    except FileNotFoundError:
        return None
    try:
        if found.st_size <= limit:
            data = pread(descriptor, limit + 1, 0, name, short=True)
            if len(data) <= limit:
                return data
        raise bad(f"{name}: expected at most {limit} bytes, found {max(found.st_size, limit + 1)}")
    finally:
        os.close(descriptor)


def pread(descriptor: int, count: int, offset: int, name: str, *, short: bool = False) -> bytes:
    """Exactly `count` bytes at `offset` (`short`: as many as there are)."""
    parts: list[bytes] = []
    missing = count
    while missing > 0:
        try:
            part = os.pread(descriptor, min(missing, 1 << 24), offset + count - missing)
        except OSError as error:
            raise bad(f"{name}: {reason(error)}") from None
        if not part:
            break
        parts.append(part)
        missing -= len(part)
    if missing and not short:
        raise _cut(name, count - missing, count)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def pread_into(descriptor: int, buffer: memoryview, offset: int, name: str) -> None:
    """Fill a writable buffer of bytes from `offset` on, without a second copy where possible."""
    done, count = 0, len(buffer)
    while done < count:
        piece = buffer[done : done + (1 << 26)]
        try:
            if hasattr(os, "preadv"):
                got = os.preadv(descriptor, [piece], offset + done)
            else:
                data = os.pread(descriptor, len(piece), offset + done)
                got = len(data)
                piece[:got] = data
        except OSError as error:
            raise bad(f"{name}: {reason(error)}") from None
        if got == 0:
            raise _cut(name, done, count)
        done += got


def _cut(name: str, found: int, expected: int) -> MoescopeError:
    return bad(
        f"{name}: expected {expected} more bytes, found {found}; the file was cut short meanwhile",
        "download it again",
    )
