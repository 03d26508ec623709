# SPDX-License-Identifier: Apache-2.0
"""System V ipc: remove every object of the calling process's ipc namespace (sysvipc(7))."""

from __future__ import annotations

import errno
from ctypes import c_int, c_void_p, create_string_buffer

from nsbox.linux.binding import bind, failure

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_shmctl = bind("shmctl", c_int, c_int, c_void_p)
_msgctl = bind("msgctl", c_int, c_int, c_void_p)
_semctl = bind("semctl", c_int, c_int, c_int, c_void_p)

_IPC_RMID = 0
# linux/shm.h, linux/msg.h, linux/sem.h: *_STAT takes an index and gives the id, *_INFO gives the
# highest index in use.
_SHM_STAT, _SHM_INFO = 13, 14
_MSG_STAT, _MSG_INFO = 11, 12
_SEM_STAT, _SEM_INFO = 18, 19
_ENOUGH = 512  # bytes; the largest of the structs they fill has 112
# Where *_INFO tells how many there are: shm_info.used_ids, msginfo.msgpool, seminfo.semusz.
_SHM_COUNT, _MSG_COUNT, _SEM_COUNT = 0, 0, 28
_INT = 4  # bytes
_buffer = create_string_buffer(_ENOUGH)


def remove_all() -> None:
    """Remove all shared memory segments, message queues and semaphore sets.

    A filter that refuses these calls has refused them to everybody inside, so that there is none.
    """
    shm = (_SHM_INFO, _SHM_COUNT, _SHM_STAT)
    msg = (_MSG_INFO, _MSG_COUNT, _MSG_STAT)
    sem = (_SEM_INFO, _SEM_COUNT, _SEM_STAT)
    _remove("shmctl", lambda number, what: _shmctl(number, what, _buffer), shm)
    _remove("msgctl", lambda number, what: _msgctl(number, what, _buffer), msg)
    _remove("semctl", lambda number, what: _semctl(number, 0, what, _buffer), sem)


def _remove(name: str, control: Callable[[int, int], int], what: tuple[int, int, int]) -> None:
    info, place_of_count, stat = what
    highest = control(0, info)
    if highest < 0:
        error = failure(name)
        if error.errno in (errno.EPERM, errno.ENOSYS):
            return
        raise error
    if not any(_buffer.raw[place_of_count : place_of_count + _INT]):
        return
    for index in range(highest + 1):
        identifier = control(index, stat)
        if identifier >= 0 and control(identifier, _IPC_RMID) < 0:
            raise failure(name)
