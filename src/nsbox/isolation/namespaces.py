# SPDX-License-Identifier: Apache-2.0
"""Namespaces of an environment, its id maps, and which host ids it gets.

As root each environment has a host uid and gid of its own, so that not even a bug of the pid
namespace lets two of them touch each other. Blocks of ids are claimed machine-wide by locks
on a file in a directory of root's own: the kernel gives one back when its last holder dies.
"""

from __future__ import annotations

import errno
import os
import stat
import struct

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
    """Host ids for environments, of a block that no other launcher of this machine has."""

    def __init__(
        self, first: int, count: int, *, offset: int = 0, directory: str | None = None
    ) -> None:
        """Claim a block of the `count` host ids from `first`.

        `offset` is what to subtract to name such an id in the launcher's own user namespace, and
        `directory` where the file ``ids`` is, a byte of which is locked for each block; None, where
        there is no place for it.

        An abstract Unix socket is named after the block, too: launchers that see other directories
        see that, if they share the network. As anybody can take such a name, one that is taken
        keeps a locked block back only while there is another.

        Raises:
            OSError: EUSERS, all blocks are taken.
        """
        self._name = _Socket(AF_UNIX, SOCK_DGRAM)
        locks = None if directory is None else _Locks(f"{directory}/ids")
        self._locks = locks  # held as long as it is open, in children too
        size = min(BLOCK, count)
        chosen = None
        for block in range(first, first + count - size + 1, size):
            if locks is not None and not locks.take(block):
                continue
            is_named = _bind(self._name, f"\0nsbox/ids/{block}")
            if is_named or (locks is not None and chosen is None):
                chosen, left = block, chosen
            else:
                left = block
            if locks is not None and left is not None:
                locks.give_back(left)
            if is_named:
                break
        if chosen is None:
            self.close()
            raise OSError(errno.EUSERS, f"all blocks of host ids from {first} are in use")
        self._ids = range(chosen - offset, chosen - offset + size)
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
        """Give an id back whose environment has ended."""
        self._used.discard(taken)

    def close(self) -> None:
        """Release the block."""
        self._name.close()
        if self._locks is not None:
            self._locks.close()


class _Locks:
    """Open-file-description locks on bytes of a file, which may be beyond its end (fcntl(2))."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)

    def take(self, place: int) -> bool:
        """Lock byte `place`; return whether it was free."""
        try:
            self._set(place, is_taken=True)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            return False
        return True

    def give_back(self, place: int) -> None:
        self._set(place, is_taken=False)

    def close(self) -> None:
        os.close(self._fd)

    def _set(self, place: int, *, is_taken: bool) -> None:
        import fcntl  # of launchers alone; the template imports this module

        # struct flock of fcntl(2) on 64-bit machines: l_type, l_whence, l_start, l_len, l_pid.
        kind = fcntl.F_WRLCK if is_taken else fcntl.F_UNLCK
        request = struct.pack("@hhqqi0q", kind, os.SEEK_SET, place, 1, 0)
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, request)


def _bind(socket: _Socket, name: str) -> bool:
    try:
        socket.bind(name)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def come_home(fd: int, kind: int) -> None:
    """Return to a namespace that this process has left for a moment.

    Raises:
        RuntimeError: It cannot. Whatever it did from here on would be done in the wrong place, so
            that this is no failure of one birth but the end of the process.
    """
    for attempts_left in (2, 1, 0):
        try:
            calls.setns(fd, kind)
            return
        except OSError as error:
            if not attempts_left:
                raise RuntimeError("this process cannot return to its own namespace") from error


def write_id_maps(pid: int, inside: int, outside: int) -> None:
    """Map the one id `inside` of the user namespace of `pid` to `outside`, for users and groups."""
    line = b"%d %d 1" % (inside, outside)
    for name in ("uid_map", "gid_map"):
        _write_map(pid, name, line)


def _write_map(pid: int, name: str, lines: bytes) -> None:
    # Not open(): its layers would touch 60 more pages, each to be copied after the clone.
    fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, lines)
    finally:
        os.close(fd)


def is_public(source: os.stat_result) -> bool:
    """Return whether everybody on the host may read `source`, of a directory its names."""
    needed = 0o005 if stat.S_ISDIR(source.st_mode) else 0o004
    return source.st_mode & needed == needed


def takes_on_owner(source: os.stat_result) -> bool:
    """Return whether root's environments have the rights of `source`'s owner in a bind of it.

    Of any owner but root. A public directory of root's, such as /etc, has private files in it that
    are not meant; what is private itself is bound to be read by the environment.
    """
    return source.st_uid != 0 or not is_public(source)


def mapping_namespace(owner: tuple[int, int], outside: int) -> int:
    """Return a user namespace for an idmapped mount (mount_setattr(2)).

    What belongs to the ids `owner` (user, group) on disk belongs to `outside` in the mount, and
    what `outside` creates there is owned by them; all others keep theirs. Group 0 is never taken
    on: what `outside` creates has its own group then. Needs real root.
    """
    user, group = owner
    maps = {
        "uid_map": _swap("uid_map", user, outside),
        "gid_map": _swap("gid_map", group or outside, outside),
    }
    pid, pidfd = calls.clone3(c.CLONE_NEWUSER)
    if pid == 0:
        os._exit(0)  # its namespace can be had until it is waited for
    try:
        for name, lines in maps.items():
            _write_map(pid, name, lines)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(pidfd)
        os.waitpid(pid, 0)


def _swap(name: str, one: int, other: int) -> bytes:
    """Return an id map of this process's ids to themselves, but `one` and `other` to each other."""
    if name not in _own_ids:
        with open(f"/proc/self/{name}") as file:
            rows = [line.split() for line in file]
        _own_ids[name] = [(int(first), int(first) + int(count)) for first, _, count in rows]
    lines = {(one, other, 1), (other, one, 1)}
    for first, end in _own_ids[name]:
        cuts = [id_ for id_ in sorted({one, other}) if first <= id_ < end]
        starts = [first, *(id_ + 1 for id_ in cuts)]
        for start, stop in zip(starts, [*cuts, end], strict=True):
            if start < stop:
                lines.add((start, start, stop - start))
    return b"\n".join(b"%d %d %d" % line for line in lines)


_own_ids: dict[str, list[tuple[int, int]]] = {}  # of this process; its maps never change
