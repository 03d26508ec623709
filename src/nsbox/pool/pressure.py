# SPDX-License-Identifier: Apache-2.0
"""Whether memory is short: told by the kernel at once, and looked at now and then.

The kernel tells (PSI, Linux 5.2) when tasks have waited for memory, on the host and in this
process's own v2 cgroup: on the descriptor of a trigger (Documentation/accounting/psi.rst). But
tasks wait at the limits of their own cgroups, too, those of environments among them, which says
nothing about others. So an alarm is believed when little memory is available, too; and that can be
read everywhere.
"""

from __future__ import annotations

import contextlib
import io
import os
from typing import Final

STALL: Final = 200_000
"""Microseconds of `WINDOW` in which some task waited for memory; systemd's default, too."""
WINDOW: Final = 2_000_000
"""Microseconds. Without CAP_SYS_RESOURCE a window has to be a multiple of two seconds."""
ALARM: Final = 2.0
"""After an alarm so many times as much has to be available."""
LOOK_SECONDS: Final = 5.0
"""How often the available memory is looked at, while there are environments."""
_UNIFIED: Final = "/sys/fs/cgroup"


class Pressure:
    """The triggers of a pool, and what it takes for too little."""

    def __init__(self, least: float, *, stall: int = STALL) -> None:
        """Take the share of the memory that is to be available."""
        self._least = least
        self._directories = _own_directories()
        files = ["/proc/pressure/memory"]
        files += [f"{directory}/memory.pressure" for directory in self._directories[:1]]
        # Files and not numbers: one that is dropped is closed.
        self._files = [file for path in files if (file := _arm(path, stall)) is not None]
        self.triggers = [file.fileno() for file in self._files]

    def is_low(self) -> bool:
        """Whether too little memory is available."""
        return self.available() < self._least

    def is_alarming(self) -> bool:
        """Whether an alarm of the kernel's is to be believed."""
        return self.available() < self._least * ALARM

    def available(self) -> float:
        """Return the share of the memory that is available: the host's, or less in a cgroup."""
        host = _read_numbers("/proc/meminfo")
        shares = [1.0]
        if host.get("MemTotal:"):
            shares.append(host.get("MemAvailable:", 0) / host["MemTotal:"])
        for directory in self._directories:
            limit = _read_number(f"{directory}/memory.max")
            if limit:
                used = _read_number(f"{directory}/memory.current")
                # As the kernel counts for MemAvailable: what it can drop is as good as free.
                used -= _read_numbers(f"{directory}/memory.stat").get("inactive_file", 0)
                shares.append(1.0 - used / limit)
        return min(shares)

    def close(self) -> None:
        """Close the triggers, when nobody waits on them any more."""
        for file in self._files:
            file.close()
        self.triggers = []


def _own_directories() -> list[str]:
    """Return this process's v2 cgroup and those above, as far as they have memory files."""
    path = ""
    with contextlib.suppress(OSError), open("/proc/self/cgroup") as file:
        for line in file:
            if line.startswith("0::/"):
                path = line[4:].strip()
    directories = []
    while True:
        directory = f"{_UNIFIED}/{path}".rstrip("/")
        if os.path.exists(f"{directory}/memory.max"):
            directories.append(directory)
        if not path:
            return directories
        path = path.rpartition("/")[0]


def _read_number(path: str) -> int:
    """Return the number in a file, 0 for none: "max", or no such file."""
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        return int(file.read())
    return 0


def _read_numbers(path: str) -> dict[str, int]:
    """Return the numbers of a file of names and numbers."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError), open(path) as file:
        for line in file:
            name, value, *_ = line.split()
            found[name] = int(value)
    return found


def _arm(path: str, stall: int) -> io.FileIO | None:
    """Return a trigger, or None: no PSI in this kernel, or not for this user."""
    with contextlib.suppress(OSError):
        file = io.FileIO(path, "r+")
        try:
            file.write(f"some {stall} {WINDOW}\0".encode())
        except OSError:
            file.close()
            raise
        return file
    return None
