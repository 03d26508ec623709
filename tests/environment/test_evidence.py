# SPDX-License-Identifier: Apache-2.0
"""Evidence and usage say what was measured, whoever is quicker: kernel, launcher or host."""

from __future__ import annotations

import os
import select
import signal
from pathlib import Path

import pytest
from tests.support import PATIENCE, OpenEnvironment, wait_until

import nsbox
from nsbox import Limits, Outcome
from nsbox.linux import proc

pytestmark = pytest.mark.needs("userns")

BURN = "import time\nwhile time.process_time() < 0.1: pass"


def cgroup_of(pid: int, controller: str) -> Path | None:
    """Return the directory of a process in a v1 hierarchy as root sees it, None without one."""
    for number, names, path in proc.parse_cgroup(Path(f"/proc/{pid}/cgroup").read_text()):
        if number and controller in names:
            return Path(f"/sys/fs/cgroup/{controller}{path}")
    return None


@pytest.mark.needs("root", "cgroup.memory")
def test_a_notice_of_oom_is_no_kill_that_was_counted() -> None:
    with nsbox.ExecutionEnvironment(limits=Limits(memory_max="32M")) as env:
        directory = cgroup_of(env.pid, "memory")
        if directory is None:
            pytest.skip("v2 has no controller here, or the own cgroup is the root")
        # The kernel gives notice, and leaves the killing to others.
        (directory / "memory.oom_control").write_text("1")
        result = env.run(["python3", "-c", "bytearray(1 << 28)"], timeout=60 * PATIENCE)
    assert result.outcome is Outcome.OOM_KILLED
    assert result.usage.oom_kills == 0
    assert "notice of OOM" in result.evidence
    assert "counts" not in result.evidence


def test_cpu_time_of_a_command_whose_cgroup_has_gone_since_is_known() -> None:
    command = ["python3", "-I", "-S", "-c", BURN]
    with OpenEnvironment() as env, env.start(command) as process:
        # PID 1 has told its end, and nobody has heard it yet.
        assert select.select(process.descriptors(), [], [], 60 * PATIENCE)[0]
        os.kill(env.pid, signal.SIGKILL)
        wait_until(lambda: not os.path.exists(f"/proc/{env.pid}"), "the end of PID 1")
        result = process.wait(timeout=60 * PATIENCE)
    assert result.outcome is Outcome.EXITED
    assert result.usage.cpu_seconds is not None
    assert result.usage.cpu_seconds >= 0.05
