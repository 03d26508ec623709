# SPDX-License-Identifier: Apache-2.0
"""Deaths and failures in a pool at awkward moments, most of them found by the storm."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pool.conftest import managed_of
from tests.support import PATIENCE, wait_until

import nsbox
from nsbox.pool.manager import PoolSlot
from nsbox.pool.scheduler import Scheduler

pytestmark = pytest.mark.needs("userns")

Make = Callable[..., nsbox.FunctionVersion]


@pytest.mark.parametrize("when", ["created", "initialised"])
def test_an_end_before_the_event_is_sent_is_a_death(
    make: Make, slots: list[PoolSlot], when: str
) -> None:
    """The environment was alive when it was born for the call, and is dead when that begins."""
    killed: list[str] = []

    def kill(event: nsbox.PoolEvent) -> None:
        if event.kind == when and not killed:
            killed.append(event.environment)
            env = managed_of(slots[0])
            os.kill(env.pid, signal.SIGKILL)
            wait_until(lambda: env.state is nsbox.State.DEAD, "it is seen")

    with nsbox.WarmPool(make(), max_environments=1, on_event=kill) as pool:
        with pytest.raises(nsbox.EnvironmentDied, match="nothing of the call was run"):
            pool.invoke({})
        assert pool.invoke({"echo": 1})["echo"] == 1
        stats = pool.stats()
        assert (stats["Calls"], stats["Invocations"], stats["Errors"]) == (2, 2, 1)


def test_caller_and_watch_may_look_at_an_end_at_once(
    slots: list[PoolSlot], dispatch: Callable[[int], None]
) -> None:
    """A poll object of Python's refuses a second thread, which neither of the two expects."""
    with nsbox.WarmPool(max_environments=1) as pool:
        with pytest.raises(ZeroDivisionError), pool.acquire() as env:  # noqa: PT012 - destroys it
            death = slots[0].death
            assert death is not None
            looks = threading.Thread(target=death.poll, args=(30_000 * PATIENCE,))
            looks.start()

            def is_looking() -> bool:
                try:
                    death.poll(0)
                except RuntimeError:
                    return True
                return False

            wait_until(is_looking, "the thread is in poll")
            dispatch(slots[0].fd)
            os.kill(env.pid, signal.SIGKILL)
            looks.join()
            raise ZeroDivisionError
        with pool.acquire() as env:
            assert env.run(["true"]).ok


@pytest.fixture
def no_thread(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Have threads of that name not start, as when a process may have no more."""

    def refuse(name: str) -> list[str]:
        refused: list[str] = []
        start = threading.Thread.start

        def start_or_not(thread: threading.Thread) -> None:
            if thread.name == name and len(refused) < 2:
                refused.append(name)
                raise RuntimeError("can't start new thread")  # as the interpreter says it
            start(thread)

        monkeypatch.setattr(threading.Thread, "start", start_or_not)
        return refused

    return refuse


def test_a_pool_that_gets_no_thread_to_fill_it_tries_again(
    make: Make, no_thread: Callable[[str], list[str]]
) -> None:
    with nsbox.WarmPool(make(), provisioned=1, max_environments=1) as pool:
        refused = no_thread("nsbox-pool-fill")
        (first,) = pool.snapshot().environments
        os.kill(first.pid, signal.SIGKILL)

        def is_filled() -> bool:
            ids = {env.id for env in pool.snapshot().environments}
            return len(refused) == 2 and bool(ids - {first.id, ""})

        wait_until(is_filled, "another one is there")
        assert pool.invoke({"echo": 1})["echo"] == 1
        stats = pool.stats()
        assert (stats["Calls"], stats["Invocations"], stats["Errors"]) == (1, 1, 0)


def test_a_pool_that_gets_no_thread_of_its_own_is_made_when_there_is_one(
    no_thread: Callable[[str], list[str]],
) -> None:
    """And nothing of it is left before: the leak check looks."""
    refused = no_thread("nsbox-pool")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="new thread"):
            nsbox.WarmPool(provisioned=1, max_environments=1)
    assert len(refused) == 2
    with nsbox.WarmPool(provisioned=1, max_environments=1) as pool, pool.acquire() as env:
        assert env.run(["true"]).ok


def test_a_call_that_gets_no_thread_is_no_call(
    make: Make, no_thread: Callable[[str], list[str]]
) -> None:
    with nsbox.WarmPool(make(), max_environments=2) as pool:
        no_thread("nsbox-pool-call")
        for _ in range(2):
            with pytest.raises(RuntimeError, match="new thread"):
                pool.submit({})
        future = pool.submit({"echo": 1})
        assert future.result(30 * PATIENCE)["echo"] == 1
        assert pool.stats()["Calls"] == 1


def test_a_pool_goes_on_when_its_thread_meets_an_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with nsbox.WarmPool(provisioned=1, max_environments=1) as pool:
        # On the class: put back on the object, its method would keep it alive.
        died, sweep = Scheduler.died, Scheduler.sweep
        errors: list[str] = []

        def fail_once(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: object) -> Any:
                if name not in errors:
                    errors.append(name)
                    raise ZeroDivisionError(name)
                return function(*arguments)

            return call

        monkeypatch.setattr(Scheduler, "sweep", fail_once("sweep", sweep))
        pool.provision(1)  # its thread looks again
        wait_until(lambda: errors == ["sweep"], "it has met one")
        monkeypatch.setattr(Scheduler, "died", fail_once("died", died))
        (env,) = pool.snapshot().environments
        os.kill(env.pid, signal.SIGKILL)
        wait_until(lambda: errors == ["sweep", "died"], "it has met the second")
        with pool.acquire() as another:
            assert another.run(["true"]).ok
        assert [r.levelname for r in caplog.records if r.exc_info] == ["ERROR", "ERROR"]


def test_a_birth_that_gets_no_thread_gives_its_place_back(
    make: Make, no_thread: Callable[[str], list[str]]
) -> None:
    async def main() -> None:
        async with nsbox.AsyncWarmPool(make(), max_environments=1) as pool:
            no_thread("nsbox-pool-lease")
            for _ in range(2):
                with pytest.raises(RuntimeError, match="new thread"):
                    await pool.invoke({})
            assert (await pool.invoke({"echo": 1}))["echo"] == 1
            stats = pool.stats()
            assert (stats["Calls"], stats["Invocations"], stats["Errors"]) == (3, 3, 2)

    asyncio.run(main())


def test_a_start_that_fails_again_and_again_is_told_once(
    out: Path, slots: list[PoolSlot], caplog: pytest.LogCaptureFixture
) -> None:
    config = nsbox.Config(mounts=(nsbox.Mount.bind(out, "/data"),))
    with nsbox.WarmPool(config, provisioned=1, max_environments=1) as pool:
        with pool.acquire() as env:
            out.rmdir()  # no other can be born
            os.kill(env.pid, signal.SIGKILL)
        wait_until(lambda: slots[0].queue.breaker.pause() > 0, "three starts have failed")
        told = [r for r in caplog.records if "does not start" in r.getMessage()]
        assert len(told) == 1
        out.mkdir()
