# SPDX-License-Identifier: Apache-2.0
"""An environment that lives, as its launcher knows it."""

from __future__ import annotations

import signal

from nsbox.isolation.sigstop import Stopper

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket

    from nsbox.launcher.birth import Birth


class Environment:
    """An environment the launcher is parent of.

    Attributes:
        id: Its id.
        host: Where the host has asked for it, until all of its birth is over: the end of this
            ends the environment. Then None.
        reply: Where the host waits to hear of its end, or None.
        pid: Its PID 1.
        pidfd: Readable when it has ended; -1 once it has.
        cgroup: Its cgroup, or None.
        host_id: Uid and gid it has outside.
        takes_id: Whether `host_id` is to be given back.
        oom_event: Readable when v1's OOM killer struck, or -1.
        oom_notices: How often it did; the environment is ended at the first.
        is_reported: Whether somebody wants its counters once it has ended.
        is_let_go: Whether the host wants to know nothing of its end.
    """

    def __init__(self, birth: Birth, pid: int, pidfd: int) -> None:
        self.id = birth.env_id
        self.host: Socket | None = birth.host
        self.reply: Socket | None = None
        self.pid = pid
        self.pidfd = pidfd
        self.cgroup = birth.cgroup
        self.host_id = birth.host_id
        self.takes_id = birth.takes_id
        self.oom_event = -1
        self.oom_notices = 0
        self.is_reported = True
        self.is_let_go = False
        self._stopper = Stopper(pid)

    def kill(self) -> None:
        """SIGKILL PID 1, and so everything in it."""
        if self.pidfd >= 0:
            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def freeze(self) -> None:
        """Stop every process of it."""
        if self.cgroup is not None and self.cgroup.can_freeze:
            self.cgroup.freeze()
        else:
            self._stopper.stop()

    def thaw(self) -> None:
        """Let them run again."""
        if self.cgroup is not None and self.cgroup.can_freeze:
            self.cgroup.thaw()
        else:
            self._stopper.go_on()
