# SPDX-License-Identifier: Apache-2.0
"""What a birth does to its own mounts, inside a fresh copy of a layout's mount namespace.

Every path here is on a tree that nsbox made itself and that no guest code has seen yet: that is
what makes mounting by path safe (lesson of CVE-2025-31133 and its kin). Sources of the host were
cloned by descriptor before, in `userland`.
"""

from __future__ import annotations

import os

from nsbox.isolation.userland import EMPTY, NEW_ROOT, attach
from nsbox.linux import calls
from nsbox.linux import constants as c

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# OCI's maskedPaths and readonlyPaths (runc, moby). The environment's ids are mapped to no
# privileged id outside, so ordinary permissions protect these files already; this is the belt.
MASKED = (
    "acpi", "asound", "interrupts", "kcore", "keys", "latency_stats", "sched_debug", "scsi",
    "timer_list", "timer_stats",
)  # fmt: skip
READ_ONLY = ("bus", "fs", "irq", "sys", "sysrq-trigger")

PROC_FULL, PROC_PID_ONLY, PROC_NONE = "full", "subset=pid", "none"

_SCRATCH = c.MS_NOSUID | c.MS_NODEV
_NO_EXEC = _SCRATCH | c.MS_NOEXEC
# One inode for every 4 KiB: more than real trees need, and a bound on what empty files may cost
# (each takes about 1 KiB of kernel memory whatever its size; tmpfs(5), nr_inodes).
_BYTES_PER_INODE = 4096


def paths_to_mask() -> tuple[list[str], list[str], list[str]]:
    """Return the masked files, masked directories and read-only paths this kernel's /proc has."""
    present = set(os.listdir("/proc"))
    masked = [name for name in MASKED if name in present]
    directories = [name for name in masked if os.path.isdir(f"/proc/{name}")]
    files = [name for name in masked if name not in directories]
    return files, directories, [name for name in READ_ONLY if name in present]


def tmpfs_options(size: int) -> str:
    """Return the mount options of a private tmpfs of `size` bytes (tmpfs(5))."""
    return f"size={size},nr_inodes={max(64, size // _BYTES_PER_INODE)},mode=1777"


def take_root() -> None:
    """Make a copy of the layout's tree that this namespace may pivot into, and go there."""
    # The copies of a more privileged namespace's mounts are locked, and pivot_root(2) refuses a
    # locked mount; a recursive clone of them is not locked itself, though its parts stay so.
    fd = calls.open_tree(
        c.AT_FDCWD, NEW_ROOT, c.OPEN_TREE_CLONE | c.OPEN_TREE_CLOEXEC | c.AT_RECURSIVE
    )
    attach(fd, NEW_ROOT)
    os.chdir(NEW_ROOT)


def mount_scratch(size: int) -> None:
    """Mount the private /tmp, /dev/shm and /dev/pts; the working directory is the new root."""
    options = tmpfs_options(size)
    calls.mount("tmpfs", "tmp", "tmpfs", _SCRATCH, options)
    calls.mount("tmpfs", "dev/shm", "tmpfs", _NO_EXEC, options)
    # Every devpts mount is an instance of its own since Linux 4.7.
    pts = "ptmxmode=0666,mode=0620"
    calls.mount("devpts", "dev/pts", "devpts", c.MS_NOSUID | c.MS_NOEXEC, pts)


def mount_proc(masks: tuple[list[str], list[str], list[str]]) -> str:
    """Mount a /proc of this pid namespace and mask it; return how much of it could be had.

    The ladder: a whole /proc; with ``subset=pid`` (only processes, Linux 5.8) where the host's
    own is masked, as in a container; none. Never the host's.
    """
    try:
        calls.mount("proc", "proc", "proc", _NO_EXEC)
    except OSError:
        try:
            calls.mount("proc", "proc", "proc", _NO_EXEC, "subset=pid")
        except OSError:
            return PROC_NONE
        return PROC_PID_ONLY
    files, directories, read_only = masks
    for names, blank in ((files, "dev/null"), (directories, EMPTY)):
        for name in names:
            calls.mount(blank, f"proc/{name}", None, c.MS_BIND)
    for name in read_only:
        path = f"proc/{name}"
        calls.mount(path, path, None, c.MS_BIND)
        # A bind takes no other flag in the same call (mount(2)).
        calls.mount(None, path, None, c.MS_REMOUNT | c.MS_BIND | c.MS_RDONLY | _NO_EXEC)
    return PROC_FULL


def mount_extra(mounts: list[dict[str, Any]], trees: dict[str, int]) -> None:
    """Mount what is this environment's own: tmpfs mounts, and the binds in `trees` by path."""
    for mount in mounts:
        destination = mount["destination"]
        if mount["shared"]:
            continue
        if destination.startswith("/tmp/"):  # noqa: S108 - the environment's own
            os.makedirs(os.path.dirname(destination[1:]), 0o755, exist_ok=True)
            if mount["type"] == "tmpfs" or mount["is_directory"]:
                os.makedirs(destination[1:], 0o755, exist_ok=True)
            else:
                os.close(os.open(destination[1:], os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
        if mount["type"] == "tmpfs":
            options = tmpfs_options(mount["size"])
            calls.mount("tmpfs", destination[1:], "tmpfs", _SCRATCH, options)
        else:
            attach(trees[destination], destination[1:])


def pivot() -> None:
    """Make the working directory the root and let go of everything else."""
    # pivot_root(2), NOTES: with "." twice the old root is stacked on the new one, so that no
    # directory for it is needed and one lazy unmount takes it away.
    calls.pivot_root(".", ".")
    calls.umount2(".", c.MNT_DETACH)
    os.chdir("/")
    if os.getcwd() != "/":
        # A working directory outside the root reads as "(unreachable)" (CVE-2024-21626).
        raise calls.SyscallError("getcwd", 2, "/")
