# SPDX-License-Identifier: Apache-2.0
"""What two environments of one template have in common, as the kernel tells by kcmp(2)."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import itertools
import os
import queue
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from tests.support import PATIENCE

import nsbox
from nsbox.functions.function import ReuseChoice, StartChoice

pytestmark = pytest.mark.needs("userns")

FILE, VM, FILES, FS, SIGHAND, IO, SYSVSEM = range(7)  # linux/kcmp.h
SHARED_BY_PID_1 = {"/dev/null", "pipe", "anon_inode"}
"""Open files that PID 1s of one template have in common, and no guest can reach: 0 to 2, the end
of the pipe that tells of the launcher's end, and the signalfd, whose mask is the same in all."""

# While an event is served the forks of a worker are there too.
HANDLER = """
import os, time
def handler(event, context):
    os.write(1, b"served")
    time.sleep(1000)
"""
_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def _collected() -> Iterator[None]:
    yield
    gc.collect()  # a version holds a lock in the store


def _differ(kind: int, one: int, other: int, first: int = 0, second: int = 0) -> bool | None:
    """Ask kcmp(2); None where it refuses."""
    number = {"x86_64": 312, "aarch64": 272}[os.uname().machine]
    words = (ctypes.c_long(word) for word in (number, one, other, kind, first, second))
    order: int = _libc.syscall(*words)
    return None if order < 0 else order != 0


@contextlib.contextmanager
def _serving(env: nsbox.ExecutionEnvironment, threads: ThreadPoolExecutor) -> Iterator[list[int]]:
    """Have it serve an event and run a command; gives its processes."""
    said: queue.Queue[object] = queue.Queue()
    future: Future[object] = threads.submit(
        env.invoke, {}, on_log=lambda _name, data: said.put(data)
    )
    # What has ended it is raised here, and nobody waits in vain.
    future.add_done_callback(said.put)
    word = said.get(timeout=60 * PATIENCE)
    if word is future:
        future.result()
    assert word == b"served"
    with env.popen(["sleep", "1000"], stdin=nsbox.DEVNULL):
        namespace = os.stat(f"/proc/{env.pid}/ns/pid").st_ino
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{entry}/ns/pid").st_ino == namespace:
                    found.append(int(entry))
        yield found
    env.close()
    with contextlib.suppress(nsbox.InvokeError):
        future.result()


def _open_files(pids: list[int]) -> list[tuple[int, int, str]]:
    return [
        (pid, int(fd), os.readlink(f"/proc/{pid}/fd/{fd}"))
        for pid in pids
        for fd in os.listdir(f"/proc/{pid}/fd")
    ]


@pytest.mark.needs("root")
@pytest.mark.parametrize("start", ["clone", "exec"])
@pytest.mark.parametrize("reuse", ["reset", "keep"])
def test_environments_share_nothing_that_a_guest_can_reach(
    tmp_path: Path, start: StartChoice, reuse: ReuseChoice
) -> None:
    if _differ(VM, os.getpid(), os.getpid()) is None:
        pytest.skip("this kernel has no kcmp")
    (tmp_path / "app.py").write_text(HANDLER)
    limit = 60 * PATIENCE
    function = nsbox.Function(
        "app.handler", code=tmp_path, start=start, reuse=reuse, timeout=limit, init_timeout=limit
    )
    version = function.publish()
    with (
        ThreadPoolExecutor(2) as threads,
        nsbox.ExecutionEnvironment(version) as one,
        nsbox.ExecutionEnvironment(version) as other,
        _serving(one, threads) as mine,
        _serving(other, threads) as theirs,
        subprocess.Popen(["/bin/sleep", "1000"]) as stranger,
    ):
        inits = {one.pid, other.pid}
        assert min(len(mine), len(theirs)) >= (4 if reuse == "reset" else 3)
        for pair in itertools.product(mine, theirs):
            for kind in (VM, FILES, FS, SIGHAND):
                assert _differ(kind, *pair), (kind, pair)
            for kind in (IO, SYSVSEM):  # who has none is like others who have none
                assert _differ(kind, *pair) or not _differ(kind, pair[0], stranger.pid)
        shared = [
            (a, b)
            for a, b in itertools.product(_open_files(mine), _open_files(theirs))
            if a[2] == b[2] and not _differ(FILE, a[0], b[0], a[1], b[1])
        ]
        assert [pair for pair in shared if not {pair[0][0], pair[1][0]} <= inits] == []
        names = {a[2].partition(":")[0] for a, _ in shared}
        assert names <= SHARED_BY_PID_1, shared
        assert shared, "PID 1s of one template are known to share some: the test sees none"
        stranger.kill()
