# SPDX-License-Identifier: Apache-2.0
"""Build the file tree of a layout once, as a small mount namespace that births start from.

A *layout* is what many environments share: userland, interpreter prefixes, read-only binds,
/etc, device nodes. `build` runs in a short-lived helper of the launcher, in a mount
namespace of its own, and leaves there::

    /            tmpfs, read-only
    /newroot     the environment's future root: tmpfs, read-only, with all shared binds
    /proc        the launcher's own /proc. The kernel lets a new /proc be mounted only where an
                 unmasked one is visible (fs/namespace.c, mnt_already_visible); births detach it.
    /empty       an empty directory to mask others with
    /cgroups     the launcher's cgroups, read-only: births bind their own one, and detach the rest

The launcher keeps a descriptor of that namespace, and enters it for the moment of each clone, so
that an environment never has the host's mount tree, which it would have to detach.
"""

from __future__ import annotations

import errno
import os
import stat

# The C half of `socket`, as in `linux.calls`.
from _socket import AF_UNIX, SOCK_SEQPACKET, socketpair
from _socket import socket as _Socket

from nsbox.errors import SyscallError
from nsbox.isolation.cgroups import view as cgroups
from nsbox.isolation.etc import HostFiles, host_names
from nsbox.isolation.filesystem import CGROUPS, EMPTY, NEW_ROOT, attach
from nsbox.linux import calls, questions
from nsbox.linux import constants as c
from nsbox.linux.binding import is_unknown, named

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from nsbox.isolation.layout import Layout

    View = dict[str, dict[str, str]]

_BASE = "/tmp"  # noqa: S108 - only a place to hang the tree, in a private mount namespace
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_NEVER_SHARED = frozenset({"dev", "proc", "sys", "tmp", "run", "lost+found", ".dockerenv"})

# The minimal userland: what programs of the host's /usr look for in /etc most, and that says
# nothing about the host's users, network or secrets. Files are copied, directories bound.
_ETC_FILES = (
    "bash.bashrc", "debian_version", "gai.conf", "host.conf", "inputrc", "ld.so.cache",
    "ld.so.conf", "locale.alias", "localtime", "magic", "mime.types", "networks", "os-release",
    "profile", "protocols", "rpc", "services", "shells", "ssl/openssl.cnf", "timezone",
)  # fmt: skip
_ETC_DIRECTORIES = (
    "alternatives", "fonts", "ld.so.conf.d", "pki/ca-trust", "pki/tls/certs", "ssl/certs",
    "terminfo",
)  # fmt: skip
# Files of a bind are "dubious" to git where their owner has no id inside. Nothing is there that the
# caller has not chosen, or the guest made.
_GITCONFIG = "[safe]\n\tdirectory = *\n"
# Where a function's code and layers are attached after the birth (`nsbox.functions.function`).
_CODE_PLACES = ("var/task", "opt")
_LARGEST_COPY = 4 << 20
_REPORT_MOST = 1 << 14  # bytes
_UNLISTED = 0o111
"""Of directories that are only gone through; not even their owner, who may be inside, can list them
(and change the mode: the mount is read-only)."""

_READ_ONLY = c.MOUNT_ATTR_RDONLY | c.MOUNT_ATTR_NOSUID | c.MOUNT_ATTR_NODEV
_WRITABLE = c.MOUNT_ATTR_NOSUID | c.MOUNT_ATTR_NODEV


def clone_tree(source: str, *, writable: bool = False, device: bool = False) -> int:
    """Return a descriptor of a detached, recursive copy of the mounts at `source`.

    It is read-only unless `writable`, never honours set-user-ID bits, and no device nodes unless
    it is one (`device`).
    """
    # Recursive, because a user namespace may not clone a part of a tree whose mounts it did not
    # make itself (fs/namespace.c, has_locked_children), and with the attributes on every mount.
    fd = calls.open_tree(
        c.AT_FDCWD, source, c.OPEN_TREE_CLONE | c.OPEN_TREE_CLOEXEC | c.AT_RECURSIVE
    )
    attributes = c.MOUNT_ATTR_NOSUID if device else _WRITABLE if writable else _READ_ONLY
    try:
        calls.mount_setattr(
            fd, "", c.AT_EMPTY_PATH | c.AT_RECURSIVE, attr_set=attributes, propagation=c.MS_PRIVATE
        )
    except OSError:
        os.close(fd)
        raise
    return fd


def is_full(layout: Layout) -> bool:
    """Return whether a layout has the host's /etc, and so needs its `HostFiles`."""
    return not layout.rootfs and layout.userland == "full"


