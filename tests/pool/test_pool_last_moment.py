# SPDX-License-Identifier: Apache-2.0
"""What happens between two calls to a warm environment: it dies, or says what nobody asked for."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import select
import signal
import termios
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tests.pool.conftest import managed_of
from tests.support import PATIENCE, wait_until

import nsbox
from nsbox.functions.function import ReuseChoice
from nsbox.pool.manager import PoolLease, PoolScheduler, PoolSlot
from nsbox.pool.scheduler import Scheduler

pytestmark = pytest.mark.needs("userns")

Publish = Callable[[ReuseChoice], nsbox.FunctionVersion]

CODE = """
import os, struct, sys, threading
from fcntl import ioctl
from termios import TIOCOUTQ

count = 0

def frame(kind, number, data):
    return struct.pack("!cIQ", kind, len(data), number) + data

def say_later(data):
    # When the answer has been read: what comes now is nobody's.
    unread = bytearray(4)
    while ioctl(3, TIOCOUTQ, unread) or any(unread):
        os.sched_yield()
    os.write(3, data)

def handler(event, context):
    global count
    count += 1
    number = sys._getframe(2).f_locals["number"]
    attack = event.get("attack")
    if attack == "leave":
        os.write(3, frame(b"A", number, b'"left"'))
        os._exit(0)
    if attack == "say":
        os.write(3, frame(b"A", number, b'"own"'))
        say_later(eval(event["what"], globals(), {"number": number}))
        threading.Event().wait()
    return [count, str(number), event.get("echo")]
"""


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    def make(reuse: ReuseChoice) -> nsbox.FunctionVersion:
        (tmp_path / "app.py").write_text(CODE)
        limit = 30 * PATIENCE
        return nsbox.Function(
            "app.handler", code=tmp_path, reuse=reuse, timeout=limit, init_timeout=limit
        ).publish()

    return make


def hears(slot: PoolSlot, events: int) -> bool:
    """Whether the worker's socket has one of `events`; a program's environment has PID 1's."""
    poll = select.poll()
    poll.register(slot.fd, events)
    return any(event & events for _, event in poll.poll(0))


def is_sent(slot: PoolSlot) -> bool:
    """Whether there is something that the worker has not read."""
    unread = bytearray(4)
    fcntl.ioctl(slot.fd, termios.TIOCOUTQ, unread)
    return any(unread)


def kill_at_lease(
    pool: nsbox.WarmPool, monkeypatch: pytest.MonkeyPatch, victim: str
) -> list[PoolSlot]:
    """Have the next environment that is leased die before its event is sent; returns whose."""
    killed: list[PoolSlot] = []
    take = Scheduler.take_idle

    def take_and_kill(
        scheduler: PoolScheduler, lease: PoolLease, queue: object, tenant: str | None
    ) -> bool:
        is_taken = take(scheduler, lease, queue, tenant)  # type: ignore[arg-type]
        if is_taken and not killed:
            slot = lease.slot
            killed.append(slot)
            init = psutil.Process(managed_of(slot).pid)
            (init if victim == "init" else init.children()[0]).kill()
            # Not by asking the environment, which would note its end.
            wait_until(lambda: hears(slot, select.POLLHUP), "its socket is closed")
        return is_taken

    # On the class: put back on the object, its own method would keep it alive.
    monkeypatch.setattr(Scheduler, "take_idle", take_and_kill)
    return killed


@pytest.mark.parametrize("victim", ["init", "worker"])
@pytest.mark.parametrize("how", ["invoke", "invoke_bytes", "invoke_async"])
def test_a_death_before_the_event_is_sent_is_nobodys_error(
    publish: Publish, monkeypatch: pytest.MonkeyPatch, victim: str, how: str
) -> None:
    """The guest has surely got nothing, and another environment serves the call."""
    told: list[tuple[str, object]] = []

    def note(event: nsbox.PoolEvent) -> None:
        told.append((event.kind, event.reason or event.error))

    with nsbox.WarmPool(
        publish("keep"), provisioned=2, max_environments=2, freeze_after=None, on_event=note
    ) as pool:
        killed = kill_at_lease(pool, monkeypatch, victim)
        told.clear()
        if how == "invoke":
            answer = pool.invoke({"echo": 1})
        elif how == "invoke_bytes":
            answer = pool.invoke_bytes(b'{"echo": 1}').json()
        else:
            answer = asyncio.run(pool.invoke_async({"echo": 1}))
        assert answer[0] == 1
        assert answer[2] == 1
        assert killed
        stats = pool.stats()
        assert (stats["Calls"], stats["Invocations"], stats["Errors"]) == (1, 1, 0)
        assert ("retired", nsbox.Retirement.FAILURE) in told
        assert [reason for kind, reason in told if kind == "invoked"] == [""]


