# SPDX-License-Identifier: Apache-2.0
"""What `calls` is made of: system call numbers, and foreign functions bound once with their types.

One C symbol with two signatures (`syscall`, `prctl`) gets two function objects, so nothing is
rewritten before a call. A path that holds a NUL byte raises `ValueError` before the call, as in
`os`: C would cut it short there.
"""

from __future__ import annotations

import errno
import os
import sys
from ctypes import CDLL, PyDLL, c_int, c_long, get_errno

from nsbox.errors import SyscallError, UnsupportedHostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from ctypes import _Pointer, _SimpleCData
    from typing import Any, TypeAlias

    _CType: TypeAlias = type[_SimpleCData[Any]] | type[_Pointer[Any]]
    from typing import Any

# asm/unistd.h. Since Linux 5.1 a new call has one number on every architecture. The newer calls
# have a wrapper in glibc 2.34 and 2.36, but not in 2.35, which Ubuntu 22.04 has: go by number.
_COMMON_NUMBERS = {
    "open_tree": 428,
    "move_mount": 429,
    "fsopen": 430,
    "fsconfig": 431,
    "fsmount": 432,
    "clone3": 435,
    "close_range": 436,
    "openat2": 437,
    "mount_setattr": 442,
    "landlock_create_ruleset": 444,
    "landlock_restrict_self": 446,
}
_NUMBERS = {
    "x86_64": {
        "getcwd": 79,
        "pivot_root": 155,
        "sched_getaffinity": 204,
        "add_key": 248,
        "keyctl": 250,
        "ioprio_get": 252,
        "sched_getattr": 315,
        "seccomp": 317,
    },
    "aarch64": {
        "getcwd": 17,
        "ioprio_get": 31,
        "pivot_root": 41,
        "sched_getaffinity": 123,
        "add_key": 217,
        "keyctl": 219,
        "sched_getattr": 275,
        "seccomp": 277,
    },
}


def syscall_numbers(machine: str, is_64_bit: bool = True) -> dict[str, int]:
    """Return the system call numbers of an architecture, by name.

    Args:
        machine: What `os.uname().machine` says.
        is_64_bit: Whether this process is; a 32-bit or x32 one has other numbers.

    Raises:
        UnsupportedHostError: The architecture is not known. A wrong number would be another call.
    """
    if is_64_bit:  # and has the personality of a 32-bit one (setarch(8))
        machine = {"i686": "x86_64", "armv8l": "aarch64"}.get(machine, machine)
    numbers = _NUMBERS.get(machine)
    if numbers is None or not is_64_bit:
        raise UnsupportedHostError(
            "architecture",
            f"no system call numbers for {machine}{'' if is_64_bit else ' in a 32-bit process'}",
            "Use a 64-bit Python on " + " or ".join(_NUMBERS) + ".",
        )
    return _COMMON_NUMBERS | numbers


_UNKNOWN = frozenset(
    {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.EINTR, errno.EIO, errno.ENOBUFS}
)
SYSCALL = syscall_numbers(os.uname().machine, sys.maxsize > 2**32)
_libc = CDLL(None, use_errno=True)
# PyDLL keeps the GIL. CDLL would take it again in the child of a clone3, before CPython has
# repaired it there.
_libc_with_gil = PyDLL(None, use_errno=True)


def bind(name: str, *argtypes: _CType, keep_gil: bool = False) -> Callable[..., int]:
    """Return a function of the C library that gives -1 and sets errno on failure."""
    library = _libc_with_gil if keep_gil else _libc
    function = library[name]  # [] makes a new object each time, so the types are its own
    function.argtypes = argtypes
    function.restype = c_int
    return function


def bind_syscall(*argtypes: _CType, keep_gil: bool = False) -> Callable[..., int]:
    """Return syscall(2) for one signature; call it with the number first.

    Integers are passed as long: syscall(2) is variadic, and a whole register is then defined.
    """
    function = (_libc_with_gil if keep_gil else _libc)["syscall"]
    function.argtypes = (c_long, *argtypes)
    function.restype = c_long
    return function


def bind_python(name: str) -> Callable[[], None]:
    """Return a function of CPython's C API that takes and gives nothing."""
    function = _libc_with_gil[name]
    function.argtypes = ()
    function.restype = None
    return function


def encode(path: str | bytes) -> bytes:
    """Return the bytes of a path. Raises `ValueError` if there is a NUL among them."""
    raw = os.fsencode(path)
    if b"\0" in raw:
        raise ValueError(f"embedded null byte in {path!r}")
    return raw


def encode_optional(path: str | bytes | None) -> bytes | None:
    """Return the bytes of a path, None for None (a NULL pointer)."""
    return None if path is None else encode(path)


def failure(syscall: str, path: str | bytes | None = None) -> SyscallError:
    """Return the exception for the call that just failed on this thread."""
    return SyscallError(syscall, get_errno(), None if path is None else os.fsdecode(path))


def named(call: Callable[..., int], *arguments: object) -> int:
    """Return what a call of `os` does; its exception gets the name of the call."""
    try:
        return call(*arguments)
    except OSError as error:
        raise SyscallError(call.__name__, error.errno or 0) from error


def is_unknown(error: OSError) -> bool:
    """Whether a call that failed so says nothing of what was asked: it may succeed later."""
    return error.errno in _UNKNOWN
