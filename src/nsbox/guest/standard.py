# SPDX-License-Identifier: Apache-2.0
"""The standard streams of a worker: new ones, and checks of inherited descriptors."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

_FIONREAD = 0x541B  # asm-generic/ioctls.h
_NULL = os.makedev(1, 3)  # Documentation/admin-guide/devices.txt


def open_stream(fd: int) -> TextIO:
    """Return a line-buffered text stream on `fd`; closing it leaves the descriptor open."""
    return open(fd, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)


def renew_stdin() -> None:
    """Open /dev/null anew as stdin: flags and owner are of the open file (fcntl(2))."""
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def is_null(fd: int) -> bool:
    """Whether a descriptor refers to /dev/null."""
    try:
        return os.fstat(fd).st_rdev == _NULL
    except OSError:
        return False


def identity(fd: int) -> tuple[int, int] | None:
    """Return device and inode of a descriptor's file; None where it is closed."""
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def places_of(files: tuple[tuple[int, int] | None, ...], known: int) -> list[tuple[int, int, bool]]:
    """Return all open descriptors of `files`: number, index in `files`, whether inheritable.

    Args:
        files: As `identity` returns them.
        known: How many descriptors are expected open. Where the count is right and 0 to 2 are among
            them, /proc/self/fd is not listed.
    """
    found = [(fd, identity(fd)) for fd in (0, 1, 2)]
    try:
        # Since Linux 6.2 its size is their count, which is faster to learn than the list.
        if os.stat("/proc/self/fd").st_size != known or None in [of for _, of in found]:
            found = [(int(name), identity(int(name))) for name in os.listdir("/proc/self/fd")]
    except OSError:
        pass  # there is no /proc
    return [(fd, files.index(of), os.get_inheritable(fd)) for fd, of in found if of in files]


def may_be_unread(fd: int, pipe: tuple[int, int] | None) -> bool:
    """Whether a pipe holds unread bytes; True as well when `fd` is another file than `pipe`."""
    from fcntl import ioctl  # a clone of the template has it; what is executed never gets here

    count = bytearray(4)
    try:
        ioctl(fd, _FIONREAD, count)
        return any(count) or identity(fd) != pipe
    except OSError:
        return True
