# SPDX-License-Identifier: Apache-2.0
"""Probes of single kernel operations. Each changes the process it runs in, for good.

All but the first few run in a user namespace of their own, as births do, with the caller's id
mapped to 0, and in a mount namespace of their own, so that nothing of theirs outlives them.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Final

from nsbox.errors import UnsupportedHostError
from nsbox.isolation import landlock, namespaces
from nsbox.linux import calls, image, interfaces, proc
from nsbox.linux import constants as c
from nsbox.linux.prepared import Program, run
from nsbox.seccomp import filters
from nsbox.seccomp.policy import SeccompPolicy
from nsbox.supervisor import idmaps
from nsbox.values import json_text

_SIZE: Final = 1 << 20
_PR_SET_NO_NEW_PRIVS: Final = 38  # linux/prctl.h, Linux 3.5
# Covered by a tmpfs of the probe's own: it is there on every host, and no interpreter is in it.
_PLACE: Final = "/sys"
_COMPILER: Final = "install a C compiler and Python's headers (python3-dev), and nsbox again"


def _enter(flags: int = 0) -> None:
    """Go to a user namespace as its root, and to other new namespaces."""
    uid, gid = os.geteuid(), os.getegid()
    calls.unshare(c.CLONE_NEWUSER | flags)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    if flags & c.CLONE_NEWNS:
        calls.mount(None, "/", None, c.MS_REC | c.MS_PRIVATE)


def _enter_mounts(flags: int = 0) -> None:
    """As `_enter`, with an empty tmpfs as working directory."""
    _enter(flags | c.CLONE_NEWNS)
    calls.mount("tmpfs", _PLACE, "tmpfs", c.MS_NOSUID | c.MS_NODEV, f"size={_SIZE}")
    os.chdir(_PLACE)


def _run_inner(name: str) -> str:
    """Run an action of `INNER` in a child, which is in the pid namespace unshared before."""
    done = subprocess.run(
        [sys.executable, "-m", "nsbox.host.probes_kernel", name],
        capture_output=True,
        text=True,
        check=False,
    )
    number, _, text = done.stdout.strip().partition(" ")
    if done.returncode or number != "0":
        error = int(number) if number.isdigit() else 0
        raise OSError(error, text or done.stderr.strip()[-200:] or f"status {done.returncode}")
    return text


def _userns() -> str:
    calls.unshare(c.CLONE_NEWUSER)
    return "made"


def _with_child(action: Callable[[int], str]) -> str:
    """Call `action` with the pid of a child that is in a new user namespace and waits."""
    child = subprocess.Popen(
        [sys.executable, "-m", "nsbox.host.probes_kernel", "wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            number, _, text = (child.stdout.readline() if child.stdout else "").partition(" ")
            if number != "0":
                raise OSError(int(number or 0), text.strip())
            return action(child.pid)
        finally:
            child.kill()


def _id_maps() -> str:
    inside, outside = 1000, os.geteuid()
    first = namespaces.HOST_ID_BASE
    with open("/proc/self/uid_map") as file:
        extents = [[int(word) for word in line.split()] for line in file]
    # Root of a user namespace may have no other id than its own.
    has_others = outside == 0 and any(a <= first < a + count for a, _, count in extents)
    if has_others:
        outside = first

    def write(pid: int) -> str:
        if not has_others:
            with open(f"/proc/{pid}/setgroups", "w") as file:
                file.write("deny")
        namespaces.write_id_maps(pid, inside, outside)
        return f"{inside} inside is {outside} on the host"

    return _with_child(write)


def _newuidmap() -> str:
    if os.geteuid() == 0:
        raise OSError(errno.EPERM, "for ordinary users; root has ids of its own to give")

    def write(pid: int) -> str:
        idmaps.write_launcher_maps(pid)
        with open(f"/proc/{pid}/uid_map") as file:
            lines = file.read().splitlines()
        if len(lines) < 2:
            raise OSError(errno.EPERM, "no range was mapped: see /etc/subuid and /etc/subgid")
        _, first, count = lines[1].split()
        return f"{count} ids from {first}"

    return _with_child(write)


def _namespaces() -> str:
    _enter()
    for name in ("mount", "pid", "network", "ipc", "uts", "cgroup"):
        try:
            calls.unshare(namespaces.FLAGS[name])
        except OSError as error:
            raise OSError(error.errno, f"{name} namespace: {error.strerror}") from error
    return "made"


def _time_namespace() -> str:
    _enter()
    calls.unshare(c.CLONE_NEWTIME)
    return "made"


def _mount_api() -> str:
    _enter_mounts()
    context = calls.fsopen("tmpfs", c.FSOPEN_CLOEXEC)
    calls.fsconfig_set_string(context, "size", str(_SIZE))
    calls.fsconfig_create(context)
    os.close(calls.fsmount(context, c.FSMOUNT_CLOEXEC, c.MOUNT_ATTR_NOSUID))
    os.mkdir("a")
    tree = calls.open_tree(c.AT_FDCWD, ".", c.OPEN_TREE_CLONE | c.OPEN_TREE_CLOEXEC)
    calls.mount_setattr(tree, "", c.AT_EMPTY_PATH, attr_set=c.MOUNT_ATTR_RDONLY)
    calls.move_mount(tree, "", c.AT_FDCWD, "a", c.MOVE_MOUNT_F_EMPTY_PATH)
    try:
        os.mkdir("a/b")
    except OSError as error:
        if error.errno == errno.EROFS:
            return "a read-only clone of a tree, attached"
        raise
    raise OSError(0, "a read-only mount could be written to")


def _tmpfs() -> str:
    _enter_mounts()
    try:
        with open("file", "wb", buffering=0) as file:
            for _ in range(2):
                file.write(bytes(_SIZE))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return f"full at {_SIZE} bytes"
        raise
    if os.stat("file").st_size > _SIZE:
        raise OSError(0, "its size is not kept")
    return f"full at {_SIZE} bytes"


def _proc() -> str:
    _enter_mounts(c.CLONE_NEWPID)
    return _run_inner("proc")


def _proc_pid() -> str:
    _enter_mounts(c.CLONE_NEWPID)
    return _run_inner("proc_pid")


def _overlay() -> str:
    _enter_mounts()
    for name in ("lower", "upper", "work", "merged"):
        os.mkdir(name)
    with open("lower/file", "w") as file:
        file.write("lower")
    options = "lowerdir=lower,upperdir=upper,workdir=work,userxattr"
    calls.mount("overlay", "merged", "overlay", 0, options)
    with open("merged/file", "a") as file:
        file.write("+upper")
    with open("lower/file") as lower, open("upper/file") as upper:
        if (lower.read(), upper.read()) == ("lower", "lower+upper"):
            return "written to, the lower layer unchanged"
    raise OSError(0, "a change went to the wrong layer")


def _idmapped_mounts() -> str:
    if os.geteuid():
        raise OSError(errno.EPERM, "for root only; a user's binds keep their owners")
    calls.unshare(c.CLONE_NEWNS)
    calls.mount(None, "/", None, c.MS_REC | c.MS_PRIVATE)
    mapping = namespaces.mapping_namespace((0, 0), namespaces.HOST_ID_BASE)
    tree = calls.open_tree(c.AT_FDCWD, "/etc", c.OPEN_TREE_CLONE | c.OPEN_TREE_CLOEXEC)
    calls.mount_setattr(tree, "", c.AT_EMPTY_PATH, attr_set=c.MOUNT_ATTR_IDMAP, userns_fd=mapping)
    owner = os.stat("passwd", dir_fd=tree).st_uid
    if owner != namespaces.HOST_ID_BASE:
        raise OSError(0, f"the owner in the mount is {owner}")
    return "the owner of /etc/passwd is another in the mount"


def _pivot_root() -> str:
    _enter_mounts()
    calls.pivot_root(".", ".")
    calls.umount2(".", c.MNT_DETACH)
    os.chdir("/")
    left = os.listdir("/")
    if left or os.getcwd() != "/":
        raise OSError(0, f"the new root shows {left}")
    return "an empty root, and no way back"


def _loopback() -> str:
    _enter(c.CLONE_NEWNET)
    interfaces.set_link_up("lo")
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=5).close()
    return "up, and a connection to 127.0.0.1"


def _seccomp() -> str:
    program = filters.filter_for(SeccompPolicy.default())
    calls.keyctl_join_session_keyring()
    calls.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    filters.load(program)
    try:
        calls.keyctl_join_session_keyring()
    except OSError as error:
        mode = proc.read_status()["Seccomp"]
        return (
            f"{len(program) // 8} instructions; keyctl is refused ({error.strerror}); mode {mode}"
        )
    raise OSError(0, "the filter is loaded, and keyctl is still allowed")


def _landlock() -> str:
    if not landlock.is_available():
        raise OSError(errno.ENOSYS, landlock.MISSING)
    program = Program()
    program.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    landlock.restrict(program, landlock.make_ruleset())
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("")  # the kernel chooses an abstract name (unix(7))
        server.listen()
        run(program.entries, [""])
        try:
            client.connect(server.getsockname())
        except PermissionError as error:
            return f"a connection to outside is refused ({error.strerror})"
    raise OSError(0, "a socket outside can still be reached")


def _memory_image() -> str:
    if image.WHY_NOT:
        raise UnsupportedHostError("memory_image", f"not compiled: {image.WHY_NOT}", _COMPILER)
    taken = image.take_when_tried()
    if taken is None:
        raise OSError(0, "a child could take none, or give nothing back")
    return f"{taken.size >> 10} KiB of this process"


def _json() -> str:
    try:
        from nsbox.values import _json as compiled
    except ImportError as error:
        raise UnsupportedHostError("json", f"not compiled: {error}", _COMPILER) from error
    value = {"a": [1, -0.5, None, True, "\u00e9\U0001f600\n"]}
    if compiled.encode_ascii(value) != json.dumps(value).encode():
        raise OSError(0, "it differs from the standard library")
    library = json_text.quick_decoder(may_import=True)
    return f"encodes; {'msgspec' if library else 'without msgspec (nsbox[fast]) json'} decodes"


PROBES: Final[dict[str, Callable[[], str]]] = {
    "userns": _userns,
    "id_maps": _id_maps,
    "newuidmap": _newuidmap,
    "namespaces": _namespaces,
    "time_namespace": _time_namespace,
    "mount_api": _mount_api,
    "tmpfs": _tmpfs,
    "proc": _proc,
    "proc_pid": _proc_pid,
    "overlay": _overlay,
    "idmapped_mounts": _idmapped_mounts,
    "pivot_root": _pivot_root,
    "loopback": _loopback,
    "seccomp": _seccomp,
    "landlock": _landlock,
    "memory_image": _memory_image,
    "json": _json,
}


# -- in a child ----------------------------------------------------------------------------------


def _answer(action: Callable[[], str]) -> None:
    try:
        print(0, action(), flush=True)
    except OSError as error:
        print(error.errno or 0, error.strerror, flush=True)


def _inner_proc(options: str | None, expected: str) -> str:
    os.mkdir("proc")
    flags = c.MS_NOSUID | c.MS_NODEV | c.MS_NOEXEC
    calls.mount("proc", "proc", "proc", flags, options)
    names = os.listdir("proc")
    numbers = sorted(name for name in names if name.isdigit())
    if numbers != ["1"]:
        raise OSError(0, f"it shows the processes {numbers[:5]}")
    if ("cpuinfo" in names) != (expected == "whole"):
        raise OSError(0, "it does not show what it should")
    return f"{expected}, with one process"


def _inner_wait() -> str:
    calls.unshare(c.CLONE_NEWUSER)
    return "made"


def _wait() -> None:
    _answer(_inner_wait)
    sys.stdin.read()


INNER: Final[dict[str, Callable[[], None]]] = {
    "proc": lambda: _answer(lambda: _inner_proc(None, "whole")),
    "proc_pid": lambda: _answer(lambda: _inner_proc("subset=pid", "processes only")),
    "wait": _wait,
}


if __name__ == "__main__":
    INNER[sys.argv[1]]()
