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


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may look at the launcher's descriptors")
def test_an_environment_takes_few_descriptors(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    make_env().run(["true"])
    launcher = get_launcher().pid
    before = open_files("self"), open_files(launcher)
    for _ in range(MANY):
        make_env().run(["true"])
    # Control and supervision; supervision, a pidfd, and on cgroup v1 the OOM killer's event.
    assert open_files("self") - before[0] <= 2 * MANY
    assert open_files(launcher) - before[1] <= 3 * MANY + 4  # networks are made meanwhile
