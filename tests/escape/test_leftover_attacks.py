# SPDX-License-Identifier: Apache-2.0
"""Attacks by what an invocation, or a command, leaves running: it reads and answers for others."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support import SLOW_MACHINE, attack, wait_until

import nsbox

pytestmark = pytest.mark.needs("userns")

HANDLER = '''
import ctypes, os, signal, stat, struct, threading, time

HEADER = struct.Struct("!cIQ")
LIBC = ctypes.CDLL(None)

def sockets():
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                found.append(int(name))
        except OSError:
            pass
    return found

def steal(worker):
    """Stop the worker when it has answered, and answer in its place whatever event comes."""
    held = sockets()
    time.sleep(0.005)
    os.kill(worker, signal.SIGSTOP)
    open("/tmp/stopped", "w").close()
    while True:
        for fd in held:
            os.set_blocking(fd, False)
            try:
                event = os.read(fd, 65536)
            except BlockingIOError:
                continue
            kind, size, number = HEADER.unpack_from(event)
            os.write(fd, HEADER.pack(b"A", 8, number) + b'"forged"')
        time.sleep(0.0005)

def daemonise(fork):
    worker = os.getpid()
    if fork() == 0:
        os.setsid()
        if fork() == 0:
            steal(worker)
        os._exit(0)

def others():
    own = os.getpid(), 1
    return {int(name) for name in os.listdir("/proc") if name.isdigit()} - {*own}

def handler(event, context):
    if event == "fork":
        daemonise(os.fork)
    elif event == "clone":
        daemonise(LIBC.fork)  # Python's hooks are not run
    elif event == "chain":
        if LIBC.fork() == 0:
            while True:  # each has one child, and ends
                if LIBC.fork():
                    os._exit(0)
    elif event == "stay":
        if os.fork() == 0:
            time.sleep(1000)
        threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()
    elif event == "held":
        read, write = os.pipe()
        if os.fork() == 0:
            os.write(write, bytes([len(sockets())]))
            os._exit(0)
        os.wait()
        return os.read(read, 1)[0]
    elif event == "returns twice":
        os.fork()
    elif event == "sleepers":
        for _ in range(60):
            if os.fork() == 0:
                time.sleep(1000)
        globals()["before"] = others()
    elif event == "new":
        return len(others() - before)
    return event
'''

Make = Callable[..., nsbox.ExecutionEnvironment]


@pytest.fixture(autouse=True)
def _versions_are_let_go() -> Iterator[None]:
    yield
    gc.collect()  # one holds a lock in the store


@pytest.fixture
def make_function(tmp_path: Path) -> Iterator[Make]:
    """A function that makes environments of the handler; all are closed afterwards."""
    (tmp_path / "app.py").write_text(HANDLER)
    made: list[nsbox.ExecutionEnvironment] = []

    def make(**options: Any) -> nsbox.ExecutionEnvironment:
        function = nsbox.Function("app.handler", code=tmp_path, timeout=30, **options)
        made.append(nsbox.ExecutionEnvironment(function.publish()))
        return made[-1]

    yield make
    while made:
        made.pop().close()


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_forks_of_the_worker_have_none_of_its_sockets(make_function: Make, start: str) -> None:
    env = make_function(start=start, reuse="keep")
    assert env.invoke("held") == 0
    env.invoke("stay")
    assert [env.invoke(number) for number in range(20)] == list(range(20))
    assert [env.invoke("returns twice") for _ in range(3)] == ["returns twice"] * 3
    assert env.state is nsbox.State.READY


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_forks_of_an_invocation_have_none_of_its_sockets(make_function: Make, start: str) -> None:
    env = make_function(start=start, reuse="reset")
    assert [env.invoke("held") for _ in range(2)] == [0, 0]
    assert [env.invoke("returns twice") for _ in range(3)] == ["returns twice"] * 3


CHAIN = """
if os.fork() == 0:
    os.setsid()
    os.closerange(0, 64)
    while True:  # each has one child, and ends
        if os.fork():
            os._exit(0)
"""


def test_who_forks_and_ends_is_gone_after_its_command(make_function: Make) -> None:
    """No list of processes holds both of two that follow one another fast enough."""
    env = make_function(reuse="keep")
    env.invoke("sleepers")  # so that a look takes longer
    for _ in range(1 if SLOW_MACHINE else 3):
        attack(env, CHAIN)
        assert env.invoke("new") == 0


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_what_a_tenants_call_leaves_running_neither_reads_nor_answers(
    make_function: Make, start: str
) -> None:
    """A process made past Python has the worker's socket: it is killed before the next event."""
    env = make_function(start=start, tenant="a")
    for event in ("clone", "fork", "chain"):
        assert env.invoke(event) == event
        assert env.last is not None
        assert env.last.left_running is not None
        assert env.last.left_running.processes > 0, event
        assert env.left_running() == nsbox.LeftRunning()
        assert [env.invoke(number) for number in range(5)] == list(range(5))


def test_it_would_read_and_answer(make_function: Make) -> None:
    """What the test above is worth: where processes go on, the same one answers."""
    env = make_function(left_running="run")
    assert env.invoke("clone") == "clone"
    wait_until(lambda: has_file(env, "/tmp/stopped"), "it has stopped the worker")
    assert env.left_running() == nsbox.LeftRunning(processes=1)
    assert env.invoke("secret") == "forged"


def has_file(env: nsbox.ExecutionEnvironment, path: str) -> bool:
    try:
        env.read_file(path)
    except nsbox.SyscallError:
        return False
    return True


def test_what_a_tenants_call_leaves_running_in_a_pool(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(HANDLER)
    events: list[nsbox.PoolEvent] = []
    function = nsbox.Function("app.handler", code=tmp_path, timeout=30)

    async def on_a_loop(pool: nsbox.WarmPool) -> None:
        assert await pool.invoke_async("clone", tenant="a") == "clone"
        assert [await pool.invoke_async(number, tenant="a") for number in range(5)] == [*range(5)]

    with nsbox.WarmPool(function, max_environments=1, on_event=events.append) as pool:
        assert pool.invoke("clone", tenant="a") == "clone"
        assert [pool.invoke(number, tenant="a") for number in range(5)] == list(range(5))
        asyncio.run(on_a_loop(pool))
        stats = pool.stats()
    assert (stats["LeftRunning"], stats["Births"], stats["Errors"]) == (2, 1, 0)
    told = [event.left_running for event in events if event.kind == "invoked"]
    assert [left is not None and left.processes > 0 for left in told] == [True, *[False] * 5] * 2
