# SPDX-License-Identifier: Apache-2.0
"""An environment that lives, as its launcher knows it."""

from __future__ import annotations

from nsbox.isolation.stopping import Stopper

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from nsbox.launcher.birth import Birth


class Environment:
    """An environment the launcher is parent of.

    Attributes:
        supervision: The host's socket; None once the host let go of it.
        pid: Its PID 1.
        pidfd: Readable when it has ended.
        cgroup: Its cgroup, or None.
        host_id: Uid and gid it has outside.
        takes_id: Whether `host_id` is to be given back.
        oom_event: Readable when v1's OOM killer struck, or -1.
        oom_notices: How often it did; the environment is ended at the first.
        is_reported: Whether somebody wants its counters once it has ended.
        stopper: Freezes it where there is no freezer.
    """

    def __init__(self, birth: Birth, pid: int, pidfd: int) -> None:
        self.supervision: socket.socket | None = birth.supervision
        self.pid = pid
        self.pidfd = pidfd
        self.cgroup = birth.cgroup
        self.host_id = birth.host_id
        self.takes_id = birth.takes_id
        self.oom_event = -1
        self.oom_notices = 0
        self.is_reported = True
        self.stopper = Stopper(pid)
