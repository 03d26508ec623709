# SPDX-License-Identifier: Apache-2.0
"""How PID 1 starts a command: streams or terminal, search of the program, working directory."""

from __future__ import annotations

import errno
import os
import stat
import struct
from fcntl import ioctl

from nsbox.guest.files import Failure
from nsbox.linux import constants as c

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# What the interpreter ignores stays ignored over an exec; handlers do not (signal(7)).
_IGNORED_SIGNALS = (c.SIGPIPE, c.SIGXFSZ)


def stdio_actions(stdio: list[bool], fds: list[int]) -> list[Any]:
    """Return posix_spawn file actions: the next descriptor, or /dev/null, for each of 0, 1, 2."""
    remaining = iter(fds)
    actions: list[Any] = []
    for number, given in enumerate(stdio):
        if given:
            actions.append((os.POSIX_SPAWN_DUP2, next(remaining), number))
        elif number < 3:
            mode = os.O_RDONLY if number == 0 else os.O_WRONLY
            actions.append((os.POSIX_SPAWN_OPEN, number, "/dev/null", mode, 0))
    return actions


def given_actions(stdio: list[bool], fds: list[int]) -> list[Any]:
    """Return posix_spawn file actions for the given ones of 0, 1, 2 alone."""
    numbers = [number for number, given in enumerate(stdio) if given]
    return [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in zip(numbers, fds, strict=True)]


def open_terminal(size: tuple[int, int]) -> tuple[list[Any], list[int]]:
    """Return posix_spawn file actions for a new terminal, and its master and slave, to be closed.

    `size` is rows and columns. Raises `Failure`.
    """
    try:
        master, slave = os.openpty()
        name = os.ttyname(slave)
        # Before the command starts: it may ask at once (ioctl_tty(2), struct winsize).
        ioctl(slave, c.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    except OSError as error:
        raise Failure(error.errno or errno.EIO, "tty") from error
    # The first terminal that a session leader opens becomes its controlling one (tty(4)).
    actions: list[Any] = [
        (os.POSIX_SPAWN_OPEN, 0, name, os.O_RDWR, 0),
        (os.POSIX_SPAWN_DUP2, 0, 1),
        (os.POSIX_SPAWN_DUP2, 0, 2),
    ]
    return actions, [master, slave]


def spawn(
    cwd: bytes, argv: list[bytes], environment: dict[bytes, bytes], actions: list[Any]
) -> int:
    """Start a command in a session of its own and return its pid.

    Raises:
        Failure: "cwd", chdir(2) failed; "exec", no such program, or posix_spawn(3) failed.
    """
    program = _find_program(argv[0], environment.get(b"PATH", b""), cwd)
    try:
        os.chdir(cwd)
    except OSError as error:
        raise Failure(error.errno or errno.EIO, "cwd") from error
    try:
        return os.posix_spawn(
            program,
            argv,
            environment,
            file_actions=actions,
            setsid=True,
            setsigmask=(),
            setsigdef=_IGNORED_SIGNALS,
        )
    except OSError as error:
        raise Failure(error.errno or errno.EIO, "exec") from error
    finally:
        os.chdir("/")


def _find_program(name: bytes, path: bytes, cwd: bytes) -> bytes:
    """Search as execvp(3) does, but in the PATH and working directory of the command."""
    if b"/" in name:
        return name
    found_error = errno.ENOENT
    for directory in path.split(b":"):
        candidate = os.path.join(cwd, directory, name)
        try:
            mode = os.stat(candidate).st_mode
        except OSError:
            continue
        if stat.S_ISREG(mode) and os.access(candidate, os.X_OK):
            return candidate
        found_error = errno.EACCES
    raise Failure(found_error, "exec")
