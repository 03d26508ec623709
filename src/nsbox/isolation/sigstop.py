# SPDX-License-Identifier: Apache-2.0
"""Freeze an environment where there is no freezer: SIGSTOP to every process of it."""

from __future__ import annotations

import errno
import os
import signal

from nsbox.linux import proc

_PASSES = 100


class Stopper:
    """SIGSTOP and SIGCONT for all processes of one pid namespace."""

    def __init__(self, pid: int) -> None:
        """`pid` is the namespace's PID 1, by its number outside: a child of this process."""
        self._pid = pid
        self._pidfds: dict[int, int] = {}

    def stop(self) -> None:
        """Stop every process, until a pass finds none running.

        Raises:
            OSError: EBUSY, it makes processes faster than they can be stopped; EMFILE, there is no
                room for a descriptor of each. All are continued then.
        """
        try:
            for _ in range(_PASSES):
                # Init goes first, so that it does not see its children stop.
                alive = [self._pid, *proc.descendants(self._pid)]
                # A number may be another process's by the time its pidfd is opened: what is found
                # in the namespace again afterwards is what the pidfd is about.
                are_stopped = [self._signal(pid) for pid in alive]
                if all(are_stopped):
                    return
            raise OSError(errno.EBUSY, "it makes processes faster than they can be stopped")
        except BaseException:
            self.go_on()
            raise

    def _signal(self, pid: int) -> bool:
        """Stop a process by the pidfd of an earlier pass; without one, open it."""
        try:
            if pid in self._pidfds:
                signal.pidfd_send_signal(self._pidfds[pid], signal.SIGSTOP)
                return True
            self._pidfds[pid] = os.pidfd_open(pid)
        except ProcessLookupError:
            if pid in self._pidfds:
                os.close(self._pidfds.pop(pid))
        return False

    def go_on(self) -> None:
        """Continue all that were stopped, init last, and close their pidfds."""
        while self._pidfds:
            pidfd = self._pidfds.popitem()[1]
            try:
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            except OSError:
                pass  # it has ended
            finally:
                os.close(pidfd)
