# SPDX-License-Identifier: Apache-2.0
"""How a process is scheduled, as far as the standard library does not tell it."""

from __future__ import annotations

from ctypes import c_char_p, c_long, create_string_buffer

from nsbox.linux import constants as c
from nsbox.linux.binding import SYSCALL, bind_syscall, failure

_ioprio_get = bind_syscall(c_long, c_long)
_sched_getattr = bind_syscall(c_long, c_char_p, c_long, c_long)
_SYS_IOPRIO_GET = SYSCALL["ioprio_get"]
_SYS_SCHED_GETATTR = SYSCALL["sched_getattr"]
_ATTRIBUTES_SIZE = 56  # linux/sched/types.h, SCHED_ATTR_SIZE_VER1
_attributes = create_string_buffer(_ATTRIBUTES_SIZE)  # made once: a type and an array of it


def ioprio_get(pid: int) -> int:
    """ioprio_get(2) of a process, 0 for the calling one; -1 where it is refused, or gone."""
    return _ioprio_get(_SYS_IOPRIO_GET, c.IOPRIO_WHO_PROCESS, pid)


def sched_getattr(pid: int) -> bytes:
    """sched_getattr(2) of a process, 0 for the calling one: policy, nice value, clamps, flags."""
    if _sched_getattr(_SYS_SCHED_GETATTR, pid, _attributes, _ATTRIBUTES_SIZE, 0) < 0:
        raise failure("sched_getattr")
    return _attributes.raw
