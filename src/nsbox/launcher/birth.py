# SPDX-License-Identifier: Apache-2.0
"""A birth on the launcher's side, and the list of all steps in the order the kernel needs them.

The launcher collects what the clone will need, the template clones itself and writes the id maps,
and the clone makes the environment's own steps (`inside`). `STEPS` has them all, for `nsbox plan`.
"""

from __future__ import annotations

import errno
import os

from nsbox.isolation import namespaces, rootfs
from nsbox.launcher import inside
from nsbox.launcher.steps import Step
from nsbox.linux import calls
from nsbox.linux import constants as c
from nsbox.linux.descriptors import close_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nsbox.isolation.cgroups import EnvironmentCgroup
    from nsbox.isolation.layout import LayoutMount
    from nsbox.launcher.layouts import KnownSpec
    from nsbox.launcher.messages import GiveBirth, Spec
    from nsbox.launcher.resources import Resources


class Birth:
    """A birth under way, and the descriptors that its clone is to get.

    Attributes:
        known, spec: What it is to be.
        env_id: Its id.
        awaits: What the host sends after the answer (`Launcher.request_birth`).
        is_second_attempt: Whether the template died under a first one.
        control: Its end of the control socket; -1 once closed.
        host: The socket that the birth is answered on.
        step: The step of `LAUNCHER_STEPS` under way, for a failure.
        host_id: Its uid and gid outside; 0 before it has one.
        cgroup, cgroup_fd: Its cgroup, and for v2 the directory to be cloned into, or -1.
        network: Its network namespace, or -1.
        layout: The mount namespace of its layout.
        tasks: The v1 ``tasks`` files that it writes itself into.
        trees: Detached trees by destination: the binds that are its own.
    """

    def __init__(
        self,
        resources: Resources,
        known: KnownSpec,
        request: GiveBirth,
        control: int,
        host: int,
    ) -> None:
        self._resources = resources
        self.known = known
        self.spec = known.spec
        self.env_id = request.id
        self.awaits = request.awaits
        self._sources = request.sources
        self.is_second_attempt = False
        self.control = control
        self.host = host
        self.step = ""
        self.host_id = 0
        self.cgroup: EnvironmentCgroup | None = None
        self.cgroup_fd = -1
        self.network = -1
        self.layout = -1
        self.tasks: list[int] = []
        self.trees: dict[str, int] = {}

    def run_launcher_side(self) -> None:
        """Run the launcher's steps; an exception leaves `step` at the one that failed."""
        for step in LAUNCHER_STEPS:
            self.step = step.name
            step.run(self)

    def close(self) -> None:
        """Close what only the clone needed; done as soon as the template has answered."""
        for fd in (self.control, self.network, *self.tasks, *self.trees.values()):
            if fd >= 0:
                os.close(fd)
        if self.cgroup is not None:
            self.cgroup.close()
        self.control = self.network = -1
        self.tasks, self.trees = [], {}

    def _take_id(self) -> None:
        self.host_id = self._resources.take_id(self.spec)

    def _make_cgroup(self) -> None:
        self.cgroup = self._resources.make_cgroup(self.env_id, self.spec)
        if self.cgroup is not None:
            self.cgroup_fd = self.cgroup.clone_fd
            self.tasks = self.cgroup.open_tasks()

    def _find_layout(self) -> None:
        self.layout = self._resources.layouts.find(self.known, self._sources)

    def _take_network(self) -> None:
        self.network = self._resources.take_network(self.spec)

    def _open_trees(self) -> None:
        mappings: dict[tuple[int, int], int] = {}
        try:
            for mount in self.known.own_binds:
                fd = rootfs.clone_tree(mount.source, writable=mount.writable)
                self.trees[mount.destination] = fd
                if mount.idmapped:
                    self._map_owner(fd, mount, mappings)
        finally:
            close_all(list(mappings.values()))

    def _map_owner(self, fd: int, mount: LayoutMount, mappings: dict[tuple[int, int], int]) -> None:
        """Have the owner of a tree be this environment's user in it."""
        status = os.fstat(fd)
        owner = (status.st_uid, status.st_gid)
        if mount.writable and not status.st_uid:
            raise OSError(errno.EPERM, f"{mount.source} belongs to root")
        if not namespaces.takes_on_owner(status):
            return  # it has changed since the host has looked
        if owner not in mappings:
            mappings[owner] = namespaces.mapping_namespace(owner, self.host_id)
        try:
            calls.mount_setattr(
                fd, "", c.AT_EMPTY_PATH, attr_set=c.MOUNT_ATTR_IDMAP, userns_fd=mappings[owner]
            )
        except OSError as error:
            # What may only be read is then read with the rights of others.
            if mount.writable or error.errno not in (errno.EINVAL, errno.EPERM):
                raise


def _template_side(_birth: Birth) -> None:
    """Made by `nsbox.launcher.template`."""


def _cgroup_text(spec: Spec) -> str:
    limits = ", ".join(f"{name}={value}" for name, value in spec.cgroup_limits.items() if value)
    return f"make the cgroup below the launcher's own, with {limits or 'no limit'}"


def _layout_text(spec: Spec) -> str:
    layout = spec.layout
    shared = [mount.destination for mount in layout.mounts if mount.shared]
    parts = [layout.rootfs or "/usr", *shared]
    etc = (
        "/etc without what is secret or the host's own" if rootfs.is_full(layout) else "small /etc"
    )
    return (
        "make once, or find, the mount namespace with the read-only userland: "
        f"{', '.join(parts)}, {etc}, minimal /dev"
    )


def _clone_text(spec: Spec) -> str:
    names = ", ".join(spec.namespace_names)
    network = "in" if spec.network == "none" else "in the host's network, in"
    return f"clone3 the template into new {names} namespaces, {network} the cgroup where v2"


LAUNCHER_STEPS = (
    Step("launcher", "host-id", "take a host uid and gid no other environment has (as root)",
         Birth._take_id),
    Step("launcher", "cgroup", _cgroup_text, Birth._make_cgroup),
    Step("launcher", "layout", _layout_text, Birth._find_layout),
    Step("launcher", "network", "take an unused network namespace, loopback up (as root)",
         Birth._take_network),
    Step("launcher", "trees", "clone the trees of this environment's own binds",
         Birth._open_trees),
)  # fmt: skip

TEMPLATE_STEPS = (
    Step("template", "prepare", "prepare the calls of the environment's own steps",
         _template_side),
    Step("template", "clone", _clone_text, _template_side),
    Step("template", "id-maps", lambda spec: f"write uid_map and gid_map: {spec.user_id} inside",
         _template_side),
)  # fmt: skip

STEPS = LAUNCHER_STEPS + TEMPLATE_STEPS + inside.STEPS
