# SPDX-License-Identifier: Apache-2.0
"""What a birth does to its own mounts, inside a fresh copy of a layout's mount namespace.

Every path here is on a tree that nsbox made itself and that no guest code has seen yet: that is
what makes mounting by path safe (lesson of CVE-2025-31133 and its kin). Sources of the host were
cloned by descriptor before, in `userland`.
"""

from __future__ import annotations

import errno
import os

from nsbox.linux import calls
from nsbox.linux import constants as c
from nsbox.linux.binding import is_unknown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nsbox.isolation.layout import LayoutMount
    from nsbox.linux.prepared import Name, Program

NEW_ROOT = "/newroot"
"""Where a layout has the future root of its environments (`userland`)."""
EMPTY = "/empty"
"""Where it has an empty directory, to mask others with."""
CGROUPS = "/cgroups"
"""Where it has the launcher's cgroups, read-only, to show an environment its own of."""

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
# One inode for every KiB, which is what an empty file costs of kernel memory: so they cost no more
# than full ones. Each name of a hard link is counted, and extended attributes are by their size
# (mm/shmem.c, shmem_reserve_inode, simple_xattr_space).
_NOT_KNOWN = 3  # status of a probe that could not tell
_BYTES_PER_INODE = 1024


TERMINALS = 64
"""Pseudoterminals an environment may have; all of the host share kernel.pty.max (4,096)."""


def tmpfs_options(size: int) -> str:
    """Return the mount options of a private tmpfs of `size` bytes (tmpfs(5))."""
    return f"size={size},nr_inodes={max(64, size // _BYTES_PER_INODE)},mode=1777"


def attach(fd: int, destination: str) -> None:
    """Attach the detached tree `fd` at `destination` and close `fd`."""
    calls.move_mount(fd, "", c.AT_FDCWD, destination, c.MOVE_MOUNT_F_EMPTY_PATH)
    os.close(fd)


def take_root(program: Program) -> None:
    """Prepare: bind the layout's tree recursively, so that pivot_root(2) takes it; chdir there."""
    # The copies of a more privileged namespace's mounts are locked, and pivot_root(2) refuses a
    # locked mount; a recursive bind of them is not locked itself, though its parts stay so.
    program.mount(NEW_ROOT, NEW_ROOT, None, c.MS_BIND | c.MS_REC)
    program.call(os.chdir, NEW_ROOT)


def show_cgroup(program: Program, places: dict[str, str], name: Name) -> None:
    """Prepare: bind the environment's own cgroup of each hierarchy, read-only.

    `places` maps hierarchies to paths below the new root; `name` is the cgroup's.
    """
    for hierarchy, place in places.items():
        program.call(os.chdir, f"{CGROUPS}/{hierarchy}")
        # As its source is; and locked so, for that came with a more privileged namespace.
        program.bind_named(name, NEW_ROOT + place)
    if places:
        program.call(os.chdir, NEW_ROOT)


def mount_scratch(program: Program, size: int) -> None:
    """Prepare: mount the private /tmp, /dev/shm, /dev/mqueue and /dev/pts below the new root."""
    options = tmpfs_options(size)
    program.mount("tmpfs", "tmp", "tmpfs", _SCRATCH, options)
    program.mount("tmpfs", "dev/shm", "tmpfs", _NO_EXEC, options)
    program.mount("mqueue", "dev/mqueue", "mqueue", _NO_EXEC)
    # Every devpts mount is an instance of its own since Linux 4.7.
    pts = f"ptmxmode=0666,mode=0620,max={TERMINALS}"
    program.mount("devpts", "dev/pts", "devpts", c.MS_NOSUID | c.MS_NOEXEC, pts)


def mount_proc(program: Program, extent: str) -> None:
    """Prepare: mount a /proc of this pid namespace, as much of it as `probe_proc` found, masked."""
    if extent == PROC_NONE:
        return
    options = "" if extent == PROC_FULL else extent
    program.mount("proc", "proc", "proc", _NO_EXEC, options)
    if extent != PROC_FULL:
        return
    present = set(os.listdir("/proc"))
    for name in MASKED:
        if name in present:
            blank = EMPTY if os.path.isdir(f"/proc/{name}") else "dev/null"
            program.mount(blank, f"proc/{name}", None, c.MS_BIND)
    for name in READ_ONLY:
        if name in present:
            path = f"proc/{name}"
            program.mount(path, path, None, c.MS_BIND)
            # A bind takes no other flag in the same call (mount(2)).
            flags = c.MS_REMOUNT | c.MS_BIND | c.MS_RDONLY | _NO_EXEC
            program.mount(None, path, None, flags)


def mount_extra(program: Program, mounts: list[LayoutMount], trees: dict[str, int]) -> None:
    """Prepare: mount what is this environment's own: tmpfs, and the binds in `trees` by path."""
    for mount in mounts:
        if mount.shared:
            continue
        destination = mount.destination
        if destination.startswith("/tmp/"):  # noqa: S108 - the environment's own
            program.call(_make_mount_point, destination[1:], mount.is_directory)
        if mount.type == "tmpfs":
            options = tmpfs_options(mount.size)
            program.mount("tmpfs", destination[1:], "tmpfs", _SCRATCH, options)
        else:
            program.call(attach, trees[destination], destination[1:])


def _make_mount_point(path: str, is_directory: bool) -> None:
    os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
    if is_directory:
        os.makedirs(path, 0o755, exist_ok=True)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))


def pivot(program: Program) -> None:
    """Prepare: make the working directory the root, and unmount the old one."""
    # pivot_root(2), NOTES: with "." twice the old root is stacked on the new one, so that no
    # directory for it is needed and one lazy unmount takes it away.
    program.pivot_root(".", ".")
    program.umount2(".", c.MNT_DETACH)
    program.call(os.chdir, "/")
    program.expect_root()


def probe_proc() -> str:
    """Return how much of a /proc can be mounted in a new pid namespace of a layout.

    ``"full"``; ``"subset=pid"``, processes alone (Linux 5.8), where the host's own is masked, as in
    a container; ``"none"``. Never the host's. The caller has entered the layout's mount namespace.
    """
    extents = (PROC_FULL, PROC_PID_ONLY, PROC_NONE)
    pid, pidfd = calls.clone3(c.CLONE_NEWUSER | c.CLONE_NEWPID | c.CLONE_NEWNS)
    if pid == 0:
        answer = _NOT_KNOWN
        try:
            for index, options in enumerate((None, PROC_PID_ONLY)):
                try:
                    calls.mount("proc", f"{NEW_ROOT}/proc", "proc", _NO_EXEC, options)
                except OSError as error:
                    if is_unknown(error):
                        break
                    continue
                answer = index
                break
            else:
                answer = 2
        finally:
            os._exit(answer)
    os.close(pidfd)
    answer = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if answer not in range(len(extents)):
        raise OSError(errno.EINTR, "the probe of /proc failed, or was killed from outside")
    return extents[answer]
