# SPDX-License-Identifier: Apache-2.0
"""Attacks by what an invocation, or a command, leaves running: it reads and answers for others."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support import attack

import nsbox

pytestmark = pytest.mark.needs("userns")

HANDLER = '''
import ctypes, os, stat, struct, time

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

def steal():
    """Answer in the worker's place, whatever event comes; until then write to what there is."""
    held = sockets()
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
    if fork() == 0:
        os.setsid()
        if fork() == 0:
            steal()
        os._exit(0)

def others():
    own = os.getpid(), 1
    return {int(name) for name in os.listdir("/proc") if name.isdigit()} - {*own}

def handler(event, context):
    if event == "fork":
        daemonise(os.fork)
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


@pytest.fixture
def make_function(tmp_path: Path) -> Iterator[Make]:
    """A function that makes environments of the handler; all are closed afterwards."""
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
def test_forks_of_the_worker_have_none_of_its_sockets(make_function: Make, start: str) -> None:
    env = make_function(start=start, reuse="keep")
    assert env.invoke("held") == 0
    for _ in range(3):
        env.invoke("fork")
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
    for _ in range(5):
        attack(env, CHAIN)
        assert env.invoke("new") == 0
