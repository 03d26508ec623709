# SPDX-License-Identifier: Apache-2.0
"""Attacks of one invocation, or command, on the next: what stays, and answers in its place."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support import attack

import nsbox

pytestmark = pytest.mark.needs("userns")

# A process in state Z whose second thread goes on.
GHOST = '''
import ctypes, os, signal, threading, time

def haunt():
    while True:
        time.sleep(0.001)

def ghost():
    """Make one, and return its number when its first thread has ended."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        threading.Thread(target=haunt).start()
        # exit(2) ends this thread alone; the C library's would end the process.
        ctypes.CDLL(None).syscall(ctypes.c_long(60 if os.uname().machine == "x86_64" else 93), 0)
    while b") Z " not in open(f"/proc/{pid}/stat", "rb").read():
        time.sleep(0.001)
    return pid

def others():
    own = os.getpid(), os.getppid(), 1
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) not in own]
'''

HANDLER = (
    GHOST
    + """
def handler(event, context):
    if event == "ghost":
        return ghost() and "ghost"
    return others()
"""
)

Make = Callable[..., nsbox.ExecutionEnvironment]


@pytest.fixture
def make_haunted(tmp_path: Path) -> Iterator[Make]:
    (tmp_path / "app.py").write_text(HANDLER)
    made: list[nsbox.ExecutionEnvironment] = []

    def make(**options: str) -> nsbox.ExecutionEnvironment:
        function = nsbox.Function("app.handler", code=tmp_path, timeout=30, **options)  # type: ignore[arg-type]
        made.append(nsbox.ExecutionEnvironment(function.publish()))
        return made[-1]

    yield make
    while made:
        made.pop().close()
    gc.collect()  # a version holds a lock in the store


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_process_without_its_first_thread_is_gone_after_a_reset(
    make_haunted: Make, start: str
) -> None:
    env = make_haunted(start=start, reuse="reset")
    before = env.invoke("look")
    for _ in range(3):
        assert env.invoke("ghost") == "ghost"
        assert env.invoke("look") == before
    assert env.state is nsbox.State.READY


def test_process_without_its_first_thread_is_gone_after_its_command(make_haunted: Make) -> None:
    """The worker of the environment is a command that goes on, so that not all can be killed."""
    env = make_haunted(reuse="keep")
    before = env.invoke("look")
    attack(env, GHOST + "\nghost()")
    assert env.invoke("look") == before


def test_process_without_its_first_thread_is_gone_after_the_reset_of_commands(
    make_env: Make,
) -> None:
    env = make_env()
    attack(env, GHOST + "\nghost()")
    env.reset()
    assert attack(env, GHOST + "\nanswer = others()") == []
