# SPDX-License-Identifier: Apache-2.0
"""Namespaces of an environment, its id maps, and which host ids it gets.

As root each environment has a host uid and gid of its own, so that not even a bug of the pid
namespace lets two of them touch each other. Blocks of ids are claimed machine-wide by binding an
abstract Unix socket named after the block: the kernel gives it back when its last holder dies.
"""

from __future__ import annotations

import errno
import os

# The C half of `socket`, as in `linux.calls`: the template imports this module.
from _socket import AF_UNIX, SOCK_DGRAM
from _socket import socket as _Socket

from nsbox.linux import calls
from nsbox.linux import constants as c

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

FLAGS = {
    "user": c.CLONE_NEWUSER,
    "pid": c.CLONE_NEWPID,
    "mount": c.CLONE_NEWNS,
    "network": c.CLONE_NEWNET,
    "ipc": c.CLONE_NEWIPC,
    "uts": c.CLONE_NEWUTS,
    "cgroup": c.CLONE_NEWCGROUP,
    "time": c.CLONE_NEWTIME,
}

FILES = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup", "time")
"""Names of the same under /proc/PID/ns (namespaces(7))."""

HOST_ID_BASE = 0x70000000
"""First host id given to environments: above what systemd hands out (systemd, UIDS-GIDS.md)."""
HOST_ID_COUNT = 1 << 20
BLOCK = 4096
"""Ids one launcher holds. Each environment takes the next; all are used before one is again."""


class IdPool:
    """Ids for environments, out of a block that no other launcher of this machine has."""

    def __init__(self, first: int, count: int, *, offset: int = 0) -> None:
        """Claim a block of the `count` host ids from `first`.

        `offset` is what to subtract to name such an id in the launcher's own user namespace.

        Raises:
            OSError: EUSERS, all blocks are taken.
        """
        self._lock = _Socket(AF_UNIX, SOCK_DGRAM)
        size = min(BLOCK, count)
        for block in range(first, first + count - size + 1, size):
            try:
                self._lock.bind(f"\0nsbox/ids/{block}")
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                continue
            self._ids = range(block - offset, block - offset + size)
            break
        else:
            self._lock.close()
            raise OSError(errno.EUSERS, f"all blocks of host ids from {first} are in use")
        self._used: set[int] = set()
        self._next = self._cycle()

    def _cycle(self) -> Iterator[int]:
        while True:
            yield from self._ids

    def take(self) -> int:
        """Return an id no live environment has."""
        for _ in self._ids:
            candidate = next(self._next)
            if candidate not in self._used:
                self._used.add(candidate)
                return candidate
        raise OSError(errno.EUSERS, f"{len(self._ids)} environments are alive; close some")

    def give_back(self, taken: int) -> None:
        """Return an id after its environment is gone."""
        self._used.discard(taken)


def come_home(fd: int, kind: int) -> None:
    """Return to a namespace that this process has left for a moment.

    Raises:
        RuntimeError: It cannot. Whatever it did from here on would be done in the wrong place, so
            that this is no failure of one birth but the end of the process.
    """
    try:
        calls.setns(fd, kind)
    except OSError as error:
        raise RuntimeError("this process cannot return to its own namespace") from error


def write_id_maps(pid: int, inside: int, outside: int) -> None:
    """Map the one id `inside` of the user namespace of `pid` to `outside`, for users and groups."""
    line = b"%d %d 1" % (inside, outside)
    for name in ("uid_map", "gid_map"):
        # Not open(): its layers would touch 60 more pages, each to be copied after the clone.
        fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, line)
        finally:
            os.close(fd)


def mapping_namespace(inside: tuple[int, int], outside: int) -> int:
    """Return a user namespace for an idmapped mount (mount_setattr(2)).

    What belongs to the ids `inside` (user, group) on disk will belong to `outside` in the mount,
    and what `outside` creates will be owned by `inside`. Needs real root.
    """
    ready, ready_write = os.pipe()
    done, done_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(done_write)
            calls.unshare(c.CLONE_NEWUSER)
            os.write(ready_write, b"r")
            os.read(done, 1)
        finally:
            os._exit(0)
    os.close(ready_write)
    os.close(done)
    try:
        if os.read(ready, 1) != b"r":
            raise OSError(errno.EPERM, "no user namespace could be made for an idmapped mount")
        for name, host_id in zip(("uid_map", "gid_map"), inside, strict=True):
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write(f"{host_id} {outside} 1")
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(ready)
        os.close(done_write)
        os.waitpid(pid, 0)
