# SPDX-License-Identifier: Apache-2.0
"""Attacks of one invocation, or command, on the next: what stays, and answers in its place."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support import PATIENCE, attack

import nsbox
from nsbox.functions.function import ReuseChoice, StartChoice

pytestmark = pytest.mark.needs("userns")

# A process in state Z whose second thread goes on, and writes to all descriptors it has.
GHOST = '''
import ctypes, os, signal, threading, time

ANSWER = b"A" + (6).to_bytes(4, "big") + bytes(8) + b'"mine"'

def haunt():
    time.sleep(0.05)
    while True:
        time.sleep(0.001)
        for fd in range(3, 64):
            try:
                os.set_blocking(fd, False)
                os.write(fd, ANSWER)
            except OSError:
                pass

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
    if event == "held":
        # Sockets of this process, by what the kernel calls them, and who else has one of them.
        own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
               if os.path.exists(f"/proc/self/fd/{fd}")}
        return sorted(name for name in own if name.startswith("socket:"))
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


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_what_is_left_has_no_end_of_the_next_events_socket(make_haunted: Make, start: str) -> None:
    env = make_haunted(start=start, reuse="reset")
    seen = [env.invoke("held") for _ in range(3)]
    assert [len(sockets) for sockets in seen] == [1, 1, 1]
    assert len({sockets[0] for sockets in seen}) == 3, "a socket serves two invocations"


STDIN = """
import fcntl, os, subprocess, sys
def look(fd):
    # A word for who comes next: flags and owner are of the open file.
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    owner = fcntl.fcntl(fd, fcntl.F_GETOWN)
    fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_NONBLOCK | os.O_APPEND)
    fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
    return [flags & (os.O_NONBLOCK | os.O_APPEND), owner]

def handler(event, context):
    return look(0)
"""


@pytest.mark.parametrize("start", ["clone", "exec"])
@pytest.mark.parametrize("reuse", ["reset", "keep"])
def test_stdin_carries_no_word(tmp_path: Path, start: StartChoice, reuse: ReuseChoice) -> None:
    """Neither into the next environment of one template, nor into the next invocation."""
    (tmp_path / "app.py").write_text(STDIN)
    function = nsbox.Function("app.handler", code=tmp_path, start=start, reuse=reuse)
    version = function.publish()
    with nsbox.ExecutionEnvironment(version) as one, nsbox.ExecutionEnvironment(version) as other:
        assert one.invoke({}) == [0, 0]
        assert other.invoke({}) == [0, 0]
        if reuse == "reset":
            assert [one.invoke({}) for _ in range(3)] == [[0, 0]] * 3
        assert attack(one, STDIN + "\nanswer = look(0)") == [0, 0]
        assert attack(other, STDIN + "\nanswer = look(0)") == [0, 0]
    gc.collect()


def test_silence_and_refusal_hold_up_no_loop(tmp_path: Path) -> None:
    """No room for a large event; a closed socket: the loop goes on meanwhile."""
    (tmp_path / "app.py").write_text(
        """
import os, signal, time
def handler(event, context):
    if event == "close":
        os.close(3)
    elif event == "stop":
        if os.fork() == 0:
            time.sleep(0.1)
            os.kill(os.getppid(), signal.SIGSTOP)
            os._exit(0)
        return None
    elif isinstance(event, str):
        return len(event)
    time.sleep(1000)
"""
    )

    async def longest_pause(env: nsbox.ExecutionEnvironment, events: list[str]) -> float:
        loop = asyncio.get_running_loop()
        longest, last, is_over = 0.0, loop.time(), False

        async def tick() -> None:
            nonlocal longest, last
            while not is_over:
                await asyncio.sleep(0.005)
                longest, last = max(longest, loop.time() - last), loop.time()

        ticking = asyncio.create_task(tick())
        for event in events:
            with contextlib.suppress(nsbox.NsboxError):
                await env.invoke_async(event, timeout=2.0)
                await asyncio.sleep(0.3)
        is_over = True
        await ticking
        return longest

    for events in (["close"], ["stop", "x" * (1 << 20)]):
        function = nsbox.Function("app.handler", code=tmp_path)
        with nsbox.ExecutionEnvironment(function.publish()) as env:
            env.invoke("first")
            assert asyncio.run(longest_pause(env, events)) < 1.5 * PATIENCE, events
    gc.collect()
