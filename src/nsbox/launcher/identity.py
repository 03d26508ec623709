# SPDX-License-Identifier: Apache-2.0
"""Who the launcher is, and which host ids its environments can have.

Three cases: root of the host, each environment with an id of a configured range; an ordinary user
with subordinate ids (subuid(5)), the same out of those, but where something of the user's own is
bound; an ordinary user without, all environments with the user's own id. Never the id 0.
"""

from __future__ import annotations

import errno
import os
import stat

from nsbox.isolation.namespaces import HOST_ID_BASE, HOST_ID_COUNT, IdPool
from nsbox.linux import calls, proc
from nsbox.linux import constants as c
from nsbox.linux.binding import is_unknown
from nsbox.linux.questions import may

_CAP_SYS_ADMIN = 21  # linux/capability.h
_CAP_SETUID = 7
_LOCK_DIRECTORIES = ("/run/nsbox", "/tmp/nsbox-0")  # noqa: S108 - checked


class Identity:
    """What the launcher may do about ids.

    Attributes:
        ids: Where environments get their host ids from; None when all have the launcher's own.
        may_drop_groups: Whether setgroups(2) is allowed in its user namespace.
        kind: ``"range"``, ``"subordinate"`` or ``"own"``.
    """

    def __init__(self, ids: IdPool | None, kind: str) -> None:
        self.ids = ids
        self.kind = kind
        self.may_drop_groups = _setgroups_allowed()


def is_privileged() -> bool:
    """Whether this process is root with what a birth needs: capabilities, and ids to give."""
    effective = calls.capget()[0]
    needed = 1 << _CAP_SYS_ADMIN | 1 << _CAP_SETUID
    is_root = os.geteuid() == 0 and effective & needed == needed
    return is_root and _widest()[2] > 1 and _can_come_back()


def _can_come_back() -> bool:
    """Return whether this process may enter the network namespace that it is in.

    Root of a user namespace alone (`unshare -Ur`) may not: it belongs to the one outside.
    """
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        calls.setns(home, c.CLONE_NEWNET)
    except OSError as error:
        if is_unknown(error):
            raise
        return False
    finally:
        os.close(home)
    return True


def expect_no_chroot(mounts: int) -> None:
    """Enter the mount namespace `mounts`, which this process is in already, with its own root.

    Raises:
        OSError: EPERM, its root was another: in there the kernel makes no user namespace, and every
            later return to `mounts` would leave it.
    """
    before = os.stat("/")
    calls.setns(mounts, c.CLONE_NEWNS)
    if not os.path.samestat(before, os.stat("/")):
        raise OSError(errno.EPERM, proc.CHROOT)


def expect_mapped(first: int, count: int) -> None:
    """Check that the operator's range of host ids can be had here.

    Raises:
        OSError: EINVAL, it is not mapped in this user namespace.
    """
    if not any(begin <= first and first + count <= begin + n for begin, _, n in _extents()):
        mapped = ", ".join(f"{begin}:{n}" for begin, _, n in _extents())
        raise OSError(errno.EINVAL, f"{first}:{count} is not in {mapped}, which this user "
                      "namespace has (/proc/self/uid_map and gid_map)")  # fmt: skip


def choose(*, own_namespace: bool, id_range: tuple[int, int] | None) -> Identity:
    """Return the identity of this process, which has its id maps by now.

    Args:
        own_namespace: Whether the launcher made a user namespace for itself.
        id_range: First id and count given by the operator; None for the default range.
    """
    extents = _extents()
    if own_namespace:
        # Ids from 1 up are the subordinate ones, if newuidmap wrote any.
        for inside, outside, count in extents:
            if inside == 1:
                user = next((start for begin, start, _ in extents if begin == 0), 0)
                place = lock_directory(f"/run/user/{user}/nsbox", f"/tmp/nsbox-{user}")  # noqa: S108
                pool = IdPool(outside, count, offset=outside - inside, directory=place)
                return Identity(pool, "subordinate")
        return Identity(None, "own")
    first, count = id_range or (HOST_ID_BASE, HOST_ID_COUNT)
    for inside, _, length in extents:
        if inside <= first and first + count <= inside + length:
            place = lock_directory(*_LOCK_DIRECTORIES)
            return Identity(IdPool(first, count, directory=place), "range")
    # Root of a container: take the upper half of what was given to it.
    inside, outside, length = _widest()
    half = length // 2
    first = inside + length - half
    place = lock_directory(*_LOCK_DIRECTORIES)
    pool = IdPool(outside + length - half, half, offset=outside - inside, directory=place)
    return Identity(pool, "range")


def lock_directory(*paths: str) -> str | None:
    """Return the first of `paths` that can be a directory which only this user can write to.

    None: there is none (a read-only /run, and somebody else has taken the place in /tmp).
    """
    return next(filter(_is_own_directory, paths), None)


def _is_own_directory(path: str) -> bool:
    try:
        above = os.lstat(os.path.dirname(path))
        is_mine = above.st_uid == os.geteuid() and not above.st_mode & 0o022
        # In a sticky one such as /tmp others cannot remove or rename it (unlink(2)).
        if not stat.S_ISDIR(above.st_mode) or not (is_mine or above.st_mode & stat.S_ISVTX):
            return False
        try:
            os.mkdir(path, 0o700)
        except FileExistsError:
            pass
        found = os.lstat(path)
    except OSError as error:
        # Another place while this one is full: ids of it would be given to others, too.
        if is_unknown(error) or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        return False
    is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return is_own and not found.st_mode & 0o022 and may(path, os.W_OK)


def _extents() -> list[tuple[int, int, int]]:
    """Return the id ranges mapped for both users and groups: (inside, outside, count)."""
    found = []
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}") as file:
            found.append([tuple(int(word) for word in line.split()) for line in file])
    users, groups = found
    both = [
        (inside, outside, min(count, other[2]))
        for inside, outside, count in users
        for other in groups
        if other[0] == inside
    ]
    return both or [(0, 0, 1)]


def _widest() -> tuple[int, int, int]:
    return max(_extents(), key=lambda extent: extent[2])


def _setgroups_allowed() -> bool:
    try:
        with open("/proc/self/setgroups") as file:
            return file.read().strip() == "allow"
    except FileNotFoundError:
        return True
