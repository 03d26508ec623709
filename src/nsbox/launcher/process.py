# SPDX-License-Identifier: Apache-2.0
"""Start a process of nsbox's own: the host starts the launcher, the launcher its template."""

from __future__ import annotations

import fcntl
import os
import signal
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

FIRST_DESCRIPTOR = 3
"""Number under which the process finds the first of the descriptors given to it."""
_FIRST_FREE = 16  # copies are made above this number


def start(role: str, words: Sequence[str], descriptors: Sequence[int]) -> int:
    """Start ``python -I -S main.py ROLE WORDS...`` and return its pid.

    It gets the descriptors, in order, from `FIRST_DESCRIPTOR` on, /dev/null as 0 to 2, an empty
    environment, a session of its own (Ctrl-C is not for it) and default signals.
    """
    program = os.path.join(os.path.dirname(__file__), "main.py")
    # Copies above the numbers they go to, or one dup2 could overwrite another's source.
    sources = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE) for fd in descriptors]
    sources.append(os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC))
    places = [*enumerate(sources[:-1], FIRST_DESCRIPTOR)]
    try:
        return os.posix_spawn(
            sys.executable,
            [sys.executable, "-I", "-S", program, role, *words],
            {},
            file_actions=[
                *((os.POSIX_SPAWN_DUP2, sources[-1], number) for number in range(3)),
                *((os.POSIX_SPAWN_DUP2, source, number) for number, source in places),
            ],
            setsid=True,
            setsigmask=(),
            setsigdef=signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP},
        )
    finally:
        for fd in sources:
            os.close(fd)
