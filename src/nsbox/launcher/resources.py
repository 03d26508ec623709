# SPDX-License-Identifier: Apache-2.0
"""What births take and ends give back: ids, layouts, network namespaces, cgroups."""

from __future__ import annotations

import os

from nsbox.isolation import cgroups
from nsbox.isolation.network import NetworkPool
from nsbox.launcher.layouts import KnownSpecs, Layouts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from nsbox.launcher.identity import Identity
    from nsbox.launcher.messages import Spec

NETWORKS_READY = 4


class Resources:
    """What a launcher has for its environments.

    Attributes:
        identity: Who it is, and the host ids that it gives away.
        layouts: Mount namespaces with the userland.
        networks: Network namespaces ready for use; None where clone3(2) makes them.
        tree: Its cgroups.
        specs: The specs it was told.
    """

    def __init__(self, identity: Identity, mounts: int, *, has_networks: bool) -> None:
        """`mounts` is the launcher's own mount namespace."""
        self.identity = identity
        self.layouts = Layouts(mounts)
        self.networks = NetworkPool(NETWORKS_READY) if has_networks else None
        self.tree = cgroups.Tree.for_process(os.getpid())
        self.specs = KnownSpecs(self.tree)

    def take_id(self, spec: Spec) -> int:
        """Return a host id that no other environment has; 0 where all have the launcher's own."""
        ids = self.identity.ids
        return 0 if spec.as_caller or ids is None else ids.take()

    def give_back_id(self, host_id: int) -> None:
        """Let an id be taken again: nothing runs with it any more."""
        if host_id and self.identity.ids is not None:
            self.identity.ids.give_back(host_id)

    def take_network(self, spec: Spec) -> int:
        """Return an unused network namespace, or -1 where none is taken."""
        return -1 if self.networks is None or spec.network != "none" else self.networks.take()

    def make_cgroup(self, env_id: str, spec: Spec) -> cgroups.EnvironmentCgroup | None:
        """Make the cgroup of an environment, or None where no hierarchy is usable."""
        return self.tree.make(env_id, spec.cgroup_limits) if self.tree.paths else None
