# SPDX-License-Identifier: Apache-2.0
"""A PID 1 that was taken over answers in part, too much, or not at all: nobody waits for it.

An impostor has its end of the control socket, and speaks `nsbox.guest.protocol` as it likes.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from tests.support import PATIENCE, OpenEnvironment, wait_until

import nsbox
import nsbox.functions.leftovers
from nsbox.guest import protocol as p
from nsbox.linux.descriptors import close_all, receive_bytes, send_bytes
from nsbox.supervisor import channel, process

pytestmark = pytest.mark.needs("userns")

OK = p.ANSWER.pack(p.OK, 0, 0, 0)
LIMIT = 0.1 * PATIENCE


Attack = Callable[..., None]


class Impostor:
    """Has PID 1's end of `env`'s control socket: answers each request with `data` and descriptors.

    Then it is silent until the PID 1 there is, which is idle, has been killed; or `dies` with it.
    """

    def __init__(self, env: OpenEnvironment, data: bytes, fds: int, *, dies: bool):
        control = env.managed.death_descriptor()
        self._data, self._fds, self._dies = data, fds, dies
        self._pidfd = os.pidfd_open(env.pid)
        self._original = socket.socket(fileno=os.dup(control))  # while it is there, PID 1 lives
        ours, self._control = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            os.dup2(ours.fileno(), control, inheritable=False)
        self._channels: list[socket.socket] = []
        self._thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        while all(fd != self._pidfd for fd, _ in poll.poll()):
            try:
                message, fds = receive_bytes(self._control, p.LARGEST_MESSAGE)
            except ConnectionError:
                break
            if not message:
                break
            close_all(fds[1:])
            self._channels.append(socket.socket(fileno=fds[0]))
            null = os.open("/dev/null", os.O_RDONLY)
            if self._data:
                send_bytes(self._channels[-1], self._data, [null] * self._fds)
            os.close(null)
            if self._dies:
                break
        self._close()

    def _close(self) -> None:
        for end in (*self._channels, self._control, self._original):
            end.close()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._thread.join()
        os.close(self._pidfd)


def invoke(env: nsbox.ExecutionEnvironment) -> None:
    env.invoke(1)  # it is reset after it
    env.invoke(2)


def invoke_async(env: nsbox.ExecutionEnvironment) -> None:
    async def main() -> None:
        await env.invoke_async(1)
        await env.invoke_async(2)

    asyncio.run(main())


OPERATIONS: dict[str, Callable[[nsbox.ExecutionEnvironment], Any]] = {
    "run": lambda env: env.run(["true"]),
    "popen": lambda env: env.popen(["true"]),
    "terminal": lambda env: env.popen(["true"], tty=(24, 80)),
    "read": lambda env: env.read_file("/etc/passwd"),
    "write": lambda env: env.write_file("/tmp/a", b"x" * 100),
    "reset": lambda env: env.reset(),
    "invoke": invoke,
    "invoke on a loop": invoke_async,
}


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    """Have versions, which hold a lock in the store each, gone before leaks are looked for."""
    yield
    wait_until(lambda: not any(t.name == "nsbox-aside" for t in threading.enumerate()), "over")
    gc.collect()


@pytest.fixture(params=list(OPERATIONS))
def attacked(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Attack:
    """An operation with an impostor for PID 1: it ends the environment, and is told why."""
    name = request.param
    monkeypatch.setattr(channel, "ANSWER_DEADLINE", LIMIT)
    monkeypatch.setattr(nsbox.functions.leftovers, "ANSWER_DEADLINE", LIMIT)
    (tmp_path / "app.py").write_text("def handler(event, context): return event")

    def make() -> OpenEnvironment:
        if not name.startswith("invoke"):
            return OpenEnvironment()
        function = nsbox.Function("app.handler", code=tmp_path, reuse="reset")
        env = OpenEnvironment(function.publish())
        env.init()
        return env

    def ends(why: str, data: bytes, fds: int = 0, *, dies: bool = False) -> None:
        with make() as env:
            begin = time.monotonic()
            impostor = Impostor(env, data, fds, dies=dies)
            with impostor, pytest.raises(nsbox.EnvironmentDied, match=why):
                OPERATIONS[name](env)
            assert time.monotonic() - begin < 10 * PATIENCE, "nobody waits for it"
            assert env.state is nsbox.State.DEAD
            with pytest.raises(nsbox.EnvironmentStateError, match="is dead"):
                env.run(["true"])

    return ends


def test_an_answer_in_part_then_death_ends_the_environment(attacked: Attack) -> None:
    for data, fds in ((OK[:10], 0), (OK[:10], 1), (b"", 0)):
        attacked("PID 1", data, fds, dies=True)


def test_an_answer_with_more_descriptors_than_it_has_ends_the_environment(
    attacked: Attack,
) -> None:
    for data, fds in ((OK, 2), (OK, 40), (OK[:5], 16)):
        attacked("PID 1", data, fds)


@pytest.mark.parametrize("attacked", sorted(OPERATIONS.keys() - {"run"}), indirect=True)
def test_an_answer_in_part_then_silence_ends_the_environment(attacked: Attack) -> None:
    """All but a command, which may run for as long as it likes, or its timeout says."""
    for data, fds in ((OK[:10], 0), (OK[:10], 1), (b"", 0)):
        attacked("PID 1 did not answer; nsbox killed it", data, fds)


def test_a_command_whose_end_is_told_in_part_ends_at_its_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(process, "KILL_DEADLINE", LIMIT)
    for data in (b"", OK[:10]):
        with OpenEnvironment() as env, Impostor(env, data, 0, dies=False):
            result = env.run(["true"], timeout=LIMIT)
        assert result.outcome is nsbox.Outcome.TIMED_OUT
        assert "with its whole environment" in result.evidence


@pytest.mark.parametrize("dies", [False, True], ids=["silence", "death"])
def test_a_part_of_a_file_is_no_file(monkeypatch: pytest.MonkeyPatch, dies: bool) -> None:
    """Nor one of which more is announced than comes, or that is larger than it may be."""
    monkeypatch.setattr(channel, "ANSWER_DEADLINE", LIMIT)
    last, more = (p.ANSWER.pack(p.OK, 100, is_more, 0) for is_more in (0, 1))
    for data in (last, last + b"x" * 99, more + b"x" * 100, more + b"x" * 100 + OK[:10]):
        with OpenEnvironment() as env, Impostor(env, data, 0, dies=dies):
            with pytest.raises(nsbox.EnvironmentDied):
                env.read_file("/etc/passwd")
            assert env.state is nsbox.State.DEAD
    with (
        OpenEnvironment() as env,
        Impostor(env, last + b"x" * 100, 0, dies=dies),
        pytest.raises(nsbox.EnvironmentDied, match="malformed"),
    ):
        env.read_file("/etc/passwd", max_bytes=99)
    with OpenEnvironment() as env, Impostor(env, last + b"x" * 100, 0, dies=dies):
        assert env.read_file("/etc/passwd") == b"x" * 100
