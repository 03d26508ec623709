# SPDX-License-Identifier: Apache-2.0
"""The layouts a launcher keeps, and the specs it was told."""

from __future__ import annotations

import os

from nsbox.isolation import cgroups, etc, filesystem, rootfs
from nsbox.isolation.namespaces import come_home
from nsbox.launcher.messages import Spec
from nsbox.linux import calls
from nsbox.linux import constants as c
from nsbox.linux.descriptors import close_all

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

LAYOUTS_KEPT = 8
SPECS_KEPT = 64


class KnownSpec:
    """A spec that the host has sent, with what can be read off it once.

    Attributes:
        spec: The host's.
        cgroup_view: Hierarchy -> where an environment sees its own cgroup.
        shown: What the layout has of cgroups (`cgroups.view_of`).
        layout_key: The same for all specs with the same layout.
        cgroups: Directories of cgroups that are in the layout.
        is_full: Whether the layout has the host's /etc.
        own_binds: Mounts that each environment has attached for itself.
    """

    __slots__ = (
        "cgroup_view", "cgroups", "is_full", "layout_key", "own_binds", "shown", "spec"
    )  # fmt: skip

    def __init__(self, spec: Spec, tree: cgroups.Tree) -> None:
        view = self.shown = cgroups.view_of(tree, spec.cgroup_limits)
        layout = spec.layout
        places = {name: cgroups.place(name) for name in view["own"]} if view else {}
        self.spec = spec
        self.cgroup_view = places
        self.layout_key = repr(layout)
        self.cgroups = list(view["own"].values()) if view else []
        self.is_full = rootfs.is_full(layout)
        self.own_binds = [
            mount for mount in layout.mounts if not mount.shared and mount.type == "bind"
        ]


class KnownSpecs:
    """The specs used last, by key."""

    def __init__(self, tree: cgroups.Tree) -> None:
        """`tree` is the launcher's, made."""
        self._tree = tree
        self._specs: dict[str, KnownSpec] = {}

    def find(self, key: str, spec: dict[str, Any] | None) -> KnownSpec | None:
        """Return the spec of `key`; None when it is not known and was not sent along."""
        known = self._specs.pop(key, None)
        if known is None:
            if spec is None:
                return None
            known = KnownSpec(Spec.from_wire(spec), self._tree)
            if len(self._specs) >= SPECS_KEPT:
                del self._specs[next(iter(self._specs))]
        self._specs[key] = known  # the most recently used last
        return known


class Layouts:
    """Mount namespaces of the layouts used last (`isolation.userland`)."""

    def __init__(self, home_mounts: int) -> None:
        """`home_mounts` is the launcher's own mount namespace, to come back to."""
        self._home_mounts = home_mounts
        self._held: dict[str, tuple[int, tuple[str, list[tuple[int, int]]], list[int]]] = {}
        self._proc_extent = ""
        self._host_files: etc.HostFiles | None = None

    def look_ahead(self) -> None:
        """Read /etc through for the first layout, while nobody waits for this process."""
        self._host_files = etc.HostFiles()

    def find(self, wanted: KnownSpec, sources: str) -> int:
        """Return the mount namespace of a layout, built anew when a source was replaced.

        `sources` is what the host has seen there (`messages.GiveBirth`): this process looks at none
        itself for a layout that it holds, since the file system of one may not answer.

        Raises:
            OSError: A source is gone, or a mount was refused.
        """
        views = [(status.st_dev, status.st_ino) for status in map(os.stat, wanted.cgroups)]
        stamps = (sources, views)
        etc_stamps = etc.stamps() if wanted.is_full else []
        if wanted.spec.layout.network == "host":
            etc_stamps += etc.name_stamps()
        known = self._held.pop(wanted.layout_key, None)
        if known is not None and known[1:] != (stamps, etc_stamps):
            os.close(known[0])
            known = None
        if known is None:
            host_files, self._host_files = self._host_files, None
            host_files = (host_files or etc.HostFiles()) if wanted.is_full else None
            known = (rootfs.hold(wanted.spec.layout, wanted.shown, host_files), stamps, etc_stamps)
            if len(self._held) >= LAYOUTS_KEPT:
                oldest = next(iter(self._held))
                os.close(self._held.pop(oldest)[0])
        self._held[wanted.layout_key] = known  # the most recently used last
        return known[0]

    def attach(self, pid: int, mounts: Sequence[Sequence[str]]) -> None:
        """Attach read-only trees inside an environment in which no code of a guest has run.

        Args:
            pid: Its PID 1.
            mounts: Pairs of source, on the host, and destination, an empty directory inside.

        Raises:
            OSError: A source is gone, or the environment.
        """
        inside = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        trees: list[int] = []
        try:
            for source, _ in mounts:
                trees.append(rootfs.clone_tree(source))
            calls.setns(inside, c.CLONE_NEWNS)
            try:
                for _, destination in mounts:
                    filesystem.attach(trees[0], destination)
                    del trees[0]  # closed
            finally:
                come_home(self._home_mounts, c.CLONE_NEWNS)
        finally:
            close_all([inside, *trees])

    def proc_extent(self, layout: int) -> str:
        """Return how much of a /proc environments can have here; found out once, in `layout`."""
        if not self._proc_extent:
            calls.setns(layout, c.CLONE_NEWNS)
            try:
                self._proc_extent = filesystem.probe_proc()
            finally:
                come_home(self._home_mounts, c.CLONE_NEWNS)
        return self._proc_extent
