# SPDX-License-Identifier: Apache-2.0
"""Limits, accounting, freezing and killing by control groups, v2 and v1, controller by controller.

``locate`` finds this process's own cgroup in every hierarchy, ``tree`` makes the launcher's
directory below it, ``group`` is one environment's cgroup, ``usage`` reads its counters from the
host side, ``sweep`` removes what dead launchers left. ``v1`` and ``v2`` declare the kernel's files
with cgroupspy's typed interfaces; ``files`` does the reads and writes.

Nothing here ever touches a cgroup outside the own one: the only directories made, written or
removed are ``nsbox.host`` and ``nsbox.<owner>`` in it (and, on v2, its ``cgroup.subtree_control``).
"""

from __future__ import annotations

from nsbox.isolation.cgroups.group import EnvironmentCgroup
from nsbox.isolation.cgroups.locate import Hierarchies, Place, locate
from nsbox.isolation.cgroups.owner import Owner
from nsbox.isolation.cgroups.sweep import collect_garbage, remove_tree_after
from nsbox.isolation.cgroups.tree import Tree
from nsbox.isolation.cgroups.usage import UsageReader
from nsbox.isolation.cgroups.view import place, view_of

__all__ = [
    "EnvironmentCgroup",
    "Hierarchies",
    "Owner",
    "Place",
    "Tree",
    "UsageReader",
    "collect_garbage",
    "locate",
    "place",
    "remove_tree_after",
    "view_of",
]
