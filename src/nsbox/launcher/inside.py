# SPDX-License-Identifier: Apache-2.0
"""The environment's own steps of a birth, in the order in which the kernel needs them.

Each is *prepared* by the template as a list of calls (`nsbox.linux.prepared`), made by the clone.
The first closes what the clone inherited, the last loads the filter; after it no step may come.
"""

from __future__ import annotations

import os

from nsbox.isolation import filesystem, landlock, privileges
from nsbox.launcher.steps import Step
from nsbox.linux import constants as c
from nsbox.linux.descriptors import gaps
from nsbox.linux.interfaces import set_link_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from nsbox.launcher.messages import Spec
    from nsbox.linux.prepared import Name, Program

# Descriptors that every clone finds under these numbers; all others are the template's own.
LIFELINE = 3
CONTROL = 4
SYNC = 5
SIGNALS = 6
RULESET = 7  # of Landlock, where the kernel has scopes; closed before anything of the guest's
PAGEMAP = 8  # PID 1 closes it when it has given memory back
FIRST_OTHER = 9

MAPPED = b"m"


class Inherited:
    """What a birth brings along besides its spec.

    Attributes:
        extent: How much of a /proc it can have (`filesystem.probe_proc`).
        has_image: Whether it shares an image of the template's memory, and keeps `PAGEMAP`.
        drop_groups: Whether setgroups(2) is allowed.
        tasks: Descriptors of the v1 ``tasks`` files to write itself into.
        trees: Destination -> descriptor of its own binds' detached trees.
        name: Filled in with its id before it is cloned.
        cgroup_view: Hierarchy -> where it sees its own cgroup (`isolation.cgroups.view`).
    """

    __slots__ = ("cgroup_view", "drop_groups", "extent", "has_image", "name", "tasks", "trees")

    def __init__(
        self,
        extent: str,
        has_image: bool,
        drop_groups: bool,
        tasks: list[int],
        trees: dict[str, int],
        name: Name,
        cgroup_view: dict[str, str],
    ) -> None:
        self.extent = extent
        self.has_image = has_image
        self.drop_groups = drop_groups
        self.tasks = tasks
        self.trees = trees
        self.name = name
        self.cgroup_view = cgroup_view


def _start_session(program: Program, _spec: Spec, birth: Inherited) -> None:
    # First of all: nothing of the template's may outlive this point in the clone.
    program.set_name(birth.name)
    kept = [*range(PAGEMAP + birth.has_image), *birth.tasks, *birth.trees.values()]
    for first, last in gaps(kept):
        program.close_range(first, last)
    program.call(os.setsid)


def _join_cgroups(program: Program, _spec: Spec, birth: Inherited) -> None:
    for fd in birth.tasks:
        program.call(os.write, fd, b"0")
        program.call(os.close, fd)
    if birth.tasks:
        # The root of a cgroup namespace is where its maker was then (cgroup_namespaces(7)):
        # clone3's is still right for v2, where the environment was born in its cgroup.
        program.unshare(c.CLONE_NEWCGROUP)


def _await_maps(program: Program, _spec: Spec, _birth: Inherited) -> None:
    # The template holds the only other end: its death at any moment reads as the end of the pipe.
    # Whether there are maps is not asked: without them the kernel refuses the next step (EINVAL).
    program.call(os.read, SYNC, 1)
    program.call(os.close, SYNC)


def _become_user(program: Program, spec: Spec, birth: Inherited) -> None:
    privileges.become(program, spec.user_id, drop_groups=birth.drop_groups)


def _set_hostname(program: Program, spec: Spec, _birth: Inherited) -> None:
    program.sethostname(spec.layout.hostname)


def _set_loopback_up(program: Program, spec: Spec, _birth: Inherited) -> None:
    if spec.namespaces & c.CLONE_NEWNET:
        program.call(set_link_up, "lo")


def _take_root(program: Program, _spec: Spec, _birth: Inherited) -> None:
    filesystem.take_root(program)


