# SPDX-License-Identifier: Apache-2.0
"""Start a process of nsbox's own: the host starts the launcher, the launcher its template."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import sys
from _io import FileIO
from functools import partial
from itertools import starmap

from nsbox.errors import SyscallError
from nsbox.linux.descriptors import as_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

FIRST_DESCRIPTOR = 3
"""Number under which the process finds the first of the descriptors given to it."""
BIND_NOW = "LD_BIND_NOW"
"""Variable that has the dynamic linker look up all functions at the start (ld.so(8))."""
FIRST_FREE = 16
"""From this number on copies are made of the descriptors given."""
_TOO_MANY = "this user has as many processes as it may (RLIMIT_NPROC), or the cgroup (pids.max)"


def start(role: str, words: Sequence[str], descriptors: Sequence[int], started: list[int]) -> int:
    """Start ``python -I -S main.py ROLE WORDS...`` and return its pid.

    `started` gets that as well, and as soon as there is such a process: an interrupt may come
    before it is returned.

    It gets the descriptors, in order, from `FIRST_DESCRIPTOR` on, /dev/null as 0 to 2, an empty
    environment (but for `BIND_NOW` in a template), a session of its own (Ctrl-C is not for it) and
    default signals.
    """
    # Every function of the C library that a clone calls first would be looked up in each clone.
    environment = {BIND_NOW: "1"} if role == "template" else {}
    program = os.path.join(os.path.dirname(__file__), "main.py")
    opened: list[FileIO] = []
    try:
        opened.append(FileIO("/dev/null", "r+"))
        # Copies above the numbers they go to, or one dup2 could overwrite another's source.
        for fd in descriptors:
            opened.append(as_file(fcntl.fcntl, fd, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE))
        null, *sources = [file.fileno() for file in opened]
        spawn = partial(
            os.posix_spawn,
            sys.executable,
            [sys.executable, "-I", "-S", program, role, *words],
            environment,
            file_actions=[
                *((os.POSIX_SPAWN_DUP2, null, number) for number in range(3)),
                *(
                    (os.POSIX_SPAWN_DUP2, source, number)
                    for number, source in enumerate(sources, FIRST_DESCRIPTOR)
                ),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )
        try:
            started += starmap(spawn, [()])  # within one call of the interpreter's own
        except OSError as error:
            note = _TOO_MANY if error.errno == errno.EAGAIN else ""
            raise SyscallError("posix_spawn", error.errno or 0, sys.executable, note) from error
        return started[-1]
    finally:
        for file in opened:
            file.close()
