# SPDX-License-Identifier: Apache-2.0
"""Read back from outside that an environment has locked itself in."""

from __future__ import annotations

from io import FileIO

# Lines of /proc/PID/status (proc(5)).
_UNPRIVILEGED = (
    *(f"\nCap{name}:\t{0:016x}\n".encode() for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")),
    b"\nNoNewPrivs:\t1\n",
)
_FILTERED = (*_UNPRIVILEGED, b"\nSeccomp:\t2\n")


def missing_lock(pid: int, *, filtered: bool) -> str:
    """Return the line that the status of `pid` should have and has not, or "".

    Raises:
        OSError: The process is gone, or hidden from the caller (proc(5), hidepid=).
    """
    with FileIO(f"/proc/{pid}/status") as file:
        status = file.read(1 << 14) or b""
    for line in _FILTERED if filtered else _UNPRIVILEGED:
        if line not in status:
            return line.decode().strip()
    return ""
