# SPDX-License-Identifier: Apache-2.0
"""How many descriptors an environment takes, in this process and in the launcher."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import nsbox
from nsbox.supervisor.launcher import get_launcher

pytestmark = pytest.mark.needs("userns")

MANY = 6
HANDLER = "def handler(event, context):\n    return event\n"


def open_files(pid: int | str) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def pidfds_have_inodes() -> bool:
    """Whether each process has an inode of its own in pidfs (Linux 6.9)."""
    pidfds = [os.pidfd_open(pid) for pid in (os.getpid(), os.getppid())]
    inodes = {os.fstat(pidfd).st_ino for pidfd in pidfds}
    for pidfd in pidfds:
        os.close(pidfd)
    return len(inodes) == 2


def both() -> tuple[int, int]:
    """Return how many this process has open, and the launcher, if one may look at it."""
    launcher = open_files(get_launcher().pid) if os.geteuid() == 0 else 0
    return open_files("self"), launcher


def check(before: tuple[int, int], in_host: int, in_launcher: int) -> None:
    """Where no inode tells pidfds apart, there is one besides; a few are of no environment."""
    after = both()
    assert after[0] - before[0] <= (in_host + (not pidfds_have_inodes())) * MANY + 5
    assert after[1] - before[1] <= in_launcher * MANY + 5


def test_an_environment_takes_few_descriptors(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    make_env().run(["true"])
    before = both()
    for _ in range(MANY):
        make_env().run(["true"])
    check(before, 1, 1)  # PID 1's socket; on cgroup v1 the OOM killer's event


def test_an_environment_of_a_function_takes_few_descriptors(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(HANDLER)
    options: dict[str, Any] = {
        "keep": {}, "kill": {"left_running": "kill"}, "tenant": {"tenant": "a"},
        "reset": {"reuse": "reset"}, "exec": {"start": "exec"}, "never": {"reuse": "never"},
    }  # fmt: skip
    versions = {
        name: nsbox.Function(handler="app.handler", code=tmp_path, **more).publish()
        for name, more in options.items()
    }
    versions["program"] = nsbox.Function(command=["/bin/cat"], code=tmp_path).publish()
    with ExitStack() as made:
        # The worker's socket and its two outputs; the count of its threads. PID 1's socket is in
        # the launcher, or here, with that of the answer to a reset, and no outputs.
        counts = {
            "keep": (3, 2), "never": (3, 2), "kill": (4, 2), "tenant": (4, 2),
            "reset": (3, 1), "exec": (4, 1), "program": (1, 1),
        }  # fmt: skip
        for name, (in_host, in_launcher) in counts.items():
            before = (0, 0)
            for number in range(MANY + 1):
                env = made.enter_context(nsbox.ExecutionEnvironment(versions[name]))
                env.init()
                if name != "never":  # that closes it
                    env.invoke(1)
                if not number:
                    before = both()
            check(before, in_host, in_launcher)
        before = both()
        made.enter_context(
            nsbox.WarmPool(versions["keep"], max_environments=MANY, provisioned=MANY)
        )
        check(before, 3, 2)  # a pool needs none besides
    versions.clear()
    del env
    gc.collect()  # a version holds a lock in the store


LIMITED = """
import resource, sys
import nsbox

HARD = 96
nsbox.set_standby(0)
# First the launcher may be the one that has no room, then it is this process.
for soft, whose in ((HARD, ""), (44, "this process")):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, HARD))
    made = []
    try:
        while True:
            made.append(nsbox.ExecutionEnvironment())
    except nsbox.DescriptorsExhausted as error:
        assert error.limit == soft and soft // 2 < error.count < soft, error
        assert "RLIMIT_NOFILE" in str(error) and whose in str(error) and error.hint, error
    assert len(made) >= 10, len(made)
    for env in made[::8]:
        assert env.run(["true"]).ok
        assert nsbox.run(["echo", "here"]).stdout == b"here\\n"
    while made:
        made.pop().close()
nsbox.ExecutionEnvironment().close()
"""


def test_births_are_refused_before_others_suffer() -> None:
    subprocess.run([sys.executable, "-W", "error", "-c", LIMITED], check=True)
