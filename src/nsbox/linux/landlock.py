# SPDX-License-Identifier: Apache-2.0
"""Landlock rulesets (landlock(7)), as far as they are used here; `program` enters one."""

from __future__ import annotations

import errno
import sys
from ctypes import c_char_p, c_ulong

from nsbox.linux.binding import SYSCALL, bind_syscall, failure

SCOPE_ABSTRACT_UNIX_SOCKET = 1 << 0  # linux/landlock.h, ABI 6 (Linux 6.12)
SCOPE_SIGNAL = 1 << 1

_CREATE_RULESET_VERSION = 1 << 0

_create_ruleset = bind_syscall(c_char_p, c_ulong, c_ulong)


def abi() -> int:
    """landlock_create_ruleset(2), LANDLOCK_CREATE_RULESET_VERSION; 0 where there is no Landlock."""
    version = _create_ruleset(SYSCALL["landlock_create_ruleset"], None, 0, _CREATE_RULESET_VERSION)
    if version >= 0:
        return version
    error = failure("landlock_create_ruleset")
    # Not built in, not switched on, or a filter around this process refuses it.
    if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES):
        return 0
    raise error


def create_ruleset(scoped: int) -> int:
    """landlock_create_ruleset(2): return the descriptor of a ruleset that handles `scoped` alone.

    Args:
        scoped: SCOPE_* flags.
    """
    # struct landlock_ruleset_attr: handled_access_fs, handled_access_net, scoped.
    attr = bytes(16) + scoped.to_bytes(8, sys.byteorder)
    fd = _create_ruleset(SYSCALL["landlock_create_ruleset"], attr, len(attr), 0)
    if fd < 0:
        raise failure("landlock_create_ruleset")
    return fd
