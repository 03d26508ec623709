# SPDX-License-Identifier: Apache-2.0
"""Answers of PID 1 that do not come whole: it died meanwhile, or is in the hands of an attacker."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.support import name_of, wait_until

import nsbox
from nsbox.guest import protocol as p
from nsbox.linux.descriptors import receive_bytes, send_bytes
from nsbox.supervisor import process
from nsbox.supervisor.channel import Channel
from nsbox.supervisor.connection import EnvironmentConnection

pytestmark = pytest.mark.needs("userns")

LARGE = os.urandom(1 << 20)
_receive_numbers = Channel.receive_numbers


def after_first_answer(monkeypatch: pytest.MonkeyPatch, act: Callable[[], None]) -> None:
    """Do something when PID 1 has announced the first part of a file, which no socket holds."""
    todo = [act]

    def receive(channel: Channel) -> tuple[bytes, int, int]:
        answer = _receive_numbers(channel)
        if todo:
            todo.pop()()
        return answer

    monkeypatch.setattr(Channel, "receive_numbers", receive)


def test_a_file_is_whole_or_not_there(
    make_env: Callable[..., nsbox.ExecutionEnvironment], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env()
    env.write_file("/tmp/large", LARGE)
    assert env.read_file("/tmp/large") == LARGE
    pid = env.pid

    def kill() -> None:
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: name_of(pid) == "", "it is gone")

    after_first_answer(monkeypatch, kill)
    with pytest.raises(nsbox.EnvironmentDied):
        env.read_file("/tmp/large")


def test_a_file_that_shrinks_is_read_to_its_end(
    make_env: Callable[..., nsbox.ExecutionEnvironment], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env()
    env.write_file("/tmp/large", LARGE)
    script = ["sh", "-c", "read x; : > /tmp/large; echo done"]
    with env.popen(script, stdin=nsbox.PIPE, stdout=nsbox.PIPE) as shell:
        assert shell.stdin is not None
        assert shell.stdout is not None
        feed, done = shell.stdin, shell.stdout

        def shrink() -> None:
            feed.write(b"\n")
            assert done.read(5) == b"done\n"

        after_first_answer(monkeypatch, shrink)
        assert env.read_file("/tmp/large") == LARGE[: p.LARGEST_PART]
    assert env.read_file("/tmp/large") == b""


class Attacker:
    """What all that PID 1 is asked comes to, from now on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._control, self._end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

        def ask(_: EnvironmentConnection, kind: bytes, request: bytes, fds: list[int]) -> Channel:
            return Channel(self._control, kind, request, fds)

        monkeypatch.setattr(EnvironmentConnection, "ask", ask)

    def take(self) -> socket.socket:
        _, fds = receive_bytes(self._end, p.LARGEST_MESSAGE)
        for fd in fds[1:]:
            os.close(fd)
        return socket.socket(fileno=fds[0])

    def close(self) -> None:
        self._control.close()
        self._end.close()


def test_a_part_of_an_answer_holds_nobody_up(
    make_env: Callable[..., nsbox.ExecutionEnvironment], monkeypatch: pytest.MonkeyPatch
) -> None:
    env = make_env()
    monkeypatch.setattr(process, "KILL_DEADLINE", 0.1)
    monkeypatch.setattr(process, "_LONGEST_WAIT", 100)
    attacker = Attacker(monkeypatch)
    before = len(os.listdir("/proc/self/fd"))
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(env.run, ["true"], timeout=0.1)
        with attacker.take() as channel:
            null = os.open("/dev/null", os.O_RDONLY)
            send_bytes(channel, p.ANSWER.pack(p.EXITED, 0, 0, 0)[:10], [null])
            os.close(null)
            result = running.result(10)
    assert result.outcome is nsbox.Outcome.TIMED_OUT, "with its environment"
    attacker.close()
    assert env.state is nsbox.State.DEAD
    env.close()
    assert len(os.listdir("/proc/self/fd")) <= before
