# SPDX-License-Identifier: Apache-2.0
"""This process's own cgroup in each hierarchy, or the reason why it cannot be used.

A controller is attached to one hierarchy only, v1 or v2, and the kernel tells which in
``/proc/self/cgroup`` (cgroups(7)): ``4:memory:/path`` is v1, ``0::/path`` is v2. The path counts
from the root of the cgroup namespace, the mounts in ``/proc/self/mountinfo`` too.
"""

from __future__ import annotations

import os

from nsbox.errors import SyscallError
from nsbox.isolation.cgroups.files import read_processes, read_text
from nsbox.isolation.cgroups.owner import HOST_LEAF
from nsbox.linux import proc
from nsbox.linux.binding import is_unknown
from nsbox.linux.questions import exists, may

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nsbox.linux.proc import MountInfo

CONTROLLERS = ("memory", "pids", "cpu", "cpuacct", "cpuset", "io", "freezer")
NAMES = (*CONTROLLERS, "unified")
V1_NAMES = {"io": "blkio"}
CORE_ON_V2 = ("cpuacct", "freezer")
"""v1 controllers whose work v2 does in every cgroup, without a controller."""

HINT_DELEGATE = (
    "start the program with `systemd-run --user --scope -p Delegate=yes -- PROGRAM`, "
    "or set Delegate=yes in its systemd unit"
)
HINT_V1_USER = (
    "on cgroup v1 only root can hand a cgroup to a user: run as root, or boot with "
    "systemd.unified_cgroup_hierarchy=1 and use `systemd-run --user --scope -p Delegate=yes`"
)
HINT_READ_ONLY = (
    "this looks like a container with a read-only cgroup mount; podman: run it with "
    "`--security-opt unmask=/sys/fs/cgroup --cgroups=split`; docker: with `--privileged`"
)
HINT_CONTROLLER = (
    "the parent cgroup does not hand the controller down: as root, `systemctl edit user@.service`, "
    "add `[Service]` and `Delegate=cpu cpuset io memory pids`, and log in again"
)
HINT_KERNEL = "use a kernel built with this controller and not booted with cgroup_disable="
HINT_MOUNT = "as root: `mount -t cgroup2 none /sys/fs/cgroup`"
HINT_OUTSIDE = (
    "mount the cgroup file system of this cgroup namespace, or start the program in a cgroup that "
    "the mounts of this container show"
)


class Place:
    """One controller, or "unified": `version` 1 or 2 and the own `directory`, or 0 and why."""

    __slots__ = ("directory", "hint", "name", "reason", "version")

    def __init__(
        self, name: str, version: int, directory: str = "", reason: str = "", hint: str = ""
    ) -> None:
        self.name = name
        self.version = version
        self.directory = directory
        self.reason = reason
        self.hint = hint

    def __repr__(self) -> str:
        found = self.directory if self.version else self.reason
        return f"Place({self.name!r}, {self.version}, {found!r})"


class Hierarchies:
    """The own cgroup of this process in every hierarchy; a mapping from name to `Place`."""

    def __init__(self, places: dict[str, Place]) -> None:
        self.places = places

    @classmethod
    def detect(cls) -> Hierarchies:
        """Find the own cgroups of the running process and check that they can be used.

        Raises:
            OSError: That is not known (`binding.is_unknown`).
        """
        try:
            with open("/proc/self/cgroup", "rb") as stream:
                cgroup_text = os.fsdecode(stream.read())
            with open("/proc/self/mountinfo", "rb") as stream:
                mountinfo_text = os.fsdecode(stream.read())
        except OSError as error:
            if is_unknown(error):
                raise
            why = f"{error.filename} cannot be read: {error.strerror}"
            hint = "mount /proc, and use a kernel with CONFIG_CGROUPS"
            return cls({name: Place(name, 0, "", why, hint) for name in NAMES})
        found = locate(cgroup_text, mountinfo_text)
        found.check()
        return found

    def __getitem__(self, name: str) -> Place:
        return self.places[name]

    @property
    def bases(self) -> list[str]:
        """The own cgroup's directories, each once."""
        return list(dict.fromkeys(p.directory for p in self.places.values() if p.version))

    def miss(self, name: str, reason: str, hint: str) -> None:
        """Mark a place as not usable, with the reason and the remedy."""
        self.places[name] = Place(name, 0, "", reason, hint)

    def check(self) -> None:
        """Mark places that cannot be used: not ours, read-only, not delegated, not enabled."""
        verdicts: dict[str, tuple[str, str] | None] = {}
        for name, place in list(self.places.items()):
            if not place.version:
                continue
            if place.directory not in verdicts:
                verdicts[place.directory] = _check_directory(place.directory, place.version)
            verdict = verdicts[place.directory]
            if verdict is None and place.version == 2 and name in CONTROLLERS:
                verdict = self._check_controller(name, place.directory)
            if verdict is not None:
                self.miss(name, *verdict)

    def _check_controller(self, name: str, directory: str) -> tuple[str, str] | None:
        if name in CORE_ON_V2:
            return None
        try:
            if name in read_text(f"{directory}/cgroup.controllers").split():
                return None
            reason = f"controller {name} is not in {directory}/cgroup.controllers"
            # Only the root cgroup has no cgroup.events; what it lacks the kernel has not, or
            # a v1 hierarchy of somebody else's mount namespace took it.
            top = directory
            while exists(f"{os.path.dirname(top)}/cgroup.controllers"):
                top = os.path.dirname(top)
            is_root = not exists(f"{top}/cgroup.events")
            if is_root and name not in read_text(f"{top}/cgroup.controllers").split():
                return reason, HINT_KERNEL
        except SyscallError as error:
            if is_unknown(error):
                raise
            return str(error), HINT_CONTROLLER
        return reason, HINT_CONTROLLER


