# SPDX-License-Identifier: Apache-2.0
"""Whether the host is short of memory: told by the kernel at once, and looked at now and then.

The kernel tells (PSI, Linux 5.2) when tasks have waited for memory, of the whole host and of this
process's own cgroup, which may have a limit of its own. It says so on the descriptor of a trigger
(Documentation/accounting/psi.rst). How much memory is available can be read everywhere.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Final

STALL: Final = 200_000
"""Microseconds of `WINDOW` in which some task waited for memory; systemd's default, too."""
WINDOW: Final = 2_000_000
"""Microseconds. Without CAP_SYS_RESOURCE a window has to be a multiple of two seconds."""
LOOK_SECONDS: Final = 5.0
"""How often the available memory is looked at, while there are environments."""


class Pressure:
    """The triggers of a pool, and what it takes for too little."""

    def __init__(self, least: float, *, stall: int = STALL) -> None:
        """Take the share of the host's memory that is to be available."""
        self._least = least
        self._next_look = 0.0
        self.triggers = [fd for path in _sources() if (fd := _arm(path, stall)) >= 0]

    def look(self) -> tuple[bool, float]:
        """Look at the available memory, if it is time to.

        Returns whether there is too little, and the seconds until it is time again.
        """
        now = time.monotonic()
        if now < self._next_look:
            return False, self._next_look - now
        self._next_look = now + LOOK_SECONDS
        return self.is_low(), LOOK_SECONDS

    def is_low(self) -> bool:
        """Whether less memory is available than there should be."""
        found: dict[str, int] = {}
        with open("/proc/meminfo") as file:
            for line in file:
                name, _, rest = line.partition(":")
                if name in ("MemTotal", "MemAvailable"):
                    found[name] = int(rest.split()[0])
                if len(found) == 2:
                    break
        return found.get("MemAvailable", 1) < self._least * found.get("MemTotal", 0)

    def close(self) -> None:
        """Close the triggers, when nobody waits on them any more."""
        for fd in self.triggers:
            os.close(fd)
        self.triggers = []


def _sources() -> list[str]:
    """Return the files that tell of pressure: the host's, and that of this process's v2 cgroup."""
    sources = ["/proc/pressure/memory"]
    with open("/proc/self/cgroup") as file:
        for line in file:
            if line.startswith("0::/") and line[4:].strip():
                sources.append(f"/sys/fs/cgroup/{line[4:].strip()}/memory.pressure")
    return sources


def _arm(path: str, stall: int) -> int:
    """Return the descriptor of a trigger, or -1: no PSI in this kernel, or not for this user."""
    fd = -1
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(fd, f"some {stall} {WINDOW}\0".encode())
        except OSError:
            os.close(fd)
            fd = -1
    return fd
