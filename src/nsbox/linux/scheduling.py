# SPDX-License-Identifier: Apache-2.0
"""How a process is scheduled: what its children inherit and others of its user id can change."""

from __future__ import annotations

from ctypes import addressof, c_long, c_void_p, create_string_buffer

from nsbox.linux import constants as c
from nsbox.linux.binding import SYSCALL, bind_syscall

_ioprio_get = bind_syscall(c_long, c_long)
_sched_getattr = bind_syscall(c_long, c_void_p, c_long, c_long)
_sched_getaffinity = bind_syscall(c_long, c_long, c_void_p)
_SYS_IOPRIO_GET = SYSCALL["ioprio_get"]
_SYS_SCHED_GETATTR = SYSCALL["sched_getattr"]
_SYS_SCHED_GETAFFINITY = SYSCALL["sched_getaffinity"]
_ATTRIBUTES_SIZE = 56  # linux/sched/types.h, SCHED_ATTR_SIZE_VER1
_MASK_SIZE = 1024  # bytes; 8,192 CPUs, which is the most that a kernel is built for


class Standing:
    """Policy, nice value, clamps, flags, CPUs and I/O priority of a process.

    Made once, before clones, which write into one page of it. What the filter refuses to tell, as
    it does to set, is zeros.
    """

    __slots__ = ("_at", "_buffer", "_ioprio", "_mask_at")

    def __init__(self) -> None:
        self._buffer = create_string_buffer(_ATTRIBUTES_SIZE + _MASK_SIZE)
        self._at = addressof(self._buffer)
        self._mask_at = self._at + _ATTRIBUTES_SIZE
        self._ioprio = 0

    def take(self, pid: int) -> None:
        """Read them of a process; 0 is the calling one."""
        _sched_getattr(_SYS_SCHED_GETATTR, pid, self._at, _ATTRIBUTES_SIZE, 0)
        _sched_getaffinity(_SYS_SCHED_GETAFFINITY, pid, _MASK_SIZE, self._mask_at)
        self._ioprio = _ioprio_get(_SYS_IOPRIO_GET, c.IOPRIO_WHO_PROCESS, pid)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Standing):
            return NotImplemented
        return (self._ioprio, self._buffer.raw) == (other._ioprio, other._buffer.raw)

    __hash__ = None  # type: ignore[assignment]
