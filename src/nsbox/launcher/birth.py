# SPDX-License-Identifier: Apache-2.0
"""The steps of a birth, in the order in which the kernel needs them.

Each step is a value: a name (in `SetupError.step`), a description (`nsbox plan`) and what it does.
The launcher's steps run first and end with the clone and its id maps. The environment's are
*prepared* by the launcher, as a list of calls (`nsbox.linux.program`), and made by the clone.
"""

from __future__ import annotations

import gc
import json
import os
import socket

from nsbox.guest.init import Init
from nsbox.isolation import filesystem, namespaces, privileges, userland
from nsbox.linux import calls
from nsbox.linux import constants as c
from nsbox.linux.descriptors import close_all, gaps
from nsbox.linux.program import Program, run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

    from nsbox.isolation.cgroups import EnvironmentCgroup
    from nsbox.launcher.server import Server
    from nsbox.linux.program import Entry

_MAPPED = b"m"


class Step:
    """One step of a birth.

    Attributes:
        side: ``"launcher"`` or ``"environment"``: who makes it.
        name: For errors and for people.
        run: What the launcher does (`Birth`), or how it prepares what the environment does
            (`Birth`, `Program`).
        own: Whether what is prepared is this birth's own, and not that of all with its spec.
    """

    __slots__ = ("_text", "name", "own", "run", "side")

    def __init__(
        self,
        side: str,
        name: str,
        text: str | Callable[[dict[str, Any]], str],
        run: Callable[..., None],
        *,
        own: bool = False,
    ) -> None:
        self.side = side
        self.name = name
        self._text = text
        self.run = run
        self.own = own

    def describe(self, spec: dict[str, Any]) -> str:
        """Say what the step does for the environment `spec` describes."""
        return self._text if isinstance(self._text, str) else self._text(spec)


