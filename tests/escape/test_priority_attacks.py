# SPDX-License-Identifier: Apache-2.0
"""Attacks by priorities, CPUs and limits on the processes that commands to come descend from."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import attack, x86_64_only

import nsbox
from nsbox.functions.function import StartChoice
from nsbox.values.config import ProfileChoice

pytestmark = [pytest.mark.needs("userns", "seccomp"), x86_64_only]


@pytest.mark.parametrize("profile", ["strict", "default", "docker"])
def test_pid_1_keeps_its_priority_its_cpus_and_its_limits(
    make_env: Callable[..., nsbox.ExecutionEnvironment], profile: str
) -> None:
    found = attack(
        make_env(seccomp=profile),
        """
        answer = {}
        word = ctypes.create_string_buffer(bytes([1] + [0] * 63), 64)
        for high in (0, 1 << 32, 0xffffffff << 32):
            pid = high | 1
            answer[f'affinity {high:x}'] = syscall(203, pid, 8, word)
            answer[f'param {high:x}'] = syscall(142, pid, ctypes.byref(ctypes.c_int(0)))
            answer[f'scheduler {high:x}'] = syscall(144, pid, 5, ctypes.byref(ctypes.c_int(0)))
            answer[f'attributes {high:x}'] = syscall(314, pid, word, 0)
            answer[f'priority {high:x}'] = syscall(141, high, pid, 5)
            answer[f'group {high:x}'] = syscall(141, high | 1, 0, 5)
            answer[f'user {high:x}'] = syscall(141, high | 2, 0, 5)
            answer[f'io {high:x}'] = syscall(251, high | 1, pid, 3 << 13)
            answer[f'io of group {high:x}'] = syscall(251, high | 2, 0, 3 << 13)
            answer[f'io of user {high:x}'] = syscall(251, high | 3, 0, 3 << 13)
            answer[f'limits {high:x}'] = syscall(302, pid, 7, word, 0)
        """,
    )
    assert set(found.values()) == {"EPERM"}, found


@pytest.mark.parametrize("profile", ["default", "docker"])
def test_ones_own_may_be_changed(
    make_env: Callable[..., nsbox.ExecutionEnvironment], profile: str
) -> None:
    found = attack(
        make_env(seccomp=profile),
        """
        import threading
        cpu = min(os.sched_getaffinity(0))
        def bind():
            os.sched_setaffinity(threading.get_native_id(), {cpu})
            answer.append(os.sched_getaffinity(0) == {cpu})
        answer = [attempt(os.setpriority, os.PRIO_PROCESS, os.getpid(), 5)]
        answer.append(attempt(os.sched_setaffinity, os.getpid(), {cpu}))
        thread = threading.Thread(target=bind)
        thread.start()
        thread.join()
        answer += [syscall(251, 1, os.getpid(), 3 << 13), syscall(252, 1, 0) >> 13]
        """,
    )
    assert found == [None, None, True, 0, 3]


CHANGES = {
    "priority": "os.setpriority(os.PRIO_PROCESS, {}, 7)",
    "scheduler": "os.sched_setscheduler({}, os.SCHED_BATCH, os.sched_param(0))",
    "cpus": "os.sched_setaffinity({}, [min(os.sched_getaffinity(0))])",
    "io": "libc.syscall(251, 1, {}, 3 << 13)",
    "limits": "resource.prlimit({}, resource.RLIMIT_NOFILE, (50, 50))",
}
HANDLER = """
import ctypes, os, resource
libc = ctypes.CDLL(None, use_errno=True)
def look():
    return [os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0),
            sorted(os.sched_getaffinity(0)), libc.syscall(252, 1, 0),
            resource.getrlimit(resource.RLIMIT_NOFILE)[0]]
FIRST = look()
def handler(event, context):
    before = look()
    refused = 0
    for pid in range(1, os.getpid()) if event else ():
        try:
            CHANGE
        except OSError:
            refused += 1
    return [before == FIRST, refused]
"""


@pytest.mark.parametrize(("start", "profile"), [("clone", "docker"), ("exec", "default")])
@pytest.mark.parametrize("change", CHANGES)
def test_what_invocations_are_forks_of_is_as_it_was_or_gone(
    tmp_path: Path, start: StartChoice, profile: ProfileChoice, change: str
) -> None:
    if change == "cpus" and nsbox.run(["nproc"]).text() == "1\n":
        pytest.skip("one CPU")
    code = tmp_path / "code"
    code.mkdir()
    (code / "app.py").write_text(HANDLER.replace("CHANGE", CHANGES[change].format("pid")))
    function = nsbox.Function("app.handler", code=code, reuse="reset", start=start, seccomp=profile)
    with nsbox.ExecutionEnvironment(function.publish(tmp_path / "store")) as env:
        try:
            assert env.invoke(True)[0]
            again = env.invoke(False)[0]
        except nsbox.EnvironmentStateError:
            again = True  # could not be reset: nobody is given it
    del env
    gc.collect()
    assert again, "the next invocation has what the one before has set"