def hold(layout: Layout, view: View | None, host_files: HostFiles | None) -> int:
    """Build a layout in a helper process and return a descriptor of its mount namespace.

    `view` is what it has of cgroups (`cgroups.view_of`); `host_files` are given for a full one
    (`is_full`).

    Raises:
        OSError: As the step of `build` that failed.
    """
    # Each end reads as ended when the other process is gone.
    ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
    try:
        try:
            pid = named(os.fork)
            if pid == 0:
                _hold(layout, view, host_files, ours, theirs)
        finally:
            theirs.close()
        try:
            answer = ours.recv(_REPORT_MOST)
            if not answer:
                raise OSError(errno.EIO, "the process that builds it died")
            number, _, text = os.fsdecode(answer).partition(" ")
            if text:
                raise OSError(int(number), text)
            return os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            ours.close()  # which ends it
            os.waitpid(pid, 0)
    finally:
        ours.close()


def _hold(
    layout: Layout,
    view: View | None,
    host_files: HostFiles | None,
    others: _Socket,
    own: _Socket,
) -> NoReturn:
    try:
        others.close()
        try:
            calls.unshare(c.CLONE_NEWNS)
            build(layout, view, host_files)
            report = "0 "
        except OSError as error:
            text = str(error).removeprefix(f"[Errno {error.errno}] ")
            report = f"{error.errno or errno.EIO} {text or 'no reason given'}"
        own.send(os.fsencode(report)[:_REPORT_MOST])
        own.recv(1)
    finally:
        os._exit(0)


def build(layout: Layout, view: View | None, host_files: HostFiles | None) -> None:
    """Make the tree and pivot into it; runs in the helper process of `hold`."""
    calls.mount(None, "/", None, c.MS_REC | c.MS_PRIVATE)
    # Before anything covers a source below _BASE.
    binds = _open_binds(layout, _shared_paths(layout, host_files))
    own_cgroups = _open_cgroups(view or {})
    names = host_names() if layout.network == "host" else {}
    proc = calls.open_tree(
        c.AT_FDCWD, "/proc", c.OPEN_TREE_CLONE | c.OPEN_TREE_CLOEXEC | c.AT_RECURSIVE
    )
    etc = [] if layout.rootfs or host_files else _minimal_etc()
    if layout.rootfs:
        os.chdir(layout.rootfs)  # it may lie below _BASE, too: from here on it is "."

    flags = c.MS_NOSUID | c.MS_NODEV
    calls.mount("tmpfs", _BASE, "tmpfs", flags, "mode=755,size=4m,nr_inodes=0")
    root = _BASE + NEW_ROOT
    for path in (root, f"{_BASE}/proc", _BASE + EMPTY):
        os.mkdir(path, 0o755)
    calls.mount("tmpfs", root, "tmpfs", flags, "mode=755,size=32m,nr_inodes=8192")
    attach(proc, f"{_BASE}/proc")

    _place_devices(f"{root}/dev")
    _make_skeleton(root)
    if own_cgroups:
        _place_cgroups(root, **own_cgroups)
    if layout.rootfs:
        _place_rootfs(root)
    else:
        _place_host_userland(root)
        for name, content in etc:
            _write(f"{root}/etc/{name}", content)
    if host_files:
        _place_full_etc(root, layout, names, host_files)
    else:
        _place_synthetic_etc(root, layout, names)
    way_modes = {
        mount.destination: 0o755 if mount.is_way_listed else _UNLISTED for mount in layout.mounts
    }
    for destination, is_directory, fd in binds:
        way_mode = way_modes.get(destination, 0o755)
        _make_mount_point(root, destination, is_directory=is_directory, way_mode=way_mode)
        attach(fd, root + destination)
    for mount in layout.mounts:
        destination = mount.destination
        if not mount.shared and not destination.startswith("/tmp/"):  # noqa: S108
            way_mode, is_directory = way_modes[destination], mount.is_directory
            _make_mount_point(root, destination, is_directory=is_directory, way_mode=way_mode)
    for path in (root, _BASE):
        calls.mount_setattr(c.AT_FDCWD, path, 0, attr_set=_READ_ONLY)
    if os.stat(f"{root}/dev").st_dev != os.stat(root).st_dev:
        calls.mount_setattr(c.AT_FDCWD, f"{root}/dev", 0, attr_set=c.MOUNT_ATTR_RDONLY)
    os.chdir(_BASE)
    calls.pivot_root(".", ".")
    calls.umount2(".", c.MNT_DETACH)
    os.chdir("/")