class Birth:
    """An environment on its way: what both sides of the clone need to know."""

    def __init__(self, server: Server, spec: dict[str, Any], control: int, lifeline: int) -> None:
        self.server = server
        self.spec = spec
        self.control = control
        self.lifeline = lifeline
        self.step = ""
        self.host_id = 0
        self.takes_id = False
        self.cgroup: EnvironmentCgroup | None = None
        self.layout = -1
        self.tasks: list[int] = []
        self.trees: dict[str, int] = {}
        self.entries: list[Entry] = []
        self.ready = b""
        self.pid = 0
        self.pidfd = -1
        self.sync, self._child_sync = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def run_launcher_side(self) -> None:
        """Run the launcher's steps; an exception leaves `step` at the one that failed."""
        for step in LAUNCHER_STEPS:
            self.step = step.name
            step.run(self)
        self._child_sync.close()

    def close(self) -> None:
        """Let go of what only the birth needed."""
        self.sync.close()
        self._child_sync.close()
        close_all([*self.tasks, *self.trees.values()])
        self.tasks, self.trees = [], {}

    # -- the launcher's side -------------------------------------------------------------------

    def _take_id(self) -> None:
        pool = self.server.ids
        self.takes_id = pool is not None
        self.host_id = 0 if pool is None else pool.take()

    def _make_cgroup(self) -> None:
        self.cgroup = self.server.make_cgroup(self.spec)
        if self.cgroup is not None:
            self.tasks = self.cgroup.open_tasks()

    def _find_layout(self) -> None:
        self.layout = self.server.layout(self.spec["layout"])

    def _open_trees(self) -> None:
        for mount in self.spec["layout"]["mounts"]:
            if mount["shared"] or mount["type"] != "bind":
                continue
            fd = userland.clone_tree(mount["source"], writable=mount["writable"])
            self.trees[mount["destination"]] = fd
            if mount["idmapped"]:
                owner = os.stat(mount["source"])
                mapping = namespaces.mapping_namespace((owner.st_uid, owner.st_gid), self.host_id)
                try:
                    calls.mount_setattr(
                        fd, "", c.AT_EMPTY_PATH, attr_set=c.MOUNT_ATTR_IDMAP, userns_fd=mapping
                    )
                finally:
                    os.close(mapping)

    def _prepare(self) -> None:
        extent = self.server.proc_extent(self.layout)
        self.ready = extent.encode()
        shared = self.server.prepared.get(self.spec["key"])
        if shared is None:
            shared = {step.name: self._entries(step) for step in ENVIRONMENT_STEPS if not step.own}
            self.server.remember(self.spec["key"], shared)
        for step in ENVIRONMENT_STEPS:
            self.entries += self._entries(step) if step.own else shared[step.name]

    def _entries(self, step: Step) -> list[Entry]:
        program = Program()
        program.step = step.name
        step.run(self, program)
        return program.entries

    def _clone(self) -> None:
        server = self.server
        flags = self.spec["namespaces"]
        networks = server.networks if self.spec["network"] == "none" else None
        cgroup = self.cgroup.clone_fd if self.cgroup is not None else -1
        if networks is not None:
            networks.enter()
        try:
            calls.setns(self.layout, c.CLONE_NEWNS)
            try:
                self.pid, self.pidfd = calls.clone3(flags, cgroup=cgroup)
                if self.pid == 0:
                    self._run_environment_side()
            finally:
                calls.setns(server.home_mounts, c.CLONE_NEWNS)
        finally:
            if networks is not None:
                networks.leave()

    def _write_id_maps(self) -> None:
        namespaces.write_id_maps(self.pid, self.spec["user_id"], self.host_id)
        self.sync.send(_MAPPED)

    # -- the environment's side ----------------------------------------------------------------

    def _run_environment_side(self) -> NoReturn:
        at = [""]
        try:
            gc.disable()
            run(self.entries, at)
            self._child_sync.close()
            os.write(self.control, self.ready)
            Init(self.control, self.lifeline).run()
        except BaseException as error:  # noqa: BLE001 - there is no caller to raise to
            try:
                self._child_sync.send(json.dumps(describe_error(at[0], error)).encode())
            except OSError:
                pass
        finally:
            os._exit(1)

    def _start_session(self, program: Program) -> None:
        # First of all: nothing of the launcher's may outlive this point in the child. The
        # launcher's objects that own these descriptors stay referenced and are never closed.
        kept = (
            *(0, 1, 2, self.control, self.lifeline, self._child_sync.fileno()),
            *self.tasks,
            *self.trees.values(),
        )
        for first, last in gaps(kept):
            program.close_range(first, last)
        program.call(os.setsid)
        program.call(privileges.set_name, "nsbox-" + self.spec["id"])

    def _join_cgroups(self, program: Program) -> None:
        for fd in self.tasks:
            program.call(os.write, fd, b"0")
            program.call(os.close, fd)
        if self.tasks:
            # The root of a cgroup namespace is where its maker was then (cgroup_namespaces(7)):
            # clone3's is still right for v2, where the environment was born in its cgroup.
            program.unshare(c.CLONE_NEWCGROUP)

    def _await_maps(self, program: Program) -> None:
        program.call(_await, self._child_sync)

    def _become_user(self, program: Program) -> None:
        drop_groups = self.server.may_drop_groups
        privileges.become(program, self.spec["user_id"], drop_groups=drop_groups)

    def _set_hostname(self, program: Program) -> None:
        program.call(socket.sethostname, self.spec["layout"]["hostname"])

    def _set_loopback_up(self, program: Program) -> None:
        if self.spec["namespaces"] & c.CLONE_NEWNET:
            program.call(calls.set_link_up, "lo")

    def _take_root(self, program: Program) -> None:
        filesystem.take_root(program)

    def _mount_scratch(self, program: Program) -> None:
        filesystem.mount_scratch(program, self.spec["tmp_size"])

    def _mount_proc(self, program: Program) -> None:
        filesystem.mount_proc(program, self.ready.decode())

    def _mount_extra(self, program: Program) -> None:
        filesystem.mount_extra(program, self.spec["layout"]["mounts"], self.trees)

    def _pivot(self, program: Program) -> None:
        filesystem.pivot(program)

    def _set_rlimits(self, program: Program) -> None:
        privileges.set_rlimits(program, self.spec["rlimits"])

    def _drop_privileges(self, program: Program) -> None:
        program.call(privileges.drop_all)
        program.call(privileges.shield)

    def _load_filter(self, program: Program) -> None:
        if self.spec["seccomp"]:
            program.call(calls.seccomp_set_filter, bytes.fromhex(self.spec["seccomp"]))


def _await(sync: socket.socket) -> None:
    # The launcher's own copy of this end is closed after the clone, so that its death reads as
    # EOF here at every moment.
    if sync.recv(1) != _MAPPED:
        os._exit(1)


