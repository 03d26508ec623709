# SPDX-License-Identifier: Apache-2.0
"""Questions to the kernel, which have three answers: yes, no, and an exception for "not known".

`os.path.exists` and `os.access` say no whenever a call fails, also for want of a descriptor or of
memory, and what is decided by that answer would be decided for good.
"""

from __future__ import annotations

import os
import stat
from ctypes import c_char_p, c_int

from nsbox.linux.binding import bind, encode, failure, is_unknown

_access = bind("access", c_char_p, c_int)


def exists(path: str) -> bool:
    """Whether there is something at the end of `path`; OSError when that is not known."""
    return _mode(path) != 0


def is_directory(path: str) -> bool:
    """Whether `path` leads to a directory; OSError when that is not known."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: str) -> int:
    try:
        return os.stat(path).st_mode
    except OSError as error:
        if is_unknown(error):
            raise
        return 0


def may(path: str, mode: int) -> bool:
    """access(2): whether this process may do `mode` (os.W_OK ...); OSError when not known."""
    if _access(encode(path), mode) == 0:
        return True
    error = failure("access", path)
    if is_unknown(error):
        raise error
    return False
