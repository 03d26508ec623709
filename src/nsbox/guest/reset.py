# SPDX-License-Identifier: Apache-2.0
"""Remove what guests leave outside of processes: files, System V ipc objects, keys, sockets."""

from __future__ import annotations

import errno
import os
import stat
import time
from fcntl import ioctl

from nsbox.guest import processes
from nsbox.linux import constants as c
from nsbox.linux import keys, sysv

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

PLACES = ("/tmp", "/dev/shm", "/dev/mqueue")  # noqa: S108 - the environment's own
"""Writable mounts of every environment; those of the configuration come besides."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MODE = 0o1777  # as they are mounted
_FIRST_DEADLINE, _SOCKETS_DEADLINE = 0.02, 0.5  # seconds; what stays is taken for the worker's
_NO_ATTRIBUTES = (errno.EOPNOTSUPP, errno.ENOTTY, errno.ENOSYS, errno.EPERM)


def reset(places: list[bytes]) -> None:
    """Empty all writable mounts, remove ipc objects and keys, and wait for the end of sockets.

    Args:
        places: Paths of the configuration's tmpfs mounts; `PLACES` are emptied as well.

    Raises:
        OSError: Something cannot be removed; EXDEV, a mount was moved by renaming its parent.
    """
    own = [os.fsdecode(place) for place in places]
    mounts = _mounts_below((*PLACES, *own))
    for place in own:
        # The directory that a mount is in may have been renamed, and another put in its place.
        if os.stat(place).st_dev == os.stat(os.path.dirname(place)).st_dev:
            raise OSError(errno.EXDEV, "it is mounted elsewhere now", place)
    for place in (*PLACES, *own):
        try:
            if stat.S_IMODE(os.stat(place).st_mode) != _MODE:
                os.chmod(place, _MODE)  # its owner could not read it, and so not empty it
            fd = os.open(place, _DIRECTORY)
        except FileNotFoundError:
            if place in own:
                raise
            continue
        try:
            # By its path: of a descriptor Python makes another one first.
            _empty(fd, os.listdir(place), place, mounts)
            _clean(fd)
        finally:
            os.close(fd)
    sysv.remove_all()
    keys.forget_all()
    _await_sockets()


_kept: list[int] = []  # how many the worker itself has, once that is known


def _await_sockets() -> None:
    """Wait until sockets are gone that ended processes have had in flight, in a circle (unix(7)).

    A thread of the kernel looks for those, soon. Until it comes to them their ports and names are
    taken, and others connect to them. Unix sockets have them all; of other kinds some go late.
    """
    kept = _kept[0] if _kept else 0
    if processes.sockets() <= kept:
        return
    deadline = time.monotonic() + (_SOCKETS_DEADLINE if _kept else _FIRST_DEADLINE)
    while (left := processes.unix_sockets()) > kept and time.monotonic() < deadline:
        time.sleep(0.001)
    _kept[:] = [left]


def _clean(fd: int) -> None:
    """Reset extended attributes, flags and times of a directory, which can carry data, too."""
    os.utime(fd)
    for name in _if_any(os.listxattr, fd) or ():
        if name.startswith(("user.", "system.posix_acl")):
            os.removexattr(fd, name)
    if any(_if_any(ioctl, fd, c.FS_IOC_GETFLAGS, bytes(8)) or ()):
        ioctl(fd, c.FS_IOC_SETFLAGS, bytes(8))


def _if_any(look: Callable[..., Any], *arguments: object) -> Any:  # noqa: ANN401
    """Return what `look` returns; None where the file system or the filter refuses it."""
    try:
        return look(*arguments)
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTES:
            raise
        return None


_without_mounts: set[tuple[str, ...]] = set()


def _mounts_below(places: tuple[str, ...]) -> list[str]:
    """Return the present paths of mounts below `places`, which are kept.

    Guests cannot mount, but they can rename the parent directories of a mount.
    """
    if places in _without_mounts:
        return []
    with open("/proc/self/mountinfo", "rb") as file:
        found = [line.split(b" ", 5)[4] for line in file]
    mounts = [os.fsdecode(place.decode("unicode_escape").encode("latin-1")) for place in found]
    below = tuple(f"{place}/" for place in places)
    inner = [mount for mount in mounts if mount.startswith(below) and mount not in places]
    if not inner:
        _without_mounts.add(places)
    return inner


def _empty(top: int, names: list[str], path: str, mounts: list[str]) -> None:
    """Remove `names` in the directory `top`, and all below, but mounts, and follow no link."""
    for name in names:
        full = f"{path}/{name}"
        if full in mounts:
            continue
        if any(mount.startswith(f"{full}/") for mount in mounts):
            inner = os.open(name, _DIRECTORY, dir_fd=top)
            try:
                _empty(inner, os.listdir(inner), full, mounts)
            finally:
                os.close(inner)
        else:
            _remove(top, name)


def _remove(top: int, name: str) -> None:
    """Remove an entry of the directory `top`, however deep the tree below it is.

    What is deeper than one level is moved up first: neither depth nor the length of a path, both of
    which may be chosen to be too much, ever grows.
    """
    waiting = [name]
    prefix = f".{os.urandom(8).hex()}-"  # no name that could have been taken before
    moved = 0
    while waiting:
        name = waiting.pop()
        try:
            os.unlink(name, dir_fd=top)
            continue
        except IsADirectoryError:
            pass
        os.chmod(name, 0o700, dir_fd=top)  # unlink has told that it is no link
        inner = os.open(name, _DIRECTORY, dir_fd=top)
        try:
            for child in os.listdir(inner):
                try:
                    os.unlink(child, dir_fd=inner)
                except IsADirectoryError:
                    # A directory that may not be written to cannot be moved either.
                    os.chmod(child, 0o700, dir_fd=inner)
                    moved += 1
                    place = f"{prefix}{moved}"
                    os.rename(child, place, src_dir_fd=inner, dst_dir_fd=top)
                    waiting.append(place)
        finally:
            os.close(inner)
        os.rmdir(name, dir_fd=top)
