# SPDX-License-Identifier: Apache-2.0
"""Attacks that hold up, or watch, who else opens a file that is bound read-only or code."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support import PATIENCE, attack, x86_64_only

import nsbox
from nsbox.functions.function import StartChoice

pytestmark = [pytest.mark.needs("userns", "seccomp"), x86_64_only]

PROFILES = ["strict", "default", "docker"]

# F_SETLEASE with F_RDLCK and F_WRLCK, F_NOTIFY with DN_ACCESS | DN_OPEN.., and F_SETDELEG of 6.19.
TRIES = """
def tries(path):
    fd = os.open(path, os.O_RDONLY)
    word = ctypes.create_string_buffer(64)
    return {
        f'{command} {value} {high:x}': syscall(72, fd, high | command, value)
        for command, value in ((1024, 0), (1024, 1), (1026, 0x8000003f), (1040, word))
        for high in (0, 1 << 32, 0xffffffff << 32)
    }
"""


def opens_at_once(path: Path, flags: int) -> bool:
    """Whether an open in the host ends; a lease would hold it up for 45 seconds."""
    done = threading.Event()

    def open_it() -> None:
        os.close(os.open(path, flags))
        done.set()

    threading.Thread(target=open_it, daemon=True).start()
    return done.wait(10 * PATIENCE)


@pytest.mark.parametrize("profile", PROFILES)
def test_no_leases_and_no_notifications_on_binds(
    make_env: Callable[..., nsbox.ExecutionEnvironment], tmp_path: Path, profile: str
) -> None:
    shared = tmp_path / "shared"
    shared.mkdir()
    file = shared / "file"
    file.write_text("word")
    file.chmod(0o644)
    shared.chmod(0o755)
    env = make_env(seccomp=profile, mounts=[nsbox.Mount.bind(shared, "/shared")])
    with env.popen(["sleep", "1000"]):
        found = attack(
            env,
            TRIES + "answer = {p: tries(p) for p in ('/shared/file', '/shared', '/usr/bin/env')}",
        )
        for path, answers in found.items():
            assert set(answers.values()) == {"EPERM"}, (path, answers)
        assert opens_at_once(file, os.O_WRONLY | os.O_TRUNC)


HOLDER = (
    """
import ctypes, errno, fcntl, os, time
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def syscall(number, *arguments):
    ctypes.set_errno(0)
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *words)
    return errno.errorcode[ctypes.get_errno()] if result == -1 else result
"""
    + TRIES
    + """
HELD = []
def handler(event, context):
    places = [os.path.join(d, n) for d, _, names in os.walk('/var/task') for n in ['', *names]]
    for place in places:
        HELD.append(os.open(place, os.O_RDONLY))
        fcntl.flock(HELD[-1], fcntl.LOCK_EX)
        if os.path.isfile(place):
            fcntl.lockf(os.open(place, os.O_RDONLY), fcntl.LOCK_SH)
    return [len(HELD), sorted({str(v) for p in places for v in tries(p).values()})]
"""
)


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_code_that_is_locked_holds_up_nothing_of_the_store(
    tmp_path: Path, start: StartChoice
) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "app.py").write_text(HOLDER)
    store = tmp_path / "store"
    function = nsbox.Function("app.handler", code=code, start=start)
    version = function.publish(store)
    with nsbox.ExecutionEnvironment(version) as env:
        assert env.invoke({}) == [2, ["EPERM"]]
        # A lock of the guest's that any of these waited for would be there for ever.
        with nsbox.ExecutionEnvironment(function.publish(store)) as other:
            other.init()
        assert nsbox.Store(store).collect(max_age=0) == [], "what is in use stays"
        env.run(["sleep", "0"]).check()
    del env, other, version
    gc.collect()
    assert len(nsbox.Store(store).collect(max_age=0)) == 1, "no lock of the guest's keeps it"


def test_code_of_a_pool_has_no_leases(tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    (code / "app.py").write_text(HOLDER)
    function = nsbox.Function("app.handler", code=code)
    with nsbox.WarmPool(function.publish(tmp_path / "store"), reuse="keep") as pool:
        assert pool.invoke({}) == [2, ["EPERM"]]
    del pool
    gc.collect()


def test_strict_tells_nobody_what_others_open(
    make_env: Callable[..., nsbox.ExecutionEnvironment],
) -> None:
    code = "answer = [syscall(294, high) for high in (0, 1 << 32)] + [syscall(253), syscall(300)]"
    assert set(attack(make_env(seccomp="strict"), code)) == {"ENOSYS", "EPERM"}
