# SPDX-License-Identifier: Apache-2.0
"""Deaths and failures in a pool at awkward moments, most of them found by the soak."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable

import pytest
from tests.support import PATIENCE, wait_until

import nsbox

pytestmark = pytest.mark.needs("userns")

Make = Callable[..., nsbox.FunctionVersion]


@pytest.mark.parametrize("when", ["created", "initialised"])
def test_an_end_before_the_event_is_sent_is_a_death(make: Make, when: str) -> None:
    """The environment was alive when it was born for the call, and is dead when that begins."""
    killed: list[str] = []

    def kill(event: nsbox.PoolEvent) -> None:
        if event.kind == when and not killed:
            killed.append(event.environment)
            (entry,) = pool._leases._entries
            env = entry.env
            assert env is not None
            os.kill(env.pid, signal.SIGKILL)
            wait_until(lambda: env.state is nsbox.State.DEAD, "it is seen")

    with nsbox.WarmPool(make(), max_environments=1, on_event=kill) as pool:
        with pytest.raises(nsbox.EnvironmentDied, match="nothing of the call was run"):
            pool.invoke({})
        assert pool.invoke({"echo": 1})["echo"] == 1
        stats = pool.stats()
        assert (stats["Calls"], stats["Invocations"], stats["Errors"]) == (2, 2, 1)


def test_caller_and_watch_may_look_at_an_end_at_once() -> None:
    """A poll object of Python's refuses a second thread, which neither of the two expects."""
    with nsbox.WarmPool(max_environments=1) as pool:
        with pytest.raises(ZeroDivisionError), pool.acquire() as env:  # noqa: PT012 - destroys it
            (entry,) = pool._leases._entries
            death = entry.death
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
            pool._house._on_ready(entry.fd)
            os.kill(env.pid, signal.SIGKILL)
            looks.join()
            raise ZeroDivisionError
        with pool.acquire() as env:
            assert env.run(["true"]).ok


def test_a_birth_that_gets_no_thread_gives_its_place_back(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")  # as the interpreter says it

    async def main() -> None:
        async with nsbox.AsyncWarmPool(make(), max_environments=1) as pool:
            with monkeypatch.context() as patch:
                patch.setattr(threading.Thread, "start", refuse)
                with pytest.raises(RuntimeError, match="new thread"):
                    await pool.invoke({})
            assert (await pool.invoke({"echo": 1}))["echo"] == 1
            stats = pool.stats()
            assert (stats["Calls"], stats["Invocations"], stats["Errors"]) == (2, 2, 1)

    asyncio.run(main())
