# SPDX-License-Identifier: Apache-2.0
"""Attacks of one call on the next: words and log in what stays open, and calls made to fail."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.support import PATIENCE, OpenEnvironment, publish_app

import nsbox
import nsbox.functions.leftovers
from nsbox.functions.session import Session
from nsbox.supervisor.channel import ANSWER_DEADLINE
from nsbox.supervisor.connection import EnvironmentConnection

pytestmark = pytest.mark.needs("userns")

Publish = Callable[..., nsbox.FunctionVersion]


@pytest.fixture
def publish(tmp_path: Path) -> Iterator[Publish]:
    def make(code: str, **options: str) -> nsbox.FunctionVersion:
        return publish_app(tmp_path, code, **options)

    yield make
    gc.collect()  # a version holds a lock in the store


WRITER = """
import fcntl, os
F_SETPIPE_SZ = 1031
copy = os.dup(1)  # by the import: every fork has it
def handler(event, context):
    if event != "attack":
        os.write(1, b"next")
        return "next"
    for fd in (1, 2):
        try:
            fcntl.fcntl(fd, F_SETPIPE_SZ, 1 << 20)
        except OSError:  # over the user's share of all pipes
            pass
        os.write(fd, b"mine" * 50_000)
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        for fd in (1, 2, copy):
            os.set_blocking(fd, False)
        while True:
            for fd in (1, 2, copy):
                try:
                    os.write(fd, b"late" * 100)
                except OSError:
                    pass
            os.write(write, b"!")
    os.read(read, 1)
    return "done"
"""


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_what_is_written_after_an_answer_is_in_no_other_log(publish: Publish, start: str) -> None:
    """By what it has left running, through pipes made larger, and a descriptor of the import."""
    with nsbox.ExecutionEnvironment(publish(WRITER, reuse="reset", start=start)) as env:
        for _ in range(2):
            assert env.invoke("attack") == "done"
            last = env.last
            assert last is not None
            assert last.stdout.count(b"mine") == 50_000  # from two pipes, in any order
            assert last.stderr.count(b"mine") == 50_000
            assert env.invoke("next") == "next"
            last = env.last
            assert last is not None
            assert (last.stdout, last.stderr) == (b"next", b"")


WORDS = """
import fcntl, os, signal
F_SETSIG, F_GETSIG, F_SETPIPE_SZ, F_GETPIPE_SZ = 10, 11, 1031, 1032
def look(fd):
    again = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK)
    found = [fcntl.fcntl(fd, fcntl.F_GETFL), fcntl.fcntl(fd, fcntl.F_GETOWN),
             fcntl.fcntl(fd, F_GETSIG), fcntl.fcntl(fd, F_GETPIPE_SZ), os.fstat(fd).st_mode]
    try:
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        found.append("locked")
    os.close(again)
    return found

def handler(event, context):
    found = [look(1), look(2), os.fstat(1).st_ino, os.fstat(2).st_ino]
    for fd in (1, 2):
        flags = os.O_NONBLOCK | os.O_APPEND | os.O_ASYNC
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | flags)
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(fd, F_SETSIG, signal.SIGURG)
        fcntl.fcntl(fd, F_SETPIPE_SZ, 4096)
        fcntl.flock(fd, fcntl.LOCK_EX)
        try:
            os.fchmod(fd, 0o622)
        except OSError:
            pass
    return found
"""


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_stdout_and_stderr_carry_no_word(publish: Publish, start: str) -> None:
    with nsbox.ExecutionEnvironment(publish(WORDS, reuse="reset", start=start)) as env:
        first, *others = [env.invoke(None) for _ in range(3)]
        assert first[0][1:3] == [0, 0]
        assert "locked" not in first[0] + first[1]
        assert [found[:2] for found in others] == [first[:2]] * 2


NO_WAITING = """
import os, stat
def handler(event, context):
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                os.set_blocking(fd, False)
        except OSError:  # that of the list
            pass
    return event
"""


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_a_socket_that_does_not_wait_ends_no_worker(publish: Publish, start: str) -> None:
    with nsbox.ExecutionEnvironment(publish(NO_WAITING, start=start)) as env:
        for event in (1, "x" * 5_000_000, 2):
            assert env.invoke(event) == event


FILES = """
import os
TUNED = "oom_score_adj", "coredump_filter", "timerslack_ns", "autogroup"
def look():
    found = []
    for pid in (1, os.getppid(), os.getpid()):
        for name in TUNED:
            try:
                with open(f"/proc/{pid}/{name}") as file:  # "/autogroup-NUMBER nice 0"
                    found.append(file.read().split()[-1])
            except OSError:
                found.append(None)
    return found

