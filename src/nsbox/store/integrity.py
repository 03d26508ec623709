# SPDX-License-Identifier: Apache-2.0
"""Whether an entry of the code store still is what its name says.

A tree is believed after its files were hashed in this process, and as long as none of them has
another inode, size, owner, mode or time of change since: the kernel sets the time of change
(ctime, inode(7)) at every change of content, name or mode, and no call can set it.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Final, NamedTuple

from nsbox.errors import ConfigError, StoreError
from nsbox.linux.owned import Descriptor
from nsbox.store.sources import read_directory
from nsbox.store.tree import DIRECTORY, MODES, Manifest, Node, TreeWriter

_MANIFEST_MAX: Final = 128 << 20
_ROOT: Final = Node(DIRECTORY)
_SETTLED: Final = 2_000_000_000
"""Nanoseconds. Times of change advance by timer ticks of up to 10 ms, on some file systems by a
second: two changes within one look like one. What is younger is hashed again the next time."""


class Corrupt(Exception):
    """An entry is not what its name says."""


class Seal(NamedTuple):
    """What the kernel says of all files of a tree."""

    digest: bytes
    newest: int
    """The last time of change, in nanoseconds."""


_seals: dict[tuple[str, str], Seal] = {}
"""By store and digest: the seal of the tree when it was hashed in this process."""


@contextmanager
def corrupt_when_missing(path: str) -> Iterator[None]:
    """Tell an entry that is not as it was from a host that cannot read it now."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EACCES, errno.ENXIO):
            raise Corrupt(str(error)) from error
        raise StoreError(path, f"cannot be read: {error}") from error


def read_manifest(fd: int, digest: str) -> Manifest:
    """Return the manifest in the file `fd`. Raises Corrupt when its hash is not `digest`."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size > _MANIFEST_MAX:
        raise Corrupt("its manifest is no file of a sensible size")
    with open(fd, "rb", closefd=False) as file:
        data = file.read(status.st_size)  # of the largest there may be a buffer would be made
    if hashlib.sha256(data).hexdigest() != digest:
        raise Corrupt("its manifest has another hash")
    try:
        return Manifest.decode(data)
    except (ValueError, RecursionError) as error:
        raise Corrupt(str(error)) from error


def check_tree(path: str, entry: int, digest: str, manifest: Manifest) -> None:
    """Raise Corrupt unless the tree in the directory `entry` is what `digest` says.

    Args:
        path: The store, for the memory of what was hashed.
        entry: A descriptor of the entry.
        digest: Its digest.
        manifest: Its manifest, read with `read_manifest`.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    with Descriptor(os.open, "tree", flags, dir_fd=entry) as tree:
        now = time.clock_gettime_ns(time.CLOCK_REALTIME)  # the clock that stamps files
        seal = _take_seal(".", tree, manifest)
        if _seals.get((path, digest)) == seal:
            return
        writer = TreeWriter("entry", exact=True)
        try:
            read_directory(writer, tree)
            found = writer.finish().digest
        except ConfigError as error:
            if isinstance(error.__cause__, OSError):
                raise error.__cause__ from error  # may be the host's want: no descriptors left
            raise Corrupt(str(error)) from error
        if found != digest:
            raise Corrupt("its files have other content")
        if _take_seal(".", tree, manifest) != seal:
            raise Corrupt("it changed while it was looked at")
        if seal.newest < now - _SETTLED:
            _seals[path, digest] = seal


def is_as_it_was(path: str, entry: str, digest: str, manifest: Manifest, inode: int) -> bool:
    """Whether an entry surely is what it was when it was hashed in this process.

    The short way, for what is asked at each start; when it says no, `check_tree` says why.

    Args:
        path: The store.
        entry: The path of the entry.
        digest: Its digest.
        manifest: Its manifest.
        inode: The inode of the manifest's file.
    """
    known = _seals.get((path, digest))
    if known is None:
        return False
    try:
        if os.lstat(f"{entry}/manifest").st_ino != inode or not stat.S_ISDIR(
            os.lstat(entry).st_mode
        ):
            return False
        return _take_seal(f"{entry}/tree", None, manifest) == known
    except (OSError, Corrupt):
        return False


def _take_seal(place: str, tree: int | None, manifest: Manifest) -> Seal:
    """Look at every file of the tree `place`, seen from the directory `tree`.

    A foreign owner or mode is corruption.
    """
    uid = os.geteuid()
    seal = hashlib.sha256()
    newest = 0
    for path, node in chain([("", _ROOT)], manifest.nodes.items()):
        status = os.stat(f"{place}/{path}" if path else place, dir_fd=tree, follow_symlinks=False)
        mode = MODES[node.kind]
        if status.st_mode != mode or status.st_uid != uid:
            raise Corrupt(
                f"{path or '.'!r} has mode {status.st_mode:o} and owner {status.st_uid}, "
                f"not {mode:o} and {uid}"
            )
        newest = max(newest, status.st_ctime_ns)
        seal.update(
            b"%d %d %d %d %d;" % (
                status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns,
                status.st_ctime_ns,
            )
        )  # fmt: skip
    return Seal(seal.digest(), newest)
