# SPDX-License-Identifier: Apache-2.0
"""Futures: `map` in order, `submit`, `cancel` and `shutdown` as those of an executor."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any

import pytest
from tests.support import PATIENCE, wait_until

import nsbox

pytestmark = pytest.mark.needs("userns")

Make = Callable[..., nsbox.FunctionVersion]

WAITING = 30 * PATIENCE


def occupy(pool: nsbox.WarmPool) -> Future[Any]:
    """Have a call that sleeps until it is killed, and return its future once it runs."""
    future = pool.submit({"sleep": 1000})
    wait_until(lambda: pool.stats()["ConcurrentExecutions"] == 1, "it runs", 20)
    assert future.running()
    return future


def test_map_answers_in_the_order_of_the_events(make: Make) -> None:
    with nsbox.WarmPool(make(), max_environments=3, acquire_timeout=None) as pool:
        events = ({"echo": n, "sleep": 0.02 * (n % 3 == 0)} for n in range(12))
        answers = pool.map(events, timeout=WAITING, tenant="a")
        assert [(a["echo"], a["tenant"]) for a in answers] == [(n, "a") for n in range(12)]
        assert list(pool.map([])) == []
        assert pool.stats()["Invocations"] == 12


def test_map_raises_in_its_place_and_cancels_the_rest(make: Make) -> None:
    with nsbox.WarmPool(make(), max_environments=1) as pool:
        answers = pool.map([{"echo": 1}, {"raise": 1}, {"sleep": 1000}, {"echo": 4}])
        assert next(answers)["echo"] == 1
        with pytest.raises(nsbox.FunctionError, match="asked for"):
            next(answers)
        assert list(answers) == []
        # The third may have begun; the last has not, and never does.
        pool.close(drain=False)
        assert pool.stats()["Calls"] <= 3


def test_map_gives_up_in_time(make: Make) -> None:
    with nsbox.WarmPool(make(), max_environments=1) as pool:
        answers = pool.map([{"sleep": 1000}, {"echo": 2}], timeout=0.01)
        with pytest.raises(TimeoutError):
            next(answers)
        with pytest.raises(nsbox.ConfigError, match="timeout"):
            pool.map([], timeout=-1)
        pool.close(drain=False)
        assert pool.stats()["Calls"] <= 1


def test_map_of_what_is_no_event_or_raises(make: Make) -> None:
    def broken() -> Iterator[object]:
        yield {"echo": 1}
        raise LookupError("no more")

    with nsbox.WarmPool(make(), max_environments=1) as pool:
        with pytest.raises(LookupError):
            pool.map(broken())
        answers = pool.map([{"echo": 1}, object()])
        assert next(answers)["echo"] == 1
        with pytest.raises(nsbox.ConfigError, match="no JSON value"):
            next(answers)


def test_a_future_can_be_cancelled_until_it_runs(make: Make) -> None:
    with nsbox.WarmPool(make(), max_environments=1) as pool:
        running = occupy(pool)
        waiting = [pool.submit({"echo": n}) for n in range(3)]
        assert waiting[1].cancel()
        assert not running.cancel()
        calls = pool.stats()["Calls"]
        assert calls == 1
        with pytest.raises(CancelledError):
            waiting[1].result()
        pool.close(drain=False)
        with pytest.raises(nsbox.PoolClosed):
            running.result()
        for future in (waiting[0], waiting[2]):
            with pytest.raises(nsbox.PoolClosed):
                future.result()


def test_shutdown_as_an_executors(make: Make) -> None:
    with nsbox.WarmPool(make(), max_environments=1) as pool:
        futures = [pool.submit({"echo": n}) for n in range(4)]
        pool.shutdown()
        assert [future.result(0)["echo"] for future in futures] == [0, 1, 2, 3]
        with pytest.raises(nsbox.PoolClosed):
            pool.submit({})
        with pytest.raises(nsbox.PoolClosed):
            pool.invoke({})
        pool.shutdown(cancel_futures=True)


def test_shutdown_that_waits_for_nothing(make: Make) -> None:
    pool = nsbox.WarmPool(make(), max_environments=1)
    first = pool.submit({"echo": 1, "sleep": 0.05})
    wait_until(first.running, "it runs", 20)
    others = [pool.submit({"echo": n}) for n in range(3)]
    pool.shutdown(wait=False, cancel_futures=True)
    assert all(future.cancelled() for future in others)
    with pytest.raises(nsbox.PoolClosed):
        pool.submit({})
    assert first.result(WAITING)["echo"] == 1
    pool.close()
    assert pool.stats()["Environments"] == 0


# -- asyncio -------------------------------------------------------------------------------------


def test_map_on_a_loop_takes_events_as_it_goes(make: Make) -> None:
    taken: list[int] = []

    async def events() -> AsyncIterator[object]:
        for n in range(1000):
            taken.append(n)
            yield {"echo": n}

    async def main() -> None:
        async with nsbox.AsyncWarmPool(make(), max_environments=2) as pool:
            answers = [answer["echo"] async for answer in pool.map({"echo": n} for n in range(9))]
            assert answers == list(range(9))
            found = []
            stream = pool.map(events(), tenant="a")
            async for answer in stream:
                found.append((answer["echo"], answer["tenant"]))
                if len(found) == 3:
                    break
            await stream.aclose()  # type: ignore[attr-defined]
            assert found == [(0, "a"), (1, "a"), (2, "a")]
            assert len(taken) <= 5
            with pytest.raises(nsbox.FunctionError):
                [_ async for _ in pool.map([{"echo": 1}, {"raise": 1}, {"sleep": 1000}])]
            assert (await pool.invoke({"echo": 7}))["echo"] == 7

    asyncio.run(main())


def test_acquire_on_a_loop() -> None:
    async def main() -> None:
        async with nsbox.AsyncWarmPool(max_environments=1) as pool:
            async with pool.acquire() as env:
                await asyncio.to_thread(env.write_file, "/tmp/x", b"kept")
                with pytest.raises(nsbox.PoolTimeout, match=r"0\.01 seconds"):
                    async with pool.acquire(timeout=0.01):
                        pass
            async with pool.acquire() as env:
                assert await asyncio.to_thread(env.read_file, "/tmp/x") == b"kept"
                first = env.id
            with pytest.raises(LookupError):
                async with pool.acquire():
                    raise LookupError
            async with pool.acquire() as env:
                assert env.id != first, "what its body raised leaves doubt"
            with pytest.raises(nsbox.PoolError, match="acquire"):
                await pool.invoke({})  # type: ignore[misc]

    asyncio.run(main())


def test_acquire_that_is_cancelled_gives_back() -> None:
    async def main() -> None:
        async with nsbox.AsyncWarmPool(max_environments=1) as pool:
            inside = asyncio.Event()

            async def hold() -> None:
                async with pool.acquire():
                    inside.set()
                    await asyncio.Event().wait()

            task = asyncio.ensure_future(hold())
            await inside.wait()
            waiting = asyncio.ensure_future(hold())
            await asyncio.to_thread(wait_until, lambda: pool.stats()["Waiting"] == 1, "waits", 20)
            waiting.cancel()
            task.cancel()
            await asyncio.gather(task, waiting, return_exceptions=True)
            async with pool.acquire() as env:
                assert env.state is nsbox.State.READY
            stats = pool.stats()
            assert (stats["ConcurrentExecutions"], stats["Throttles"]) == (0, 1)

    asyncio.run(main())


def test_threads_map_at_the_same_time(make: Make) -> None:
    with nsbox.WarmPool(make(), max_environments=2) as pool:
        found: dict[int, list[int]] = {}

        def body(start: int) -> None:
            events = ({"echo": n} for n in range(start, start + 10))
            found[start] = [answer["echo"] for answer in pool.map(events)]

        threads = [threading.Thread(target=body, args=(start,)) for start in (0, 100, 200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {start: list(range(start, start + 10)) for start in (0, 100, 200)}