def handler(event, context):
    found = look()
    got = []
    for pid in (1, os.getppid()) if event else ():
        for name, data in zip(TUNED, (b"500", b"1", b"1000000", b"5")):
            try:
                with open(f"/proc/{pid}/{name}", "wb", 0) as file:
                    file.write(data)
            except OSError:
                pass
        for way in (lambda: open(f"/proc/{pid}/mem", "r+b"), lambda: open(f"/proc/{pid}/environ"),
                    lambda: os.readlink(f"/proc/{pid}/fd/0"), lambda: os.stat(f"/proc/{pid}/cwd")):
            try:
                got.append(str(way()))
            except OSError:
                pass
    return [found, got]
"""


@pytest.mark.parametrize("start", ["clone", "exec"])
@pytest.mark.parametrize("first", [True, False])
def test_a_worker_is_not_changed_by_its_files(publish: Publish, start: str, first: bool) -> None:
    """Memory above all: who writes that is in all invocations to come."""
    with nsbox.ExecutionEnvironment(publish(FILES, reuse="reset", start=start)) as env:
        before, got = env.invoke(first)
        assert got == []
        try:
            assert env.invoke(True) == [before, []]
            assert env.invoke(False) == [before, []]
        except nsbox.EnvironmentStateError as error:
            assert "could not be reset" in str(error)  # noqa: PT017 - nobody is given it


HINDERER = """
import os, signal, socket, sys
worker = os.getpid()
def handler(event, context):
    if event == "victim":
        return "answered"
    if event == "junk":
        own = socket.socket(fileno=3)
        for option in (socket.SO_RCVLOWAT, 42, socket.SO_SNDBUF, socket.SO_RCVBUF):
            try:
                own.setsockopt(socket.SOL_SOCKET, option, 1)
            except OSError:
                pass
        own.detach()
        if os.fork() == 0:
            while True:
                try:
                    os.write(3, b"junk")
                except OSError:
                    pass
    elif event == "priority":
        os.setpriority(os.PRIO_PROCESS, worker, 7)
    else:
        os.kill(worker, getattr(signal, event))
    return "done"
"""


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_no_caller_makes_the_next_ones_call_fail(publish: Publish, start: str) -> None:
    """The worker is stopped, killed, slowed down; bytes and options are left on the socket."""
    version = publish(HINDERER, reuse="reset", start=start)
    attacks = ["SIGSTOP", "SIGTSTP", "SIGKILL", "SIGTERM", "SIGABRT", "priority", "junk"]
    with nsbox.WarmPool(version, provisioned=2, max_environments=2, freeze_after=None) as pool:

        async def on_loop(attack: str) -> None:
            assert await pool.invoke_async(attack) == "done"
            assert await pool.invoke_async("victim") == "answered"

        for attack in attacks:
            try:
                assert pool.invoke(attack) == "done"
            except nsbox.InvokeError:
                assert attack in ("SIGKILL", "SIGTERM", "SIGABRT", "junk")  # its own matter
            errors = pool.stats()["Errors"]
            for _ in range(2):
                assert pool.invoke("victim") == "answered", attack
            pool.invoke_bytes(b'"victim"')
            assert pool.stats()["Errors"] == errors, attack
        for _ in range(2):
            asyncio.run(on_loop("SIGSTOP"))
            asyncio.run(on_loop("priority"))
        assert pool.stats()["Errors"] == errors


KEEPER = """
import ctypes, os, signal, socket, subprocess
libc = ctypes.CDLL(None)
CLONE = 56 if os.uname().machine == "x86_64" else 220
CLONE_PARENT = 0x8000
port = "127.0.0.1", 8080

def children():
    for _ in range(300):
        pid = libc.syscall(CLONE, CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0)
        if pid == 0:
            os._exit(0)

def sockets():
    kept = socket.create_server(port), socket.socket(socket.AF_UNIX)
    kept[1].bind("\\0name")
    pairs = [socket.socketpair() for _ in range(50)]
    for (one, _), (_, other) in zip(pairs, pairs[1:] + pairs[:1]):
        socket.send_fds(one, [b"x"], [other.fileno(), *(held.fileno() for held in kept)])

def handler(event, context):
    if event != "victim":
        return globals()[event]()
    socket.create_server(port).close()
    with socket.socket(socket.AF_UNIX) as own:
        own.bind("\\0name")
    running = [subprocess.Popen(["cat"], stdin=subprocess.PIPE) for _ in range(3)]
    for child in running:
        child.communicate()
    own = {"1", str(os.getpid()), str(os.getppid())}
    return [pid for pid in os.listdir("/proc") if pid.isdigit() and pid not in own]
