# SPDX-License-Identifier: Apache-2.0
"""An environment's read-only view of its own cgroup, by which runtimes size themselves.

The JVM, V8 (libuv), .NET and Go look for /proc/self/cgroup, for mounts of type cgroup or cgroup2 in
/proc/self/mountinfo, and for the files there. On v2 the environment's own directory is bound at
/sys/fs/cgroup, on v1 those of its controllers below it, from a layout that has the launcher's.

The JVM believes v1 only where cpu, cpuacct, cpuset and memory are all mounted. In those without a
limit an environment is where the launcher is. So layouts have the launcher's directories there,
covered by empty ones before any environment is born: their mounts are listed, nothing can be read.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from nsbox.isolation.cgroups.tree import Tree

PLACE = "/sys/fs/cgroup"
CONTROLLERS = ("cpu", "cpuacct", "cpuset", "memory")
"""Those of v1 that runtimes read."""
_LIMITS = {"memory": "memory_max", "cpu": "cpu_max", "cpuset": "cpuset_cpus"}


def place(hierarchy: str) -> str:
    """Return the path inside of an environment's own cgroup of a hierarchy."""
    return PLACE if hierarchy == "unified" else f"{PLACE}/{hierarchy}"


def view_of(tree: Tree, limits: Mapping[str, Any]) -> dict[str, dict[str, str]] | None:
    """Return what a layout for environments with `limits` needs, {hierarchy: directory} twice.

    None: they have no limit that a runtime looks for, and see no cgroup. Else ``own`` are the
    launcher's directories that have the environments' own in them, and ``covered`` the others.
    """
    wanted = [name for name, limit in _LIMITS.items() if limits.get(limit) is not None]
    if not wanted:
        return None
    own = {name: tree.paths[name] for name in ("memory", *wanted) if name in tree.paths}
    if not own:
        own = {name: path for name, path in tree.paths.items() if name == "unified"}
        return {"own": own, "covered": {}} if own else None
    places = {name: tree.hierarchies[name] for name in CONTROLLERS if name not in own}
    covered = {name: place.directory for name, place in places.items() if place.version == 1}
    return {"own": own, "covered": covered}
