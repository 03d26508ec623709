# SPDX-License-Identifier: Apache-2.0
"""PID 1's socket of an environment that is only invoked: the launcher has it until it is needed."""

from __future__ import annotations

import gc
import os
import resource
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import nsbox
from nsbox.supervisor.launcher import get_launcher

pytestmark = pytest.mark.needs("userns")

CODE = """
def handler(event, context):
    return open("/tmp/" + event).read() if event else None
"""


Make = Callable[[], nsbox.ExecutionEnvironment]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    (tmp_path / "app.py").write_text(CODE)
    function = nsbox.Function("app.handler", code=tmp_path)

    def make() -> nsbox.ExecutionEnvironment:
        env = nsbox.ExecutionEnvironment(function.publish())
        env.init()
        return env

    yield make
    gc.collect()  # a version holds a lock in the store


def files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_everything_that_pid_1_does_works_then(make: Make) -> None:
    with make() as env:
        before = files()
        assert env.invoke("in/data", files={"in/data": b"placed"}) == "placed"
        env.write_file("/tmp/short", b"x")
        env.write_file("/tmp/large", b"y" * (1 << 20))
        assert env.invoke("short") == "x"
        assert env.read_file("/tmp/large") == b"y" * (1 << 20)
        assert env.run(["cat"], input=b"z" * 300_000).stdout == b"z" * 300_000
        assert env.run(["echo", "w" * 100_000]).stdout == b"w" * 100_000 + b"\n"  # a long request
        with env.popen(["sleep", "60"]) as process:
            process.kill()
            assert process.wait().outcome is nsbox.Outcome.KILLED
        assert env.left_running() == nsbox.LeftRunning(0, 0)
        env.freeze()
        env.thaw()
        with pytest.raises(nsbox.SyscallError, match="openat2"):
            env.read_file("/tmp/missing")
        assert files() == before + 1
        env.close(grace=5)


def test_without_a_descriptor_here_it_is_refused_and_lives(make: Make) -> None:
    with make() as env:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.open("/dev/null", os.O_RDONLY)
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            with pytest.raises(nsbox.SyscallError, match="socketpair"):
                env.read_file("/etc/hostname")
            assert env.state is nsbox.State.READY, "there is no room to look"
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        env.write_file("/tmp/x", b"x")
        assert env.invoke("x") == "x"


def test_a_launcher_without_a_descriptor_is_the_cause(make: Make) -> None:
    with make() as env:
        launcher = get_launcher().pid
        before = resource.prlimit(launcher, resource.RLIMIT_NOFILE)
        resource.prlimit(launcher, resource.RLIMIT_NOFILE, (3, before[1]))
        try:
            with pytest.raises(nsbox.LauncherError, match="the launcher did not answer 'control'"):
                env.read_file("/etc/hostname")
        finally:
            resource.prlimit(launcher, resource.RLIMIT_NOFILE, before)


def test_a_launcher_that_is_silent_holds_up_nobody_who_has_the_socket(make: Make) -> None:
    with make() as env:
        launcher = get_launcher().pid
        env.write_file("/tmp/x", b"x")
        os.kill(launcher, signal.SIGSTOP)
        try:
            assert env.read_file("/tmp/x") == b"x"
            assert env.invoke("y", files={"y": b"placed"}) == "placed"
        finally:
            os.kill(launcher, signal.SIGCONT)


def test_a_launcher_that_is_gone_is_the_cause(make: Make) -> None:
    with make() as env, make() as other:
        other.write_file("/tmp/x", b"x")
        os.kill(get_launcher().pid, signal.SIGKILL)
        for one in (env, other):
            with pytest.raises(nsbox.NsboxError, match="the launcher died"):
                one.read_file("/etc/hostname")


def test_threads_that_ask_at_once_get_one_socket(make: Make) -> None:
    with make() as env, ThreadPoolExecutor(8) as threads:
        before = files()
        for _ in threads.map(lambda n: env.write_file(f"/tmp/{n}", b"x"), range(16)):
            pass
        assert files() == before + 1