def test_a_death_before_a_program_is_started_is_nobodys_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    function = nsbox.Function(command=["/bin/cat"], timeout=30 * PATIENCE)
    with nsbox.WarmPool(function, provisioned=2, max_environments=2, freeze_after=None) as pool:
        killed = kill_at_lease(pool, monkeypatch, "init")
        assert pool.invoke({"echo": 1}) == {"echo": 1}
        assert killed
        assert pool.stats()["Errors"] == 0


def test_what_a_worker_has_got_is_not_sent_again(publish: Publish, slots: list[PoolSlot]) -> None:
    """It leaves in the middle: whether it has run is not known, and its caller is told so."""
    with nsbox.WarmPool(
        publish("keep"), provisioned=2, max_environments=2, freeze_after=None
    ) as pool:
        for env in pool.snapshot().environments:
            (worker,) = psutil.Process(env.pid).children()
            worker.suspend()  # the socket takes the event, and nobody reads it
        future = pool.submit({"echo": 1})
        wait_until(lambda: pool.stats()["ConcurrentExecutions"] == 1, "it is leased")
        (slot,) = (slot for slot in slots if slot.token)
        wait_until(lambda: is_sent(slot), "it is sent")
        os.kill(managed_of(slot).pid, signal.SIGKILL)
        with pytest.raises(nsbox.InvokeError):
            future.result()
        stats = pool.stats()
        assert (stats["Calls"], stats["Invocations"], stats["Errors"]) == (1, 1, 1)


def test_workers_that_leave_after_each_answer_cost_no_call(publish: Publish) -> None:
    """Nor do they keep one busy for ever: what was born for a call is its last environment."""
    with nsbox.WarmPool(publish("keep"), max_environments=1, freeze_after=None) as pool:
        for _ in range(4):
            assert pool.invoke({"attack": "leave"}) == "left"
            wait_until(lambda: not pool.snapshot().environments, "its end is seen")
        stats = pool.stats()
        assert (stats["Calls"], stats["Errors"], stats["Births"]) == (4, 0, 4)


@pytest.mark.parametrize(
    "what",
    [
        "frame(b'A', number, b'\"forged\"')",
        "frame(b'A', number + 1, b'\"forged\"')",
        "frame(b'A', 3, b'\"forged\"') * 3",
        "frame(b'A', int.from_bytes(os.urandom(8)), b'\"forged\"')",
        "frame(b'E', number, b'{}')",
        "frame(b'B', number, b'{}')",
        "frame(b'Y', number, b'e') + frame(b'A', number + 1, b'1')",
        "frame(b'X', number, b'0')",
        "frame(b'B', 0, bytes(1000))[:-1]",
    ],
)
def test_what_is_said_between_two_calls_is_no_answer_to_the_second(
    publish: Publish, slots: list[PoolSlot], what: str
) -> None:
    """No worker knows the number of an event that it has not got."""
    with nsbox.WarmPool(publish("keep"), max_environments=1, freeze_after=None) as pool:
        assert pool.invoke({"attack": "say", "what": what}) == "own"
        wait_until(lambda: hears(slots[0], select.POLLIN), "it is said")
        with pytest.raises(nsbox.EnvironmentDied, match="broke the rules"):
            pool.invoke({"echo": 2}, timeout=10 * PATIENCE)
        assert pool.invoke({"echo": 3})[2] == 3
        assert pool.stats()["Births"] == 2


@pytest.mark.parametrize("what", ["b'A'", "frame(b'A', number, b'')[:-1]"])
def test_a_part_of_an_answer_is_none(publish: Publish, slots: list[PoolSlot], what: str) -> None:
    """The rest of it never comes: that is silence, and after it the environment is killed."""
    with nsbox.WarmPool(publish("keep"), max_environments=1, freeze_after=None) as pool:
        assert pool.invoke({"attack": "say", "what": what}) == "own"
        wait_until(lambda: hears(slots[0], select.POLLIN), "it is said")
        with pytest.raises(nsbox.InvokeTimeout):
            pool.invoke({"echo": 2}, timeout=0.2 * PATIENCE)
        assert pool.invoke({"echo": 3})[2] == 3


def test_numbers_of_events_cannot_be_guessed(publish: Publish) -> None:
    with nsbox.WarmPool(publish("keep"), provisioned=1, max_environments=1) as pool:
        numbers = [int(pool.invoke({})[1]) for _ in range(40)]
    assert len({number >> 32 for number in numbers}) == len(numbers)
    assert len({b - a for a, b in itertools.pairwise(numbers)}) == len(numbers) - 1
    assert max(numbers) >= 1 << 63, "all 64 bits are drawn"
    assert min(numbers) < 1 << 63
