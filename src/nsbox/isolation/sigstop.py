# SPDX-License-Identifier: Apache-2.0
"""Freeze an environment where there is no freezer: SIGSTOP to every process of it."""

from __future__ import annotations

import errno
import os
import signal

from nsbox.linux import proc

_PASSES = 100


class Stopper:
    """Stops and continues the processes of one pid namespace."""

    def __init__(self, pid: int) -> None:
        """`pid` is the namespace's PID 1, by its number outside."""
        self._pid = pid
        self._stopped: list[int] = []

    def stop(self) -> None:
        """Stop every process, until a pass finds none running.

        Raises:
            OSError: EBUSY, it makes processes faster than they can be stopped; they are let go.
        """
        # Init goes first, so that it does not see its children stop.
        for _ in range(_PASSES):
            alive = [self._pid, *proc.descendants(self._pid)]
            running = [pid for pid in alive if pid not in self._stopped]
            if not running:
                return
            for pid in running:
                try:
                    os.kill(pid, signal.SIGSTOP)
                except ProcessLookupError:
                    continue
                self._stopped.append(pid)
        self.go_on()
        raise OSError(errno.EBUSY, "it makes processes faster than they can be stopped")

    def go_on(self) -> None:
        """Let them run again, init last."""
        for pid in reversed(self._stopped):
            try:
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                continue
        self._stopped.clear()