def _check_directory(directory: str, version: int) -> tuple[str, str] | None:
    procs = f"{directory}/cgroup.procs"
    try:
        processes = read_processes(directory)
        if version == 2:
            processes += read_processes(f"{directory}/{HOST_LEAF}")
    except SyscallError as error:  # EOPNOTSUPP: a threaded cgroup
        if is_unknown(error):
            raise
        return f"{error}", "start the program in a cgroup whose cgroup.type is domain"
    # Another file system mounted over it, or another host's mount, must never be taken for ours.
    if os.getpid() not in processes:
        return f"{procs} does not list this process", HINT_OUTSIDE
    if may(directory, os.W_OK | os.X_OK) and may(procs, os.W_OK):
        return None
    if os.statvfs(directory).f_flag & os.ST_RDONLY:
        return f"{directory} is mounted read-only", HINT_READ_ONLY
    hint = HINT_DELEGATE if version == 2 else HINT_V1_USER
    return f"{directory} is not writable by this user (no delegation)", hint


def _directory(mount: MountInfo, path: str) -> tuple[str, bool] | None:
    """Return where a mount shows cgroup `path`, and whether that is below its root."""
    if path == mount.root:
        rest = ""
    elif mount.root == "/":
        rest = path
    elif path.startswith(mount.root + "/"):
        rest = path[len(mount.root) :]
    else:
        return None
    if ".." in rest.split("/"):  # above the cgroup namespace, and not below this mount
        return None
    return (mount.mount_point.rstrip("/") + rest).rstrip("/") or "/", rest not in ("", "/")


def locate(proc_self_cgroup_text: str, mountinfo_text: str) -> Hierarchies:
    """Return the own cgroup of each controller from the two texts; touches nothing.

    Controllers that no v1 hierarchy has are placed in the v2 one, if there is one; whether it
    really has them stands in its ``cgroup.controllers``, which `Hierarchies.check` reads. A v2
    cgroup named ``nsbox.host`` is a leaf that an nsbox made: the own cgroup is its parent.
    """
    v1_paths: dict[str, str] = {}
    v2_path = ""
    for number, names, shown in proc.parse_cgroup(proc_self_cgroup_text):
        # A cgroup removed under its process still shows, so marked.
        path = shown.removesuffix(" (deleted)")
        if number == 0 and not names:
            v2_path = path
        for name in names:
            v1_paths[name] = path
    # Only these lines are parsed: a host may have thousands of mounts.
    lines = [line for line in mountinfo_text.split("\n") if " - cgroup" in line]
    mounts = [
        mount
        for mount in proc.parse_mountinfo("\n".join(lines))
        if mount.fstype in ("cgroup", "cgroup2")
    ]

    places: dict[str, Place] = {}
    unified = _place_v2(v2_path, mounts)
    for name in CONTROLLERS:
        v1_name = V1_NAMES.get(name, name)
        if v1_name in v1_paths:
            places[name] = _place_v1(name, v1_name, v1_paths[v1_name], mounts)
        else:
            places[name] = Place(
                name, unified.version, unified.directory, unified.reason, unified.hint
            )
            if not unified.version and not v2_path:
                places[name].reason = f"no cgroup hierarchy has the controller {v1_name}"
                places[name].hint = HINT_KERNEL
    places["unified"] = unified
    return Hierarchies(places)


def _place_v2(path: str, mounts: list[MountInfo]) -> Place:
    if not path:
        return Place("unified", 0, "", "this kernel or host has no cgroup v2 hierarchy", HINT_MOUNT)
    candidates = [mount for mount in mounts if mount.fstype == "cgroup2"]
    if not candidates:
        return Place("unified", 0, "", "no cgroup2 file system is mounted", HINT_MOUNT)
    for mount in reversed(candidates):  # a later mount lies over an earlier one
        found = _directory(mount, path)
        if found is None:
            continue
        directory, below_root = found
        if below_root and os.path.basename(directory) == HOST_LEAF:
            directory = os.path.dirname(directory)
        return Place("unified", 2, directory)
    return Place("unified", 0, "", f"no cgroup2 mount shows the own cgroup {path}", HINT_OUTSIDE)


def _place_v1(name: str, v1_name: str, path: str, mounts: list[MountInfo]) -> Place:
    candidates = [m for m in mounts if m.fstype == "cgroup" and v1_name in m.super_options]
    if not candidates:
        hint = f"as root: `mount -t cgroup -o {v1_name} none /sys/fs/cgroup/{v1_name}`"
        return Place(name, 0, "", f"the v1 hierarchy of {v1_name} is not mounted", hint)
    for mount in reversed(candidates):
        found = _directory(mount, path)
        if found is not None:
            return Place(name, 1, found[0])
    return Place(name, 0, "", f"no {v1_name} mount shows the own cgroup {path}", HINT_OUTSIDE)