"""


@pytest.mark.parametrize("start", ["clone", "exec"])
def test_what_the_kernel_keeps_is_not_in_the_next_ones_way(publish: Publish, start: str) -> None:
    """Children of the worker, which it has to wait for; sockets in messages that nobody reads."""
    with nsbox.ExecutionEnvironment(publish(KEEPER, reuse="reset", start=start)) as env:
        for attack in ["children", *["sockets"] * 10]:
            env.invoke(attack)
            assert env.invoke("victim") == [], attack


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("how", ["invoke", "invoke_async"])
def test_a_worker_that_dies_at_the_last_moment_is_nobodys_error(
    publish: Publish, monkeypatch: pytest.MonkeyPatch, moment: str, how: str
) -> None:
    """Before its event is sent, or with the event in its socket, which no fork has read."""
    version = publish(HINDERER, reuse="reset")
    killed: list[int] = []
    send = Session._send

    def send_and_kill(self: Session, *request: object) -> object:
        if killed:
            return send(self, *request)  # type: ignore[arg-type]
        (worker,) = psutil.Process(self._connection.pid).children()
        killed.append(worker.pid)
        if moment == "before":
            worker.kill()
            return send(self, *request)  # type: ignore[arg-type]
        worker.suspend()
        call = send(self, *request)  # type: ignore[arg-type]
        worker.kill()
        return call

    with nsbox.WarmPool(version, provisioned=2, max_environments=2, freeze_after=None) as pool:
        monkeypatch.setattr(Session, "_send", send_and_kill)
        if how == "invoke":
            assert pool.invoke("victim") == "answered"
        else:
            assert asyncio.run(pool.invoke_async("victim")) == "answered"
        assert killed
        assert pool.stats()["Errors"] == 0


def test_an_environment_on_its_own_says_what_has_ended(publish: Publish) -> None:
    with nsbox.ExecutionEnvironment(publish(HINDERER, reuse="reset")) as env:
        assert env.invoke("SIGSTOP") == "done"
        assert env.invoke("victim") == "answered"
        with contextlib.suppress(nsbox.InvokeError):
            env.invoke("SIGKILL")  # it may see it itself
        with pytest.raises(nsbox.NsboxError, match="worker had ended"):
            env.invoke("victim")
        assert env.state is nsbox.State.DEAD


PEEKER = """
import os, socket, struct, sys, time
HEADER = struct.Struct("!cIQ")
SO_PEEK_OFF = 42
def say(number):
    os.write(3, HEADER.pack(b"A", 2, number) + b"42")
def handler(event, context):
    # Answers, and leaves in the socket what it answers to.
    own = socket.socket(fileno=3)
    own.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    say(sys._getframe(2).f_locals["number"])
    def peek(size):
        # Without waiting: Linux 6.1 begins at the first byte again after a wait.
        data = b""
        while len(data) < size:
            try:
                data += own.recv(size - len(data), socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                time.sleep(0.001)
        return data
    while True:
        _, size, number = HEADER.unpack(peek(HEADER.size))
        peek(size)
        say(number)
"""


def test_a_small_event_that_nobody_reads_holds_up_no_loop(publish: Publish) -> None:
    """Those before it have filled the socket."""
    version = publish(PEEKER)

    async def ticks_of_the_last(env: nsbox.ExecutionEnvironment) -> int:
        ticks = before = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.005)
                ticks += 1

        ticking = asyncio.create_task(tick())
        with pytest.raises(nsbox.InvokeTimeout):  # noqa: PT012 - one of them
            for _ in range(100):
                before = ticks
                assert await env.invoke_async("x" * 50_000, timeout=0.7 * PATIENCE) == 42
        ticking.cancel()
        return ticks - before

    with nsbox.ExecutionEnvironment(version) as env:
        assert env.invoke("first") == 42
        assert asyncio.run(ticks_of_the_last(env)) > 3


def test_a_silent_pid_1_holds_up_no_loop(publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its time it is killed, and the call is told so; a pool would make it elsewhere."""
    monkeypatch.setattr(nsbox.functions.leftovers, "ANSWER_DEADLINE", 0.2 * PATIENCE)
    with OpenEnvironment(publish(HINDERER, reuse="reset")) as env:
        pid, send = env.pid, EnvironmentConnection.begin

        def ask_and_stop(*arguments: Any) -> object:
            os.kill(pid, signal.SIGSTOP)
            return send(*arguments)

        # On the class: put back on the object, its own method would keep it alive.
        monkeypatch.setattr(EnvironmentConnection, "begin", ask_and_stop)
        assert env.invoke("victim") == "answered"
        begin = time.monotonic()
        with pytest.raises(nsbox.EnvironmentDied, match="PID 1 did not answer"):
            asyncio.run(env.invoke_async("victim"))
        assert time.monotonic() - begin < ANSWER_DEADLINE / 2, "it waited on the loop"
        assert env.managed.heard_nothing