def _shared_paths(layout: Layout, host_files: HostFiles | None) -> list[str]:
    """Return the host's directories with the same path inside, besides /usr and /etc."""
    if layout.rootfs:
        return []
    if host_files is None:
        paths = [f"/etc/{name}" for name in _ETC_DIRECTORIES]
        return [path for path in paths if questions.is_directory(path)]
    taken = [mount.destination + "/" for mount in layout.mounts]
    return [
        path
        for path in host_files.state
        if not any(
            (path + "/").startswith(other) or other.startswith(path + "/") for other in taken
        )
    ]


def _open_binds(layout: Layout, shared: list[str]) -> list[tuple[str, bool, int]]:
    """Return (destination, whether it is a directory, detached tree), parents first."""
    binds = [(path, True, clone_tree(path)) for path in shared]
    for mount in layout.mounts:
        if mount.shared:
            fd = clone_tree(mount.source, writable=mount.writable)
            binds.append((mount.destination, mount.is_directory, fd))
    return sorted(binds, key=lambda bind: bind[0].count("/"))


def _make_skeleton(root: str) -> None:
    for name in (
        *("proc", "tmp", "etc", "run", "var", "dev/pts", "dev/shm", "dev/mqueue"),
        *_CODE_PLACES,
    ):
        os.mkdir(f"{root}/{name}", 0o755)
    for name, target in (
        ("dev/fd", "/proc/self/fd"),
        ("dev/stdin", "/proc/self/fd/0"),
        ("dev/stdout", "/proc/self/fd/1"),
        ("dev/stderr", "/proc/self/fd/2"),
        ("dev/ptmx", "pts/ptmx"),
    ):
        os.symlink(target, f"{root}/{name}")


def _place_devices(target: str) -> None:
    """Make `target`, with device nodes: one mount, which is written to until it is read-only."""
    os.mkdir(target, 0o755)
    calls.mount("tmpfs", target, "tmpfs", c.MS_NOSUID, "mode=755,size=64k,nr_inodes=64")
    try:
        for name in _DEVICES:
            status = os.stat(f"/dev/{name}")
            os.mknod(f"{target}/{name}", status.st_mode, status.st_rdev)
            os.chmod(f"{target}/{name}", stat.S_IMODE(status.st_mode))
        os.close(os.open(f"{target}/null", os.O_RDWR | os.O_CLOEXEC))
    except PermissionError:
        # Nobody but root of the host makes some that can be opened (mknod(2)): the host's, then.
        calls.umount2(target, 0)
        for name in _DEVICES:
            _write(f"{target}/{name}", b"")
            attach(clone_tree(f"/dev/{name}", device=True), f"{target}/{name}")


def _open_cgroups(view: View) -> dict[str, dict[str, int]]:
    """Return a `cgroups.view_of` with descriptors of detached trees for its directories."""
    return {
        part: {name: clone_tree(path) for name, path in paths.items()}
        for part, paths in view.items()
    }


def _place_cgroups(root: str, own: dict[str, int], covered: dict[str, int]) -> None:
    """Attach the launcher's cgroups, and make the mount points of an environment's own."""
    place = root + cgroups.PLACE
    for name, fd in own.items():
        os.makedirs(f"{_BASE}{CGROUPS}/{name}", 0o755)
        os.makedirs(root + cgroups.place(name), 0o755)
        attach(fd, f"{_BASE}{CGROUPS}/{name}")
    if covered:
        cover = f"{_BASE}/cover"
        for name in (*own, *covered):
            os.makedirs(f"{cover}/{name}", 0o755)
        for name, fd in covered.items():
            os.mkdir(f"{place}/{name}", 0o755)
            attach(fd, f"{place}/{name}")
        attach(clone_tree(cover), place)


def _place_host_userland(root: str) -> None:
    os.mkdir(f"{root}/usr")
    attach(clone_tree("/usr"), f"{root}/usr")
    os.symlink("/tmp", f"{root}/var/tmp")  # noqa: S108
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        _place_entry(root, "/", name)


def _place_rootfs(root: str) -> None:
    """Put the working directory's entries into `root`."""
    for name in (*reversed(_CODE_PLACES), "var"):
        os.rmdir(f"{root}/{name}")
    os.rmdir(f"{root}/etc")
    for name in sorted(os.listdir(".")):
        if name == "var" and not os.path.islink(name):
            # Entry by entry, so that there is a place for a function's code.
            os.mkdir(f"{root}/var", 0o755)
            for inner in sorted(os.listdir(name)):
                _place_entry(f"{root}/var", name, inner)
        elif name not in _NEVER_SHARED:
            _place_entry(root, ".", name)
    for name in ("etc", "var", *_CODE_PLACES):
        parent = os.path.dirname(f"{root}/{name}")
        if not os.path.lexists(f"{root}/{name}") and not os.path.islink(parent):
            os.mkdir(f"{root}/{name}", 0o755)