def describe_error(step: str, error: BaseException) -> dict[str, Any]:
    """Return an error of a birth as the JSON-able fields of a `SetupError`."""
    return {
        "step": step,
        "errno": getattr(error, "errno", None) or 0,
        "message": str(error).removeprefix(f"[Errno {error.errno}] ")
        if isinstance(error, OSError)
        else repr(error),
    }


def _cgroup_text(spec: dict[str, Any]) -> str:
    limits = ", ".join(f"{name}={value}" for name, value in spec["cgroup_limits"].items() if value)
    return f"make the cgroup below the launcher's own, with {limits or 'no limit'}"


def _mounts_text(spec: dict[str, Any]) -> str:
    own = [mount["destination"] for mount in spec["layout"]["mounts"] if not mount["shared"]]
    return f"attach this environment's own mounts: {', '.join(own) or 'none'}"


def _layout_text(spec: dict[str, Any]) -> str:
    layout = spec["layout"]
    shared = [mount["destination"] for mount in layout["mounts"] if mount["shared"]]
    parts = [layout["rootfs"] or "/usr", *shared]
    return (
        "make once, or find, the mount namespace with the read-only userland: "
        f"{', '.join(parts)}, synthetic /etc, minimal /dev"
    )


def _clone_text(spec: dict[str, Any]) -> str:
    names = ", ".join(spec["namespace_names"])
    network = (
        "with an unused network namespace (loopback up)"
        if spec["network"] == "none"
        else "in the host's network"
    )
    return f"clone3 the launcher into new {names} namespaces, {network}, into the cgroup where v2"


def _user_text(spec: dict[str, Any]) -> str:
    return f"no supplementary groups; become uid and gid {spec['user_id']}"


def _rlimit_text(spec: dict[str, Any]) -> str:
    return "set " + ", ".join(f"RLIMIT_{k.upper()}={v}" for k, v in spec["rlimits"].items())


LAUNCHER_STEPS = (
    Step("launcher", "host-id", "take a host uid and gid no other environment has (as root)",
         Birth._take_id),
    Step("launcher", "cgroup", _cgroup_text, Birth._make_cgroup),
    Step("launcher", "layout", _layout_text, Birth._find_layout),
    Step("launcher", "trees", "clone the trees of this environment's own binds",
         Birth._open_trees),
    Step("launcher", "prepare", "prepare the calls of the environment's own steps",
         Birth._prepare),
    Step("launcher", "clone", _clone_text, Birth._clone),
    Step("launcher", "id-maps", lambda spec: f"write uid_map and gid_map: {spec['user_id']} inside",
         Birth._write_id_maps),
)  # fmt: skip

ENVIRONMENT_STEPS = (
    Step("environment", "session", "close every inherited descriptor; a session of its own",
         Birth._start_session, own=True),
    Step("environment", "cgroup-join", "enter the v1 cgroups, on hybrid and v1 hosts",
         Birth._join_cgroups, own=True),
    Step("environment", "maps", "wait for the id maps", Birth._await_maps, own=True),
    Step("environment", "identity", _user_text, Birth._become_user),
    Step("environment", "hostname", lambda spec: f"sethostname {spec['layout']['hostname']!r}",
         Birth._set_hostname),
    Step("environment", "loopback", "set lo up, where the namespace was not made ready before",
         Birth._set_loopback_up),
    Step("environment", "root", "bind the layout's tree anew and go there", Birth._take_root),
    Step("environment", "scratch",
         lambda spec: f"mount /tmp and /dev/shm of {spec['tmp_size']} bytes each, and /dev/pts",
         Birth._mount_scratch),
    Step("environment", "proc", "mount /proc of its own pid namespace, masked", Birth._mount_proc),
    Step("environment", "mounts", _mounts_text, Birth._mount_extra, own=True),
    Step("environment", "pivot", "pivot_root, detach the old root, check the working directory",
         Birth._pivot),
    Step("environment", "rlimits", _rlimit_text, Birth._set_rlimits),
    Step("environment", "privileges",
         "lock securebits, empty all capability sets, no_new_privs, not dumpable, new keyring",
         Birth._drop_privileges),
    Step("environment", "seccomp", lambda spec: f"load the filter: {spec['seccomp_name']}",
         Birth._load_filter),
)  # fmt: skip

STEPS = LAUNCHER_STEPS + ENVIRONMENT_STEPS
