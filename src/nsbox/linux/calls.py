# SPDX-License-Identifier: Apache-2.0
"""System calls, one function each: the names and the argument order of the manual pages.

Text in, None or a file descriptor out, `nsbox.errors.SyscallError` on failure. Every descriptor
made here is close-on-exec. No policy, no log, no second attempt. What the standard library of
Python 3.11 has (`os.pidfd_open`, `os.setresuid`, `os.waitid` ...) is not repeated here.
"""

from __future__ import annotations

import errno
import os

# The C half of `signal`, whose Python half costs 10 ms (enum).
from _signal import SIG_BLOCK, pthread_sigmask
from ctypes import (
    POINTER,
    Structure,
    addressof,
    byref,
    c_char_p,
    c_int,
    c_long,
    c_uint32,
    c_uint64,
    c_ulong,
    c_ushort,
    c_void_p,
    create_string_buffer,
    get_errno,
    sizeof,
)
from itertools import starmap
from struct import Struct

from nsbox.errors import SyscallError
from nsbox.linux import constants as c
from nsbox.linux.binding import (
    SYSCALL,
    bind,
    bind_python,
    bind_syscall,
    encode,
    encode_optional,
    failure,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class _CloneArgs(Structure):
    """struct clone_args, linux/sched.h, CLONE_ARGS_SIZE_VER2 (5.7)."""

    _fields_ = [
        ("flags", c_uint64),
        ("pidfd", c_uint64),
        ("child_tid", c_uint64),
        ("parent_tid", c_uint64),
        ("exit_signal", c_uint64),
        ("stack", c_uint64),
        ("stack_size", c_uint64),
        ("tls", c_uint64),
        ("set_tid", c_uint64),
        ("set_tid_size", c_uint64),
        ("cgroup", c_uint64),
    ]


class _MountAttr(Structure):
    """struct mount_attr, linux/mount.h."""

    _fields_ = [
        ("attr_set", c_uint64),
        ("attr_clr", c_uint64),
        ("propagation", c_uint64),
        ("userns_fd", c_uint64),
    ]


class _OpenHow(Structure):
    """struct open_how, linux/openat2.h."""

    _fields_ = [("flags", c_uint64), ("mode", c_uint64), ("resolve", c_uint64)]


class _SockFprog(Structure):
    """struct sock_fprog, linux/filter.h; the filter as raw bytes."""

    _fields_ = [("len", c_ushort), ("filter", c_char_p)]


class _CapHeader(Structure):
    """struct __user_cap_header_struct, linux/capability.h."""

    _fields_ = [("version", c_uint32), ("pid", c_int)]


class _CapData(Structure):
    """struct __user_cap_data_struct, linux/capability.h: 32 of the capabilities."""

    _fields_ = [
        ("effective", c_uint32),
        ("permitted", c_uint32),
        ("inheritable", c_uint32),
    ]


_UnsignedLongs = (c_ulong, c_ulong, c_ulong, c_ulong)
_unshare = bind("unshare", c_int)
_setns = bind("setns", c_int, c_int)
_mount = bind("mount", c_char_p, c_char_p, c_char_p, c_ulong, c_char_p)
_mount_from = bind("mount", c_void_p, c_char_p, c_char_p, c_ulong, c_char_p)
_umount2 = bind("umount2", c_char_p, c_int)
_prctl = bind("prctl", c_int, *_UnsignedLongs)
_prctl_pointer = bind("prctl", c_int, c_void_p, c_ulong, c_ulong, c_ulong)
_sethostname = bind("sethostname", c_char_p, c_ulong)
# Not POINTER(...): its checks would touch thirty more pages of a clone.
_capset = bind("capset", c_void_p, c_void_p)
_capget = bind("capget", POINTER(_CapHeader), POINTER(_CapData))

_signalfd = bind("signalfd", c_int, c_char_p, c_int)
_kill = bind("kill", c_int, c_int)

_pivot_root = bind_syscall(c_char_p, c_char_p)
_open_tree = bind_syscall(c_long, c_char_p, c_ulong)
_move_mount = bind_syscall(c_long, c_char_p, c_long, c_char_p, c_ulong)
_mount_setattr = bind_syscall(c_long, c_char_p, c_ulong, POINTER(_MountAttr), c_ulong)
_fsopen = bind_syscall(c_char_p, c_ulong)
_fsconfig = bind_syscall(c_long, c_ulong, c_char_p, c_char_p, c_long)
_fsmount = bind_syscall(c_long, c_ulong, c_ulong)
_openat2 = bind_syscall(c_long, c_char_p, POINTER(_OpenHow), c_ulong)
_close_range = bind_syscall(c_ulong, c_ulong, c_ulong)
_seccomp = bind_syscall(c_ulong, c_ulong, c_void_p)
_landlock_restrict_self = bind_syscall(c_ulong, c_ulong)
_keyctl = bind_syscall(c_long, c_char_p)
_getcwd = bind_syscall(c_void_p, c_ulong)
_clone3 = bind_syscall(POINTER(_CloneArgs), c_ulong, keep_gil=True)

FOREIGN = {
    "mount": _mount,
    "mount_from": _mount_from,
    "umount2": _umount2,
    "unshare": _unshare,
    "prctl": _prctl,
    "prctl_pointer": _prctl_pointer,
    "sethostname": _sethostname,
    "capset": _capset,
    "pivot_root": _pivot_root,
    "close_range": _close_range,
    "getcwd": _getcwd,
    "keyctl": _keyctl,
    "seccomp": _seccomp,
    "landlock_restrict_self": _landlock_restrict_self,
}
"""Bound functions for `program`, which prepares their arguments itself."""

_SYS_CLONE3 = SYSCALL["clone3"]
_SYS_OPEN_TREE = SYSCALL["open_tree"]
_SYS_MOVE_MOUNT = SYSCALL["move_mount"]
_SYS_MOUNT_SETATTR = SYSCALL["mount_setattr"]
_SYS_FSOPEN = SYSCALL["fsopen"]
_SYS_FSCONFIG = SYSCALL["fsconfig"]
_SYS_FSMOUNT = SYSCALL["fsmount"]
_SYS_OPENAT2 = SYSCALL["openat2"]
_SYS_CLOSE_RANGE = SYSCALL["close_range"]
_SYS_PIVOT_ROOT = SYSCALL["pivot_root"]
_SYS_KEYCTL = SYSCALL["keyctl"]
_SYS_SECCOMP = SYSCALL["seccomp"]


# CPython's own work around a fork: import lock, GIL, thread list, os.register_at_fork functions.
_before_fork = bind_python("PyOS_BeforeFork")
_after_fork_parent = bind_python("PyOS_AfterFork_Parent")
_after_fork_child = bind_python("PyOS_AfterFork_Child")

_CLONE_ARGS_SIZE = sizeof(_CloneArgs)
_MOUNT_ATTR_SIZE = sizeof(_MountAttr)
_OPEN_HOW_SIZE = sizeof(_OpenHow)
_CapSets = _CapData * c.LINUX_CAPABILITY_U32S_3
_root_only = create_string_buffer(len("/\0"))
_no_capabilities = (_CapHeader(c.LINUX_CAPABILITY_VERSION_3, 0), _CapSets())
# As addresses: what a foreign function does to take an array touches eight more pages of a clone.
ROOT_ONLY = (addressof(_root_only), sizeof(_root_only))
"""Arguments of getcwd(2): a buffer that has room for no other path."""
NO_CAPABILITIES = tuple(map(addressof, _no_capabilities))
"""Arguments of capset(2): three empty sets, for the calling thread."""


# Processes and namespaces


class Clone:
    """A clone3(2) prepared once and made any number of times, by the thread that prepared it."""

    def __init__(self, flags: int, exit_signal: int = c.SIGCHLD) -> None:
        """See `clone3`."""
        if flags & (c.CLONE_VM | c.CLONE_VFORK):
            raise ValueError("clone3: the child needs its own memory")
        if flags & c.CLONE_PARENT:
            exit_signal = 0
        self._pidfd = c_int(-1)
        self._flags = flags | c.CLONE_PIDFD
        self._arguments = _CloneArgs(pidfd=addressof(self._pidfd), exit_signal=exit_signal)
        # glibc keeps the thread id in its own memory and only its own fork renews it: have the
        # kernel write the child's there, as glibc does. The place belongs to the calling thread.
        tid_address = c_void_p()
        if _prctl_pointer(c.PR_GET_TID_ADDRESS, byref(tid_address), 0, 0, 0) == 0:
            if tid_address.value:
                self._flags |= c.CLONE_CHILD_SETTID | c.CLONE_CHILD_CLEARTID
                self._arguments.child_tid = tid_address.value
        elif get_errno() != errno.EINVAL:  # EINVAL: a kernel without CONFIG_CHECKPOINT_RESTORE
            raise failure("prctl")
        self._reference = byref(self._arguments)

    def make(self, cgroup: int = -1) -> tuple[int, int]:
        """Clone; see `clone3`."""
        self._arguments.flags = self._flags | (c.CLONE_INTO_CGROUP if cgroup >= 0 else 0)
        self._arguments.cgroup = max(cgroup, 0)
        # Up to here everything is ready made: what the child writes to first is a page fault each.
        _before_fork()
        pid = _clone3(_SYS_CLONE3, self._reference, _CLONE_ARGS_SIZE)
        if pid == 0:
            _after_fork_child()
            return 0, -1
        error = get_errno()  # before the at-fork functions, which may call C too
        _after_fork_parent()
        if pid < 0:
            raise SyscallError("clone3", error)
        return pid, self._pidfd.value


def clone3(flags: int, *, exit_signal: int = c.SIGCHLD, cgroup: int = -1) -> tuple[int, int]:
    """clone3(2): `os.fork` with new namespaces, and a pidfd.

    The caller must have one thread, as for any fork that goes on in Python: the child may meet
    the switch request of a thread it does not have. A Python signal handler must not raise in
    here. C library hooks (`pthread_atfork`) do not run; those of `os.register_at_fork` do. A child
    does not return to the parent's frames safely: end it with `os._exit`.

    Args:
        flags: CLONE_NEW* and the like. CLONE_VM and CLONE_VFORK raise `ValueError`: Python code
            cannot run on its parent's memory.
        exit_signal: What the parent is sent at the end of the child. With CLONE_PARENT it is that
            of the caller, and to be left out (clone(2)).
        cgroup: A descriptor of the cgroup v2 directory to be born in (CLONE_INTO_CGROUP), or -1.

    Returns:
        The child's pid and its pidfd in the parent, ``(0, -1)`` in the child.
    """
    return Clone(flags, exit_signal).make(cgroup)


CHILD = Struct("8xiI112x")
"""A record of a signalfd of SIGCHLD: ssi_code, and ssi_pid. Equal signals are merged."""


def signalfd(numbers: Sequence[int]) -> int:
    """signalfd(2). Blocks the signals for this thread, as the descriptor needs; returns it.

    It is close-on-exec and does not block. A clone that inherits it reads its own signals by it.
    """
    mask = bytearray(128)  # sigset_t of the GNU C library
    for number in numbers:
        mask[(number - 1) // 8] |= 1 << (number - 1) % 8
    pthread_sigmask(SIG_BLOCK, numbers)
    fd = _signalfd(-1, bytes(mask), os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        raise failure("signalfd")
    return fd


def kill_all_others() -> bool:
    """kill(2) with SIGKILL for -1: every process of this pid namespace but the caller and PID 1.

    Returns whether there was any. Only for PID 1 of a namespace of its own.
    """
    if _kill(-1, c.SIGKILL) == 0:
        return True
    if get_errno() != errno.ESRCH:
        raise failure("kill")
    return False


def unshare(flags: int) -> None:
    """unshare(2)."""
    if _unshare(flags) < 0:
        raise failure("unshare")


def setns(fd: int, nstype: int) -> None:
    """setns(2)."""
    if _setns(fd, nstype) < 0:
        raise failure("setns")


# Mounts


def mount(
    source: str | bytes | None,
    target: str | bytes,
    fstype: str | bytes | None,
    flags: int,
    data: str | bytes | None = None,
) -> None:
    """mount(2)."""
    if (
        _mount(
            encode_optional(source),
            encode(target),
            encode_optional(fstype),
            flags,
            encode_optional(data),
        )
        < 0
    ):
        raise failure("mount", target)


def umount2(target: str | bytes, flags: int) -> None:
    """umount2(2)."""
    if _umount2(encode(target), flags) < 0:
        raise failure("umount2", target)


def pivot_root(new_root: str | bytes, put_old: str | bytes) -> None:
    """pivot_root(2)."""
    if _pivot_root(_SYS_PIVOT_ROOT, encode(new_root), encode(put_old)) < 0:
        raise failure("pivot_root", new_root)


def open_tree(dirfd: int, path: str | bytes, flags: int) -> int:
    """open_tree(2), 5.2. Returns a close-on-exec descriptor of the mount."""
    fd = _open_tree(_SYS_OPEN_TREE, dirfd, encode(path), flags | c.OPEN_TREE_CLOEXEC)
    if fd < 0:
        raise failure("open_tree", path)
    return fd


def move_mount(
    from_dirfd: int, from_path: str | bytes, to_dirfd: int, to_path: str | bytes, flags: int
) -> None:
    """move_mount(2), 5.2. A failure names the place it was to go to."""
    if (
        _move_mount(
            _SYS_MOVE_MOUNT, from_dirfd, encode(from_path), to_dirfd, encode(to_path), flags
        )
        < 0
    ):
        raise failure("move_mount", to_path)


def mount_setattr(
    dirfd: int,
    path: str | bytes,
    flags: int,
    *,
    attr_set: int = 0,
    attr_clr: int = 0,
    propagation: int = 0,
    userns_fd: int = 0,
) -> None:
    """mount_setattr(2), 5.12. `flags` are AT_*, the attributes MOUNT_ATTR_*."""
    attributes = _MountAttr(attr_set, attr_clr, propagation, userns_fd)
    if (
        _mount_setattr(
            _SYS_MOUNT_SETATTR, dirfd, encode(path), flags, byref(attributes), _MOUNT_ATTR_SIZE
        )
        < 0
    ):
        raise failure("mount_setattr", path)


def fsopen(fsname: str, flags: int = 0) -> int:
    """fsopen(2), 5.2. Returns a close-on-exec descriptor; reading it gives the kernel's words."""
    fd = _fsopen(_SYS_FSOPEN, encode(fsname), flags | c.FSOPEN_CLOEXEC)
    if fd < 0:
        raise failure("fsopen", fsname)
    return fd


def fsconfig_set_string(fd: int, key: str, value: str | bytes) -> None:
    """fsconfig(2) FSCONFIG_SET_STRING, 5.2. A failure names the key."""
    if _fsconfig(_SYS_FSCONFIG, fd, c.FSCONFIG_SET_STRING, encode(key), encode(value), 0) < 0:
        raise failure("fsconfig", key)


def fsconfig_create(fd: int) -> None:
    """fsconfig(2) FSCONFIG_CMD_CREATE, 5.2."""
    if _fsconfig(_SYS_FSCONFIG, fd, c.FSCONFIG_CMD_CREATE, None, None, 0) < 0:
        raise failure("fsconfig")


def fsmount(fd: int, flags: int = 0, attr_flags: int = 0) -> int:
    """fsmount(2), 5.2. Returns a close-on-exec descriptor of a mount that is nowhere yet."""
    mount_fd = _fsmount(_SYS_FSMOUNT, fd, flags | c.FSMOUNT_CLOEXEC, attr_flags)
    if mount_fd < 0:
        raise failure("fsmount")
    return mount_fd


# Files


def openat2(dirfd: int, path: str | bytes, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2), 5.6. Returns a close-on-exec descriptor.

    `mode` must be 0 without O_CREAT or O_TMPFILE (EINVAL). EAGAIN is possible with RESOLVE_BENEATH
    or RESOLVE_IN_ROOT when something is renamed at the same time; it is for the caller to decide.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, mode, resolve)
    words = (_SYS_OPENAT2, dirfd, encode(path), byref(how), _OPEN_HOW_SIZE)
    (fd,) = starmap(_openat2, (words,))  # as `nsbox.linux.owned` needs it
    if fd < 0:
        raise failure("openat2", path)
    return fd


def close_range(first: int, last: int, flags: int = 0) -> None:
    """close_range(2), 5.9. `last` is included; CLOSE_RANGE_MAX for all that follow `first`."""
    if _close_range(_SYS_CLOSE_RANGE, first, last, flags) < 0:
        raise failure("close_range")


# Privileges


def capset_empty() -> None:
    """prctl(2) PR_CAP_AMBIENT_CLEAR_ALL, then capset(2) with three empty sets, for this thread."""
    if _prctl(c.PR_CAP_AMBIENT, c.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) < 0:
        raise failure("prctl")
    if _capset(*NO_CAPABILITIES) < 0:
        raise failure("capset")


def capget() -> tuple[int, int, int]:
    """capget(2) of this thread. Returns the effective, permitted and inheritable sets as bits."""
    header = _CapHeader(c.LINUX_CAPABILITY_VERSION_3, 0)
    data = _CapSets()
    if _capget(byref(header), data) < 0:
        raise failure("capget")
    low, high = data
    return (
        low.effective | high.effective << 32,
        low.permitted | high.permitted << 32,
        low.inheritable | high.inheritable << 32,
    )


def filter_argument(program: bytes) -> object:
    """Return the pointer that seccomp(2) takes a filter by.

    Args:
        program: Raw `struct sock_filter` instructions, 8 bytes each.

    Raises:
        ValueError: The program is empty, too long or not whole. The kernel would not see it: the
            length is 16 bits wide, and a longer program would be cut to a weaker one.
    """
    count, remainder = divmod(len(program), 8)
    if remainder or not 0 < count <= c.BPF_MAXINSNS:
        raise ValueError(f"not a BPF program: {len(program)} bytes")
    return byref(_SockFprog(count, program))


def seccomp_set_filter(program: bytes, flags: int = 0) -> None:
    """seccomp(2) SECCOMP_SET_MODE_FILTER, 3.17. Needs no_new_privs or CAP_SYS_ADMIN.

    `flags` are SECCOMP_FILTER_FLAG_*, but for NEW_LISTENER. Raises ValueError as `filter_argument`.
    """
    argument = filter_argument(program)
    result = _seccomp(_SYS_SECCOMP, c.SECCOMP_SET_MODE_FILTER, flags, argument)
    if result > 0:  # TSYNC: the id of a thread that could not be brought along; nothing was loaded
        raise SyscallError("seccomp", errno.ESRCH)
    if result < 0:
        raise failure("seccomp")


def keyctl_join_session_keyring(name: str | None = None) -> int:
    """keyctl(2) KEYCTL_JOIN_SESSION_KEYRING. Returns the serial number of the new keyring.

    None makes an anonymous one. ENOSYS: a kernel without CONFIG_KEYS.
    """
    serial = _keyctl(_SYS_KEYCTL, c.KEYCTL_JOIN_SESSION_KEYRING, encode_optional(name))
    if serial < 0:
        raise failure("keyctl")
    return serial


def prctl(option: int, arg2: int = 0, arg3: int = 0, arg4: int = 0, arg5: int = 0) -> int:
    """prctl(2), raw. Returns what the option returns."""
    result = _prctl(option, arg2, arg3, arg4, arg5)
    if result < 0:
        raise failure("prctl")
    return result