def _place_entry(root: str, parent: str, name: str) -> None:
    """Put one top-level entry of `parent` into `root`: links as links, the rest bound."""
    source, target = os.path.join(parent, name), f"{root}/{name}"
    try:
        mode = os.lstat(source).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        os.symlink(os.readlink(source), target)
    elif stat.S_ISDIR(mode):
        os.mkdir(target, 0o755)
        attach(clone_tree(source), target)
    elif stat.S_ISREG(mode):
        _write(target, b"")
        attach(clone_tree(source), target)


def _minimal_etc() -> list[tuple[str, bytes]]:
    found = []
    for name in _ETC_FILES:
        path = f"/etc/{name}"
        try:
            status = os.stat(path)
            if stat.S_ISREG(status.st_mode) and status.st_size <= _LARGEST_COPY:
                found.append((name, _read(path)))
        except OSError as error:
            if is_unknown(error):
                raise
            continue  # absent or unreadable to us: it is not part of this host's userland
    return found


def _place_full_etc(
    root: str, layout: Layout, names: dict[str, bytes], host_files: HostFiles
) -> None:
    top = f"{_BASE}/top"
    for name, content in _synthetic_etc(layout, names).items():
        _write(f"{top}/{name}", content)
    for mount in layout.mounts:
        # Here, since the mounted /etc takes no mount point any more.
        inner = mount.destination.removeprefix("/etc/")
        if inner != mount.destination:
            if os.path.isfile(f"{top}/{inner}"):
                os.unlink(f"{top}/{inner}")
            _make_mount_point(top, inner, is_directory=mount.is_directory)
    host_files.place_etc(_BASE, f"{root}/etc", top)


def _synthetic_etc(layout: Layout, names: dict[str, bytes]) -> dict[str, bytes]:
    user, hostname = layout.user_id, layout.hostname
    files = {
        "passwd": "root:x:0:0:root:/:/usr/sbin/nologin\n"
        f"sandbox:x:{user}:{user}:sandbox:/tmp:/bin/sh\n"
        "nobody:x:65534:65534:nobody:/:/usr/sbin/nologin\n",
        "group": f"root:x:0:\nsandbox:x:{user}:\nnogroup:x:65534:\n",
        "hosts": f"127.0.0.1 localhost {hostname}\n::1 localhost {hostname}\n",
        "hostname": f"{hostname}\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n"
        "services: files\nprotocols: files\n",
        "gitconfig": _GITCONFIG,
    }
    contents = {name: text.encode() for name, text in files.items()}
    contents |= {"resolv.conf": b""} | names
    if "hosts" in names:
        contents["hosts"] += f"\n127.0.0.1 {hostname}\n".encode()  # its own name
    return contents


def _place_synthetic_etc(root: str, layout: Layout, names: dict[str, bytes]) -> None:
    contents = _synthetic_etc(layout, names)
    if os.path.islink(f"{root}/etc"):
        # Followed here it would lead to the host's files.
        raise SyscallError("open", errno.ELOOP, "/etc", "it is a symbolic link in the rootfs")
    if not layout.rootfs or not questions.is_directory("./etc"):
        for name, content in contents.items():
            _write(f"{root}/etc/{name}", content)
        return
    # The image's own /etc is bound read-only: cover the files that it has.
    del contents["gitconfig"]
    os.mkdir(f"{root}/run/etc", 0o755)
    for name, content in contents.items():
        path = f"{root}/etc/{name}"
        if os.path.isfile(path) and not os.path.islink(path):
            _write(f"{root}/run/etc/{name}", content)
            attach(clone_tree(f"{root}/run/etc/{name}"), path)


def _make_mount_point(
    root: str, destination: str, *, is_directory: bool, way_mode: int = 0o755
) -> None:
    """Make an empty file or directory, and with `way_mode` the directories on the way to it."""
    device = os.stat(root).st_dev
    parts = destination.strip("/").split("/")
    path = root
    for index, part in enumerate(parts):
        parent_device = os.stat(path).st_dev
        path = f"{path}/{part}"
        if os.path.lexists(path):
            if os.path.islink(path):
                note = "a symbolic link is in the way"
                raise SyscallError("mkdir", errno.ELOOP, destination, note)
            continue
        if parent_device != device:
            # Creating it would write to the host's tree.
            note = "a mount point in a bound tree must exist there already"
            raise SyscallError("mkdir", errno.ENOENT, destination, note)
        if index < len(parts) - 1:
            os.mkdir(path, way_mode)
        elif is_directory:
            os.mkdir(path, 0o755)
        else:
            _write(path, b"")


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(_LARGEST_COPY)


def _write(path: str, content: bytes) -> None:
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    with open(path, "wb") as file:
        file.write(content)
