# SPDX-License-Identifier: Apache-2.0
"""How many descriptors an environment takes, in this process and in the launcher."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

import nsbox
from nsbox.launcher.client import get_launcher

pytestmark = pytest.mark.needs("userns")

MANY = 10


def open_files(pid: int | str) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def pidfds_have_inodes() -> bool:
    """Whether each process has an inode of its own in pidfs (Linux 6.9)."""
    pidfds = [os.pidfd_open(pid) for pid in (os.getpid(), os.getppid())]
    inodes = {os.fstat(pidfd).st_ino for pidfd in pidfds}
    for pidfd in pidfds:
        os.close(pidfd)
    return len(inodes) == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look at the launcher's descriptors")
def test_an_environment_takes_few_descriptors(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    make_env().run(["true"])
    launcher = get_launcher().pid
    before = open_files("self"), open_files(launcher)
    for _ in range(MANY):
        make_env().run(["true"])
    # Control and supervision, and where no inode tells pidfds apart a pidfd.
    assert open_files("self") - before[0] <= (2 if pidfds_have_inodes() else 3) * MANY
    # Supervision, a pidfd, and on cgroup v1 the OOM killer's event.
    assert open_files(launcher) - before[1] <= 3 * MANY + 4  # networks are made meanwhile
