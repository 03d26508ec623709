# SPDX-License-Identifier: Apache-2.0
"""The code store: file trees in the user's cache directory, named after their content.

::

    ~/.cache/nsbox/store/            owned by the user, written by nobody else
        lock                         shared: take or make an entry; exclusive: remove one
        sha256-<digest>/             an entry, made elsewhere and renamed to here
            manifest                 its hash is <digest>; a shared lock on it says "in use"
            tree/                    what environments see, read-only
        tmp-<16 digits>/             being made, under an exclusive lock
        bad-<digest>-<16 digits>/    no longer what its name says; kept for a look, never used
        trash-<16 digits>            being removed
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from nsbox.errors import ConfigError, StoreError
from nsbox.linux import calls
from nsbox.linux import constants as c
from nsbox.linux.owned import Descriptor
from nsbox.store.integrity import (
    Corrupt,
    check_tree,
    corrupt_when_missing,
    is_as_it_was,
    read_manifest,
)
from nsbox.store.tree import DIRECTORY, LINK, PROGRAM, Manifest, TreeWriter, WriteError, merge

_log: Final = logging.getLogger("nsbox")

_ENTRY: Final = re.compile(r"sha256-([0-9a-f]{64})")
_UNFINISHED: Final = re.compile(r"tmp-[0-9a-f]{16}")
_BAD: Final = re.compile(r"bad-[0-9a-f]{64}-[0-9a-f]{16}")
_TRASH: Final = re.compile(r"trash-[0-9a-f]{16}")
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")

_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_ATTEMPTS: Final = 10
_INSIDE: Final = (
    c.RESOLVE_BENEATH | c.RESOLVE_NO_SYMLINKS | c.RESOLVE_NO_MAGICLINKS | c.RESOLVE_NO_XDEV
)


class _Lease(Descriptor):
    """A shared lock on an entry's manifest, for as long as this object lives."""

    inode = 0


