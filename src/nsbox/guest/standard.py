# SPDX-License-Identifier: Apache-2.0
"""The standard streams of a worker: what others may have done to them, and new ones."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TextIO

_FIONREAD = 0x541B  # asm-generic/ioctls.h
_NULL = os.makedev(1, 3)  # Documentation/admin-guide/devices.txt


def open_stream(fd: int) -> TextIO:
    """Return the standard stream for a descriptor, which stays open when it is closed."""
    return open(fd, "w", 1, encoding="utf-8", errors="backslashreplace", closefd=False)


def renew_stdin() -> None:
    """Open /dev/null anew as stdin: flags and owner are of the open file (fcntl(2))."""
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def is_null(fd: int) -> bool:
    """Whether a descriptor is of /dev/null."""
    try:
        return os.fstat(fd).st_rdev == _NULL
    except OSError:
        return False


def identity(fd: int) -> tuple[int, int] | None:
    """Return device and inode of what a descriptor is of; None where it is closed."""
    try:
        status = os.fstat(fd)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def may_be_unread(fd: int, pipe: tuple[int, int] | None) -> bool:
    """Whether something may be in a pipe; also when the descriptor is of another file now."""
    from fcntl import ioctl  # a clone of the template has it; what is executed never gets here

    count = bytearray(4)
    try:
        ioctl(fd, _FIONREAD, count)
        return any(count) or identity(fd) != pipe
    except OSError:
        return True
