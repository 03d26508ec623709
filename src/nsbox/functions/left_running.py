# SPDX-License-Identifier: Apache-2.0
"""What invocations leave running: known by cgroup or PID 1, and killed where that is asked for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from nsbox.errors import SyscallError
from nsbox.functions.call import Call
from nsbox.functions.function import FunctionVersion
from nsbox.functions.worker import Worker
from nsbox.supervisor.channel import Channel
from nsbox.supervisor.connection import EnvironmentConnection
from nsbox.supervisor.files import begin_left_running, finish_left_running
from nsbox.values.invocation import NOTHING, LeftRunning
from nsbox.values.result import EnvironmentDied

_OWN: Final = 2  # processes that are nsbox's: PID 1 and the worker
_PID_1_AND_WORKER: Final = b"2\n"  # pids.current when there is no other thread


def known(link: EnvironmentConnection, version: FunctionVersion, call: Call) -> LeftRunning | None:
    """Return what `call` has left running, as far as no process need be asked for that."""
    if call.left_running is not None:
        return call.left_running
    goes_on = version.function.reuse == "keep" and not version.kills_left_running
    is_counted = goes_on and version.function.start == "clone" and not link.is_killed
    try:
        tasks = link.reader.tasks() if is_counted and link.reader is not None else None
    except SyscallError:
        return None  # the cgroup has just been removed
    if tasks is None:
        return None
    processes, threads = tasks
    return LeftRunning(max(0, processes - _OWN), max(0, threads - processes))


def count(link: EnvironmentConnection, worker: Worker | None) -> LeftRunning:
    """Ask PID 1 what runs now besides it and its worker.

    Raises:
        EnvironmentDied: It is gone, or cannot tell.
    """
    channel = begin_left_running(link, _number(worker), kill=False)
    return finish_left_running(link, channel) or NOTHING


class Sweep:
    """Kills what each invocation of an environment has left running, before there is another.

    Attributes:
        on_kill: Called when there was something.
    """

    def __init__(self, link: EnvironmentConnection, version: FunctionVersion) -> None:
        self._link = link
        # Opened once: that costs ten times a look. Beside a worker that was executed there is
        # one that waits since the birth, or has ended.
        is_counted = version.function.start == "clone"
        self._counter = link.reader.open_counter() if is_counted and link.reader else -1
        self.on_kill: Callable[[], object] | None = None

    def close(self) -> None:
        """Close the descriptor that it has."""
        counter, self._counter = self._counter, -1
        if counter >= 0:
            os.close(counter)

    def run(self, call: Call, worker: Worker | None) -> None:
        """Kill what `call`, which has been answered, has left; return when it is gone."""
        channel = self.begin(call, worker)
        if channel is not None:
            self.finish(call, channel)

    def begin(self, call: Call, worker: Worker | None) -> Channel | None:
        """Do as `run`, up to PID 1's answer, which is for `finish`.

        None: the cgroup says that there is nothing, and PID 1 is not asked.
        """
        with suppress(OSError):
            if self._counter >= 0 and os.pread(self._counter, 8, 0) == _PID_1_AND_WORKER:
                call.left_running = NOTHING
                return None
        call.answered = time.monotonic()
        try:
            return begin_left_running(self._link, _number(worker), kill=True)
        except (EnvironmentDied, OSError):
            self._link.kill("what an invocation has left running could not be killed")
            return None

    def finish(self, call: Call, channel: Channel) -> None:
        """Take PID 1's answer.

        If it does not say that all is gone the environment is killed: `call` is over and has all
        it wanted, and there is no other.
        """
        try:
            left = call.left_running = finish_left_running(self._link, channel)
        except EnvironmentDied:
            return
        if left is not None and left.processes and self.on_kill is not None:
            self.on_kill()


def _number(worker: Worker | None) -> int:
    return 0 if worker is None else worker.process.pid
