# SPDX-License-Identifier: Apache-2.0
"""A tenant that keeps the host waiting: calls of other tenants on the same event loop go on."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.support import PATIENCE, wait_until

import nsbox
from nsbox.supervisor.launcher import running_launcher

pytestmark = pytest.mark.needs("userns")

HOSTILE = """
import fcntl, os, signal, struct, time
def handler(event, context):
    if event == "own":  # a socket of the event's own, of reset
        return None
    if event == "header":
        os.write(3, struct.pack("!cIQ", b"A", 1000, 0)[:5])
    if event == "stop":
        if os.fork() == 0:
            time.sleep(0.02)
            os.kill(os.getppid(), signal.SIGSTOP)
            os._exit(0)
        return os.getpid()
    if event == "close":
        os.close(3)
    time.sleep(1000)
"""
LIMIT = 60 * PATIENCE
Publish = Callable[..., nsbox.FunctionVersion]
Call = Callable[[object, dict[str, bytes]], Awaitable[Any]]


@pytest.fixture(autouse=True)
def _let_go() -> Iterator[None]:
    """Have versions, which hold a lock in the store each, gone before leaks are looked for."""
    yield
    gc.collect()


@pytest.fixture
def publish(tmp_path: Path) -> Publish:
    def make(**options: Any) -> nsbox.FunctionVersion:
        (tmp_path / "app.py").write_text(HOSTILE)
        return nsbox.Function(
            "app.handler", code=tmp_path, timeout=LIMIT, init_timeout=LIMIT, **options
        ).publish()

    return make


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Call]:
    code = tmp_path / "victim"
    code.mkdir()
    (code / "app.py").write_text("def handler(event, context): return open('/tmp/a').read()")
    function = nsbox.Function("app.handler", code=code, timeout=LIMIT, init_timeout=LIMIT)
    with nsbox.ExecutionEnvironment(function.publish()) as env:
        assert env.invoke(0, files={"a": b"x"}) == "x"
        held = [env]  # pytest holds on to what is yielded
        yield lambda event, files: held[0].invoke_async(event, files=files)
        held.clear()
    del env


@contextlib.asynccontextmanager
async def held_up(attack: Any, victim: Call) -> AsyncIterator[None]:
    """Have `attack` waited for, and meanwhile the victim's calls made, with files and thus threads.

    The threads of the loop's own executor are few, and the host program's.
    """
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(1))
    task = asyncio.ensure_future(attack)
    await asyncio.sleep(0.05)  # it is under way
    for number in range(5):
        name = str(number).encode()
        assert await victim(number, {"a": name}) == name.decode()
    assert not task.done(), "the calls of others waited for it"
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):  # it was killed
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize("what", ["header", "stop", "close"])
def test_a_silent_guest_holds_up_no_other(publish: Publish, victim: Call, what: str) -> None:
    """Half a header; a large event for a worker that is stopped; a closed socket."""

    async def main(env: nsbox.ExecutionEnvironment) -> None:
        if what == "stop":
            worker = env.invoke(what)
            assert worker
            wait_until(lambda: is_stopped(env), "it is stopped")
        event = "x" * (1 << 20) if what == "stop" else what
        async with held_up(env.invoke_async(event), victim):
            pass

    with nsbox.ExecutionEnvironment(publish()) as env:
        env.init()
        asyncio.run(main(env))


def is_stopped(env: nsbox.ExecutionEnvironment) -> bool:
    children = Path(f"/proc/{env.pid}/task/{env.pid}/children").read_text().split()
    return any(") T " in Path(f"/proc/{child}/stat").read_text() for child in children)


def test_a_program_that_does_not_end_holds_up_no_other(victim: Call) -> None:
    version = nsbox.Function(command=["sleep", "1000"], timeout=LIMIT).publish()

    async def main(env: nsbox.ExecutionEnvironment) -> None:
        async with held_up(env.invoke_async({}), victim):
            pass

    with nsbox.ExecutionEnvironment(version) as env:
        asyncio.run(main(env))


@pytest.mark.parametrize("call", ["start", "reset"])
def test_a_pid_1_that_does_not_answer_holds_up_no_other(
    publish: Publish, victim: Call, call: str
) -> None:
    """Whatever slows it down; here it is stopped, at a start by exec and after a reset."""

    async def main(env: nsbox.ExecutionEnvironment) -> None:
        with stopped(env.pid):
            if call == "reset":
                await env.invoke_async("own")
            async with held_up(env.invoke_async("own"), victim):
                pass

    version = publish(start="exec") if call == "start" else publish(reuse="reset")
    with nsbox.ExecutionEnvironment(version) as env:
        if call == "reset":
            env.init()  # PID 1 has forked the worker
        asyncio.run(main(env))


@pytest.mark.parametrize("how", ["environment", "pool"])
def test_a_thaw_that_takes_long_holds_up_no_other(publish: Publish, victim: Call, how: str) -> None:
    """One that makes processes faster than they are thawed; here the launcher is stopped."""
    launcher = running_launcher()
    assert launcher is not None
    pid = launcher.pid

    async def main(attack: Callable[[object], Any]) -> None:
        with stopped(pid):
            async with held_up(attack("own"), victim):
                pass

    if how == "environment":
        with nsbox.ExecutionEnvironment(publish()) as env:
            assert env.invoke("own") is None
            env.freeze()
            asyncio.run(main(env.invoke_async))
        return
    events: list[str] = []
    with nsbox.WarmPool(
        publish(), freeze_after=0.01, on_event=lambda event: events.append(event.kind)
    ) as pool:
        assert pool.invoke("own") is None
        wait_until(lambda: "frozen" in events, "it is frozen")
        asyncio.run(main(pool.invoke_async))