@dataclass(frozen=True, slots=True)
class Entry:
    """A tree in the store. While this object lives, no garbage collection removes the tree."""

    digest: str
    path: str
    """Where the tree is."""
    manifest: Manifest = field(repr=False, compare=False)
    store: Store = field(repr=False, compare=False)
    lease: _Lease = field(repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        # Another process needs a lock of its own: it takes the entry from the store again.
        return _take_again, (self.store.path, self.digest)

    def __deepcopy__(self, _memo: object) -> Entry:
        return self

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return self.manifest.size

    def verify(self) -> None:
        """Raise StoreError unless the tree still is what it was; costs a stat of each file."""
        self.store.verify(self)


def _take_again(path: str, digest: str) -> Entry:
    return Store(path).get(digest)


class Store:
    """The code store at `path`, by default `$NSBOX_STORE` or `~/.cache/nsbox/store`.

    The directory is made where it is missing. Any number of threads and processes may use it at
    once.

    Raises:
        StoreError: It cannot be made, belongs to somebody else, or can be written by others.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = path_of(path)
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
        except OSError as error:
            raise StoreError(
                self.path, f"cannot be made: {error.strerror}; name another in NSBOX_STORE"
            ) from error
        with self._opened():
            pass

    def __repr__(self) -> str:
        return f"Store({self.path!r})"

    # -- taking and making -----------------------------------------------------------------------

    def add(self, read: Callable[[TreeWriter], None], what: str) -> Entry:
        """Return the entry of the tree that `read` describes, making it when there is none.

        Args:
            read: Adds the tree to a writer; called once, and again when the tree must be made.
            what: What is read, for messages.

        Raises:
            ConfigError: What is read cannot be taken.
            StoreError: The store cannot be used.
        """
        writer = TreeWriter(what)
        read(writer)
        # The source may be another one when it is read again: what was made counts.
        return self._take_or_make(writer.finish().digest, read, what, exact=False)

    def merge(self, entries: Sequence[Entry], what: str = "layers") -> Entry:
        """Return the entry that is the union of `entries`; where paths meet, the last one wins."""
        merged = merge([entry.manifest for entry in entries], what)

        def read(tree: TreeWriter) -> None:
            with ExitStack() as stack:
                roots = [_open(stack, entry.path, _DIRECTORY) for entry in entries]
                for path, (index, node) in merged.items():
                    if node.kind == DIRECTORY:
                        tree.add_directory(path)
                    elif node.kind == LINK:
                        tree.add_link(path, node.content)
                    else:
                        with (
                            Descriptor(os.open, path, _FILE, dir_fd=roots[index]) as fd,
                            open(fd, "rb", closefd=False) as file,
                        ):
                            tree.add_file(path, file.read, executable=node.kind == PROGRAM)

        digest = Manifest.of({path: node for path, (_, node) in merged.items()}).digest
        entry = self._take_or_make(digest, read, what, exact=True)
        if entry.digest != digest:
            raise StoreError(self.path, f"{what}: a layer was changed while it was copied")
        return entry

    def get(self, digest: str) -> Entry:
        """Return the entry with this digest, verified. Raises StoreError when there is none."""
        if not _DIGEST.fullmatch(digest):
            raise ConfigError(f"digest: {digest!r} must be 64 hexadecimal digits")
        entry = self._take(digest)
        if entry is None:
            raise StoreError(self.path, f"has no sound entry {digest}; publish the code again")
        return entry

    def verify(self, entry: Entry) -> None:
        """Raise StoreError unless `entry` still is what it was. A spoiled one is set aside."""
        name = f"sha256-{entry.digest}"
        place = f"{self.path}/{name}"
        inode = entry.lease.inode
        if _is_own(self.path) and is_as_it_was(
            self.path, place, entry.digest, entry.manifest, inode
        ):
            return
        with self._opened() as root, ExitStack() as stack:
            inode = _inode(root, name)
            try:
                with corrupt_when_missing(self.path):
                    fd = _open(stack, name, _DIRECTORY, root)
                    if _inode(fd, "manifest") != entry.lease.inode:
                        raise Corrupt("it was replaced")
                    check_tree(self.path, fd, entry.digest, entry.manifest)
            except Corrupt as error:
                self._set_aside(root, name, inode, str(error))
                raise StoreError(
                    self.path, f"entry {entry.digest} was changed: {error}; publish the code again"
                ) from error

    def _take_or_make(
        self, digest: str, read: Callable[[TreeWriter], None], what: str, *, exact: bool
    ) -> Entry:
        for _ in range(_ATTEMPTS):
            entry = self._take(digest)
            if entry is not None:
                return entry
            digest = self._make(read, what, exact=exact)
        raise StoreError(self.path, f"{what}: its entry is spoiled as often as it is made")

    def _take(self, digest: str) -> Entry | None:
        """Return a verified entry, or None when there is none; a spoiled one is set aside."""
        name = f"sha256-{digest}"
        inode = 0
        with self._opened() as root, ExitStack() as stack:
            try:
                with corrupt_when_missing(self.path):
                    with _locked(root, fcntl.LOCK_SH):
                        inode = _inode(root, name)
                        if not inode:
                            return None
                        fd = _open(stack, name, _DIRECTORY, root)
                        manifest_fd = _open(stack, "manifest", _FILE, fd)
                        fcntl.flock(manifest_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                        os.utime(fd)  # "last used", for `collect`
                    manifest = read_manifest(manifest_fd, digest)
                    check_tree(self.path, fd, digest, manifest)
            except Corrupt as error:
                self._set_aside(root, name, inode, str(error))
                return None
            # A duplicate shares the lock, and outlives this block.
            lease = _Lease(os.dup, manifest_fd)
            lease.inode = os.fstat(manifest_fd).st_ino
            return Entry(digest, f"{self.path}/{name}/tree", manifest, self, lease)

    def _make(self, read: Callable[[TreeWriter], None], what: str, *, exact: bool) -> str:
        """Write a tree, and give it its name unless somebody was faster; return its digest."""
        temporary = f"tmp-{secrets.token_hex(8)}"
        with self._opened() as root, ExitStack() as stack:
            try:
                with _locked(root, fcntl.LOCK_SH):
                    stack.callback(_discard, root, temporary)
                    os.mkdir(temporary, 0o700, dir_fd=root)
                    fd = _open(stack, temporary, _DIRECTORY, root)
                    # Says that it is being made; the kernel lets go of it whoever is killed.
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.mkdir("tree", 0o700, dir_fd=fd)
                tree = _open(stack, "tree", _DIRECTORY, fd)
                writer = TreeWriter(what, tree, exact=exact)
                read(writer)
                manifest = writer.finish()
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                written = _open(stack, "manifest", flags, fd, mode=0o400)
                with open(written, "wb", closefd=False) as file:
                    file.write(manifest.encode())
                _rename(root, temporary, f"sha256-{manifest.digest}")
            except (OSError, WriteError) as error:
                raise StoreError(self.path, f"{what} cannot be kept: {error}") from error
            return manifest.digest

    def _set_aside(self, root: int, name: str, inode: int, reason: str) -> None:
        """Take the name from a spoiled entry, unless somebody else has done so already."""
        with _locked(root, fcntl.LOCK_EX):
            if inode and _inode(root, name) == inode:
                bad = f"bad-{name.removeprefix('sha256-')}-{secrets.token_hex(8)}"
                os.rename(name, bad, src_dir_fd=root, dst_dir_fd=root)
                _log.warning("code store %s: %s set aside as %s: %s", self.path, name, bad, reason)

    # -- removing --------------------------------------------------------------------------------

    def collect(self, *, max_age: float | None = None, max_bytes: int | None = None) -> list[str]:
        """Remove what is unused; return the paths that are gone.

        What is in use by a living process stays, whatever the limits. Always removed are
        spoiled entries, and what processes that were killed had not finished.

        Args:
            max_age: Remove entries not taken for this many seconds.
            max_bytes: Then remove entries, longest unused first, until all files of those that
                stay have at most this many bytes together.
        """
        for name, value in (("max_age", max_age), ("max_bytes", max_bytes)):
            if value is not None and not value >= 0:
                raise ConfigError(f"{name}: must not be below zero, got {value}")
        with self._opened() as root:
            with _locked(root, fcntl.LOCK_EX) as lock:
                # The clock of the file system, which stamps the entries too.
                os.utime(lock)
                now = os.fstat(lock).st_mtime
                chosen = self._choose(root, now, max_age, max_bytes)
                trash = {name: f"trash-{secrets.token_hex(8)}" for name in chosen}
                for name, new in trash.items():
                    try:
                        os.rename(name, new, src_dir_fd=root, dst_dir_fd=root)
                    except FileNotFoundError:
                        continue  # what could not be made was removed by its maker
                left = [name for name in os.listdir(root) if _TRASH.fullmatch(name)]
            # Without the lock: nobody takes what has no name any more.
            for name in left:
                try:
                    remove_tree(root, name)
                except OSError as error:
                    if error.errno != errno.ENOENT:  # another collection was faster
                        _log.warning("code store %s: %s stays: %s", self.path, name, error)
            return [f"{self.path}/{name}" for name, new in trash.items() if not _inode(root, new)]

    def _choose(
        self, root: int, now: float, max_age: float | None, max_bytes: int | None
    ) -> list[str]:
        chosen: list[str] = []
        kept: list[tuple[float, int, str]] = []
        for name in sorted(os.listdir(root)):
            if _UNFINISHED.fullmatch(name) or _BAD.fullmatch(name):
                if _is_unused(root, name):
                    chosen.append(name)
            elif match := _ENTRY.fullmatch(name):
                used = os.stat(name, dir_fd=root, follow_symlinks=False).st_mtime
                if max_age is not None and now - used > max_age and _is_unused(root, name):
                    chosen.append(name)
                elif max_bytes is not None:
                    kept.append((used, _size(root, name, match[1]), name))
        total = sum(size for _, size, _ in kept)
        for _, size, name in sorted(kept):
            if max_bytes is not None and total > max_bytes and _is_unused(root, name):
                chosen.append(name)
                total -= size
        return chosen

    @contextmanager
    def _opened(self) -> Iterator[int]:
        """Give a descriptor of the store. Raises StoreError when it cannot be trusted."""
        try:
            directory = Descriptor(os.open, self.path, _DIRECTORY)
        except OSError as error:
            raise StoreError(self.path, f"cannot be opened: {error.strerror}") from error
        with directory as fd:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid():
                raise StoreError(
                    self.path,
                    f"belongs to uid {status.st_uid}, not to {os.geteuid()}; "
                    "name one of your own in NSBOX_STORE",
                )
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise StoreError(
                    self.path, "can be written by others; `chmod go-w` it, and empty it first"
                )
            yield fd


def path_of(store: Store | str | os.PathLike[str] | None) -> str:
    """Return the absolute path of a store, which need not be there; None is the user's own."""
    if isinstance(store, Store):
        return store.path
    return default_path() if store is None else os.path.abspath(os.fspath(store))


def refuse_below(source: str, store: Store | str | os.PathLike[str] | None) -> None:
    """Raise ConfigError when `store` lies in `source`, whose entry would then hold all the others.

    Each publication would be another version, and larger than the one before.
    """
    place = path_of(store)
    top = os.path.realpath(source)
    if os.path.commonpath([os.path.realpath(place), top]) == top:
        raise ConfigError(f"source {source!r}: the store {place!r} is in it; keep it elsewhere")


def default_path() -> str:
    """Return where the store is: `$NSBOX_STORE`, or nsbox/store in the user's cache directory."""
    path = os.environ.get("NSBOX_STORE", "")
    if path:
        if not os.path.isabs(path):
            raise StoreError(path, "NSBOX_STORE must be an absolute path")
        return os.path.normpath(path)
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.join(os.path.expanduser("~"), ".cache")
    path = os.path.join(base, "nsbox", "store")
    if not os.path.isabs(path):
        raise StoreError(path, "there is no home directory; name a directory in NSBOX_STORE")
    # Under sudo HOME may be another user's: leave no file of root in it.
    owner = next(p for p in _upwards(path) if os.path.isdir(p))
    uid = os.stat(owner).st_uid
    if uid not in (os.geteuid(), 0):
        raise StoreError(
            path, f"{owner} belongs to uid {uid}; use `sudo -H`, or name one in NSBOX_STORE"
        )
    return path


def _upwards(path: str) -> Iterator[str]:
    while path != os.path.dirname(path):
        yield path
        path = os.path.dirname(path)
    yield path


# -- locks and descriptors ------------------------------------------------------------------------


@contextmanager
def _locked(root: int, operation: int) -> Iterator[int]:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    with Descriptor(os.open, "lock", flags, 0o600, dir_fd=root) as fd:
        fcntl.flock(fd, operation)
        yield fd


def _open(
    stack: ExitStack, path: str, flags: int, dir_fd: int | None = None, *, mode: int = 0o777
) -> int:
    return stack.enter_context(Descriptor(os.open, path, flags, mode, dir_fd=dir_fd))


def _is_own(path: str) -> bool:
    """Whether a directory belongs to this user and can be written by nobody else."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    others = stat.S_IWGRP | stat.S_IWOTH
    return (
        stat.S_ISDIR(status.st_mode)
        and status.st_uid == os.geteuid()
        and not status.st_mode & others
    )


def _inode(root: int, name: str) -> int:
    """Return the inode of what has this name, or 0 when nothing has."""
    try:
        return os.stat(name, dir_fd=root, follow_symlinks=False).st_ino
    except FileNotFoundError:
        return 0


def _rename(root: int, old: str, new: str) -> None:
    """Give a directory its name, unless another one has it already: that is as good."""
    try:
        os.rename(old, new, src_dir_fd=root, dst_dir_fd=root)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise


def _is_unused(root: int, name: str) -> bool:
    """Return whether it is a directory of ours whose lock nobody holds.

    With the store's lock held, nobody can take it afterwards.
    """
    with ExitStack() as stack:
        try:
            fd = _open(stack, name, _DIRECTORY, root)
            if not name.startswith("tmp-"):
                if not _inode(fd, "manifest"):
                    return True  # no lock, and no use
                fd = _open(stack, "manifest", _FILE, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


def _discard(root: int, name: str) -> None:
    try:
        remove_tree(root, name)
    except OSError as error:
        if error.errno != errno.ENOENT:  # it has got its name
            _log.warning("code store: %s stays until it is collected: %s", name, error)


def remove_tree(parent: int, name: str) -> None:
    """Remove the directory `name` with all that is below it; a link is removed, not followed.

    openat2(2) refuses mount points too: what is mounted somewhere below is not ours.
    """
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        os.unlink(name, dir_fd=parent)
        return
    with Descriptor(calls.openat2, parent, name, _DIRECTORY, resolve=_INSIDE) as fd:
        os.fchmod(fd, 0o700)
        for child in os.listdir(fd):
            try:
                remove_tree(fd, child)
            except OSError as error:
                if error.errno != errno.ENOENT:  # a second one removes the same
                    raise
    os.rmdir(name, dir_fd=parent)


def _size(root: int, name: str, digest: str) -> int:
    try:
        with ExitStack() as stack:
            fd = _open(stack, name, _DIRECTORY, root)
            return read_manifest(_open(stack, "manifest", _FILE, fd), digest).size
    except (OSError, Corrupt):
        return 0  # nobody can take it; it is set aside when somebody tries to