def _show_cgroup(program: Program, spec: Spec, birth: Inherited) -> None:
    filesystem.show_cgroup(program, birth.cgroup_view, birth.name)


def _mount_scratch(program: Program, spec: Spec, _birth: Inherited) -> None:
    filesystem.mount_scratch(program, spec.tmp_size)


def _mount_proc(program: Program, _spec: Spec, birth: Inherited) -> None:
    filesystem.mount_proc(program, birth.extent)


def _mount_extra(program: Program, spec: Spec, birth: Inherited) -> None:
    filesystem.mount_extra(program, spec.layout.mounts, birth.trees)


def _pivot(program: Program, _spec: Spec, _birth: Inherited) -> None:
    filesystem.pivot(program)


def _set_rlimits(program: Program, spec: Spec, _birth: Inherited) -> None:
    privileges.set_rlimits(program, spec.rlimits)


def _drop_privileges(program: Program, _spec: Spec, _birth: Inherited) -> None:
    privileges.drop_all(program)
    privileges.shield(program)


def _restrict(program: Program, spec: Spec, _birth: Inherited) -> None:
    if spec.landlock:
        landlock.restrict(program, RULESET)


def _load_filter(program: Program, spec: Spec, _birth: Inherited) -> None:
    if spec.seccomp:
        program.set_filter(bytes.fromhex(spec.seccomp))


def _user_text(spec: Spec) -> str:
    return f"no supplementary groups; become uid and gid {spec.user_id}"


def _mounts_text(spec: Spec) -> str:
    own = [mount.destination for mount in spec.layout.mounts if not mount.shared]
    return f"attach this environment's own mounts: {', '.join(own) or 'none'}"


def _rlimit_text(spec: Spec) -> str:
    return "set " + ", ".join(f"RLIMIT_{k.upper()}={v}" for k, v in spec.rlimits.items())


def _landlock_text(spec: Spec) -> str:
    if not spec.landlock:
        return f"none: {landlock.MISSING}"
    return "reach no abstract Unix socket and no process outside"


def _environment_step(
    name: str, text: str | Callable[[Spec], str], prepare: Callable[..., None]
) -> Step:
    return Step("environment", name, text, prepare)


STEPS = (
    _environment_step("session", "close every inherited descriptor; a session of its own",
                      _start_session),
    _environment_step("cgroup-join", "enter the v1 cgroups, on hybrid and v1 hosts",
                      _join_cgroups),
    _environment_step("maps", "wait for the id maps", _await_maps),
    _environment_step("identity", _user_text, _become_user),
    _environment_step("hostname", lambda spec: f"sethostname {spec.layout.hostname!r}",
                      _set_hostname),
    _environment_step("loopback", "set lo up, where the namespace was not made ready before",
                      _set_loopback_up),
    _environment_step("root", "bind the layout's tree anew and go there", _take_root),
    _environment_step("cgroup-view", "bind its own cgroup at /sys/fs/cgroup, read-only, where "
                      "memory or CPUs are limited", _show_cgroup),
    _environment_step("scratch",
                      lambda spec: f"mount /tmp and /dev/shm of {spec.tmp_size} bytes each, "
                      "and /dev/pts", _mount_scratch),
    _environment_step("proc", "mount /proc of its own pid namespace, masked", _mount_proc),
    _environment_step("mounts", _mounts_text, _mount_extra),
    _environment_step("pivot", "pivot_root, detach the old root, check the working directory",
                      _pivot),
    _environment_step("rlimits", _rlimit_text, _set_rlimits),
    _environment_step("privileges", "lock securebits, empty all capability sets, no_new_privs, "
                      "not dumpable, new keyring", _drop_privileges),
    _environment_step("landlock", _landlock_text, _restrict),
    _environment_step("seccomp", lambda spec: f"load the filter: {spec.seccomp_name}",
                      _load_filter),
)  # fmt: skip
