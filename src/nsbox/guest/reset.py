# SPDX-License-Identifier: Apache-2.0
"""Take away what an invocation may have left outside its memory: files, and System V ipc."""

from __future__ import annotations

import os
import stat

from nsbox.linux import sysv

PLACES = ("/tmp", "/dev/shm", "/dev/mqueue")  # noqa: S108 - the environment's own
"""Everything that is writable inside."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MODE = 0o1777  # as they are mounted


def reset() -> None:
    """Empty all writable places.

    Raises:
        OSError: Something cannot be removed.
    """
    mounts = _mounts()
    for place in PLACES:
        try:
            if stat.S_IMODE(os.stat(place).st_mode) != _MODE:
                os.chmod(place, _MODE)  # its owner could not read it, and so not empty it
            fd = os.open(place, _DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            _empty(fd, place, mounts)
        finally:
            os.close(fd)
    sysv.remove_all()


def _mounts() -> list[str]:
    """Return where something is mounted: what the configuration has bound below /tmp stays."""
    with open("/proc/self/mountinfo", "rb") as file:
        places = [line.split(b" ", 5)[4] for line in file]
    return [os.fsdecode(place.decode("unicode_escape").encode("latin-1")) for place in places]


def _empty(top: int, path: str, mounts: list[str]) -> None:
    """Remove everything below the directory `top` but mounts, and follow no link."""
    for name in os.listdir(top):
        full = f"{path}/{name}"
        if full in mounts:
            continue
        if any(mount.startswith(f"{full}/") for mount in mounts):
            inner = os.open(name, _DIRECTORY, dir_fd=top)
            try:
                _empty(inner, full, mounts)
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
