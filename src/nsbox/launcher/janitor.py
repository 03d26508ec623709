# SPDX-License-Identifier: Apache-2.0
"""The janitor: waits for the launcher's end, whatever it was, and removes its cgroups.

Processes, mounts and sockets of a dead launcher go by themselves (lifelines, namespaces). Cgroup
directories are all that would stay, and a process killed with SIGKILL cannot remove its own.
"""

from __future__ import annotations

import os
import select

from nsbox.isolation import cgroups, privileges
from nsbox.linux.binding import named
from nsbox.linux.descriptors import as_file, close_all_but

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_SWEEP_AFTER = 0.25  # seconds after the launcher's start
_SWEEP_AT_EXIT = 0.2  # seconds that sweep may take while the host waits for its own to be removed


def start(directories: list[str], done: int) -> int:
    """Fork the janitor of the calling process; return its pid.

    `done` is a pipe end that the janitor keeps open until all is removed: who reads EOF from it
    knows that nothing is left.
    """
    with as_file(os.pidfd_open, os.getpid()) as launcher:
        pid = named(os.fork)
        if pid == 0:
            try:
                _run(launcher.fileno(), directories, done)
            finally:
                os._exit(1)
    return pid


def _run(launcher: int, directories: list[str], done: int) -> NoReturn:
    privileges.set_name("nsbox-janitor")
    # The launcher's lifeline and its socket to the host must not stay open here.
    close_all_but((0, 1, 2, launcher, done))
    poll = select.poll()
    poll.register(launcher, select.POLLIN)
    # Later than the first births, or after the launcher's end: nobody is to wait for what a
    # SIGKILL of host, launcher and janitor together has left of another.
    outlived = poll.poll(_SWEEP_AFTER * 1000)
    if not outlived:
        _sweep(0.0)
    poll.poll()
    cgroups.remove_tree_after(directories)
    if outlived:
        _sweep(_SWEEP_AT_EXIT)
    os._exit(0)


def _sweep(timeout: float) -> None:
    try:
        cgroups.collect_garbage(cgroups.Hierarchies.detect(), timeout=timeout)
    except OSError:
        pass  # what is left of others is found by the next sweep
