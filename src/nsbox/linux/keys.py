# SPDX-License-Identifier: Apache-2.0
"""Keyrings: leave none that an earlier process of the calling user namespace has filled."""

from __future__ import annotations

import errno
from ctypes import c_char_p, c_long

from nsbox.linux import calls
from nsbox.linux import constants as c
from nsbox.linux.binding import SYSCALL, bind_syscall, failure

_keyctl = bind_syscall(c_long, c_long, c_long)
_add_key = bind_syscall(c_char_p, c_char_p, c_char_p, c_long, c_long)
_REFUSED = (errno.EPERM, errno.ENOSYS)
_is_refused: list[bool] = []  # has an entry once the filter has refused it, for ever


def forget_all() -> None:
    """Take a new session keyring, and empty those of the user (keyrings(7)).

    A filter that refuses these calls has refused them to everybody inside.

    Raises:
        SyscallError: A keyring cannot be emptied, or keys could be added that nobody can remove.
    """
    if _is_refused:
        return
    try:
        calls.keyctl_join_session_keyring()
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        _add_key(SYSCALL["add_key"], None, None, None, 0, 0)
        refused = failure("add_key")
        if refused.errno not in _REFUSED:
            raise
        _is_refused.append(True)
        return
    for keyring in (c.KEY_SPEC_USER_KEYRING, c.KEY_SPEC_USER_SESSION_KEYRING):
        _control(c.KEYCTL_CLEAR, keyring)
    try:
        persistent = _control(c.KEYCTL_GET_PERSISTENT, -1, c.KEY_SPEC_SESSION_KEYRING)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    else:
        _control(c.KEYCTL_CLEAR, persistent)


def _control(operation: int, first: int, second: int = 0) -> int:
    answer = _keyctl(SYSCALL["keyctl"], operation, first, second)
    if answer < 0:
        raise failure("keyctl")
    return answer
